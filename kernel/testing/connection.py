"""A connection that leads nowhere: what is published reaches the listeners of the same process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernel.transport.connection import Listener, NatsConnection


class LocalConnection(NatsConnection):
    """Takes the frames that go to a server otherwise, and passes each message on at once."""

    def __init__(self, inbox_prefix: str) -> None:
        super().__init__()
        self._inbox_prefix = bytearray(inbox_prefix.encode())
        self._exactly: dict[bytes, Listener] = {}
        self._below: dict[bytes, Listener] = {}

    def send(self, frames: bytes) -> None:
        """Pass the messages of PUB frames on; what nobody listens to is dropped, as by a server."""
        at = 0
        while at < len(frames):
            start = frames.index(b"\r\n", at) + 2
            _, subject, reply, size = frames[at : start - 2].split(b" ")
            end = start + int(size)
            listener = self._exactly.get(subject) or self._below.get(subject[: subject.rfind(b".") + 1])
            if listener is not None:
                listener(subject, reply, frames[start:end], None)
            at = end + 2

    async def listen(
        self,
        subject: str,
        listener: Listener,
        queue: str = "",  # noqa: ARG002 - there is nobody to share with
        linger: float = 0.0,  # noqa: ARG002 - nothing is on its way
    ) -> Callable[[], Any]:
        """Have a listener called for a subject, or for all subjects one token below it with `.*` at its end."""
        listeners, key = self._exactly, subject.encode()
        if key.endswith(b".*"):
            listeners, key = self._below, key[:-1]
        listeners[key] = listener

        async def stop() -> None:
            listeners.pop(key, None)

        return stop

    async def close(self) -> None:
        """Pass nothing on any more."""
        self._exactly.clear()
        self._below.clear()
