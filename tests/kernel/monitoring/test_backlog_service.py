"""A service reports its backlog while its database is slow or locked, and none while it is idle."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from kernel import Alert, Client, Service
from kernel.cli.backlog import summary
from projections.database import open_database
from tests.apps import Note, Notebook
from tests.conftest import settings_for
from tests.failing import Wait, metric, warned
from tests.kernel.monitoring.test_health import get, listening

QUICK: dict[str, Any] = {
    "backlog__interval": 0.05,
    "backlog__min_duration": 0.1,
    "backlog__count_warn": 20,
    "backlog__count_critical": 200,
    "backlog__age_warn": 1000,
    "backlog__age_critical": 2000,
}


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Hold a lock that every batch must acquire."""
    engine = open_database(url)
    with engine.connect() as connection, connection.begin() as transaction:
        if engine.dialect.name == "postgresql":
            connection.execute(text("LOCK TABLE words__1 IN ACCESS EXCLUSIVE MODE"))
        # SQLite: the transaction of a writer is the lock
        yield
        transaction.rollback()
    engine.dispose()


async def note(client: Client, count: int) -> list[Any]:
    """Send commands to different aggregates, so that each becomes a separate commit."""
    return await asyncio.gather(*(client.execute(Notebook, f"n{n}", Note("a", n)) for n in range(count)))


def levels(heard: list[Alert], kind: str = "backlog") -> set[tuple[str, str]]:
    return {(alert.projection, alert.after) for alert in heard if alert.kind == kind}


