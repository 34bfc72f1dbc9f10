"""Every declared metric has the value that a scenario on a running service gives it."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from aggregates import Rejected
from aggregates.commit import Decision, encode
from kernel import Client
from kernel.errors import CommandError
from kernel.runtime.directory import find_running
from kernel.runtime.nats_server import end_with_parent
from kernel.transport.connection import publish_frame
from tests.apps import Explode, Note, Notebook, Noted, NoteTwice
from tests.failing import ROOT, Wait
from tests.metrics_app import NAME_VARIABLE
from tests.pages import load_page
from tests.servers import Server, server

Page = dict[str, dict[frozenset[tuple[str, str]], float]]
METRICS = load_page("metrics")
FAST = (
    "passivation.idle=0.3", "jetstream.publish_timeout=0.4", "database.lock_timeout=0.2", "backlog.interval=0.2",
    "connection.health_check_interval=0.3", "dead_letters.retry_after=0.1", "dead_letters.retries=2", "http.port=0",
)  # fmt: skip


@dataclass
class Scraped:
    """A service in a process of its own, and its page of metrics."""

    process: subprocess.Popen[bytes]
    client: Client
    nats: Server
    database: Path
    url: str
    wait: Wait

    async def page(self) -> Page:
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/metrics") as answer:
            text = await answer.text()
        found: Page = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
        return found

    async def value(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that have these labels."""
        wanted = set(labels.items())
        return sum(value for have, value in (await self.page()).get(name, {}).items() if wanted <= have)

    async def until(self, holds: Callable[[float], bool], name: str, **labels: str) -> float:
        async def look() -> bool:
            return holds(await self.value(name, **labels))

        try:
            await self.wait(look)
        except TimeoutError:
            raise AssertionError(f"{name} {labels} is {await self.value(name, **labels)}") from None
        return await self.value(name, **labels)

    async def send(self, name: str, command: object, **more: Any) -> Any:
        return await self.client.execute(Notebook, name, command, timeout=30, **more)


@pytest.fixture
async def here(
    app_name: str, tmp_path: Path, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Scraped]:
    monkeypatch.setenv(NAME_VARIABLE, app_name)
    async with server(tmp_path / "nats") as nats:
        arguments = [sys.executable, "-m", "kernel.cli", "run", "tests.metrics_app:app", "--nats", nats.url]
        arguments += ["--data", str(tmp_path / "data")]
        for one in FAST:
            arguments += ["--set", one]
        log = (tmp_path / "log").open("wb")
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            preexec_fn=end_with_parent(signal.SIGKILL),  # noqa: PLW1509
        )  # fmt: skip
        described = tmp_path / "data" / app_name / "service.json"

        def started() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            return described.exists()

        try:
            await wait_until(started, 30)
            running = find_running(tmp_path / "data")
            from tests.metrics_app import app

            app.name = app_name
            async with await Client.connect(app, data=tmp_path / "data") as client:
                yield Scraped(
                    process, client, nats, tmp_path / "data" / app_name / "projections.db", running.http, wait_until
                )
        finally:
            process.kill()
            process.wait()
            log.close()


def foreign_commit(version: int) -> bytes:
    return encode(
        "/x/Notebook",
        "n0",
        {Noted: ("Noted", 1)},
        [Decision(f"f{version}", [Noted("f", 1)])],
        version,
        "2026-01-01T00:00:00Z",
    )


async def commands(one: Scraped) -> None:
    for n in range(5):
        await one.send(f"n{n}", Note("word"))
    await one.send("n0", NoteTwice("twice"), command_id="again")
    await one.send("n0", NoteTwice("twice"), command_id="again")
    with pytest.raises(Rejected):
        await one.send("n0", Note(""))
    with pytest.raises(CommandError, match="boom"):
        await one.send("n0", Explode())
    with pytest.raises(CommandError, match="no command"):
        await one.client.send({"aggregate": "Notebook", "id": "n0", "command": "Fly", "data": {}, "command_id": "fly"})
    await one.until(lambda n: n == 6, "eskernel_commands_total", aggregate="Notebook", outcome="ok")
    await one.until(lambda n: n == 1, "eskernel_commands_total", command="NoteTwice", outcome="duplicate")
    await one.until(lambda n: n == 1, "eskernel_commands_total", command="Note", outcome="rejected")
    await one.until(lambda n: n == 1, "eskernel_commands_total", outcome="unknown-command")
    await one.until(lambda n: n == 1, "eskernel_errors_total", kind="invalid")
    await one.until(lambda n: n == 1, "eskernel_errors_total", kind="handler")
    await one.until(lambda n: n >= 8, "eskernel_command_seconds_count")
    assert await one.value("eskernel_command_seconds_sum") > 0
    await one.until(lambda n: n == 0, "eskernel_commands_pending")
    await one.until(lambda n: n == 6, "eskernel_appends_total", outcome="ok")
    assert 1 <= await one.value("eskernel_append_seconds_count") <= 6
    await one.until(lambda n: n == 0, "eskernel_appends_queued")
    await one.until(lambda n: n == 0, "eskernel_appends_in_flight")
    assert await one.value("eskernel_aggregate_loads_total") >= 5
    assert await one.value("eskernel_aggregate_load_seconds_count") >= 5


