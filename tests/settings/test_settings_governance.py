"""Settings of the backlog and of rates, by their effect on a running service."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from kernel.monitoring.backlog import Level
from tests.apps import Note, Notebook
from tests.failing import Wait, running

QUICK = {"backlog__interval": 0.05, "backlog__count_warn": 10**9, "backlog__count_critical": 10**9}


@pytest.mark.setting("backlog.age_warn", "backlog.age_critical", "backlog.interval")
@pytest.mark.parametrize(
    ("thresholds", "level"),
    [
        ({"backlog__age_warn": 0.2, "backlog__age_critical": 1000.0}, Level.WARN),
        ({"backlog__age_warn": 0.2, "backlog__age_critical": 0.4}, Level.CRITICAL),
    ],
)
async def test_one_event_that_waits_for_long_is_a_backlog_by_its_age(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, thresholds: dict[str, Any], level: Level
) -> None:
    async with running(app_name, tmp_path, nats_url, backlog__min_duration=0.1, **QUICK, **thresholds) as here:
        lookout = here.service.parts.detector
        file = here.service.database_url.removeprefix("sqlite:///")
        connection = sqlite3.connect(file, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        await here.client.execute(Notebook, "n", Note("waits"))
        await wait_until(lambda: lookout.backlog.worst == level)
        connection.execute("COMMIT")
        connection.close()
        await wait_until(lambda: lookout.backlog.worst == Level.OK)


@pytest.mark.setting("backlog.min_duration")
async def test_a_short_backlog_is_not_reported(nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait) -> None:
    patient = QUICK | {"backlog__count_warn": 1, "backlog__min_duration": 3600.0}
    async with running(app_name, tmp_path, nats_url, **patient) as here:
        lookout = here.service.parts.detector
        file = here.service.database_url.removeprefix("sqlite:///")
        connection = sqlite3.connect(file, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        for n in range(5):
            await here.client.execute(Notebook, f"n{n}", Note("waits"))
        await wait_until(lambda: lookout.behind >= 5)
        assert lookout.backlog.worst == Level.OK
        connection.execute("COMMIT")
        connection.close()
        await wait_until(lambda: lookout.behind == 0)


@pytest.mark.setting("rates.loop_lag", "rates.adaptive", "rates.minimum")
@pytest.mark.parametrize("adaptive", [True, False])
async def test_an_event_loop_that_is_late_slows_the_commands_where_rates_adapt(
    nats_url: str, app_name: str, tmp_path: Path, adaptive: bool
) -> None:
    more = {"rates__loop_lag": 0.1, "rates__adaptive": adaptive, "rates__minimum": 1000.0}
    async with running(app_name, tmp_path, nats_url, **more) as here:
        governor = here.service.parts.governor
        lane = governor.lanes["commands"]
        for _ in range(40):
            await here.client.execute(Notebook, "n", Note("a"))
            time.sleep(0.15)  # a slow handler
            if lane.rate is not None:
                break
        assert (lane.rate is not None) == adaptive
        if adaptive:
            assert lane.rate == 1000.0
