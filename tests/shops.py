"""An app that reacts: orders, payments, and what leads from one to the other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from datetime import timedelta

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import (
    After,
    Aggregate,
    Cancel,
    Meta,
    Policy,
    Reaction,
    Reactions,
    Refusal,
    Rejected,
    Send,
    applies,
    command,
    event,
    handles,
    reacts,
)
from kernel import App, Effect
from projections import Rows

MOST = 1_000
"""Cents of a payment; more is rejected."""
UNLUCKY = 13
"""A payment of so many cents fails."""


@event
class Placed:
    cents: int
    expires: float


@event
class Confirmed:
    pass


@event
class Refused:
    reason: str


@event
class Expired:
    pass


@event
class Requested:
    order: str
    cents: int


@event
class Paid:
    order: str


@command
class Place:
    cents: int = 500
    expires: float = 3600.0


@command
class Confirm:
    pass


@command
class Refuse:
    reason: str


@command
class Expire:
    pass


@command
class Request:
    order: str
    cents: int


@command
class Pay:
    pass


class Order(Aggregate):
    state: str = "new"

    @handles
    def place(self, command: Place) -> Placed:
        return Placed(command.cents, command.expires)

    @handles
    def confirm(self, command: Confirm) -> Confirmed:
        if self.state != "placed":
            raise Rejected(f"it is {self.state}")
        return Confirmed()

    @handles
    def refuse(self, command: Refuse) -> Refused:
        return Refused(command.reason)

    @handles
    def expire(self, command: Expire) -> Expired:
        if self.state != "placed":
            raise Rejected(f"it is {self.state}")
        return Expired()

    @applies
    def placed(self, event: Placed) -> None:
        self.state = "placed"

    @applies
    def confirmed(self, event: Confirmed) -> None:
        self.state = "confirmed"

    @applies
    def refused(self, event: Refused) -> None:
        self.state = "refused"

    @applies
    def expired(self, event: Expired) -> None:
        self.state = "expired"


class Payment(Aggregate):
    order: str = ""

    @handles
    def request(self, command: Request) -> Requested:
        if command.cents > MOST:
            raise Rejected("too much")
        if command.cents == UNLUCKY:
            raise ValueError("unlucky")
        return Requested(command.order, command.cents)

    @handles
    def pay(self, command: Pay) -> Paid:
        return Paid(self.order)

    @applies
    def requested(self, event: Requested) -> None:
        self.order = event.order

    @applies
    def paid(self, event: Paid) -> None:
        pass


class Fulfilment(Policy, of=(Order, Payment)):
    @reacts
    def placed(self, event: Placed, meta: Meta) -> Iterator[Reaction]:
        order = meta.aggregate_id
        yield Send(Payment, f"pay-{order}", Request(order, event.cents))
        yield After(timedelta(seconds=event.expires), Send(Order, order, Expire()), key=order)

    @reacts
    def paid(self, event: Paid) -> Iterator[Reaction]:
        yield Cancel(event.order)
        yield Send(Order, event.order, Confirm())

    def on_rejected(self, refusal: Refusal) -> Reactions:
        if isinstance(refusal.sent.command, Request):
            return Send(Order, refusal.sent.command.order, Refuse(refusal.reason))
        return None


class Mails(Effect, of=Order, timeout=60.0, concurrency=4):
    """Sends a mail for each confirmed order, to a list.

    Attributes:
        sent: event id and order of each, as often as it was tried with success.
        tried: the orders, as often as they were tried.
        failing: orders for which the mail server says no.
        blocked: set it to let the mails of an order go that otherwise hang.
    """

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.tried: list[str] = []
        self.failing: set[str] = set()
        self.blocked: dict[str, asyncio.Event] = {}

    @reacts
    async def confirmed(self, event: Confirmed, meta: Meta) -> None:
        await self._send(meta)

    @reacts
    async def refused(self, event: Refused, meta: Meta) -> None:
        await self._send(meta)

    async def _send(self, meta: Meta) -> None:
        order = meta.aggregate_id
        self.tried.append(order)
        if order in self.blocked:
            await self.blocked[order].wait()
        if order in self.failing:
            raise ConnectionError("the mail server says no")
        self.sent.append((meta.event_id, order))


class Base(DeclarativeBase):
    pass


class OrderRow(Base):
    __tablename__ = "orders"
    id: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(default="new")


class Orders(Rows[OrderRow], of=Order):
    @applies
    def placed(self, row: OrderRow, event: Placed) -> None:
        row.state = "placed"

    @applies
    def ended(self, row: OrderRow, event: Confirmed | Refused | Expired) -> None:
        row.state = type(event).__name__.lower()


def shop(
    name: str, *, policies: Sequence[type[Policy]] = (Fulfilment,), effects: Sequence[Effect] = (), orders: bool = True
) -> App:
    """Return a new app.

    Args:
        orders: with a projection.
    """
    projections = [Orders] if orders else []
    return App(name, aggregates=[Order, Payment], projections=projections, policies=policies, effects=effects)
