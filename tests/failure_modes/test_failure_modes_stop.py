"""Orderly and disorderly stops, and clocks that jump."""

from __future__ import annotations

import asyncio
import datetime as dt
import signal
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from kernel import Client
from kernel.partitions.bucket import bucket_of
from kernel.transport.dial import connect
from projections import dead_letters
from projections.tables import dead_letter
from tests.apps import Note, Notebook, notebooks
from tests.failing import Process, Wait, api, free_port, metric, running, server
from tests.faults.proxy import Proxy


async def lane(client: Client, number: int, done: list[int], stop: asyncio.Event) -> None:
    """Send commands one after the other until `stop` is set; each takes effect once."""
    while not stop.is_set():
        receipt = await client.execute(
            Notebook, f"n{number}", Note("a"), command_id=f"{number}-{done[number]}", timeout=60
        )
        done[number] += 1
        assert receipt.version == done[number]


async def test_a_service_stopped_under_load_loses_and_doubles_nothing(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    database = f"sqlite:///{tmp_path / 'projections.db'}"
    process = Process(app_name, tmp_path, nats_url, database)
    await process.start()
    assert process.process is not None
    done, stop = [0] * 20, asyncio.Event()
    try:
        async with await Client.connect(notebooks(app_name), nats=nats_url) as client:
            lanes = [asyncio.create_task(lane(client, number, done, stop)) for number in range(20)]
            await wait_until(lambda: sum(done) > 200)
            process.process.terminate()
            assert await process.wait() == 0
            assert "stopped" in process.output()
            async with api(nats_url) as call:
                # the next service need not wait for leases to expire
                found = await call(f"STREAM.INFO.KV_{bucket_of(app_name)}", {"subjects_filter": ">"})
                assert found["state"].get("subjects") is None
            async with running(app_name, tmp_path, nats_url) as here:
                wanted = sum(done) + 200
                await wait_until(lambda: sum(done) > wanted)
                stop.set()
                await asyncio.gather(*lanes)
                here.acknowledged = {f"n{number}": count for number, count in enumerate(done)}
                await here.check()
    finally:
        process.close()


async def test_a_stop_answers_pending_commands_and_tells_other_senders_when_to_retry(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    proxy = Proxy(free_port(), int(nats_url.rsplit(":", 1)[1]))
    await proxy.start()
    async with running(app_name, tmp_path, proxy.url, client=nats_url) as here:
        await here.note(10)
        proxy.delay = 0.3
        under_way = asyncio.create_task(here.note(10))
        gateway = here.service.parts.gateway
        await wait_until(lambda: gateway.pending.total)
        stopping = asyncio.create_task(here.service.stop())
        connection = await connect(nats_url, name="late")
        request = orjson.dumps({"aggregate": "Notebook", "id": "late", "command": "Note", "data": {"text": "a"}})
        subject = here.client.log.subjects.commands(here.client.log.subjects.partition("Notebook", "late"))
        answer = orjson.loads((await connection.request(subject, request, timeout=5)).data)
        assert answer["error"]["type"] == "overloaded"
        assert answer["error"]["retry_after"] > 0
        await under_way
        proxy.delay = 0.0
        await stopping
        await connection.close()
    await proxy.stop()
    async with running(app_name, tmp_path, nats_url) as again:
        again.acknowledged = here.acknowledged
        await again.check()


@pytest.mark.parametrize("how", ["deadline", "second signal"])
async def test_a_stop_ends_while_the_server_does_not_answer_and_the_next_start_goes_on(
    app_name: str, tmp_path: Path, wait_until: Wait, how: str
) -> None:
    async with server(tmp_path) as nats:
        process = Process(app_name, tmp_path, nats.url, f"sqlite:///{tmp_path / 'projections.db'}", "--drain", "1")
        await process.start()
        assert process.process is not None
        try:
            async with await Client.connect(notebooks(app_name), nats=nats.url) as client:
                for n in range(5):
                    await client.execute(Notebook, f"n{n}", Note("a"))
                nats.send(signal.SIGSTOP)
                started = time.monotonic()
                process.process.terminate()
                if how == "second signal":
                    await wait_until(lambda: "stopping" in process.output())
                    process.process.terminate()
                assert await process.wait(20) == (1 if how == "second signal" else 0)
                assert time.monotonic() - started < (5 if how == "second signal" else 15)
                nats.send(signal.SIGCONT)
        finally:
            process.close()
        async with running(app_name, tmp_path, nats.url) as here:
            here.acknowledged = {f"n{n}": 1 for n in range(5)}
            await here.check()


# clocks


class Clock:
    """The wall clock as the service sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        clock, real = self, time.time

        class Moved(dt.datetime):
            @classmethod
            def now(cls, tz: dt.tzinfo | None = None) -> Any:
                return dt.datetime.fromtimestamp(real() + clock.ahead, tz)

        monkeypatch.setattr(time, "time", lambda: real() + self.ahead)
        for module in ("apscheduler.schedulers.base", "apscheduler.triggers.interval", "kernel.runtime.scheduler"):
            monkeypatch.setattr(f"{module}.datetime", Moved)


@pytest.mark.parametrize("hours", [-48, 48, 24 * 365])
async def test_a_clock_that_jumps_stops_no_job_and_costs_no_lease(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    clock = Clock(monkeypatch)
    async with running(app_name, tmp_path, nats_url, lease=1.5) as here:
        await here.note(20)
        lost = metric("eskernel_leases_lost_total")
        jobs = here.service.scheduler.jobs
        clock.ahead = hours * 3600.0
        before = {name: job.runs for name, job in jobs.items()}
        started = time.monotonic()
        often = [name for name, job in jobs.items() if job.interval <= 1]
        await wait_until(lambda: all(jobs[name].runs >= before[name] + 3 for name in often), timeout=8)
        assert time.monotonic() - started < 8
        await here.check()
        assert metric("eskernel_leases_lost_total") == lost


async def test_a_dead_letters_next_attempt_survives_a_clock_set_back(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    async with running(app_name, tmp_path, nats_url, retry_after=1.0) as here:
        last = await here.client.execute(Notebook, "bad", Note("poison row"))
        await here.client.query("select 1", after=last)
        engine = here.service.parts.engine
        clock.ahead = 48 * 3600.0
        with engine.begin() as connection:
            connection.execute(dead_letter.update().values(next_attempt=time.time() + 1))
        clock.ahead = 0.0
        assert [letter.aggregate_id for letter in dead_letters.due(engine, time.time())] == ["bad"]
