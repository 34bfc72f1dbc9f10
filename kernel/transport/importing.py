"""Sending many commands: a bounded number at once, in order for each aggregate, with the outcomes in order for all."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from typing import NamedTuple

from aggregates import EskernelError
from kernel.protocol import CommandMessage, Receipt

AHEAD = 4
"""For each command that may be in flight, so many are read whose outcomes have not been taken yet."""
PROGRESS_S = 0.1

Result = Receipt | EskernelError
Commands = Iterable[CommandMessage] | AsyncIterable[CommandMessage]


class Outcome(NamedTuple):
    """What became of a command of `Client.execute_many`.

    Attributes:
        command: as it was given.
        result: the receipt, or the error that `Client.execute` raises.
    """

    command: CommandMessage
    result: Receipt | EskernelError

    @property
    def receipt(self) -> Receipt:
        """The receipt. Reading it raises the error of a command that failed."""
        if isinstance(self.result, EskernelError):
            raise self.result
        return self.result

    @property
    def error(self) -> EskernelError | None:
        """The error of a command that failed, None of one that took effect."""
        return self.result if isinstance(self.result, EskernelError) else None


class _Slot(NamedTuple):
    """A command whose outcome has not been taken yet."""

    command: CommandMessage
    result: asyncio.Future[Result]


class _Load:
    """The commands that were read, and what is under way of them.

    Attributes:
        slots: of the commands whose outcomes have not been taken, in the order of the commands.
    """

    def __init__(self, send: Callable[[CommandMessage], Awaitable[Receipt]], in_flight: int) -> None:
        self._send, self._in_flight = send, in_flight
        self._loop = asyncio.get_running_loop()
        self.slots: deque[_Slot] = deque()
        self._lanes: dict[tuple[str, str], deque[_Slot]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._room, self._added = asyncio.Event(), asyncio.Event()

    async def take(self, reading: asyncio.Task[None]) -> Outcome | None:
        """Return the next outcome, None after the last one."""
        while not self.slots:
            if reading.done():
                reading.result()  # it raises what the commands' source has raised
                return None
            self._added.clear()
            reading.add_done_callback(self._end_of_reading)
            await self._added.wait()
            reading.remove_done_callback(self._end_of_reading)
        slot = self.slots[0]
        result = await slot.result
        self.slots.popleft()
        self._room.set()
        return Outcome(slot.command, result)

    def _end_of_reading(self, _: asyncio.Task[None]) -> None:
        self._added.set()

    async def read(self, commands: Commands) -> None:
        """Read the commands, no faster than there is room for them."""
        if isinstance(commands, AsyncIterable):
            async for command in commands:
                await self._add(command)
        else:
            for command in commands:
                await self._add(command)

    async def _add(self, command: CommandMessage) -> None:
        key = command.aggregate, command.id
        while len(self.slots) >= AHEAD * self._in_flight or (
            len(self._lanes) >= self._in_flight and key not in self._lanes
        ):
            self._room.clear()
            await self._room.wait()
        slot = _Slot(command, self._loop.create_future())
        self.slots.append(slot)
        self._added.set()
        lane = self._lanes.get(key)
        if lane is not None:
            lane.append(slot)
            return
        lane = self._lanes[key] = deque((slot,))
        task = self._loop.create_task(self._run(key, lane))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, key: tuple[str, str], lane: deque[_Slot]) -> None:
        """Send the commands of one aggregate, one after the other, until none is left."""
        while lane:
            slot = lane[0]
            result: Result
            try:
                result = await self._send(slot.command)
            except EskernelError as error:
                result = error
            except Exception as error:  # a bug, which must not look like an outcome
                slot.result.set_exception(error)
            if not slot.result.done():
                slot.result.set_result(result)
            lane.popleft()
        del self._lanes[key]
        self._room.set()

    async def stop(self, reading: asyncio.Task[None]) -> None:
        """End what is under way."""
        tasks = [reading, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for slot in self.slots:
            if not slot.result.cancel():
                slot.result.exception()  # asyncio complains of those that nobody looks at


async def send_many(
    send: Callable[[CommandMessage], Awaitable[Receipt]],
    commands: Commands,
    in_flight: int,
    progress: Callable[[int], None] | None,
    *,
    raise_errors: bool,
) -> AsyncGenerator[Outcome, None]:
    """Yield the outcomes of commands; see `Client.execute_many`."""
    load = _Load(send, in_flight)
    reading = asyncio.create_task(load.read(commands))
    done, told = 0, 0.0
    try:
        while (outcome := await load.take(reading)) is not None:
            if raise_errors and outcome.error is not None:
                raise outcome.error
            done += 1
            if progress is not None and (now := time.monotonic()) - told >= PROGRESS_S:
                told = now
                progress(done)
            yield outcome
        if progress is not None:
            progress(done)
    finally:
        await load.stop(reading)
