"""A service in a process of its own: prints READY, and stops when its standard input ends."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from kernel import Service
from kernel.app import load_app
from kernel.monitoring.probes import Watch
from kernel.partitions.leases import Leases
from kernel.partitions.ownership import Ownership
from kernel.settings.sources import settings_of


class Bare(Service):
    """A service without its periodic jobs: the base against which their cost is measured."""

    def _schedule(self, watch: Watch, ownership: Ownership, leases: Leases) -> None:  # noqa: ARG002 - ours has fewer
        self.scheduler.every(leases.ttl / 3, ownership.renew_leases)
        self.scheduler.every(0.5, self._passivate)
        self.scheduler.start()
        assert self._gateway is not None
        # no figures are collected for the metrics
        self._gateway._times = _Nowhere()
        self._loop_lag.stop()


class _Nowhere(list[float]):
    def append(self, _one: float) -> None:
        pass


async def _main(spec: str, data: str, sync: bool, bare: bool) -> None:
    service = (Bare if bare else Service)(load_app(spec), settings_of({"data": Path(data), "stream.sync": sync}), spec)
    await service.start()
    try:
        print(f"READY {service.durability}", flush=True)
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await service.stop()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], "--sync" in sys.argv, "--bare" in sys.argv))
