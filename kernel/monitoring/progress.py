"""The readiness of appends and of projections: whether their work gets done, not what they report."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from kernel.governance.pace import Pace
from kernel.log import JetStreamLog
from kernel.monitoring.backlog import Level
from kernel.monitoring.detector import Detector
from kernel.monitoring.health import NotWorking
from kernel.projector.live import NO_PARTITIONS, RUNNING, STARTING, Projector

STALLED_S = 10.0
"""Work that waits for so long while none of it gets done makes the service not ready."""
WRITE_S = 10.0
"""A batch that takes longer to write is reported as stuck."""
QUIET_S = 30.0
"""A log that has refused a commit is taken for one that takes commits if none was asked for in so long."""


class Stall:
    """For how long work has been waiting and none of it got done. It reads no clock: the caller passes the time."""

    def __init__(self) -> None:
        self._done: object = None
        self._since: float | None = None

    def update(self, waiting: bool, done: object, now: float) -> float:
        """Add an observation, and return the seconds since the first of the latest equal ones.

        Args:
            waiting: whether work waits.
            done: changes whenever some of it gets done.
            now: seconds of a monotonic clock.
        """
        if not waiting:
            self._since = None
            return 0.0
        if self._since is None or done != self._done:
            self._done, self._since = done, now
        return now - self._since


def overdue(stalled: float) -> bool:
    """Return whether work has been standing still for too long."""
    return stalled >= STALLED_S


class AppendCheck:
    """Says whether the log takes commits."""

    def __init__(self, log: JetStreamLog, detector: Detector) -> None:
        self._log, self._detector = log, detector
        self._stall = Stall()
        self._explained = False

    def observe(self) -> float:
        """Return for how many seconds commits have been waiting while none was settled. Costs next to nothing."""
        appender = self._log.appender
        waiting = appender.waiting_for
        return min(waiting, self._stall.update(waiting > 0, appender.settled, time.monotonic()))

    async def check(self) -> str:
        """Raise `NotWorking` if commits are refused, or if some wait and none is acknowledged."""
        appender = self._log.appender
        now = time.perf_counter()
        waiting, stalled = appender.waiting_for, self.observe()
        if appender.refusal:
            cause = await self._log.explain_refusal()
            self._explained = self._explained or bool(cause)
            # the cause is gone, or no append has come for long: only a commit shows which
            over = not cause and not waiting and (self._explained or now - appender.refused_at > QUIET_S)
            if not over:
                raise NotWorking(f"{appender.refusal}; {cause}" if cause else appender.refusal)
            appender.take_back_refusal()
        self._explained = False
        if self._log.obstacle:
            raise NotWorking(self._log.obstacle)
        if overdue(stalled):
            cause = await self._log.explain_refusal() or "the log does not answer them"
            raise NotWorking(f"commits wait for {waiting:.0f} s and none was acknowledged for {stalled:.0f} s: {cause}")
        return f"taken; pressure {self._detector.pressure.level.name.lower()}"


class ProjectionCheck:
    """Says whether the projections go on.

    Args:
        held: returns the partitions that this worker holds.
        pace: of the live projection: while it has to wait for tokens it is slowed on purpose.
    """

    def __init__(
        self,
        projector: Projector,
        log: JetStreamLog,
        detector: Detector,
        held: Callable[[], Collection[int]],
        pace: Pace,
    ) -> None:
        self._projector, self._log, self._detector = projector, log, detector
        self._held, self._pace = held, pace
        self._stall = Stall()

    def observe(self) -> float:
        """Return for how many seconds commits have been waiting while none was written. Costs next to nothing."""
        progress, now = self._projector.progress, time.monotonic()
        begun = self._projector.state not in (STARTING, NO_PARTITIONS)
        waiting = bool(self._held()) and (not begun or (progress.behind > 0 and not self._slowed(now)))
        return self._stall.update(waiting, (progress.done, progress.projected), now)

    def _slowed(self, now: float) -> bool:
        return self._pace.bucket.wait(1.0, now) > 0

    async def check(self) -> str:
        """Raise `NotWorking` if they wait for something, or if commits wait and nothing is written."""
        projector = self._projector
        if not self._detector.backlog.projections:
            return "none"
        state, stalled = projector.state, self.observe()
        behind = projector.progress.behind if self._held() else 0
        if (writing := projector.committer.lasting) > WRITE_S:
            raise NotWorking(f"writing a batch for {writing:.0f} s; {behind} commits wait")
        if state not in (RUNNING, STARTING, NO_PARTITIONS):
            raise NotWorking(state)
        if stalled > STALLED_S:
            begun = state == RUNNING
            what = f"{behind} commits wait" if begun else f"{state}: the checkpoints are not read"
            raise NotWorking(f"{what}, and nothing was written for {stalled:.0f} s: {await self._explain()}")
        critical = [
            f"{projection.projection} is {round(projection.behind)} commits and {projection.age:.0f} s behind"
            for projection in self._detector.backlog.projections.values()
            if projection.level == Level.CRITICAL
        ]
        return "; ".join(["slowed by its limit" if behind and self._slowed(time.monotonic()) else state, *critical])

    async def _explain(self) -> str:
        projector = self._projector
        if projector.trouble:
            return f"it begins again after each failure; the last was: {projector.trouble}"
        if writing := projector.committer.lasting:
            return f"the database is at a batch for {writing:.0f} s"
        if projector.progress.behind > projector.progress.unread:
            return "the database does not give the rows that they change, or they take long to fold"
        return await self._log.explain_silence() or "the server delivers nothing"
