"""Reacting from one claim of the partitions until it ends: read, do what is owed, move the checkpoints.

Events of one aggregate are worked off in order, those of different aggregates side by side. The checkpoint of a
partition passes events in order, when they have an outcome: one that takes its time holds up its partition's checkpoint
alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import takewhile
from typing import Any

from aggregates import EskernelError, InvalidId, InvalidMessage
from aggregates.commit import decode
from aggregates.errors import NewerEvent
from aggregates.reacting import DeclaredReaction
from kernel.effect import Effect
from kernel.log.base import CommitBatch, LogReader, Stored
from kernel.log.subjects import Address
from kernel.reactions import store
from kernel.reactions.context import ReactorContext
from kernel.reactions.firing import TimerFiring
from kernel.reactions.letters import BEHIND, Job, LetterRetries, Parking, next_attempt
from kernel.reactions.store import NUMBER, Claimed, ReactionWrite
from kernel.reactions.work import EffectWorker, Failed, PolicyWorker, Task, Worker
from kernel.telemetry.metrics import REACTED
from projections.parked import Key
from projections.unit_of_work import one_line

logger = logging.getLogger("eskernel.reactions")
READ = 500
"""Commits of one read."""
AHEAD = 8
"""Events of so many times the aggregates that may be worked on at once are read ahead."""
QUEUED = 10_000
"""Events at most that are read ahead, however few aggregates they are of."""
PATIENCE_S = 10.0
"""Timers that were due before wait so long for events that don't get on."""
UNWRITTEN = 20_000
"""Marks at most behind what is not done."""
LOOK_S = 0.01
"""While it waits for what is under way, it looks so often."""
QUIET_S = 2.0
"""After so long the checkpoints of partitions without news are moved up."""


@dataclass(slots=True)
class _Mark:
    """A place in a partition that its checkpoint passes when what was read up to there is done.

    Attributes:
        last: stream sequence.
        appended: when the first commit of it was appended, in Unix time.
        left: events without an outcome.
        parked: aggregates that it has dead letters of.
    """

    last: int
    appended: float
    left: int = 0
    letters: list[dict[str, Any]] = field(default_factory=list)
    parked: Counter[Key] = field(default_factory=Counter)


