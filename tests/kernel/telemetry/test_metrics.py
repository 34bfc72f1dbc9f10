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
from aggregates.commit import Decision
from kernel import Client
from kernel.errors import CommandError
from kernel.runtime.nats_server import end_with_parent
from kernel.runtime.running import find_running
from kernel.transport.connection import publish_frame
from tests.apps import Explode, Note, Notebook, Noted, NoteTwice
from tests.failing import ROOT, Wait
from tests.histories import encode
from tests.metrics_app import NAME_VARIABLE
from tests.pages import load_page
from tests.servers import Server, server

Page = dict[str, dict[frozenset[tuple[str, str]], float]]
METRICS = load_page("metrics")
FAST = (
    "passivation.idle=0.3", "jetstream.publish_timeout=0.4", "database.lock_timeout=0.2", "backlog.interval=0.2",
    "connection.health_check_interval=0.3", "dead_letters.retry_after=0.1", "dead_letters.retries=2", "http.port=0",
    "snapshots.every=3", "snapshots.verify=0", "verification.interval=0.2",
)  # fmt: skip


@dataclass
class Scraped:
    """A service in a separate process, and its page of metrics."""

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
        async def holds_now() -> bool:
            return holds(await self.value(name, **labels))

        try:
            await self.wait(holds_now)
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
        for setting in FAST:
            arguments += ["--set", setting]
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


async def commands(scraped: Scraped) -> None:
    for n in range(5):
        await scraped.send(f"n{n}", Note("word"))
    await scraped.send("n0", NoteTwice("twice"), command_id="again")
    await scraped.send("n0", NoteTwice("twice"), command_id="again")
    with pytest.raises(Rejected):
        await scraped.send("n0", Note(""))
    with pytest.raises(CommandError, match="boom"):
        await scraped.send("n0", Explode())
    with pytest.raises(CommandError, match="no command"):
        await scraped.client.send(
            {"aggregate": "Notebook", "id": "n0", "command": "Fly", "data": {}, "command_id": "fly"}
        )
    await scraped.until(lambda n: n == 6, "eskernel_commands_total", aggregate="Notebook", outcome="ok")
    await scraped.until(lambda n: n == 1, "eskernel_commands_total", command="NoteTwice", outcome="duplicate")
    await scraped.until(lambda n: n == 1, "eskernel_commands_total", command="Note", outcome="rejected")
    await scraped.until(lambda n: n == 1, "eskernel_commands_total", outcome="unknown-command")
    await scraped.until(lambda n: n == 1, "eskernel_errors_total", kind="invalid")
    command = scraped.client.log.subjects.commands()
    scraped.client.connection.send(publish_frame(command.encode(), b"{}", reply=b"$JS.API.INFO"))
    await scraped.until(lambda n: n == 1, "eskernel_replies_refused_total")
    await scraped.until(lambda n: n == 1, "eskernel_errors_total", kind="handler")
    await scraped.until(lambda n: n >= 8, "eskernel_command_seconds_count")
    assert await scraped.value("eskernel_command_seconds_sum") > 0
    await scraped.until(lambda n: n == 0, "eskernel_commands_pending")
    await scraped.until(lambda n: n == 6, "eskernel_appends_total", outcome="ok")
    assert 1 <= await scraped.value("eskernel_append_seconds_count") <= 6
    await scraped.until(lambda n: n == 0, "eskernel_appends_queued")
    await scraped.until(lambda n: n == 0, "eskernel_appends_in_flight")
    assert await scraped.value("eskernel_aggregate_loads_total") >= 5
    assert await scraped.value("eskernel_aggregate_load_seconds_count") >= 5


async def projections(scraped: Scraped) -> None:
    await scraped.until(lambda n: n == 7, "eskernel_events_folded_total")
    await scraped.until(lambda n: n == 6, "eskernel_log_commits_read_total")
    await scraped.until(lambda n: n == 6, "eskernel_projection_position")
    await scraped.until(lambda n: n == 0, "eskernel_projection_lag_commits")
    batches = await scraped.value("eskernel_batches_total", outcome="ok")
    assert batches >= 1
    assert 1 <= await scraped.value("eskernel_batch_events_count") <= 6
    assert await scraped.value("eskernel_batch_events_sum") == 7
    assert 1 <= await scraped.value("eskernel_batch_fold_seconds_count") <= 6
    assert 1 <= await scraped.value("eskernel_batch_write_seconds_count") <= batches
    assert 5 <= await scraped.value("eskernel_rows_written_total", projection="Pages") <= 6
    assert await scraped.value("eskernel_activations_total") >= 5
    await scraped.until(lambda n: n >= 5, "eskernel_rows_compared_total", projection="Pages", outcome="same")


