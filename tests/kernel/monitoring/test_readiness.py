"""Readiness is whether work gets done, whatever a state says; the cause is named, and it ends when work goes on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aggregates import Aggregate, applies, command, event, handles
from kernel import App, Client, Service
from kernel.errors import CommandError
from kernel.governance.pace import Pace, unpaced
from kernel.governance.rates import TokenBucket
from kernel.log.appender import Appender
from kernel.monitoring.backlog import Level
from kernel.monitoring.health import NotWorking
from kernel.monitoring.progress import ProjectionCheck, Stall
from kernel.monitoring.watchdog import Watchdog
from kernel.projector.live import NO_PARTITIONS, RUNNING, STARTING
from kernel.telemetry.loop_lag import LoopLag
from projections import Fenced, Rows
from tests.apps import Note, Notebook, Page
from tests.conftest import settings_for
from tests.failing import Running, Wait, api, change_stream, metric, running
from tests.kernel.monitoring.test_health import get

Caplog = pytest.LogCaptureFixture
QUICK: dict[str, Any] = {"connection__health_check_interval": 0.2}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that stands still is reported after less time."""
    monkeypatch.setattr("kernel.monitoring.progress.STALLED_S", 0.5)


async def readiness(here: Running, component: str) -> tuple[int, str]:
    """Return the status of /readyz, and what it says of a component."""
    status, report = await get(f"{here.service.http.url}/readyz")
    return status, report["components"][component]["detail"]


# what a stall is


def test_a_stall_lasts_from_when_work_last_got_done_and_ends_when_none_waits() -> None:
    stall = Stall()
    assert stall.update(True, 1, 100.0) == 0
    assert stall.update(True, 1, 103.0) == 3
    assert stall.update(True, 2, 104.0) == 0
    assert stall.update(True, 2, 109.0) == 5
    assert stall.update(False, 2, 110.0) == 0
    assert stall.update(True, 2, 170.0) == 0
    assert stall.update(True, 2, 171.0) == 1


class Stand:
    """A projector, and what is around it, as the check sees them."""

    def __init__(self, pace: Pace | None = None) -> None:
        self.progress = SimpleNamespace(behind=0, unread=0, done=0, projected=0)
        self.projector = SimpleNamespace(
            state=RUNNING, trouble="", progress=self.progress, committer=SimpleNamespace(lasting=0.0)
        )
        self.held = {1, 2}
        self.silence = ""
        self.level = Level.OK
        stand: Any = self
        self._check = ProjectionCheck(stand.projector, stand, stand, lambda: self.held, pace or unpaced())

    @property
    def backlog(self) -> Any:
        behind = SimpleNamespace(projection="Pages", level=self.level, behind=self.progress.behind, age=99.0)
        return SimpleNamespace(projections={"Pages": behind})

    async def explain_silence(self) -> str:
        return self.silence

    async def verdict(self) -> str:
        """Return what does not work, or nothing."""
        try:
            await self._check.check()
        except NotWorking as problem:
            return str(problem)
        return ""

    def wait(self, commits: int) -> None:
        self.progress.behind = self.progress.unread = commits


@contextmanager
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [1_000.0]
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", lambda: now[0])
        yield now


async def test_commits_that_wait_while_nothing_is_written_are_not_ready_whatever_the_state_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with clock(monkeypatch) as now:
        stand = Stand()
        assert not await stand.verdict()
        stand.wait(400)
        assert not await stand.verdict()
        now[0] += 11
        assert "400 commits wait, and nothing was written for 11 s" in await stand.verdict()
        stand.silence = "the consumer is paused"
        assert "11 s: the consumer is paused" in await stand.verdict()
        stand.projector.trouble = "Pages, Notebook a: ValueError: no such page"
        assert "it begins again after each failure; the last was: Pages" in await stand.verdict()
        stand.progress.done += 1
        assert not await stand.verdict()


async def test_a_backlog_that_shrinks_is_ready_however_large_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with clock(monkeypatch) as now:
        stand = Stand()
        stand.level = Level.CRITICAL
        stand.wait(1_000_000)
        for _ in range(20):
            now[0] += 5
            stand.progress.done += 10
            assert not await stand.verdict()


async def test_a_projection_that_is_slowed_by_its_limit_is_ready_and_one_that_has_tokens_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with clock(monkeypatch) as now:
        bucket = TokenBucket(0.01, 1.0, now[0])
        stand = Stand(Pace(bucket, "none", 1.0))
        stand.wait(50)
        bucket.spend(1)
        for _ in range(9):
            now[0] += 10
            assert not await stand.verdict()
        now[0] += 12
        assert not await stand.verdict()
        now[0] += 12
        assert "50 commits wait" in await stand.verdict()


