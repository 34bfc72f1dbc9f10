"""The kernel's periodic jobs."""

from __future__ import annotations

import asyncio
import logging

import pytest

from kernel.runtime.scheduler import Scheduler


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