async def passivation(scraped: Scraped) -> None:
    await scraped.until(lambda n: n >= 5, "eskernel_passivations_total", reason="idle")
    await scraped.until(lambda n: n == 0, "eskernel_actors_live")
    assert await scraped.value("eskernel_actor_shells") >= 5


async def dead_letters(scraped: Scraped) -> None:
    assert await scraped.value("eskernel_projections_paused") == 0
    assert await scraped.value("eskernel_build_commits_left") == 0
    await scraped.send("sick", Note("poison row"))
    await scraped.until(lambda n: n >= 1, "eskernel_parkings_total")
    await scraped.until(lambda n: n >= 1, "eskernel_dead_letters_total")
    await scraped.until(lambda n: n == 1, "eskernel_parked_aggregates")
    await scraped.until(lambda n: n >= 2, "eskernel_dead_letter_retries_total", outcome="failed")
    connection, log = scraped.client.log._connection, scraped.client.log
    connection.send(publish_frame(f"{scraped.client.app.name}.evt.0.Notebook.x".encode(), b"garbage"))
    await scraped.until(lambda n: n >= 1, "eskernel_quarantined_messages")
    newer = log.subjects.address("Notebook", "newer")
    connection.send(publish_frame(newer.subject.encode(), foreign_commit(0).replace(b'"Noted"', b'"Unheard"')))
    await scraped.until(lambda n: n == 1, "eskernel_waiting_aggregates")


async def conflicts(scraped: Scraped) -> None:
    """Another writer appends just before the service does."""
    connection, log = scraped.client.log._connection, scraped.client.log
    address = log.subjects.address("Notebook", "n0")
    await scraped.until(lambda n: n >= 1, "eskernel_snapshots_taken_total", outcome="ok")
    receipt = await scraped.send("n0", Note("before"))
    await scraped.until(lambda n: n >= 1, "eskernel_snapshots_used_total", outcome="ok")
    version = receipt.version
    for _ in range(100):
        connection.send(publish_frame(address.subject.encode(), foreign_commit(version)))
        receipt = await scraped.send("n0", Note("after"))
        version = receipt.version
        if await scraped.value("eskernel_appends_total", outcome="conflict"):
            break
        await asyncio.sleep(1.1 if _ % 5 == 4 else 0)
    await scraped.until(lambda n: n >= 1, "eskernel_appends_total", outcome="conflict")