async def projections(one: Scraped) -> None:
    await one.until(lambda n: n == 7, "eskernel_events_folded_total")
    await one.until(lambda n: n == 6, "eskernel_log_commits_read_total")
    await one.until(lambda n: n == 6, "eskernel_projection_position")
    await one.until(lambda n: n == 0, "eskernel_projection_lag_commits")
    batches = await one.value("eskernel_batches_total", outcome="ok")
    assert batches >= 1
    assert 1 <= await one.value("eskernel_batch_events_count") <= 6
    assert await one.value("eskernel_batch_events_sum") == 7
    assert 1 <= await one.value("eskernel_batch_fold_seconds_count") <= 6
    assert 1 <= await one.value("eskernel_batch_write_seconds_count") <= batches
    assert 5 <= await one.value("eskernel_rows_written_total", projection="Pages") <= 6
    assert await one.value("eskernel_activations_total") >= 5


async def passivation(one: Scraped) -> None:
    await one.until(lambda n: n >= 5, "eskernel_passivations_total", reason="idle")
    await one.until(lambda n: n == 0, "eskernel_actors_live")
    assert await one.value("eskernel_actor_shells") >= 5


async def dead_letters(one: Scraped) -> None:
    await one.send("sick", Note("poison row"))
    await one.until(lambda n: n >= 1, "eskernel_parkings_total")
    await one.until(lambda n: n >= 1, "eskernel_dead_letters_total")
    await one.until(lambda n: n == 1, "eskernel_parked_aggregates")
    await one.until(lambda n: n >= 2, "eskernel_dead_letter_retries_total", outcome="failed")
    connection = one.client.log._connection
    connection.send(publish_frame(f"{one.client.app.name}.evt.0.Notebook.x".encode(), b"garbage"))
    await one.until(lambda n: n >= 1, "eskernel_quarantined_messages")


async def conflicts(one: Scraped) -> None:
    """Somebody else appends just before the service does."""
    connection, log = one.client.log._connection, one.client.log
    address = log.subjects.address("Notebook", "n0")
    receipt = await one.send("n0", Note("before"))
    version = receipt.version
    for _ in range(100):
        connection.send(publish_frame(address.subject.encode(), foreign_commit(version)))
        receipt = await one.send("n0", Note("after"))
        version = receipt.version
        if await one.value("eskernel_appends_total", outcome="conflict"):
            break
        await asyncio.sleep(1.1 if _ % 5 == 4 else 0)
    await one.until(lambda n: n >= 1, "eskernel_appends_total", outcome="conflict")