async def test_checkpoints_that_are_not_read_are_not_ready_and_a_worker_without_partitions_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with clock(monkeypatch) as now:
        stand = Stand()
        for state in (STARTING, NO_PARTITIONS):
            stand.projector.state = state
            stand.held = {1}
            assert not await stand.verdict()
            now[0] += 11
            assert "the checkpoints are not read" in await stand.verdict()
            stand.held = set()
            assert not await stand.verdict()


# a service


async def test_a_paused_consumer_is_named_and_the_service_is_ready_again_when_it_is_resumed(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, soon: None
) -> None:
    async with running(app_name, tmp_path, nats_url, **QUICK) as here, api(nats_url) as call:
        await here.client.query("select 1", after=await here.note(3))

        async def pause(**until: str) -> None:
            for consumer in (await call(f"CONSUMER.NAMES.{app_name}"))["consumers"]:
                await call(f"CONSUMER.PAUSE.{app_name}.{consumer}", until)

        await pause(pause_until="2099-01-01T00:00:00Z")
        receipts = await here.note(20)

        async def named() -> bool:
            status, detail = await readiness(here, "projection")
            return (
                status == 503 and "commits wait, and nothing was written" in detail and "is paused until 2099" in detail
            )

        await wait_until(named)
        assert (await get(f"{here.service.http.url}/healthz"))[0] == 200
        await pause()
        await here.client.query("select 1", after=receipts)

        async def ready() -> bool:
            return (await readiness(here, "projection"))[0] == 200

        await wait_until(ready)


async def test_a_projector_that_spins_is_not_ready_and_fills_no_log(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, soon: None, caplog: Caplog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "eskernel")
    async with running(app_name, tmp_path, nats_url, consumer__backoff=(0.001,), **QUICK) as here:
        await here.client.query("select 1", after=await here.note(3))
        projector = here.service.parts.projector
        began = metric("eskernel_projection_failures_total", cause="fenced")
        spun = 0

        async def spin() -> None:
            nonlocal spun
            spun += 1
            await asyncio.sleep(0)
            raise Fenced("someone else's")

        monkeypatch.setattr(projector, "_project", spin)
        projector._interrupted.set()
        receipts = await here.note(3)

        async def named() -> bool:
            status, detail = await readiness(here, "projection")
            return status == 503 and "it begins again after each failure" in detail

        await wait_until(named)
        await wait_until(lambda: spun > 100)
        assert projector.state == RUNNING
        assert metric("eskernel_projection_failures_total", cause="fenced") - began > 100
        lines = [record for record in caplog.records if "projection goes on" in record.getMessage()]
        assert 0 < len(lines) < 5
        monkeypatch.undo()
        monkeypatch.setattr("kernel.monitoring.progress.STALLED_S", 0.5)
        await here.client.query("select 1", after=receipts)

        async def ready() -> bool:
            return (await readiness(here, "projection"))[0] == 200

        await wait_until(ready)


@pytest.mark.parametrize(
    ("change", "back", "said"),
    [
        ({"subjects": ["{app}.other.>"]}, {"subjects": ["{app}.evt.>"]}, "does not take"),
        ({"max_msgs": 3}, {"max_msgs": -1}, "is full: 3 messages"),
        ({"max_bytes": 600}, {"max_bytes": -1}, "is full: "),
        ({"no_ack": True}, {"no_ack": False}, "acknowledges no commit"),
    ],
    ids=["subjects", "max_msgs", "max_bytes", "no_ack"],
)
async def test_a_stream_that_takes_nothing_is_named_and_asked_less_and_less_often(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, change: Any, back: Any, said: str, caplog: Caplog
) -> None:
    def named(config: dict[str, Any]) -> dict[str, Any]:
        return {
            key: [text.format(app=app_name) for text in value] if key == "subjects" else value
            for key, value in config.items()
        }

    quick = {**QUICK, "jetstream__publish_timeout": 0.5, "jetstream__publish_deadline": 3}
    async with running(app_name, tmp_path, nats_url, **quick) as here:
        await here.note(3)
        before = here.service.parts.log.appender.read_backs
        await change_stream(nats_url, app_name, **named(change))
        if "no_ack" not in change:
            with pytest.raises(CommandError, match="unavailable"):
                await here.client.execute(Notebook, "refused", Note("x"), timeout=5)
        else:
            # stored, and found there
            await here.client.execute(Notebook, "n0", Note("x", 0), timeout=5)
            here.acknowledged["n0"] += 1

        async def noticed() -> bool:
            status, detail = await readiness(here, "appends")
            return status == 503 and said in detail

        await wait_until(noticed)
        assert here.service.parts.log.appender.read_backs - before < 20
        assert len([record for record in caplog.records if record.name == "eskernel.log"]) < 10
        await change_stream(nats_url, app_name, **named(back))

        async def ready() -> bool:
            return (await readiness(here, "appends"))[0] == 200

        await wait_until(ready)
        await here.note(3)


