"""Folds the log a second time, into temporary tables, and compares them with the live ones: row by row.

The live tables are copied at one moment, with the place in the log up to which they were folded. The second fold goes
up to that place, so both must be equal, whatever the service does meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from kernel.app import App
from kernel.governance.pace import Pace, unpaced
from kernel.log.base import EventLog
from kernel.projector.parking import Batch
from kernel.projector.replay import RebuildProgress, Replay, reading
from kernel.projector.row_history import differs_since, row_steps
from kernel.projector.unknown import find_unknown
from projections.comparison import TableComparison
from projections.declaration import DeclaredProjection
from projections.errors import HandlerFailed, SchemaError
from projections.exclusions import plan_of
from projections.fold import Plan
from projections.shadow import Shadow, is_protected, open_shadow
from projections.unit_of_work import Writer


@dataclass(frozen=True, slots=True)
class Parking:
    """An aggregate at which the program fails.

    Attributes:
        sequence: place in its aggregate of the event from which on it is not folded.
        error: why.
        newer: nothing has failed: only a newer program can read the event.
    """

    aggregate: str
    aggregate_id: str
    sequence: int
    error: str
    newer: bool = False


@dataclass(frozen=True, slots=True)
class Verified:
    """What a second fold found out about one projection.

    Attributes:
        version: that the program declares.
        live_version: that readers see; 0 if it has not been built.
        generation: number of the live tables; 0 if there are none.
        sequence: stream sequence up to which both were folded.
        tables: the comparison of each table.
        parked: aggregates at which the program fails now, and did not when the live tables were folded.
    """

    projection: str
    version: int
    live_version: int
    generation: int
    events: int
    sequence: int
    seconds: float
    tables: list[TableComparison] = field(default_factory=list)
    parked: list[Parking] = field(default_factory=list)

    @property
    def differing(self) -> int:
        """Number of rows that differ."""
        return sum(table.differing for table in self.tables)


class Verification:
    """A comparison of the live tables with what the log leads to. It changes nothing, and a service may run meanwhile.

    Args:
        log: the app's log, such as `Client.log`.
        projections: of `App.projections`.
        same: the live tables must be of the versions that the program declares, and what was parked then is passed
            over. Otherwise the program is another one: see `eskernel rehearse`.
        unshown: numbers of generations that readers do not see yet, by projection, to be compared instead of the live
            ones. Nobody may write them meanwhile.
    """

    def __init__(
        self,
        app: App,
        log: EventLog,
        engine: Engine,
        projections: Sequence[DeclaredProjection],
        progress: Callable[[RebuildProgress], None] = lambda _: None,
        pace: Pace | None = None,
        same: bool = True,
        unshown: Mapping[str, int] | None = None,
    ) -> None:
        self._unshown = unshown
        self._app, self._log, self._engine, self._projections = app, log, engine, projections
        self._progress, self._pace, self._same = progress, pace or unpaced(), same

    async def run(self) -> list[Verified]:
        """Fold and compare.

        Raises:
            SchemaError: a projection has not been built, or with another version; a handler changes other tables too.
            LogError, sqlalchemy.exc.DBAPIError: the log or the database failed.
        """
        with ThreadPoolExecutor(1, "eskernel-verify") as pool:
            found = await self._verify(self._projections, pool)
            if found is not None:
                return found
            singly = [await self._verify([declared], pool) for declared in self._projections]
            return [verified for each in singly for verified in each or ()]

    async def _verify(
        self, projections: Sequence[DeclaredProjection], pool: ThreadPoolExecutor
    ) -> list[Verified] | None:
        """Verify projections with one pass over the log. None: they are not at the same place of it."""
        started = time.perf_counter()
        run_in_thread = partial(asyncio.get_running_loop().run_in_executor, pool)
        plan = Plan(list(self._app.types.values()), projections, self._engine.dialect, self._app.transient)
        if not self._same:
            await find_unknown(self._app, self._log)
        info = await self._log.info()
        end = dict.fromkeys(range(info.partitions), info.last)
        opening = run_in_thread(
            partial(
                open_shadow,
                self._engine,
                plan,
                self._app.projections,
                same=self._same,
                end=end,
                unshown=self._unshown,
            )
        )
        try:
            shadow = await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait([opening])
            if opening.exception() is None and (opened := opening.result()) is not None:
                opened.close()
            raise
        if shadow is None:
            return None
        try:
            parked_before = {(key, index) for key, waiting in plan.parked.items() for index in waiting}
            writer = Writer(self._engine, plan, shadow.made, epoch=0, alone=True)
            try:
                replay = await self._fold(shadow, writer, pool, started)
            except DBAPIError as error:
                if not is_protected(error):
                    raise
                raise SchemaError(
                    f"a handler changes more than its projection's own tables, and would do so now: {error.orig}. "
                    "Leave its projection out"
                ) from None
            verified = []
            for index, declared in enumerate(projections):
                tables = await run_in_thread(partial(shadow.compare, index, sequences=self._same))
                if declared.kind == "rows" and not declared.keyed:
                    await self._date(declared, plan, tables, shadow.until)
                parked = [
                    Parking(*key, waiting[index].since, waiting[index].error, waiting[index].waits)
                    for key, waiting in plan.parked.items()
                    if index in waiting and (key, index) not in parked_before
                ]
                live = shadow.live[index]
                seconds = time.perf_counter() - started
                at = min(replay.at, max(shadow.until.values(), default=0))  # it is read on to the end of a batch
                verified.append(
                    Verified(declared.name, declared.version, *live, replay.events, at, seconds, tables, parked)
                )
            return verified
        finally:
            await run_in_thread(shadow.close)

    async def _date(
        self, declared: DeclaredProjection, plan: Plan, tables: Sequence[TableComparison], until: Mapping[int, int]
    ) -> None:
        """Note in the differences of `Rows` since which event there are."""
        alone = plan_of(plan, declared.name)
        for table in tables:
            for place, difference in enumerate(table.examples):
                if difference.what == "extra" or len(difference.key) != 1:
                    continue  # it has no events, or the table's key was another one
                (aggregate_id,) = map(str, difference.key.values())
                address = self._log.subjects.address(declared.row_type, aggregate_id)
                stored = await self._log.read_subject(address.subject)
                folded = [commit for commit in stored if commit.sequence <= until[address.partition]]
                steps = row_steps(alone.apart(), (declared.row_type, aggregate_id), folded)
                table.examples[place] = replace(difference, since=differs_since(difference, steps))

    async def _fold(self, shadow: Shadow, writer: Writer, pool: ThreadPoolExecutor, started: float) -> Replay:
        info = await self._log.info()

        def ignore(failures: Sequence[HandlerFailed], batch: Batch) -> None:
            pass  # they are found in the plan at the end

        def progress(replay: Replay) -> None:
            seconds = time.perf_counter() - started
            self._progress(RebuildProgress(replay.commits, info.commits, replay.events, seconds))

        replay = Replay(self._log, writer, info.partitions, pool, self._pace, ignore, progress, None, shadow.connection)
        until: Mapping[int, int] = shadow.until
        last = min(max(until.values(), default=0), info.last)
        if last:
            async with reading(self._log) as reader:
                await replay.fill(reader, last, until)
        return replay
