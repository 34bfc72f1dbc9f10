"""Requests whose sender names a reply subject that is no inbox: they are dropped, counted, and logged."""

from __future__ import annotations

import logging

from kernel.log.repeats import Repeats
from kernel.telemetry.metrics import REPLIES_REFUSED
from kernel.transport.connection import Listener
from kernel.transport.inboxes import ReplyFilter

logger = logging.getLogger("eskernel.commands")
EVERY_S = 60.0
"""Between two log lines. A sender can cause one with each request."""


class ReplyGuard:
    """Keeps the service from publishing to a subject that a sender may not publish to himself.

    Attributes:
        allows: returns whether the service may answer to a reply subject that is not empty.
    """

    def __init__(self, replies: ReplyFilter) -> None:
        self.allows = replies.allows
        self._repeats = Repeats(EVERY_S)

    def refuse(self, subject: bytes, reply: bytes) -> None:
        """Count and log a request that is dropped."""
        REPLIES_REFUSED.inc()
        if (more := self._repeats.due("reply")) is not None:
            logger.warning(
                "a request on %.100r was dropped: its reply subject %.100r is not an inbox that the service answers to "
                "(connection.reply_prefixes)%s",
                subject.decode(errors="replace"), reply.decode(errors="replace"), more,
            )  # fmt: skip

    def guarded(self, listener: Listener) -> Listener:
        """Return a listener that gets only requests with an allowed reply subject, or with none."""

        def receive(subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
            if reply and not self.allows(reply):
                self.refuse(subject, reply)
            else:
                listener(subject, reply, payload, headers)

        return receive
