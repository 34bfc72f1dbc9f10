"""Finds out what a server takes, where it takes less than it announces.

A server announces the largest payload, but an account or a user may have a lower limit, and no server announces the
longest control line. Who exceeds one of them loses the connection, and with it all that was under way. So after the
first such loss the limit is measured, on connections made for that, and everything larger is refused before it is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from nats.errors import Error as NatsError

from kernel.transport.connection import (
    CONTROL_LINE_REST,
    MAX_CONTROL_LINE,
    PAYLOAD,
    NatsConnection,
    publish_frame,
)

logger = logging.getLogger("eskernel.transport")
ANSWER_S = 2.0
"""Time limit in seconds for one attempt."""
_QUIET = {"name": "eskernel measuring", "allow_reconnect": False, "max_reconnect_attempts": 0}


class _Trial(NatsConnection):
    """A connection for one message, which may be the one that the server closes it for."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = asyncio.Event()

    async def _process_err(self, err_msg: str) -> None:
        await super()._process_err(err_msg)
        if self.violation:
            self.refused.set()

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        # the server's reason is often lost, because the client was still sending
        self.refused.set()
        await super()._close(status, do_cbs)


def measuring(connection: NatsConnection, options: dict[str, Any]) -> Callable[[str, int], Awaitable[None]]:
    """Return a function that measures a limit and notes it at the connection. It raises as connecting does.

    Args:
        options: nats-py's options of the connection.
    """

    async def measure(violation: str, size: int) -> None:
        announced = connection.max_payload
        trial = await _connect(connection, options)
        present = trial.max_payload
        await trial.close()
        if violation == PAYLOAD:
            if present < announced:
                return  # it has been lowered; the next connection learns that by itself
            if (most := await _bisect(size, lambda size: _takes(connection, options, b"", size))) == size:
                return
            connection.limit_payload(most)
            logger.warning(
                "the server announces a largest message of %d bytes and takes %d: the limit of an account or a user",
                present,
                most,
            )
        else:
            most = await _bisect(
                MAX_CONTROL_LINE, lambda size: _takes(connection, options, b"x" * max(1, size - CONTROL_LINE_REST), 0)
            )
            connection.max_control_line = most
            logger.warning("the server takes control lines of at most %d bytes (max_control_line)", most)

    return measure


async def _bisect(largest: int, takes: Callable[[int], Awaitable[bool]]) -> int:
    """Return the largest size that is taken, at most `largest`."""
    if await takes(largest):
        return largest
    low, high = 0, largest
    while high - low > max(1, high // 256):
        middle = (low + high) // 2
        if await takes(middle):
            low = middle
        else:
            high = middle
    if not low:
        raise NatsError("nats: the server takes nothing at all")
    return low


async def _takes(connection: NatsConnection, options: dict[str, Any], subject: bytes, size: int) -> bool:
    trial = await _connect(connection, options)
    try:
        # nothing subscribes to it
        inbox = trial.new_inbox().encode()
        trial.send(publish_frame(inbox + b"." + subject if subject else inbox, b"0" * size))
        refused = asyncio.ensure_future(trial.refused.wait())
        answered = asyncio.ensure_future(trial.flush(round(ANSWER_S)))
        try:
            await asyncio.wait({refused, answered}, timeout=ANSWER_S, return_when=asyncio.FIRST_COMPLETED)
            if trial.refused.is_set():
                return False
            if answered.done() and answered.exception() is None:
                return True
        finally:
            for waiting in (refused, answered):
                waiting.cancel()
            await asyncio.wait({refused, answered})
        raise NatsError("nats: the server does not say whether it takes a message")
    finally:
        await trial.close()


async def _connect(connection: NatsConnection, options: dict[str, Any]) -> _Trial:
    trial = _Trial()

    async def ignore(_problem: Exception) -> None:
        pass

    server = connection._current_server  # where the connection was made to
    assert server is not None, "only a connection that was made is lost"
    await trial.connect([server.uri.geturl()], **{**options, **_QUIET, "error_cb": ignore})
    return trial
