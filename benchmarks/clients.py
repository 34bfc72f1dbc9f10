"""Sending commands to a service in another process, as fast as possible or at a given rate."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from examples.bank import Account, Deposit
from kernel import Client
from kernel.app import App
from kernel.runtime.running import find_running

ACCOUNTS, IN_FLIGHT = 1_000, 256


@contextlib.asynccontextmanager
async def service(spec: str, data: Path, *, sync: bool, bare: bool = False) -> AsyncIterator[str]:
    """Run a service; yield what it says about durability.

    Args:
        bare: with leases and passivation only: no jobs, governor, metrics, health or backlog detection.
    """
    arguments = [sys.executable, "-m", "benchmarks.service_process", spec, str(data)]
    arguments += [option for option, wanted in (("--sync", sync), ("--bare", bare)) if wanted]
    process = await asyncio.create_subprocess_exec(
        *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parent.parent
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
        if not line.startswith("READY"):
            raise RuntimeError(f"the service did not start: {line}")
        yield line.removeprefix("READY ")
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 30)
        except TimeoutError:
            process.kill()
            await process.wait()


class Load:
    """A client and its accounts."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._number = 0

    @property
    def sent(self) -> int:
        """Commands sent so far."""
        return self._number

    async def send(self) -> float:
        """Send a command and wait for its receipt; return the seconds it took."""
        self._number += 1
        begin = time.perf_counter()
        await self.client.execute(Account, f"a{self._number % ACCOUNTS}", Deposit(1))
        return time.perf_counter() - begin

    async def full(self, seconds: float) -> tuple[float, list[float]]:
        """Keep 256 commands in flight; return commands per second and what each took."""
        took: list[float] = []
        begin = time.perf_counter()
        end = begin + seconds

        async def sender() -> None:
            while time.perf_counter() < end:
                took.append(await self.send())

        await asyncio.gather(*(sender() for _ in range(IN_FLIGHT)))
        return len(took) / (time.perf_counter() - begin), took

    async def paced(self, rate: float, seconds: float) -> list[float]:
        """Send at a steady rate without waiting for answers; latency counts from the time a command was due."""
        begin = time.perf_counter()
        tasks: list[asyncio.Task[float]] = []

        async def due(moment: float) -> float:
            late = time.perf_counter() - moment
            return late + await self.send()

        while (now := time.perf_counter()) < begin + seconds:
            while len(tasks) < (now - begin) * rate:
                tasks.append(asyncio.create_task(due(begin + len(tasks) / rate)))
            await asyncio.sleep(0.001)
        return list(await asyncio.gather(*tasks))


def process_of(data: Path, app: str) -> int:
    """Return the id of the service's process."""
    return find_running(data, app).pid


@contextlib.asynccontextmanager
async def load(app: App, spec: str, data: Path, *, sync: bool, bare: bool = False) -> AsyncIterator[tuple[Load, str]]:
    """Run a service and a client; yield when every account has been used once."""
    async with service(spec, data, sync=sync, bare=bare) as durability, await Client.connect(app, data=data) as client:
        made = Load(client)
        for _ in range(ACCOUNTS // 200):
            await asyncio.gather(*(made.send() for _ in range(200)))
        yield made, durability
