"""Killing the worker again and again: at the end every number is exactly right."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

import psutil
import pytest

from aggregates.commit import decode
from kernel import Client
from kernel.log import find_log
from kernel.transport.dial import connect
from tests.apps import Note, Notebook, notebooks

KILLS = 2
LANES = 40


class Worker:
    """The service in a separate process that can be killed and restarted."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> str:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.crash_service", *self.arguments, stdout=asyncio.subprocess.PIPE
        )
        assert self.process.stdout is not None
        return (await self.process.stdout.readline()).decode().strip()

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.process.wait()


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("server", "database_url"), [("external", "postgresql"), ("embedded", "sqlite")], indirect=["database_url"]
)
async def test_kills_at_random_moments_lose_and_double_nothing(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, server: str
) -> None:
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    print(f"TEST_SEED={seed}")
    chance = random.Random(seed)
    nats = "embedded" if server == "embedded" else nats_url
    worker = Worker(app_name, str(tmp_path / "data"), nats, database_url)
    url = await worker.start()
    stopping = asyncio.Event()
    acknowledged: dict[str, list[int]] = {}
    async with await Client.connect(notebooks(app_name), nats=url, database=database_url) as client:

        async def lane(number: int) -> None:
            sent = 0
            while not stopping.is_set():
                receipt = await client.execute(
                    Notebook, f"n{number}", Note("word", sent), command_id=f"{number}-{sent}", timeout=60
                )
                assert receipt.version == sent + 1
                acknowledged.setdefault(f"n{number}", []).append(sent)
                sent += 1

        async with asyncio.TaskGroup() as group:
            for number in range(LANES):
                group.create_task(lane(number))
            for _ in range(KILLS):
                before = sum(map(len, acknowledged.values()))
                wanted = before + chance.randrange(1, 400)
                while sum(map(len, acknowledged.values())) < wanted:
                    await asyncio.sleep(0)
                await worker.kill()
                assert await worker.start() == url, "clients of the old service must find the new one"
            stopping.set()
        last = [await client.execute(Notebook, f"n{n}", Note("word", 0), command_id="last") for n in range(LANES)]
        pages = await client.query("select * from pages", after=last, timeout=30)
        words = await client.query("select word, times from words")
        lines = await client.query("select notebook, max(sequence) as m, count(*) as n from lines group by notebook")
        info = await client.log.info()
    expected = {name: (len(sent) + 1, sum(sent)) for name, sent in acknowledged.items()}
    assert {page["notebook"]: (page["notes"], page["total"]) for page in pages} == expected
    total = sum(count for count, _ in expected.values())
    assert words == [{"word": "word", "times": total}]
    assert {line["notebook"]: (line["m"], line["n"]) for line in lines} == {n: (c, c) for n, (c, _) in expected.items()}
    await _check_log(url, app_name, total, info.last)
    await worker.kill()


async def _check_log(url: str, app: str, total: int, last: int) -> None:
    """Read the raw log: each aggregate's events are 1, 2, 3, ... and each command is there once."""
    connection = await connect(url, name="checker")
    log = await find_log(connection, app)
    reader = await log.read(0)
    sequences: dict[str, int] = {}
    commands: set[tuple[str, str]] = set()
    at = 0
    while at < last:
        for commit in (await reader.next(1000)).commits:
            at = commit.sequence
            for envelope in decode(commit.payload):
                assert envelope.sequence == sequences.get(commit.subject, 0) + 1
                sequences[commit.subject] = envelope.sequence
                assert (commit.subject, envelope.commandid) not in commands
                commands.add((commit.subject, envelope.commandid))
    assert len(commands) == total
    await reader.close()
    await log.close()
    await connection.close()


async def test_a_service_that_starts_after_a_kill_does_not_wait_for_the_leases_of_the_dead(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path / 'p.db'}"
    worker = Worker(app_name, str(tmp_path / "data"), nats_url, database, "60")
    await worker.start()
    async with await Client.connect(notebooks(app_name), nats=nats_url) as client:
        await client.execute(Notebook, "n", Note("before"))
        for version in (2, 3):
            await worker.kill()
            await worker.start()
            assert (await client.execute(Notebook, "n", Note("after"), timeout=30)).version == version
    assert len(list((tmp_path / "data" / app_name / "workers").iterdir())) == 1, "the dead are forgotten"
    await worker.kill()


async def test_a_killed_service_leaves_no_server_behind(database_url: str, app_name: str, tmp_path: Path) -> None:
    worker = Worker(app_name, str(tmp_path / "data"), "embedded", database_url)
    await worker.start()
    assert worker.process is not None
    children = psutil.Process(worker.process.pid).children(recursive=True)
    assert [child.name() for child in children] == ["nats-server"]
    os.kill(worker.process.pid, signal.SIGKILL)
    await worker.process.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, 10)
    assert alive == []
