"""Committer batches to the database from a thread of its own, again for as long as it is the database that fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

from kernel.telemetry.metrics import BATCH_SECONDS, BATCHES, DEAD_LETTERS, ERRORS
from projections.database import is_infrastructure
from projections.errors import Fenced, HandlerFailed
from projections.unit_of_work import Write, Writer

logger = logging.getLogger("eskernel.projector")
AWAY = "waiting for the database"
Threads = Callable[[str], Executor]
"""Makes what runs the statements for one purpose, which it is named after."""


def one_thread(name: str) -> Executor:
    """Return a thread: statements run beside the event loop."""
    return ThreadPoolExecutor(1, name)


class Committer:
    """The way of one worker's batches to the database.

    Args:
        backoff: pauses in seconds after failures; the last one repeats.
        interrupted: set when nothing should be tried again.
        set_state: called with what is being waited for, or `running`; for people.

    Attributes:
        batches: how many were written, and how many attempts failed.
        slowest: seconds of the slowest batch since this was last set to 0.
    """

    def __init__(
        self,
        backoff: Sequence[float],
        interrupted: asyncio.Event,
        set_state: Callable[[str], None],
        threads: Threads = one_thread,
    ) -> None:
        self._backoff, self._interrupted, self._set_state = backoff, interrupted, set_state
        self._pool = threads("eskernel-write")
        self._began = 0.0
        self.batches = (0, 0)
        self.slowest = 0.0

    @property
    def lasting(self) -> float:
        """Seconds that the database has been at the present batch."""
        return time.perf_counter() - self._began if self._began else 0.0

    async def write(self, writer: Writer, write: Write) -> list[HandlerFailed]:
        """Write a batch.

        Returns:
            the aggregates that were parked because the database refuses what was folded.

        Raises:
            Fenced, sqlalchemy.exc.DBAPIError: trying again would not help, or is not wanted any more.
        """
        failures = 0
        try:
            while (parked := await self._attempt(writer, write)) is None:
                failures += 1
                await self.rest(failures)
        finally:
            self._began = 0.0
        DEAD_LETTERS.inc(write.lettered)
        return parked

    async def _attempt(self, writer: Writer, write: Write) -> list[HandlerFailed] | None:
        started = self._began = time.perf_counter()
        try:
            parked = await asyncio.get_running_loop().run_in_executor(self._pool, writer.commit, write)
        except Fenced:
            raise
        except Exception as error:
            BATCHES.labels(outcome="failed").inc()
            ERRORS.labels(kind="database").inc()
            self.batches = self.batches[0], self.batches[1] + 1
            if not is_infrastructure(error) or self._interrupted.is_set():
                raise
            self._set_state(AWAY)
            logger.warning("database: %s; trying again", str(error).splitlines()[0])
            return None
        BATCHES.labels(outcome="ok").inc()
        self.batches = self.batches[0] + 1, self.batches[1]
        BATCH_SECONDS.observe(took := time.perf_counter() - started)
        self.slowest = max(self.slowest, took)
        self._set_state("running")
        return parked

    async def rest(self, failures: int) -> None:
        """Wait after so many failures, but not past an interruption."""
        await self._wait(self._backoff[min(failures, len(self._backoff)) - 1])

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._interrupted.wait()
        except TimeoutError:
            pass

    def close(self) -> None:
        """Let go of the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)
