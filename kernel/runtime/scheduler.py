"""The scheduler: it runs the kernel's periodic jobs, such as leases, passivation, backlog detection and probes."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from kernel.telemetry.metrics import JOB_SECONDS, JOBS

logger = logging.getLogger("eskernel.runtime")
JOB_TIMEOUT_S = 30.0
JUMP_S = 1.0
"""Seconds between comparisons of the wall clock with the monotonic clock, and the difference that counts as a jump."""


@dataclass(slots=True)
class Job:
    """A job as `eskernel jobs` shows it.

    Attributes:
        interval: seconds between runs.
        runs: number of runs.
        duration: duration of the last run in seconds.
        last: start of the last run (ISO 8601, UTC), empty before the first.
        error: error of the last run, empty if it succeeded.
        failures: number of failed runs.
        running: seconds since the current run began, 0 if the job is not running.
        next_run: time of the next run (ISO 8601, UTC), empty if none is planned.
    """

    name: str
    interval: float
    runs: int = 0
    duration: float = 0.0
    last: str = ""
    error: str = ""
    failures: int = 0
    running: float = 0.0
    next_run: str = ""


class _Steady(AsyncIOScheduler):  # type: ignore[misc]
    """APScheduler uses the wall clock. This one detects that the clock was set, and then runs all jobs at once."""

    offset: float | None = None

    def _process_jobs(self) -> float:
        offset = time.time() - time.monotonic()
        if self.offset is None or abs(offset - self.offset) > JUMP_S:
            jumped, self.offset = self.offset is not None, offset
            if jumped:
                logger.warning("the clock was set; all jobs run now")
                for job in self.get_jobs():
                    job.modify(next_run_time=datetime.now(UTC))
        wait = super()._process_jobs()
        # 0: a job is due again already; None: there are no jobs
        return JUMP_S if wait is None else min(wait, JUMP_S)


class Scheduler:
    """Runs jobs at intervals. A job that fails or hangs does not stop the others.

    Args:
        waits: says of a job's error that the job only waits for something whose absence is known. It is not counted as
            a failure, and not logged.
    """

    def __init__(self, waits: Callable[[Exception], bool] = lambda _error: False) -> None:
        self._waits = waits
        self._scheduler = _Steady(timezone=UTC)
        self.jobs: dict[str, Job] = {}
        self._began: dict[str, float] = {}
        self._turned = time.monotonic()

    def every(self, seconds: float, work: Callable[[], Any], name: str = "") -> None:
        """Run a function, sync or async, at an interval. Missed runs are not repeated.

        Args:
            seconds: the interval; a run is cancelled after `JOB_TIMEOUT_S`.
            name: the job's name, by default the function's.
        """
        job = Job(name or work.__name__.strip("_"), seconds)
        self.jobs[job.name] = job

        async def run() -> None:
            started = time.perf_counter()
            self._turned = time.monotonic()
            self._began[job.name] = started
            job.runs += 1
            job.last = datetime.now(UTC).isoformat(timespec="seconds")
            try:
                async with asyncio.timeout(JOB_TIMEOUT_S):
                    result = work()
                    if inspect.isawaitable(result):
                        await result
            except asyncio.CancelledError:
                pass  # by `stop`; APScheduler would log it as an error of the job
            except Exception as error:
                job.error = f"{type(error).__name__}: {error}"
                if self._waits(error):
                    JOBS.labels(task=job.name, outcome="waiting").inc()
                else:
                    job.failures += 1
                    JOBS.labels(task=job.name, outcome="failed").inc()
                    logger.warning("job %s failed: %s", job.name, job.error)
            else:
                job.error = ""
                JOBS.labels(task=job.name, outcome="ok").inc()
            del self._began[job.name]
            job.duration = time.perf_counter() - started
            JOB_SECONDS.labels(task=job.name).set(job.duration)

        self._scheduler.add_job(
            run,
            "interval",
            seconds=seconds,
            id=job.name,
            max_instances=1,
            coalesce=True,
            # a run that is late, for example after a freeze, must still happen
            misfire_grace_time=None,
        )

    @property
    def idle_for(self) -> float:
        """Seconds since a job last began."""
        return time.monotonic() - self._turned

    def report(self) -> list[dict[str, Any]]:
        """Return every job as JSON data."""
        for job in self.jobs.values():
            began = self._began.get(job.name)
            job.running = time.perf_counter() - began if began is not None else 0.0
            scheduled = self._scheduler.get_job(job.name)
            due = getattr(scheduled, "next_run_time", None)
            job.next_run = due.isoformat(timespec="milliseconds") if due is not None else ""
        return [asdict(job) for job in self.jobs.values()]

    def start(self) -> None:
        """Start running jobs."""
        self._turned = time.monotonic()
        logging.getLogger("apscheduler").setLevel(logging.ERROR)
        self._scheduler.start()

    def stop(self) -> None:
        """Stop running jobs, without waiting for those in progress."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)
