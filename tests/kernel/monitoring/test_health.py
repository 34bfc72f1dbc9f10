"""Probes find out the health; it says what is wrong and since when, and callbacks learn of its changes."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from sqlalchemy import create_engine, select
from sqlalchemy.engine import make_url

from kernel import Alert, App, Service
from kernel.cli.run import run as run_command
from kernel.errors import SettingsError, Unavailable
from kernel.monitoring.alerting import Alerts
from kernel.monitoring.health import DEAD_S, Health
from kernel.monitoring.http import HttpServer
from kernel.settings import Http, load
from projections.database import open_database
from projections.tables import stream
from tests.apps import Lines, Notebook, Pages, Words
from tests.conftest import settings_for
from tests.failing import Wait, running

ROOT = Path(__file__).parents[3]


def listening(name: str, *callbacks: Any) -> App:
    return App(name, aggregates=[Notebook], projections=[Pages, Words, Lines], on_alert=callbacks)


async def get(url: str) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        return answer.status, await answer.json()


# callbacks


async def test_callbacks_sync_and_async_get_every_alert(wait_until: Wait) -> None:
    heard: list[tuple[str, str]] = []

    def plain(alert: Alert) -> None:
        heard.append(("plain", alert.subject))

    async def waiting(alert: Alert) -> None:
        await asyncio.sleep(0)
        heard.append(("async", alert.subject))

    alerts = Alerts([plain, waiting])
    for number in range(3):
        alerts.send(Alert("health", f"{number}", "ok", "failing", ""))
    await wait_until(lambda: len(heard) == 6)
    assert [subject for kind, subject in heard if kind == "plain"] == ["0", "1", "2"]
    assert [subject for kind, subject in heard if kind == "async"] == ["0", "1", "2"]
    alerts.close()


async def test_a_callback_that_raises_hangs_or_never_gives_way_harms_no_other(
    wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []
    tried: list[str] = []
    waited: list[str] = []
    end = threading.Event()

    def raises(alert: Alert) -> None:
        tried.append(alert.subject)
        raise SystemExit("oh no")

    def hangs(_alert: Alert) -> None:
        end.wait()

    async def hangs_async(alert: Alert) -> None:
        waited.append(alert.subject)
        tried.append(alert.subject)
        await asyncio.Event().wait()

    async def never_gives_way(_alert: Alert) -> None:
        end.wait()

    alerts = Alerts(
        [raises, hangs, hangs_async, never_gives_way, lambda alert: heard.append(alert.subject)], limit=0.05
    )
    for number in range(2_000):
        alerts.send(Alert("health", f"{number}", "ok", "failing", ""))
    await wait_until(lambda: len(heard) >= 1 and heard[-1] == "1999")
    await wait_until(lambda: len(tried) >= 4)
    await wait_until(lambda: len(waited) >= 2)
    assert "oh no" in caplog.text
    await wait_until(lambda: "has not returned" in caplog.text and "does not keep up" in caplog.text)
    end.set()
    alerts.close()


# components


def health(idle: float = 0.0, patience: float = 60.0) -> Health:
    return Health(Alerts([]), lambda: idle, patience)


def test_a_component_shows_when_it_last_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = health()
    now = [100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for at, ok in ((100.0, True), (105.0, True), (110.0, False), (115.0, False), (120.0, True)):
        now[0] = at
        found.set("log", ok, "detail", 0.5)
        assert found.components["log"].since == {100.0: 100, 105.0: 100, 110.0: 110, 115.0: 110, 120.0: 120}[at]
    assert found.report()["components"]["log"]["latency"] == 0.5


def test_an_outdated_probe_result_is_not_believed() -> None:
    found = health(patience=60)
    for name in found.components:
        found.set(name, True, "fine")
    assert found.ready
    found._probed -= 61
    assert not found.ready
    assert not found.report()["publishing"]


def test_publishing_and_projecting_are_ready_independently() -> None:
    found = health()
    for name in found.components:
        found.set(name, name != "database", "")
    report = found.report()
    assert (report["publishing"], report["projecting"], report["ready"]) == (True, False, False)


@pytest.mark.parametrize(("idle", "status"), [(0.0, 200), (DEAD_S + 1, 503)])
async def test_a_process_whose_jobs_run_no_more_is_not_alive(idle: float, status: int) -> None:
    server = HttpServer(health(idle), Http())
    await server.start()
    assert await get(f"{server.url}/healthz") == (status, {"alive": status == 200})
    await server.stop()


async def test_a_service_that_works_says_so_of_every_component(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    async with running(app_name, tmp_path, nats_url, database_url) as here:
        status, report = await get(f"{here.service.http.url}/readyz")
        assert status == 200
        assert report["publishing"]
        assert report["projecting"]
        assert set(report["components"]) == {
            "log", "appends", "database", "leases", "projection", "builds", "reactions", "commands", "loop"
        }  # fmt: skip
        assert all(component["ok"] and component["since"] > 0 for component in report["components"].values())
        assert report["components"]["log"]["latency"] > 0


async def test_a_probe_that_hangs_fails_by_itself_and_holds_up_no_other(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    async with running(app_name, tmp_path, nats_url) as here:
        watch = here.service.parts.probes
        monkeypatch.setattr("kernel.monitoring.probes.PROBE_S", 0.1)
        answer = asyncio.Event()

        async def hang() -> str:
            await answer.wait()
            return "it answers"

        asked = []

        async def database() -> str:
            asked.append(1)
            return "fine"

        watch.checks |= {"log": hang, "database": database}
        for _ in range(3):
            await watch.probe()
        components = here.service.health.components
        assert not components["log"].ok
        assert "no answer" in components["log"].detail
        assert components["database"].ok
        assert len(asked) == 3
        assert not here.service.health.ready
        answer.set()
        await wait_until(watch._under_way["log"][1].done)
        await watch.probe()
        assert components["log"].ok


async def test_callbacks_learn_when_a_component_fails_and_when_it_recovers(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    heard: list[Alert] = []
    service = Service(listening(app_name, heard.append), settings_for(tmp_path, nats=nats_url))
    await service.start()
    working = service.parts.log.info

    async def unreachable() -> Any:
        raise Unavailable("it is unreachable")

    monkeypatch.setattr(service.parts.log, "info", unreachable)
    await service.parts.probes.probe()
    monkeypatch.setattr(service.parts.log, "info", working)
    await service.parts.probes.probe()
    await wait_until(lambda: len([alert for alert in heard if alert.subject == "log"]) == 2)
    broken, works = [alert for alert in heard if alert.subject == "log"]
    assert (broken.kind, broken.before, broken.after) == ("health", "ok", "failing")
    assert "it is unreachable" in broken.detail
    assert broken.worker == service.worker
    assert (works.before, works.after) == ("failing", "ok")
    await service.stop()
    assert [alert for alert in heard if alert.subject == "commands"] == []


async def test_a_database_that_can_be_read_and_not_written_is_not_ready(
    nats_url: str, fresh_postgres: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    admin = create_engine(make_url(fresh_postgres).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    name = make_url(fresh_postgres).database
    async with running(app_name, tmp_path, nats_url, fresh_postgres) as here:
        watch = here.service.parts.probes
        with admin.connect() as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        here.service.parts.engine.dispose()
        await watch.probe()
        database = here.service.health.components["database"]
        assert not database.ok
        assert "read-only" in database.detail
        with admin.connect() as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
        here.service.parts.engine.dispose()
        await watch.probe()
        assert database.ok
    admin.dispose()


async def test_probing_leaves_nothing_in_the_database(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    async with running(app_name, tmp_path, nats_url, database_url) as here:
        for _ in range(3):
            await here.service.parts.probes.probe()
        engine = open_database(database_url, read_only=True)
        with engine.connect() as connection:
            assert list(connection.scalars(select(stream.c.app))) == [app_name]
        engine.dispose()


async def test_an_event_loop_that_is_late_is_not_ready(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(app_name, tmp_path, nats_url) as here:
        watch = here.service.parts.probes
        monkeypatch.setattr("kernel.monitoring.probes.LATE_S", 0.1)
        time.sleep(0.5)
        await watch.probe()
        assert not here.service.health.components["loop"].ok


# deployment


def test_the_kubernetes_example_names_what_there_is() -> None:
    documents = list(yaml.safe_load_all((ROOT / "docs/deploy/kubernetes.yaml").read_text()))
    (workload,) = [document for document in documents if document["kind"] in ("Deployment", "StatefulSet")]
    pod = workload["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (port,) = [port["containerPort"] for port in container["ports"] if port["name"] == "http"]
    arguments = container["args"]
    assert arguments[:1] == ["run"]
    _check_options(arguments[1:])
    assert str(port) == arguments[arguments.index("--port") + 1]
    paths = {name: container[name]["httpGet"]["path"] for name in ("livenessProbe", "readinessProbe", "startupProbe")}
    assert paths == {"livenessProbe": "/healthz", "readinessProbe": "/readyz", "startupProbe": "/healthz"}
    for probe in paths:
        assert container[probe]["httpGet"]["port"] == "http"
    drain = float(arguments[arguments.index("--drain") + 1])
    assert pod["terminationGracePeriodSeconds"] > drain + 15


def test_the_kubernetes_example_is_locked_up() -> None:
    """The settings of its environment start a service, and pods have no more rights than they need."""
    text = (ROOT / "docs/deploy/kubernetes.yaml").read_text()
    documents = {found["kind"]: found for found in yaml.safe_load_all(text)}
    assert set(documents) == {"Deployment", "PodDisruptionBudget", "NetworkPolicy"}
    labels = documents["Deployment"]["spec"]["selector"]["matchLabels"]
    assert documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    policy = documents["NetworkPolicy"]["spec"]
    assert (policy["podSelector"]["matchLabels"], policy["policyTypes"]) == (labels, ["Ingress", "Egress"])
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert policy["ingress"][0]["ports"][0]["port"] == container["ports"][0]["containerPort"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    variables = {entry["name"]: entry.get("value", "postgresql://u@h/d") for entry in container["env"]}
    arguments = container["args"]
    host = arguments[arguments.index("--host") + 1]
    assert load(None, {"http.host": host}, variables).settings.http.host == host
    del variables["ESKERNEL_HTTP__TOKEN"]
    with pytest.raises(SettingsError, match="http.token"):
        load(None, {"http.host": host}, variables)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
def test_the_systemd_unit_is_locked_up() -> None:
    """As systemd itself rates it: from 0, locked up, to 10."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", ROOT / "docs/deploy/eskernel.service"]
    rated = subprocess.run(command, capture_output=True, text=True, check=False)
    if "nknown option" in rated.stderr or "unrecognized option" in rated.stderr:
        pytest.skip("an older systemd-analyze")
    assert rated.returncode == 0, rated.stdout[-300:] + rated.stderr


def test_the_systemd_unit_names_what_there_is() -> None:
    unit = (ROOT / "docs/deploy/eskernel.service").read_text()
    entries = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    command = entries["ExecStart"].split()
    assert command[0].endswith("/eskernel")
    assert command[1] == "run"
    _check_options(command[2:])
    assert entries["KillSignal"] == "SIGTERM"
    assert float(entries["TimeoutStopSec"]) > float(command[command.index("--drain") + 1]) + 15


def _check_options(arguments: list[str]) -> None:
    known = {option for parameter in run_command.params for option in parameter.opts}
    named = [argument.split("=")[0] for argument in arguments if argument.startswith("-")]
    assert named
    assert set(named) <= known