async def database(one: Scraped) -> None:
    connection = sqlite3.connect(one.database, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    await one.send("n1", Note("while locked"))
    await one.until(lambda n: n >= 1, "eskernel_batches_total", outcome="failed")
    await one.until(lambda n: n >= 1, "eskernel_errors_total", kind="database")
    # and somebody else has taken over meanwhile
    connection.execute("UPDATE eskernel_checkpoint SET epoch = epoch + 1000 WHERE epoch >= 0")
    connection.execute("COMMIT")
    connection.close()
    await one.until(lambda n: n >= 1, "eskernel_fenced_batches_total")


async def connection(one: Scraped) -> None:
    for attempt in range(20):
        sending = [asyncio.create_task(one.send(f"many{n}", Note("while frozen"))) for n in range(200)]
        await asyncio.sleep(0.003 * attempt)  # somewhere between the service's appends and their acknowledgements
        os.kill(one.nats.pid, signal.SIGSTOP)
        await asyncio.sleep(0.8)
        os.kill(one.nats.pid, signal.SIGCONT)
        await asyncio.gather(*sending)
        await asyncio.sleep(1.1)  # the counter is brought up to date each second
        if await one.value("eskernel_append_read_backs_total"):
            break
    await one.until(lambda n: n >= 1, "eskernel_append_read_backs_total")
    await one.nats.stop()
    await one.until(lambda n: n == 0, "eskernel_nats_connected")
    await one.nats.start()
    await one.until(lambda n: n == 1, "eskernel_nats_connected")
    await one.until(lambda n: n >= 1, "eskernel_nats_reconnects_total")
    assert await one.value("eskernel_nats_events_total", event="disconnected") >= 1
    assert await one.value("eskernel_errors_total", kind="connection") >= 1


async def leases(one: Scraped) -> None:
    await one.until(lambda n: n == 64, "eskernel_partitions_held")
    await one.until(lambda n: n >= 64, "eskernel_leases_lost_total")  # the bucket was in the server's memory
    assert await one.value("eskernel_partitions_moved_total", direction="taken") >= 64


async def governance(one: Scraped) -> None:
    connection, subject = one.client.log._connection, one.client.log.subjects.service("limits")

    async def limit(**values: float | None) -> None:
        named = {f"{name}.rate": value for name, value in values.items()}
        at = asyncio.get_running_loop().time() + 1e9
        answer = await connection.request(subject, orjson.dumps({"at": at, "overrides": named}), timeout=5)
        assert "error" not in orjson.loads(answer.data), answer.data

    await limit(commands=5.0, live=1.0)
    await asyncio.gather(*(one.send(f"n{n}", Note("many")) for n in range(15)))
    await one.until(lambda n: n >= 1, "eskernel_commands_refused_total", limit="commands")
    await one.until(lambda n: n == 5, "eskernel_rate_limit", lane="commands")
    await one.until(lambda n: n <= 5, "eskernel_rate_present", lane="commands")
    await one.until(lambda n: n > 0, "eskernel_throttled_seconds_total", lane="live")
    await limit(commands=None, live=None)


async def backlog(one: Scraped) -> None:
    for projection in ("Pages", "Words", "Lines"):
        await one.until(lambda n: n == 0, "eskernel_backlog_commits", projection=projection)
        await one.until(lambda n: n == 0, "eskernel_backlog_age_seconds", projection=projection)
        await one.until(lambda n: n == 0, "eskernel_backlog_drain_seconds", projection=projection)
        for level in ("warn", "critical"):
            await one.until(lambda n: n == 0, "eskernel_backlog_partitions", projection=projection, level=level)
    await one.until(lambda n: n >= 0, "eskernel_projected_commits_per_second")
    await one.until(lambda n: n == 0, "eskernel_publishing_pressure")
    # the database was locked, and the server away
    assert await one.value("eskernel_alerts_total", kind="health") >= 2
    assert await one.value("eskernel_alerts_dropped_total") == 0


async def memory(one: Scraped) -> None:
    async def keep_live() -> None:
        while True:
            await asyncio.gather(*(one.send(f"big{n}", Note("x" * 1000)) for n in range(20)))
            await asyncio.sleep(0.05)

    sending = asyncio.create_task(keep_live())
    await one.until(lambda n: n > 1000, "eskernel_actors_memory_bytes")
    sending.cancel()


async def the_kernel_itself(one: Scraped) -> None:
    assert await one.value("eskernel_kernel_bugs_total") == 0
    await one.until(lambda n: n >= 5, "eskernel_jobs_total", outcome="ok")
    assert await one.value("eskernel_job_seconds") > 0
    assert 0 <= await one.value("eskernel_loop_lag_seconds") < 60
    await one.until(lambda n: n >= 6, "eskernel_component_ok")
    assert await one.value("process_resident_memory_bytes") > 1e6


SCENARIO: list[Callable[[Scraped], Coroutine[Any, Any, None]]] = [
    commands, projections, passivation, dead_letters, conflicts, database, connection, leases, governance,
    backlog, memory,
    the_kernel_itself,
]  # fmt: skip


async def test_every_metric_has_the_value_that_a_scenario_gives_it(here: Scraped) -> None:
    looked_at: set[str] = set()
    value = here.value

    async def noting(name: str, **labels: str) -> float:
        looked_at.add(name)
        return await value(name, **labels)

    here.value = noting  # type: ignore[method-assign]
    for step in SCENARIO:
        await step(here)
    base = {name.removesuffix("_count").removesuffix("_sum") for name in looked_at}
    assert {METRICS.name_of(metric) for metric in METRICS.declared()} <= base | looked_at


async def test_no_sample_has_an_id_in_its_labels(here: Scraped) -> None:
    await here.send("a-very-special-id", Note("x"), command_id="a-very-special-command")
    await here.until(lambda n: n == 1, "eskernel_commands_total", outcome="ok")
    labels = {value for samples in (await here.page()).values() for have in samples for _, value in have}
    assert not {one for one in labels if "special" in one}