async def database(scraped: Scraped) -> None:
    connection = sqlite3.connect(scraped.database, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    await scraped.send("n1", Note("while locked"))
    await scraped.until(lambda n: n >= 1, "eskernel_batches_total", outcome="failed")
    await scraped.until(lambda n: n >= 1, "eskernel_errors_total", kind="database")
    # meanwhile another worker has taken over
    connection.execute("UPDATE eskernel_checkpoint SET epoch = epoch + 1000 WHERE epoch >= 0")
    connection.execute("COMMIT")
    connection.close()
    await scraped.until(lambda n: n >= 1, "eskernel_fenced_batches_total")
    await scraped.until(lambda n: n >= 1, "eskernel_projection_failures_total", cause="fenced")
    # on SQLite a writer waits for the other one
    assert await scraped.value("eskernel_database_deadlocks_total") == 0
    # each session reads with a consumer of its own
    await scraped.until(lambda n: n >= 2, "eskernel_consumers_created_total")


async def connection(scraped: Scraped) -> None:
    for attempt in range(20):
        sending = [asyncio.create_task(scraped.send(f"many{n}", Note("while frozen"))) for n in range(200)]
        await asyncio.sleep(0.003 * attempt)  # at some moment between the service's appends and their acknowledgements
        os.kill(scraped.nats.pid, signal.SIGSTOP)
        await asyncio.sleep(0.8)
        os.kill(scraped.nats.pid, signal.SIGCONT)
        await asyncio.gather(*sending)
        await asyncio.sleep(1.1)  # the counter is updated each second
        if await scraped.value("eskernel_append_read_backs_total"):
            break
    await scraped.until(lambda n: n >= 1, "eskernel_append_read_backs_total")
    await scraped.nats.stop()
    await scraped.until(lambda n: n == 0, "eskernel_nats_connected")
    await scraped.nats.start()
    await scraped.until(lambda n: n == 1, "eskernel_nats_connected")
    await scraped.until(lambda n: n >= 1, "eskernel_nats_reconnects_total")
    assert await scraped.value("eskernel_nats_events_total", event="disconnected") >= 1
    await scraped.until(lambda n: n >= 1, "eskernel_errors_total", kind="connection")


async def leases(scraped: Scraped) -> None:
    await scraped.until(lambda n: n == 64, "eskernel_partitions_held")
    await scraped.until(lambda n: n >= 64, "eskernel_leases_lost_total")  # the bucket was in the server's memory
    assert await scraped.value("eskernel_partitions_moved_total", direction="taken") >= 64


async def governance(scraped: Scraped) -> None:
    connection, subject = scraped.client.log._connection, scraped.client.log.subjects.service("limits")

    async def limit(**values: float | None) -> None:
        named = {f"{name}.rate": value for name, value in values.items()}
        at = asyncio.get_running_loop().time() + 1e9
        answer = await connection.request(subject, orjson.dumps({"at": at, "overrides": named}), timeout=5)
        assert "error" not in orjson.loads(answer.data), answer.data

    await limit(commands=5.0, live=1.0)
    await asyncio.gather(*(scraped.send(f"n{n}", Note("many")) for n in range(15)))
    await scraped.until(lambda n: n >= 1, "eskernel_commands_refused_total", limit="commands")
    await scraped.until(lambda n: n == 5, "eskernel_rate_limit", lane="commands")
    await scraped.until(lambda n: n <= 5, "eskernel_rate_present", lane="commands")
    await scraped.until(lambda n: n > 0, "eskernel_throttled_seconds_total", lane="live")
    await limit(commands=None, live=None)


async def backlog(scraped: Scraped) -> None:
    for projection in ("Pages", "Words", "Lines"):
        await scraped.until(lambda n: n == 0, "eskernel_backlog_commits", projection=projection)
        await scraped.until(lambda n: n == 0, "eskernel_backlog_age_seconds", projection=projection)
        await scraped.until(lambda n: n == 0, "eskernel_backlog_drain_seconds", projection=projection)
        for level in ("warn", "critical"):
            await scraped.until(lambda n: n == 0, "eskernel_backlog_partitions", projection=projection, level=level)
    await scraped.until(lambda n: n >= 0, "eskernel_projected_commits_per_second")
    await scraped.until(lambda n: n == 0, "eskernel_publishing_pressure")
    # the database was locked, and the server was stopped
    assert await scraped.value("eskernel_alerts_total", kind="health") >= 2
    assert await scraped.value("eskernel_alerts_dropped_total") == 0


async def memory(scraped: Scraped) -> None:
    async def keep_live() -> None:
        while True:
            await asyncio.gather(*(scraped.send(f"big{n}", Note("x" * 1000)) for n in range(20)))
            await asyncio.sleep(0.05)

    sending = asyncio.create_task(keep_live())
    await scraped.until(lambda n: n > 1000, "eskernel_actors_memory_bytes")
    sending.cancel()


async def reactions(scraped: Scraped) -> None:
    await scraped.send("pond", Note("ripple"))
    await scraped.send("lake", Note("late ripple"))
    of = {"reaction": "Ripples"}
    for outcome in ("ok", "nothing", "failed"):
        await scraped.until(lambda n: n >= 1, "eskernel_reactions_total", outcome=outcome, **of)
    await scraped.until(lambda n: n == 1, "eskernel_policy_commands_total", policy="Ripples", outcome="ok")
    await scraped.until(lambda n: n == 1, "eskernel_policy_commands_total", policy="Ripples", outcome="rejected")
    await scraped.until(lambda n: n == 1, "eskernel_reaction_parked_aggregates", **of)
    await scraped.until(lambda n: n == 1, "eskernel_timers_pending", policy="Ripples")
    await scraped.until(lambda n: n == 0, "eskernel_timers_late", policy="Ripples")
    await scraped.until(lambda n: n == 0, "eskernel_reaction_lag_commits", **of)
    await scraped.until(lambda n: n == 0, "eskernel_reaction_lag_seconds", **of)


async def the_kernel_itself(scraped: Scraped) -> None:
    assert await scraped.value("eskernel_kernel_bugs_total") == 0
    await scraped.until(lambda n: n >= 5, "eskernel_jobs_total", outcome="ok")
    assert await scraped.value("eskernel_job_seconds") > 0
    assert 0 <= await scraped.value("eskernel_loop_lag_seconds") < 60
    await scraped.until(lambda n: n >= 6, "eskernel_component_ok")
    assert await scraped.value("process_resident_memory_bytes") > 1e6


SCENARIO: list[Callable[[Scraped], Coroutine[Any, Any, None]]] = [
    commands, projections, passivation, dead_letters, conflicts, database, connection, leases, governance,
    backlog, memory, reactions,
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
    assert not {label for label in labels if "special" in label}
