"""`python -m tests.faults.cluster_run`: three servers with replicated streams, PostgreSQL, two services."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from tests.faults import evidence
from tests.faults.clients import Load
from tests.faults.cluster_faults import OF_SERVERS, ClusterFaults, ClusterKind, Gap, endless_plan
from tests.faults.ending import CheckedRun, Result
from tests.faults.gaps import BARE, Probes
from tests.faults.places import Postgres, Service, postgres_server
from tests.faults.report import describe
from tests.servers import cluster

SERVICES = 2
LANES = 24
"""Senders of the load; each side has others besides, which measure gaps."""


class ClusterRun(CheckedRun):
    """A run on a cluster, in a directory of its own.

    Args:
        seconds: how long to inject faults.
        short: inject each kind once, for the shortest time, and restart one worker only.
    """

    def __init__(
        self, seed: int, seconds: float, postgres: str, report: Callable[[str], None], *, short: bool = False
    ) -> None:
        app = f"c{seed}-{os.getpid()}-{int(time.time() * 1000) % 10_000_000}"
        result = Result(seed, f"postgresql, {SERVICES} services, 3 servers", 0)
        super().__init__(app, f"eskernel-cluster-faults-{seed}-", result, report)
        self.seed, self.seconds, self.short = seed, seconds, short
        self.database = Postgres(postgres, app.replace("-", "_"))
        self.faults: ClusterFaults | None = None
        self.probes: Probes | None = None
        self._stack = AsyncExitStack()

    async def _run(self) -> None:
        assert self.database is not None
        database = self.database.url
        self.members = await self._stack.enter_async_context(cluster(self.directory))
        urls = [member.url for member in self.members]
        joined = ",".join(urls)
        self.url = urls[0]
        more = ["--replicas", "3", "--set", f"snapshots.every={20 + self.seed % 80}"]
        for number in range(SERVICES):
            where = self.directory / f"service{number}"
            service = Service(self.app, joined, database, where, 0, more)
            self.services.append(service)
            service.start()
        load = self.load = Load(self.app, joined, joined, self.seed, LANES)
        await load.start(120.0)
        probes = self.probes = Probes(load, urls)
        await probes.start()
        faults = self.faults = ClusterFaults(
            self.app, self.members, self.services, load, probes, self.report, rolled=1 if self.short else SERVICES
        )
        await faults.wait_until_healthy("the start")
        await faults.settle("the start")
        await faults.run(endless_plan(self.seed, self.short), self.seconds)
        await probes.stop()
        await load.stop()
        await self._finish()
        self.result.notes.append(f"{len(probes.service.times)} marks and {len(probes.bare.times)} bare messages")
        bare = await evidence.last_of(self.url, BARE)
        if bare < len(probes.bare.times):
            self.result.notes.append(f"the bare stream has {bare} messages, the servers acknowledged more")

    async def _close(self) -> None:
        if self.faults is not None:
            self.result.gaps = gap_lines(self.faults.gaps)
        if self.probes is not None:
            await self.probes.close()
        if self.load is not None:
            await self.load.close()
        for service in self.services:
            await service.close()
        await self._stack.aclose()
        if self.database is not None:
            await asyncio.to_thread(self.database.drop)


def gap_lines(gaps: Sequence[Gap]) -> list[str]:
    """Return the longest time without a receipt for each kind of fault, and over all that stop both sides."""
    lines = []
    for kind in ClusterKind:
        if own := [gap for gap in gaps if gap.kind is kind]:
            lines.append(_line(f"{len(own)} x {kind}", own, kind in OF_SERVERS))
    if both := [gap for gap in gaps if gap.kind in OF_SERVERS]:
        lines.append(_line("longest of the server faults", both, True))
    return lines


def _line(what: str, gaps: Sequence[Gap], compared: bool) -> str:
    service, bare = max(gap.service for gap in gaps), max(gap.bare for gap in gaps)
    ratio = f", ratio {service / bare:.2f}" if compared and bare else ""
    return f"{what}: {service:.2f} s without a receipt, bare nats-py {bare:.2f} s{ratio}"


async def run(seed: int, seconds: float, postgres: str) -> Result:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        # only once: a second signal must not interrupt the cleaning up
        asyncio.get_running_loop().add_signal_handler(number, lambda: task.cancelling() or task.cancel())
    begin = time.monotonic()

    def report_progress(line: str) -> None:
        print(f"  {time.monotonic() - begin:6.1f}s  {line}", flush=True)

    return await ClusterRun(seed, seconds, postgres, report_progress).run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.cluster_run", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long faults are injected")
    parser.add_argument("--seed", type=int, help="random otherwise")
    chosen = parser.parse_args()
    seed = random.randrange(1, 1 << 30) if chosen.seed is None else chosen.seed
    print(f"seed {seed}: {chosen.minutes:g} minutes", flush=True)
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(postgres_server())
        result = asyncio.run(run(seed, 60 * chosen.minutes, postgres))
    print("\n".join(describe(result)))
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
