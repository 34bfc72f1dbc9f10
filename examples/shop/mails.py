"""What the customer hears of it: an effect that sends mails."""

import asyncio
import smtplib
from email.message import EmailMessage

from aggregates import Meta, reacts
from examples.shop.domain import Confirmed, Expired, Order, Shipment, Shipped
from kernel import Effect

SMTP_TIMEOUT_S = 10.0


class Mails(Effect, of=(Order, Shipment), timeout=15.0):
    """Sends a mail for each event that a customer wants to know of.

    Args:
        server: host and port of the mail server.
    """

    def __init__(self, server: str) -> None:
        self._host, _, port = server.rpartition(":")
        self._port = int(port)

    @reacts
    async def confirmed(self, event: Confirmed, meta: Meta) -> None:
        await self._send(event.email, f"Order {meta.aggregate_id}: thank you", meta)

    @reacts
    async def expired(self, event: Expired, meta: Meta) -> None:
        await self._send(event.email, f"Order {meta.aggregate_id}: not paid in time", meta)

    @reacts
    async def shipped(self, event: Shipped, meta: Meta) -> None:
        await self._send(event.email, f"Order {meta.aggregate_id}: on its way with {event.carrier}", meta)

    async def _send(self, to: str, subject: str, meta: Meta) -> None:
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = "shop@shop.example", to, subject
        # a mail that is sent again has the same id, by which it is known
        mail["Message-ID"] = f"<{meta.event_id}@shop.example>"
        mail.set_content("Your shop\n")
        await asyncio.to_thread(self._deliver, mail)

    def _deliver(self, mail: EmailMessage) -> None:
        with smtplib.SMTP(self._host, self._port, timeout=SMTP_TIMEOUT_S) as server:
            server.send_message(mail)
