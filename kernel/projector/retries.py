"""Looks after the dead letters: retries those whose handler failed with something that may pass, and counts all."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from sqlalchemy import Engine

from kernel.app import App
from kernel.log.subjects import Subjects
from kernel.projector.parking import WHOLE
from kernel.settings import DeadLetters
from kernel.telemetry.logging import about
from kernel.telemetry.metrics import PARKED, QUARANTINED, RETRIES, WAITING
from projections import dead_letters
from projections.retrying import retry_all
from projections.waiting import Postponed, postponed

logger = logging.getLogger("eskernel.projector")


class DeadLetterRetries:
    """Folds again, with growing pauses, the events that wait for a retry in this worker's partitions.

    Args:
        projects: says whether this worker keeps a partition of a projection up to date.

    Attributes:
        postponed: the aggregates that wait for a newer program, in the whole database.
    """

    def __init__(
        self,
        app: App,
        engine: Engine,
        subjects: Subjects,
        projects: Callable[[str, int], bool],
        settings: DeadLetters,
    ) -> None:
        self._app, self._engine, self._subjects, self._settings = app, engine, subjects, settings
        self._projects = projects
        self.postponed: list[Postponed] = []
        self._warned: set[tuple[str, str]] = set()

    async def retry_dead_letters(self) -> None:
        """Retry what is due, and count what waits."""
        done = await asyncio.to_thread(self._retry_due)
        if len(done) > WHOLE:
            left = sum(retried.left > 0 for retried in done)
            level = logging.WARNING if left else logging.INFO
            logger.log(level, "retried %d aggregates: %d of them are still parked; %d follow", len(done), left, WHOLE)
        for retried in done:
            RETRIES.labels(outcome="failed" if retried.left else "ok").inc()
        for retried in done[:WHOLE]:
            logger.log(
                logging.WARNING if retried.left else logging.INFO,
                "retried %s %s for %s: %d folded, %d left%s",
                retried.aggregate, retried.aggregate_id, retried.projection, retried.folded, retried.left,
                f": {retried.error}" if retried.left else "",
                extra=about(retried.aggregate, retried.aggregate_id, projection=retried.projection),
            )  # fmt: skip
        for waiting in self.postponed:
            if (waiting.aggregate, waiting.why) not in self._warned:
                self._warned.add((waiting.aggregate, waiting.why))
                logger.warning(
                    "projections of %s wait for a program that can read its events (%d aggregates): %s",
                    waiting.aggregate, waiting.aggregates, waiting.why,
                    extra={"aggregate": waiting.aggregate, "reason": waiting.why},
                )  # fmt: skip

    def _retry_due(self) -> list[dead_letters.Retried]:
        parked, quarantined = dead_letters.counts(self._engine)
        PARKED.set(parked)
        QUARANTINED.set(quarantined)
        self.postponed = postponed(self._engine)
        WAITING.set(sum(waiting.aggregates for waiting in self.postponed))
        due = [
            letter
            for letter in (dead_letters.due(self._engine, time.time()) if parked else ())
            if self._projects(letter.projection, self._subjects.partition(letter.aggregate, letter.aggregate_id))
        ]
        return retry_all(self._engine, self._app.plan(self._engine.dialect), due, self._pause) if due else []

    def _pause(self, attempts: int) -> float | None:
        if attempts >= self._settings.retries:
            return None
        return min(self._settings.retry_after * float(2**attempts), dead_letters.MAX_PAUSE_S)
