"""Pauses a projection at which too many aggregates fail: a bad deploy is not a bad aggregate."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from kernel.projector.grouping import Group
from kernel.settings import DeadLetters
from kernel.telemetry.metrics import PAUSED
from projections.declaration import DeclaredProjection
from projections.errors import HandlerFailed

logger = logging.getLogger("eskernel.projector")

WINDOW_S = 60.0
"""Aggregates that were folded, and those of them that failed, are counted for this long."""


class ProjectionPaused(Exception):
    """A projection was paused. What was folded is not written; the others go on in a new session."""


class Pauses:
    """The projections that this worker has paused. A restart forgets them: the program may have been corrected.

    Args:
        projections: in the plan's order.

    Attributes:
        reasons: why each of them is paused, by index.
    """

    def __init__(
        self,
        projections: Sequence[DeclaredProjection],
        settings: DeadLetters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._projections, self._settings, self._clock = projections, settings, clock
        self._counted: deque[tuple[float, Counter[int], Counter[int]]] = deque()
        self.reasons: dict[int, str] = {}

    @property
    def paused(self) -> frozenset[int]:
        """Indexes of the paused projections."""
        return frozenset(self.reasons)

    def describe(self) -> str:
        """Return for people what is paused, and why; an empty text if nothing is."""
        return "; ".join(f"{self._projections[index].name} is paused: {why}" for index, why in self.reasons.items())

    def note(self, groups: Sequence[Group], failures: Sequence[HandlerFailed]) -> bool:
        """Count what was folded and what failed. Return whether a projection is paused for it.

        Args:
            groups: none if they are counted already.
            failures: a transient one does not count.
        """
        now = self._clock()
        folded: Counter[int] = Counter()
        by_type = Counter((group.address.aggregate, group.skip) for group in groups)
        failed = {
            (index, failure.aggregate) for failure in failures if not failure.transient for index in self._of(failure)
        }
        for index, declared in enumerate(self._projections):
            for (aggregate, skip), count in by_type.items():
                if aggregate in declared.units and index not in skip:
                    folded[index] += count
        if folded or failed:
            self._counted.append((now, folded, Counter(index for index, _ in failed)))
        while self._counted and now - self._counted[0][0] > WINDOW_S:
            self._counted.popleft()
        paused = [
            index for index in sorted({index for index, _ in failed} - self.reasons.keys()) if self._is_bad(index)
        ]
        for index in paused:
            self._pause(index, next(failure for failure in failures if index in self._of(failure)))
        return bool(paused)

    def _of(self, failure: HandlerFailed) -> list[int]:
        if failure.projection >= 0:
            return [failure.projection]
        return [i for i, declared in enumerate(self._projections) if failure.aggregate[0] in declared.units]

    def _count(self, index: int) -> tuple[int, int]:
        folded = sum(counted[index] for _, counted, _ in self._counted)
        failed = sum(counted[index] for _, _, counted in self._counted)
        return folded, failed

    def _is_bad(self, index: int) -> bool:
        folded, failed = self._count(index)
        return failed >= self._settings.pause_minimum and failed > self._settings.pause_above * folded

    def _pause(self, index: int, example: HandlerFailed) -> None:
        name, (folded, failed) = self._projections[index].name, self._count(index)
        self.reasons[index] = f"{failed} of {folded} aggregates failed, such as {example}"
        PAUSED.set(len(self.reasons))
        logger.error(
            "projection %s is paused, and not folded any further: %s. If the program is at fault, deploy one that is "
            "not; its start goes on by itself. Otherwise: eskernel projections resume %s",
            name, self.reasons[index], name, extra={"projection": name},
        )  # fmt: skip

    def wait(self, index: int, why: str) -> None:
        """Pause a projection that only a newer program can fold any further."""
        name = self._projections[index].name
        self.reasons[index] = f"only a newer program can go on: {why}"
        PAUSED.set(len(self.reasons))
        logger.warning(
            "projection %s waits for a newer program, with all of its rows in this worker's partitions: %s",
            name, why, extra={"projection": name},
        )  # fmt: skip

    def resume(self) -> None:
        """Fold all projections again."""
        if self.reasons:
            logger.info("folded again: %s", ", ".join(self._projections[index].name for index in self.reasons))
        self.reasons.clear()
        self._counted.clear()
        PAUSED.set(0)