class Session:
    """One claim of some partitions for a policy or an effect, and the work on them.

    Attributes:
        behind: commits that the log has beyond what was read.
    """

    def __init__(self, context: ReactorContext, declared: DeclaredReaction, claimed: Claimed) -> None:
        self._context, self._declared = context, declared
        self._epoch, self._positions = claimed.epoch, dict(claimed.positions)
        self._read_to = min(self._positions.values(), default=0)
        self._parking = Parking(claimed.parked, claimed.waiting)
        self._chains: dict[Key, deque[Job]] = {}
        self._marks: dict[int, deque[_Mark]] = {partition: deque() for partition in claimed.positions}
        self._under_way = self._unwritten = 0
        self._ready: set[int] = set()
        self._finished, self._room, self._progress = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: list[BaseException] = []
        self._timers: list[dict[str, Any]] = []
        self._outcomes: Counter[str] = Counter()
        self.behind = 0
        policies, instance = context.settings.policies, declared.instance
        at_once = instance.concurrency if isinstance(instance, Effect) else policies.in_flight
        self._slots = asyncio.Semaphore(at_once)
        self._ahead = at_once * AHEAD
        self._worker: Worker
        self._firing: TimerFiring | None = None
        if isinstance(instance, Effect):
            self._worker = EffectWorker(context.app, declared)
        else:
            worker = PolicyWorker(
                context.app, declared, context.send, claimed.rejected, self._record_rejection, policies.depth
            )
            self._worker = worker
            self._firing = TimerFiring(context, declared.name, worker, claimed, self._slots)
        self._retries = LetterRetries(context, declared, self._worker, self._parking, self._queue, self._slots)

    async def _record_rejection(self, row: dict[str, Any]) -> None:
        await self._context.run(partial(store.record_rejection, self._context.engine, self._epoch, row))

    async def run(self, interrupted: asyncio.Event, grace: float) -> None:
        """React until interrupted; then wait up to `grace` seconds for what is under way, and write it.

        Raises:
            projections.Fenced: the partitions have another owner, or a person has paused or changed something.
            LogError, sqlalchemy.exc.DBAPIError: the log or the database failed.
        """
        reader = await self._context.log.read(self._read_to)
        feeding = asyncio.create_task(self._feed(reader))
        working = [
            asyncio.create_task(self._write_batches()),
            asyncio.create_task(self._retries.run(self._positions, self._epoch)),
        ]
        if self._firing is not None:
            last = (await self._context.log.info()).last
            working.append(asyncio.create_task(self._firing.run(partial(self._catch_up, last))))
        stopping: asyncio.Task[Any] = asyncio.create_task(interrupted.wait())
        try:
            await asyncio.wait({feeding, *working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            feeding.cancel()
            if stopping.done():
                await self._drain(working, grace)
            for task in (feeding, *working):
                if task.done() and not task.cancelled():
                    task.result()
        finally:
            everything = [feeding, stopping, *working, *self._tasks]
            for task in everything:
                task.cancel()
            _, stuck = await asyncio.wait(everything, timeout=PATIENCE_S)
            if stuck:
                logger.error("%s: %d handlers did not end when they were cancelled", self._declared.name, len(stuck))
            for task in everything:
                if task.done() and not task.cancelled():
                    task.exception()  # what nobody asks for would be logged
            await reader.close()

    async def _catch_up(self, last: int) -> None:
        """Wait until what the log held at the beginning is written: it may cancel timers that are due by now.

        What doesn't get on does not hold up the timers.
        """
        with suppress(TimeoutError):
            while self._read_to < last:
                self._progress.clear()
                async with asyncio.timeout(PATIENCE_S):
                    await self._progress.wait()
            async with asyncio.timeout(PATIENCE_S):
                while any(marks and marks[0].last <= last for marks in self._marks.values()):
                    self._progress.clear()
                    await self._progress.wait()

    async def _drain(self, working: list[asyncio.Task[None]], grace: float) -> None:
        """Wait until everything that was read is written, but no longer than that."""
        try:
            async with asyncio.timeout(grace):
                while self._unwritten and not any(task.done() for task in working):
                    await asyncio.wait(working, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            logger.info("%s: what is under way is done again by the next owner", self._declared.name)

    @property
    def idle(self) -> bool:
        """Whether everything that was read has an outcome, and no timer is due."""
        return not (self._unwritten or self._chains or self.behind or (self._firing and self._firing.is_due()))

    def wake(self) -> None:
        """Look at the clock now: it was set."""
        if self._firing is not None:
            self._firing.wake()

    @property
    def read_to(self) -> int:
        """Stream sequence up to which the log was read."""
        return self._read_to

    @property
    def oldest(self) -> float:
        """When the first commit was appended that is not done, in Unix time; 0 if all are."""
        return min((marks[0].appended for marks in self._marks.values() if marks), default=0.0)

    # reading

    async def _feed(self, reader: LogReader) -> None:
        moved = time.monotonic()
        while True:
            while len(self._chains) >= self._ahead or self._under_way >= QUEUED or self._unwritten >= UNWRITTEN:
                self._room.clear()
                await self._room.wait()
            read = await reader.next(READ, QUIET_S)
            if read.commits:
                self._take(read)
                await asyncio.sleep(0)
            if not read.commits or time.monotonic() - moved > QUIET_S:
                moved = time.monotonic()
                # nothing before this place is left to be read
                for partition, marks in self._marks.items():
                    if self._positions[partition] < self._read_to and not marks:
                        self._add(_Mark(self._read_to, self._context.now()), partition)

    def _take(self, read: CommitBatch) -> None:
        appended = read.oldest or self._context.now()
        marks: dict[int, _Mark] = {}
        passed = 0
        for stored in read.commits:
            try:
                passed += self._take_commit(stored, marks, appended)
            except (InvalidId, InvalidMessage):
                continue  # no commit of this app: the projections put such messages into quarantine
        if passed:
            REACTED.labels(reaction=self._declared.name, outcome="nothing").inc(passed)
        for partition, mark in marks.items():
            self._add(mark, partition)
        self.behind = read.pending
        self._read_to = read.commits[-1].sequence
        self._progress.set()

    def _add(self, mark: _Mark, partition: int) -> None:
        self._marks[partition].append(mark)
        self._unwritten += 1
        if not mark.left:
            self._finish(partition)

    def _finish(self, partition: int) -> None:
        self._ready.add(partition)
        self._finished.set()

    def _take_commit(self, stored: Stored, marks: dict[int, _Mark], appended: float) -> int:
        """Have the events of a commit worked on; return of how many nothing follows."""
        address: Address = self._context.log.subjects.parse(stored.subject)
        handlers = self._declared.handlers.get(address.aggregate)
        partition = address.partition
        if handlers is None or self._positions.get(partition, stored.sequence) >= stored.sequence:
            return 0
        known = self._declared.types[address.aggregate].events
        mark = marks.setdefault(partition, _Mark(stored.sequence, appended))
        mark.last = stored.sequence
        passed = 0
        for number, envelope in enumerate(decode(stored.payload), 1):
            handler = handlers.get(envelope.type)
            if handler is None and envelope.type in known:
                continue
            task = Task(address, stored.sequence, number, envelope, handler)
            owes = self._worker.prepare(task)
            if owes or task.key in self._parking.parked or task.key in self._chains:
                mark.left += 1
                self._under_way += 1
                self._queue(task.key, partial(self._work_on, task, stored, mark))
            else:
                passed += 1
        return passed

    def _queue(self, key: Key, job: Job) -> None:
        chain = self._chains.get(key)
        if chain is not None:
            chain.append(job)
            return
        self._chains[key] = deque([job])
        working = asyncio.create_task(self._work_off(key))
        self._tasks.add(working)
        working.add_done_callback(self._note_end)

    async def _work_off(self, key: Key) -> None:
        chain = self._chains[key]
        while chain:
            await chain[0]()
            chain.popleft()
        del self._chains[key]
        self._room.set()

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failures.append(error)
            self._finished.set()

    # one event

    async def _work_on(self, task: Task, stored: Stored, mark: _Mark) -> None:
        if task.key in self._parking.parked:
            outcome = "waits"
            self._put_behind(task, stored, mark)
        else:
            outcome = await self._perform(task, stored, mark)
        self._outcomes[outcome] += 1
        mark.left -= 1
        self._under_way -= 1
        if task.timers:
            # another event of the mark may take its time, and they may be due before
            self._timers += task.timers
            self._finished.set()
        if not mark.left:
            self._finish(task.address.partition)

    async def _perform(self, task: Task, stored: Stored, mark: _Mark) -> str:
        try:
            async with self._slots:
                await self._worker.perform(task)
        except NewerEvent as error:
            self._parking.waiting.add(task.key)
            self._parking.parked.add(task.key)
            self._put_behind(task, stored, mark, str(error))
            return "waits"
        except Failed as failure:
            address, cause = task.address, failure.__cause__
            logger.warning(
                "%s could not react to event %d of %s %s: %s",
                self._declared.name, task.envelope.sequence, address.aggregate, address.id, failure,
                # of the app's own code; what was answered needs none
                exc_info=None if isinstance(cause, EskernelError | TimeoutError) else cause,
            )  # fmt: skip
            self._parking.parked.add(task.key)
            settings = self._context.settings.dead_letters
            again = next_attempt(settings, 1, self._context.now()) if failure.transient else None
            self._put_behind(task, stored, mark, str(failure), again)
            task.timers.clear()
            return "failed"
        return "ok"

    def _put_behind(
        self, task: Task, stored: Stored, mark: _Mark, error: str = BEHIND, again: float | None = None
    ) -> None:
        """Make an event a dead letter: the first one of its aggregate, or one that waits behind it."""
        mark.parked[task.key] += 1
        self._parking.unwritten[task.key] += 1
        mark.letters.append(
            {
                "projection": self._declared.name,
                "generation": NUMBER,
                "partition": task.address.partition,
                "aggregate": task.address.aggregate,
                "aggregate_id": task.address.id,
                "stream_sequence": task.stream_sequence,
                "sequence": task.envelope.sequence,
                "payload": stored.payload,
                "error": one_line(error),
                "failed": datetime.now(UTC).isoformat(timespec="seconds"),
                "attempts": 0 if task.key in self._parking.waiting else 1,
                "next_attempt": again,
            }
        )

    # writing

    async def _write_batches(self) -> None:
        while True:
            await self._finished.wait()
            self._finished.clear()
            if self._failures:
                raise self._failures[0]
            ready, self._ready = self._ready, set()
            done = {
                partition: found
                for partition in ready
                if (found := list(takewhile(lambda mark: not mark.left, self._marks[partition])))
            }
            if done or self._timers:
                await self._write(done)

    async def _write(self, done: dict[int, list[_Mark]]) -> None:
        name, marks = self._declared.name, [mark for found in done.values() for mark in found]
        steps = {partition: found[-1].last for partition, found in done.items()}
        written = ReactionWrite(
            [
                (name, NUMBER, partition, self._positions[partition], last)
                for partition, last in steps.items()
                if last > self._positions[partition]
            ],
            [letter for mark in marks for letter in mark.letters],
            self._timers,
        )
        self._timers = []
        if written.moves or written.timers:
            await self._context.write(partial(store.write, self._context.engine, name, self._epoch, written))
        outcomes, self._outcomes = self._outcomes, Counter()
        for outcome, count in outcomes.items():
            REACTED.labels(reaction=name, outcome=outcome).inc(count)
        self._positions |= steps
        for partition, found in done.items():
            for _ in found:  # not before: until then they count as under way
                self._marks[partition].popleft()
        self._unwritten -= len(marks)
        for mark in marks:
            self._parking.unwritten.subtract(mark.parked)
        if self._firing is not None:
            self._firing.note(written.timers)
        self._parking.written.set()
        self._progress.set()
        self._room.set()
