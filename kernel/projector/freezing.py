"""SQL as of then: a projection is folded up to a moment into tables of its own, which never change afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from sqlalchemy import Engine

from aggregates import InvalidMessage
from aggregates.commit import decode
from kernel.app import App
from kernel.governance.pace import Pace, unpaced
from kernel.log.base import EventLog, Stored
from kernel.projector.parking import ParkingLog
from kernel.projector.replay import RebuildProgress, Replay, reading
from projections import freezing
from projections.declaration import DeclaredProjection
from projections.errors import SchemaError
from projections.fold import Plan
from projections.unit_of_work import Writer


@dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen table.

    Attributes:
        view: its name for queries.
        sequence: stream sequence up to which it was folded.
    """

    projection: str
    version: int
    generation: int
    view: str
    sequence: int
    events: int
    seconds: float


async def freeze(
    app: App,
    log: EventLog,
    engine: Engine,
    declared: DeclaredProjection,
    view: str,
    at: int | datetime,
    progress: Callable[[RebuildProgress], None] = lambda _: None,
    pace: Pace | None = None,
) -> Frozen:
    """Fold a projection up to a place of the log, and show the result under a name of its own.

    Args:
        view: the name.
        at: a stream sequence; or a time, which includes all that was decided until then. Without a zone it is UTC.

    Raises:
        SchemaError: the name is taken, the projection has several tables, or the log does not reach that far.
        LogError, sqlalchemy.exc.DBAPIError: nothing is shown.
    """
    started = time.perf_counter()
    info = await log.info()
    sequence = at if isinstance(at, int) else await _find(log, at, info.last)
    if not 0 < sequence <= info.last:
        place = f"sequence {at}" if isinstance(at, int) else at.isoformat(" ")
        raise SchemaError(f"the log goes from {info.first} to {info.last}; there is nothing to fold up to {place}")
    plan = Plan(list(app.types.values()), [declared], engine.dialect, app.transient)
    parkings = ParkingLog("while building", [declared])
    with ThreadPoolExecutor(1, "eskernel-freeze") as pool:
        run = partial(asyncio.get_running_loop().run_in_executor, pool)
        made = await run(partial(freezing.begin, engine, plan, app.projections, view, range(info.partitions)))
        writer = Writer(engine, plan, [made], epoch=0, alone=True)

        def report(replay: Replay) -> None:
            seconds = time.perf_counter() - started
            progress(RebuildProgress(min(replay.commits, sequence), sequence, replay.events, seconds))

        replay = Replay(log, writer, info.partitions, pool, pace or unpaced(), parkings.write, report)
        try:
            async with reading(log) as reader:
                await replay.fill(reader, sequence, dict.fromkeys(range(info.partitions), sequence))
            await run(partial(freezing.show, engine, made, view))
        except BaseException:
            await run(partial(freezing.give_up, engine, made))
            raise
    parkings.sum_up(at_once=True)
    seconds = time.perf_counter() - started
    return Frozen(declared.name, declared.version, made.number, view, sequence, replay.events, seconds)


async def _find(log: EventLog, at: datetime, last: int) -> int:
    """Return the stream sequence of the last commit that was decided at a time or before; 0 if there is none.

    Commits are in the order of their appends, and the times of decisions of two workers may differ by the difference of
    their clocks: where they are out of order, the place is one of those that the time may mean.
    """
    moment = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    low, high = 0, last
    while low < high:
        middle = (low + high + 1) // 2
        commit = await _commit_at(log, middle)
        if commit is not None and _time_of(commit) <= moment:
            low = commit.sequence
            if low >= high:
                break
        else:
            high = middle - 1
    return low


async def _commit_at(log: EventLog, sequence: int) -> Stored | None:
    """Return the first commit of the app from a stream sequence on."""
    reader = await log.read(sequence - 1)
    try:
        while True:
            batch = await reader.next(1, timeout=2.0)
            if not batch.commits:
                return None
            for stored in batch.commits:
                try:
                    decode(stored.payload)
                except InvalidMessage:
                    continue
                return stored
    finally:
        await reader.close()


def _time_of(stored: Stored) -> datetime:
    return datetime.fromisoformat(decode(stored.payload)[0].time)
