"""The rows about cold aggregates: a worker that was killed starts again, and nothing is in memory."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import psutil

from benchmarks import account, backlog, places
from benchmarks.report import Row
from examples.bank import Account, Deposit
from kernel import Client
from kernel.log import open_log
from kernel.settings.sources import settings_of
from kernel.transport.dial import connect

AGGREGATES, COMMITS, LONG = 2_000, 250, 100_000
IN_FLIGHT, SECONDS, AIM = 64, 5, 2_000
AGING_SECONDS = 30
AIM_MS = 50
SIZES = (100_000, 1_000_000, 5_000_000)
"""Commits in the log while its age is measured."""


async def measure(path: Path, million: bool) -> list[Row]:
    """Measure commands to aggregates that are not in memory, with and without snapshots.

    Args:
        million: a million commits, not half as many.
    """
    each = 500 if million else COMMITS
    return [await _many(path / "many", each), await _one(path / "one", 1_000_000 if million else LONG)]


async def aging(path: Path) -> list[Row]:
    """Measure commands as the log grows: to aggregates that are in memory, and to cold ones after a kill.

    A cold aggregate was not used since the log began to grow, so that it has no snapshot: its whole history is read,
    which grows with the log, since the aggregates do not become more.
    """
    hot, cold = [], []
    async with places.nats(path / "nats") as url:
        server, stored = None, 0
        for size in SIZES:
            await _fill(url, AGGREGATES, (size - stored) // AGGREGATES, f"{size}-")
            stored, server = size, server or _server_process(url)
            async with _service(url, path / "data", path / f"{size}.log", kill=True) as client:
                rate, _, _ = await _flood(client, server, f"{size}-", AGGREGATES, AGING_SECONDS)
                cold.append(rate)
                await asyncio.gather(*(_touch(client, [number], f"{size}-") for number in range(IN_FLIGHT)))
                rate, _, _ = await _flood(client, server, f"{size}-", IN_FLIGHT)
                hot.append(rate)
            print(f"  {size:,} commits: {hot[-1]:,.0f} commands/s, cold {cold[-1]:,.0f}", flush=True)
    return [
        Row(
            f"age of the log: commands to {what} aggregates with {SIZES[-1]:,} commits against {SIZES[0]:,}",
            "commands/s",
            rates[-1],
            limit=rates[0],
            limit_is=f"the same with {SIZES[0]:,} commits",
            extra={f"at_{size}": round(rate) for size, rate in zip(SIZES, rates, strict=True)},
        )
        for what, rates in (("hot", hot), ("cold", cold))
    ]


async def _many(path: Path, each: int) -> Row:
    async with places.nats(path / "nats") as url:
        await _fill(url, AGGREGATES, each)
        server = _server_process(url)
        async with _service(url, path / "data", path / "first.log", kill=True) as client:
            without, *_ = await _flood(client, server)
            # each aggregate has a snapshot when it was loaded, and there was time for it
            for _ in range(3):
                shares = [range(start, AGGREGATES, IN_FLIGHT) for start in range(IN_FLIGHT)]
                await asyncio.gather(*(_touch(client, share) for share in shares))
        async with _service(url, path / "data", path / "second.log", kill=False) as client:
            rate, last, cores = await _flood(client, server)
        lost = (path / "second.log").read_text().count("lost")
    print(f"  {rate:,.0f} commands/s, in the last second {last:,.0f}; without snapshots {without:,.0f}", flush=True)
    return Row(
        f"cold aggregates: {AGGREGATES:,} of {each} commits, service killed and started, {IN_FLIGHT} in flight at "
        f"random; the {SECONDS}th second",
        "commands/s",
        last,
        aim=f">= {AIM:,} after {SECONDS} s, no lease lost",
        met=last >= AIM and not lost and cores < 1,
        extra={
            "over_all_seconds": round(rate),
            "without_snapshots": round(without),
            "nats_server_cores": round(cores, 2),
            "leases_lost": lost,
        },
    )


async def _one(path: Path, events: int) -> Row:
    async with places.nats(path / "nats") as url:
        await _fill(url, 1, events)
        took = []
        for run in ("without", "with"):
            async with _service(url, path / "data", path / f"{run}.log", kill=True) as client:
                begin = time.perf_counter()
                await client.execute(Account, "account-0", Deposit(1), timeout=300)
                took.append((time.perf_counter() - begin) * 1e3)
                await asyncio.sleep(1)  # the snapshot is on its way
    print(
        f"  cold: one aggregate of {events:,} events: {took[1]:.0f} ms, without a snapshot {took[0]:,.0f}", flush=True
    )
    return Row(
        f"cold aggregate of {events:,} events: its first command after a kill",
        "ms",
        took[1],
        aim=f"<= {AIM_MS} ms",
        met=took[1] <= AIM_MS,
        extra={"without_snapshot_ms": round(took[0])},
    )


async def _fill(url: str, aggregates: int, each: int, prefix: str = "account-") -> None:
    connection = await connect(url, name="bench")
    log = await open_log(connection, account.app.name, settings_of({"jetstream.group_commit": "never"}))
    await backlog.fill(account.app, log, backlog.deposits(aggregates, each, prefix))
    await log.close()
    await connection.close()


def _server_process(url: str) -> psutil.Process:
    port = int(url.rsplit(":", 1)[1])
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(found.laddr.port == port for found in process.net_connections("inet") if found.status == "LISTEN"):
                return process
    raise RuntimeError("the server's process is not found")


@contextlib.asynccontextmanager
async def _service(url: str, data: Path, log: Path, *, kill: bool) -> AsyncIterator[Client]:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "kernel.cli", "run", "benchmarks.account:app", "--nats", url, "--data", str(data)]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output)
        try:
            async with asyncio.timeout(120):
                while b"stop it with" not in log.read_bytes():  # noqa: ASYNC110 - another process writes it
                    await asyncio.sleep(0.05)
            async with await Client.connect(account.app, nats=url) as client:
                yield client
        finally:
            process.kill() if kill else process.terminate()
            await process.wait()


async def _touch(client: Client, numbers: Iterable[int], prefix: str = "account-") -> None:
    for number in numbers:
        await client.execute(Account, f"{prefix}{number}", Deposit(1), timeout=120)


async def _flood(
    client: Client,
    server: psutil.Process,
    prefix: str = "account-",
    aggregates: int = AGGREGATES,
    seconds: int = SECONDS,
) -> tuple[float, float, float]:
    """Return commands per second, those of the last second, and the cores that nats-server used."""
    begin, used = time.perf_counter(), sum(server.cpu_times()[:2])
    ended: list[float] = []

    async def sender() -> None:
        while (now := time.perf_counter()) < begin + seconds:
            name = f"{prefix}{random.randrange(aggregates)}"
            with contextlib.suppress(Exception):  # what takes too long is not counted
                await client.execute(Account, name, Deposit(1), timeout=begin + seconds - now + 0.1)
                ended.append(time.perf_counter())

    await asyncio.gather(*(sender() for _ in range(IN_FLIGHT)))
    cores = (sum(server.cpu_times()[:2]) - used) / (time.perf_counter() - begin)
    last = sum(moment > begin + seconds - 1 for moment in ended if moment <= begin + seconds)
    return len(ended) / seconds, float(last), cores
