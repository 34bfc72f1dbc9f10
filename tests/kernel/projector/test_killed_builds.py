"""Kill -9 at random moments of build, verification and cut-over: readers see one whole version, and builds go on."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from kernel import Client, Service
from projections.database import open_database
from tests.conftest import settings_for
from tests.kernel.projector import building_process
from tests.ledgers import Pay, Purse, ledger

KILLS = int(os.environ.get("TEST_KILLS", "10"))
"""On each database."""
COMMITS, EACH = 600, 4
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.kernel.projector.building_process"])


def read(url: str) -> tuple[int, list[Any]]:
    """Return the version that readers see, and what they see."""
    engine = open_database(url)
    try:
        with engine.begin() as connection:
            versions = connection.execute(
                text("SELECT version FROM eskernel_projection WHERE name = 'Balances' AND state = 'live'")
            ).all()
            assert len(versions) == 1
            rows = connection.execute(text("SELECT * FROM balances ORDER BY purse")).all()
            return versions[0].version, [tuple(row) for row in rows]
    finally:
        engine.dispose()


def attempt(nats: str, database: str, name: str, version: int, chance: random.Random, kill: bool) -> str:
    """Let a process build, and kill it at a random moment. Return the phase in which it was, or `done`."""
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=building_process.build, args=(nats, database, name, version, theirs))
    process.start()
    theirs.close()
    phase = chance.choice(["begun", "building", "verifying", "cut-over"]) if kill else "done"
    after = chance.randrange(COMMITS) if phase in ("building", "verifying") else 0
    at = "begun"
    while (at != phase or after > 0) and (step := receive(ours)) is not None:
        at, done = step
        if at == phase and done >= after:
            after = 0
        if phase == "cut-over" and at == "verifying" and done >= COMMITS:
            at = phase  # the second fold is over: what follows is its comparison, and the cut-over
    if at == "done":
        process.join(20)
        assert process.exitcode == 0
    else:
        time.sleep(chance.uniform(0, 0.06))
        process.kill()
        process.join(20)
    ours.close()
    return at


def receive(pipe: Connection) -> tuple[str, int] | None:
    try:
        step: tuple[str, int] = pipe.recv()
    except EOFError:
        return None
    return step


async def test_one_consistent_version_is_live_whenever_a_build_is_killed_and_the_build_is_finished(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    print(f"TEST_SEED={seed}")
    chance = random.Random(seed)
    settings = settings_for(tmp_path / "data", nats=nats_url, database=database_url, partitions=4)
    async with (
        Service(ledger(app_name), settings),
        await Client.connect(ledger(app_name), nats=nats_url, database=database_url) as client,
    ):
        for _ in range(EACH):
            receipts = await asyncio.gather(*(client.execute(Purse, f"p{n}", Pay(n)) for n in range(COMMITS // EACH)))
        await client.query("SELECT 1", after=receipts)
    plain = sorted((f"p{n}", EACH * n) for n in range(COMMITS // EACH))
    version, met = 2, []
    for _ in range(KILLS):
        met.append(await asyncio.to_thread(attempt, nats_url, database_url, app_name, version, chance, True))
        live, rows = await asyncio.to_thread(read, database_url)
        assert live in (version - 1, version)
        assert rows == [(*row, EACH) for row in plain] if live > 1 else rows == plain
        version = live + 1
    assert await asyncio.to_thread(attempt, nats_url, database_url, app_name, version, chance, False) == "done"
    assert await asyncio.to_thread(read, database_url) == (version, [(*row, EACH) for row in plain])
    print("killed in", met)


@pytest.fixture(autouse=True, scope="module")
def _end_forkserver() -> Any:
    yield
    server: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    server._stop()
