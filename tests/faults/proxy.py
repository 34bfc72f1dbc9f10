"""A network that can fail: a fixed address in front of the server which delays, swallows, cuts and refuses."""

from __future__ import annotations

import asyncio
from typing import Final

CHUNK: Final = 65_536


class Proxy:
    """Passes bytes between clients and a server that comes and goes.

    Attributes:
        delay: seconds that every byte takes in each direction.
        lose_requests, lose_answers: swallow what comes from clients, or from the server. Connections on which this
            was done are unusable: `cut` them before passing again.

    Args:
        port: where it listens.
        target: port of the server.
    """

    def __init__(self, port: int, target: int) -> None:
        self.port, self.target = port, target
        self.delay = 0.0
        self.lose_requests = self.lose_answers = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connected(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            behind, before = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            self._writers.discard(writer)
            return
        self._writers.add(before)
        await asyncio.gather(self._pass(reader, before, True), self._pass(behind, writer, False))
        self._writers -= {writer, before}

    async def _pass(self, source: asyncio.StreamReader, to: asyncio.StreamWriter, requests: bool) -> None:
        """Read and deliver in separate tasks, so that a delay adds latency but does not limit throughput."""
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = asyncio.create_task(self._deliver(line, to))
        loop = asyncio.get_running_loop()
        try:
            while data := await source.read(CHUNK):
                if not (self.lose_requests if requests else self.lose_answers):
                    line.put_nowait((loop.time() + self.delay, data))
        except OSError:
            pass
        finally:
            line.put_nowait((loop.time() + self.delay, b""))
            await delivering

    async def _deliver(self, line: asyncio.Queue[tuple[float, bytes]], to: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                at, data = await line.get()
                if (wait := at - loop.time()) > 0:
                    await asyncio.sleep(wait)
                if not data:
                    return
                to.write(data)
                await to.drain()
        except OSError:
            pass
        finally:
            to.close()

    def cut(self) -> None:
        """Reset every connection; new ones pass everything."""
        self.lose_requests = self.lose_answers = False
        for writer in list(self._writers):
            writer.transport.abort()

    async def refuse(self) -> None:
        """Reset every connection and take no new ones until `start`."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()

    async def heal(self) -> None:
        """Pass everything again, at once."""
        self.delay = 0.0
        if self.lose_requests or self.lose_answers:
            self.cut()
        if self._server is None:
            await self.start()

    async def stop(self) -> None:
        await self.refuse()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