async def test_a_sealed_stream_refuses_commands_with_a_type_and_says_why(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with running(app_name, tmp_path, nats_url, **QUICK) as here:
        await here.note(3)
        await change_stream(nats_url, app_name, sealed=True)
        with pytest.raises(CommandError, match=r"unavailable: .*sealed"):
            await here.client.execute(Notebook, "n0", Note("x"), timeout=2)

        async def noticed() -> bool:
            status, detail = await readiness(here, "appends")
            return status == 503 and "sealed" in detail

        await wait_until(noticed)


async def test_a_refusal_that_nobody_repeats_does_not_last(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(app_name, tmp_path, nats_url, **QUICK) as here:
        here.service.parts.log.appender._refuse("the log is full or busy: for a moment")
        await wait_until(lambda: not here.service.health.components["appends"].ok)
        monkeypatch.setattr("kernel.monitoring.progress.QUIET_S", 0.2)
        await wait_until(lambda: here.service.health.ready)


async def test_appends_that_wait_while_none_is_acknowledged_are_not_ready(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(app_name, tmp_path, nats_url, **QUICK) as here:
        await here.note(3)
        # nothing goes out, and no state says so
        flush = Appender._flush
        monkeypatch.setattr(Appender, "_flush", lambda self: setattr(self, "_flushing", False))
        waiting = asyncio.create_task(here.note(3))

        async def noticed() -> bool:
            status, detail = await readiness(here, "appends")
            return status == 503 and "none was acknowledged" in detail

        await wait_until(noticed)
        monkeypatch.setattr(Appender, "_flush", flush)
        here.service.parts.log.appender._schedule_flush()
        await waiting
        await wait_until(lambda: here.service.health.ready)


async def test_what_does_not_work_is_checked_again_before_the_next_probe(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with running(app_name, tmp_path, nats_url, connection__health_check_interval=600) as here:
        for name in ("leases", "projection", "appends"):
            here.service.health.set(name, False, "holding 0 of 64 partitions")
        assert not here.service.health.ready
        await wait_until(lambda: here.service.health.ready, timeout=5)


# what blocks the loop


@event
class Slept:
    seconds: float


@command
class Sleep:
    seconds: float


class Sleeper(Aggregate):
    @handles
    def sleep(self, command: Sleep) -> Slept:
        time.sleep(command.seconds)
        return Slept(command.seconds)

    @applies
    def slept(self, event: Slept) -> None:
        pass


class Naps(Rows[Page], of=Sleeper):
    @applies
    def slept(self, row: Page, event: Slept) -> None:
        if event.seconds < 0.01:
            time.sleep(0.6)


@pytest.mark.parametrize(
    ("seconds", "culprit"),
    [
        (0.6, "aggregate Sleeper, the handler of Sleep (test_readiness.py:"),
        (0.001, "projection Naps, Naps.slept (test_readiness.py:"),
    ],
    ids=["handler", "projection"],
)
async def test_a_handler_that_blocks_the_loop_is_named_while_it_runs_and_afterwards(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, caplog: Caplog, seconds: float, culprit: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("kernel.monitoring.watchdog.WARN_S", 0.3)
    monkeypatch.setattr("kernel.monitoring.probes.LATE_S", 0.3)
    app = App(app_name, aggregates=[Sleeper], projections=[Naps])
    service = Service(app, settings_for(tmp_path, nats=nats_url))
    await service.start()
    await service.parts.probes.probe()
    async with await Client.connect(app, nats=nats_url, database=service.database_url) as client:
        await client.query("select 1", after=await client.execute(Sleeper, "a", Sleep(seconds)))
    await service.parts.probes.probe()
    loop = service.health.components["loop"]
    assert not loop.ok
    assert culprit in loop.detail
    assert "ran for" in loop.detail
    blocked = [record.getMessage() for record in caplog.records if "event loop is blocked" in record.getMessage()]
    assert any(culprit in line for line in blocked)
    await service.parts.probes.probe()
    assert loop.ok
    await service.stop()


async def test_code_that_no_app_declares_is_named_by_its_place(wait_until: Wait) -> None:
    lag = LoopLag()
    watchdog = Watchdog(App("none", aggregates=[Sleeper]), lag)
    lag.start()
    watchdog.start()
    time.sleep(0.5)
    blocked = watchdog.worst()
    assert blocked is not None
    assert "test_readiness.test_code_that_no_app_declares" in blocked.what
    assert blocked.seconds == pytest.approx(0.5, abs=0.2)
    lag.stop()
    watchdog.stop()