@pytest.mark.setting("backlog.count_warn", "backlog.count_critical")
async def test_a_locked_database_is_a_backlog_that_is_reported_and_goes_away(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, wait_until: Wait,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    heard: list[Alert] = []
    hangs = threading.Event()
    app = listening(app_name, lambda _alert: hangs.wait(), heard.append)
    thresholds = QUICK | {"backlog__count_warn": 2, "backlog__count_critical": 10, "partitions": 8}
    service = Service(app, settings_for(tmp_path, nats=nats_url, database=database_url, **thresholds))
    await service.start()
    async with await Client.connect(app, nats=nats_url, database=database_url) as client:
        await client.query("select 1", after=await note(client, 20))
        with locked(database_url):
            receipts = await note(client, 300)
            await wait_until(
                lambda: {("Pages", "critical"), ("Words", "critical"), ("Lines", "critical")} <= levels(heard)
            )
            backlog = service.status()["backlog"]
            assert backlog["level"] == "critical"
            assert [projection["behind"] for projection in backlog["projections"]] == [300] * 3
            assert all(projection["age"] > 0 for projection in backlog["projections"])
            partitions = backlog["projections"][0]["partitions"]
            assert sum(partition["behind"] for partition in partitions) == pytest.approx(300, rel=0.02)
            assert metric("eskernel_projection_lag_commits") == 300
            monkeypatch.setattr("kernel.monitoring.progress.STALLED_S", 0.3)

            async def failing() -> bool:
                await service.parts.probes.probe()
                return not service.health.components["projection"].ok

            await wait_until(failing)
            status, report = await get(f"{service.http.url}/readyz")
            assert status == 503
            assert not report["projecting"]
            assert report["publishing"]
            assert "commits wait, and nothing was written" in report["components"]["projection"]["detail"]
            assert "the database is at a batch" in report["components"]["projection"]["detail"]
            assert warned(caplog, "backlog of Pages", "critical")
        await client.query("select 1", after=receipts, timeout=30)
        await wait_until(lambda: service.status()["backlog"]["level"] == "ok")
        assert [projection["behind"] for projection in service.status()["backlog"]["projections"]] == [0] * 3
        await service.parts.probes.probe()
        assert (await get(f"{service.http.url}/readyz"))[0] == 200
        assert {alert.kind for alert in heard} >= {"backlog", "health"}
        worst = [alert for alert in heard if (alert.projection, alert.after) == ("Pages", "critical")]
        # partitions that crossed the threshold together share one alert
        assert len(worst) < len({partition for alert in worst for partition in alert.partitions})
    hangs.set()
    await service.stop()


async def test_commits_that_arrive_while_nothing_can_be_read_are_counted_too(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    # no health check asks the log meanwhile
    quick = QUICK | {"connection__health_check_interval": 600}
    service = Service(listening(app_name), settings_for(tmp_path, nats=nats_url, database=database_url, **quick))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        await client.query("select 1", after=await note(client, 50))
        with locked(database_url):
            # one batch is being written and one is folded: the third is never read
            for total in (100, 200, 300):
                receipts = await note(client, 100)
                await wait_until(lambda: service.status()["projection"]["behind"] == total)  # noqa: B023
        await client.query("select 1", after=receipts, timeout=30)
        await wait_until(lambda: service.status()["projection"]["behind"] == 0)
    await service.stop()


async def test_a_service_with_nothing_to_do_is_not_behind_however_old_its_log_is(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    heard: list[Alert] = []
    quick = QUICK | {"backlog__age_warn": 0.2, "backlog__age_critical": 0.4}
    service = Service(listening(app_name, heard.append), settings_for(tmp_path, nats=nats_url, **quick))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=service.database_url) as client:
        await client.query("select 1", after=await note(client, 50))
        detections = service.scheduler.jobs["detect_backlog"]
        before = detections.runs
        await wait_until(lambda: detections.runs > before + 10, 60)
        report = service.status()["backlog"]
        assert report["level"] == "ok"
        assert [
            (projection["behind"], projection["age"], projection["drain"]) for projection in report["projections"]
        ] == [(0, 0.0, 0.0)] * 3
        assert service.health.ready
    await service.stop()
    assert levels(heard) <= {(name, level) for name, level in levels(heard) if level == "ok"}


async def test_detecting_a_backlog_sends_the_server_no_requests(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(
        listening(app_name), settings_for(tmp_path, nats=nats_url, connection__health_check_interval=600, **QUICK)
    )
    await service.start()
    asked: list[str] = []
    real = service.parts.connection.request

    async def counted(subject: str, *arguments: Any, **options: Any) -> Any:
        asked.append(subject)
        return await real(subject, *arguments, **options)

    monkeypatch.setattr(service.parts.connection, "request", counted)
    detections = service.scheduler.jobs["detect_backlog"]
    before = detections.runs
    await wait_until(lambda: detections.runs > before + 20)
    assert [subject for subject in asked if f"STREAM.INFO.{app_name}" in subject or "CONSUMER.INFO" in subject] == []
    await service.stop()


async def test_each_worker_reports_its_own_partitions_and_the_command_line_reports_all(
    nats_url: str, fresh_postgres: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    services = [
        Service(
            listening(app_name),
            settings_for(tmp_path / str(n), nats=nats_url, database=fresh_postgres, lease=5.0, **QUICK),
        )
        for n in range(2)
    ]
    for service in services:
        await service.start()
    await wait_until(lambda: [len(service.partitions) for service in services] == [32, 32])
    async with await Client.connect(services[0].app, nats=nats_url, database=fresh_postgres) as client:
        await client.query("select 1", after=await note(client, 400))
        with locked(fresh_postgres):
            receipts = await note(client, 400)

            def behind() -> list[int]:
                return [service.status()["projection"]["behind"] for service in services]

            # the count of unread commits is an estimate where workers share the log; the count of read ones is exact
            await wait_until(lambda: min(behind()) > 50 and sum(behind()) == pytest.approx(400, rel=0.4))
            states = [service.status() for service in services]
            for service, state in zip(services, states, strict=True):
                reported = {partition["partition"] for partition in state["backlog"]["projections"][0]["partitions"]}
                assert reported <= set(service.partitions)
            found = summary({"app": app_name, "workers": states, "silent": [], "unowned": []})
            assert found["projections"][0]["behind"] == pytest.approx(400, rel=0.5)
            assert {partition["worker"] for partition in found["projections"][0]["partitions"]} == {
                service.worker for service in services
            }
        await client.query("select 1", after=receipts, timeout=30)
        await wait_until(lambda: [service.status()["projection"]["behind"] for service in services] == [0, 0])
    for service in services:
        await service.stop()


async def test_pressure_on_publishing_is_reported(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Alert] = []
    service = Service(listening(app_name, heard.append), settings_for(tmp_path, nats=nats_url, **QUICK))
    await service.start()
    service.parts.log.appender.refusal = "the log is full or busy"
    await wait_until(lambda: [alert for alert in heard if alert.kind == "pressure" and alert.after == "critical"])
    assert service.status()["pressure"]["level"] == "critical"
    service.parts.log.appender.refusal = ""
    await wait_until(lambda: service.status()["pressure"]["level"] == "low")
    await wait_until(lambda: [alert for alert in heard if alert.kind == "pressure" and alert.after == "low"])
    await service.stop()
