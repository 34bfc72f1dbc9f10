"""Messages that leave together: what is published in one turn of the event loop goes to the socket in one piece."""

from __future__ import annotations

import asyncio
from typing import Protocol

from kernel.transport.connection import publish_frame

CERTAIN = 500
"""Bytes of a message, its subjects included, that every server takes with which an app can work."""


class FrameSender(Protocol):
    """What takes protocol frames: a `NatsConnection`."""

    def send(self, frames: bytes) -> None:
        """Queue frames for the socket."""

    def fits(self, subject: bytes, payload: bytes, reply: bytes = b"", /) -> bool:
        """Return whether the server takes a message."""


class Outbox:
    """Collects the frames of one turn of the event loop and sends them at its end."""

    def __init__(self, connection: FrameSender) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._frames: list[bytes] = []

    def publish(self, subject: bytes, payload: bytes, *, reply: bytes = b"") -> bool:
        """Publish a message; answers to it go to the subject `reply`. Never waits.

        While the connection is down the message waits, and goes out after the reconnect. Return False, and send
        nothing, if the message is larger than the server takes: the server would close the connection.
        """
        if len(payload) + len(subject) + len(reply) > CERTAIN and not self._connection.fits(subject, payload, reply):
            return False
        if not self._frames:
            self._loop.call_soon(self._send)
        self._frames.append(publish_frame(subject, payload, reply=reply))
        return True

    def _send(self) -> None:
        frames, self._frames = self._frames, []
        self._connection.send(b"".join(frames))
