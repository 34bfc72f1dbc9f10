"""The kernel's periodic jobs."""

from __future__ import annotations

import asyncio
import logging

import pytest
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from kernel.runtime.scheduler import JUMP_S, Scheduler
from tests.failing import metric


async def test_a_stop_in_the_middle_of_a_job_is_no_error_of_the_job(caplog: pytest.LogCaptureFixture) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    scheduler = Scheduler()
    scheduler.every(0.01, work)
    with caplog.at_level(logging.WARNING):
        scheduler.start()
        await asyncio.wait_for(begun.wait(), 10)
        scheduler.stop()
        await asyncio.wait_for(ended.wait(), 10)
        await asyncio.sleep(0)  # APScheduler's own coroutine ends after the job's
    assert caplog.records == []
    assert scheduler.jobs["work"].failures == 0


async def test_a_job_that_waits_for_a_database_that_is_away_has_not_failed(caplog: pytest.LogCaptureFixture) -> None:
    async def asks() -> None:
        raise ConnectionError("away")

    async def breaks() -> None:
        raise ValueError("a bug")

    scheduler = Scheduler(lambda error: isinstance(error, ConnectionError))
    scheduler.every(0.01, asks)
    scheduler.every(0.01, breaks)
    before = metric("eskernel_jobs_total", task="asks", outcome="failed")
    with caplog.at_level(logging.WARNING):
        scheduler.start()
        async with asyncio.timeout(10):
            while not scheduler.jobs["asks"].error or not scheduler.jobs["breaks"].error:
                await asyncio.sleep(0.01)
        scheduler.stop()
    assert scheduler.jobs["asks"].failures == 0
    assert scheduler.jobs["breaks"].failures > 0
    assert metric("eskernel_jobs_total", task="asks", outcome="failed") == before
    assert metric("eskernel_jobs_total", task="asks", outcome="waiting") > 0
    assert {record.getMessage() for record in caplog.records} == {"job breaks failed: ValueError: a bug"}


@pytest.mark.parametrize(("due_in", "waits"), [(0.0, 0.0), (0.2, 0.2), (60.0, JUMP_S), (None, JUMP_S)])
def test_a_job_that_is_due_already_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, due_in: float | None, waits: float
) -> None:
    """A busy loop comes late to a job that runs often."""
    monkeypatch.setattr(AsyncIOScheduler, "_process_jobs", lambda _self: due_in)
    assert Scheduler()._scheduler._process_jobs() == waits
