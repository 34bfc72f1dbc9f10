"""What the log says of events that could not be folded."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from kernel.log.base import Stored
from kernel.log.subjects import Subjects
from kernel.projector.grouping import Commits
from kernel.telemetry.logging import about
from projections.dead_letters import Retried
from projections.declaration import DeclaredProjection
from projections.errors import HandlerFailed
from projections.parked import Letter

logger = logging.getLogger("eskernel.projector")

Batch = Callable[[], Iterable[tuple[tuple[str, str], Commits]]]

WHOLE = 10
"""Aggregates of one cause that have a line of their own within `EVERY_S`. The others are counted."""
EVERY_S = 60.0
SUM_S = 10.0
"""Least seconds between two lines that say how many were counted."""


@dataclass(slots=True)
class _Cause:
    """Why aggregates are parked for one projection.

    Attributes:
        began: start of the minute in which lines are counted.
        written: lines in it.
        counted: aggregates that no line has named.
        summed: when the last sum was written.
        example: the last of them.
    """

    began: float
    written: int = 0
    counted: int = 0
    summed: float = float("-inf")
    example: str = ""


class ParkingLog:
    """Writes an error line for each parked aggregate, or for many of them one line with their number.

    Args:
        when: `for` projections that are live, `while building` others.
        projections: in the plan's order.
    """

    def __init__(
        self,
        when: Literal["for", "while building"],
        projections: Sequence[DeclaredProjection],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._when, self._clock = when, clock
        self._names = [declared.name for declared in projections]
        self._causes: dict[tuple[str, str, str], _Cause] = {}

    def write(self, failures: Sequence[HandlerFailed], batch: Batch) -> None:
        """Write lines with the ids of the events, and of the commands that led to them.

        Args:
            batch: returns the commits by aggregate type and id, among which the events are found.
        """
        if not failures:
            return
        now = self._clock()
        whole: list[tuple[HandlerFailed, str]] = []
        for failure in failures:
            name = self._names[failure.projection] if failure.projection >= 0 else "every projection"
            key = name, failure.kind, type(failure.__cause__).__name__
            cause = self._causes.get(key)
            if cause is None or (now - cause.began >= EVERY_S and not cause.counted):
                cause = self._causes[key] = _Cause(now)
            if cause.written < WHOLE:
                cause.written += 1
                whole.append((failure, name))
            else:
                cause.counted += 1
                cause.example = str(failure)
        if whole:
            wanted = {failure.aggregate for failure, _ in whole}
            commits = {key: own for key, own in batch() if key in wanted}
            for failure, name in whole:
                self._write(failure, name, commits.get(failure.aggregate, []))
        self.sum_up()

    def _write(self, failure: HandlerFailed, name: str, commits: Commits) -> None:
        event = next((event for _, events in commits for event in events if event.sequence == failure.sequence), None)
        fields = about(
            *failure.aggregate,
            projection=name,
            reason=failure.kind,
            sequence=failure.sequence or None,
            command_id=event and event.commandid,
            correlation_id=event and event.correlation_id,
            causation_id=event and event.causation_id,
            traceparent=event and event.traceparent,
            actor=event and event.actor,
            tenant=event and event.tenant,
        )
        # of the app's own code the traceback helps; of the database's it is long, and holds what was written
        cause = failure.__cause__ if failure.kind == "handler" else None
        logger.error("parked %s %s: %s", self._when, name, failure, exc_info=cause, extra=fields)

    def sum_up(self, *, at_once: bool = False) -> None:
        """Write how many aggregates no line has named, if the last such line is old enough.

        Args:
            at_once: however old it is.
        """
        now = self._clock()
        for (name, kind, _), cause in self._causes.items():
            if cause.counted and (at_once or now - cause.summed >= SUM_S):
                logger.error(
                    "parked %s %s: %d aggregates more, for reasons of the same kind, such as %s",
                    self._when, name, cause.counted, cause.example,
                    extra={"projection": name, "reason": kind},
                )  # fmt: skip
                cause.counted, cause.summed = 0, now


def log_resumed(done: Sequence[Retried]) -> None:
    """Write what became of the aggregates that had waited for this program."""
    if going_on := sum(not resumed.left for resumed in done):
        logger.info("%d aggregates that waited for this program go on", going_on)
    parked = [resumed for resumed in done if resumed.left and not resumed.newer]
    for resumed in parked[:WHOLE]:
        logger.error(
            "parked for %s: %s %s, which had waited for this program, with %d events: %s",
            resumed.projection, resumed.aggregate, resumed.aggregate_id, resumed.left, resumed.error,
            extra=about(resumed.aggregate, resumed.aggregate_id, projection=resumed.projection),
        )  # fmt: skip
    if len(parked) > WHOLE:
        logger.error("%d aggregates more that had waited for this program are parked", len(parked) - WHOLE)


def stored_commit(letter: Letter, commits: Sequence[Stored], subjects: Subjects) -> tuple[int, bytes]:
    """Return the partition and the bytes of the commit that a dead letter is from.

    Args:
        commits: among which it is, in stream order.
    """
    place = bisect_left(commits, letter.stream_sequence, key=attrgetter("sequence"))
    return subjects.partition(*letter.aggregate), commits[place].payload
