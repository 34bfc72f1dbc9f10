"""A service in a process of its own: prints READY, and stops when its standard input ends."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from kernel import Service
from kernel.app import load_app
from kernel.assembly import Parts
from kernel.runtime.memory import settle_memory
from kernel.settings.sources import settings_of


class Bare(Service):
    """A service without its periodic jobs: the base against which their cost is measured."""

    def _schedule(self, parts: Parts) -> None:
        self.scheduler.every(parts.leases.ttl / 3, parts.ownership.renew_leases)
        self.scheduler.every(0.5, parts.gateway.residents.passivate)
        self.scheduler.start()
        # no figures are collected for the metrics
        parts.gateway.answers._times = _Nowhere()
        self._loop_lag.stop()


class _Nowhere(list[float]):
    def append(self, _one: float) -> None:
        pass


async def _main(spec: str, data: str, sync: bool, bare: bool) -> None:
    service = (Bare if bare else Service)(load_app(spec), settings_of({"data": Path(data), "stream.sync": sync}), spec)
    await service.start()
    settle_memory()  # as `eskernel run` does
    try:
        print(f"READY {service.durability}", flush=True)
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await service.stop()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], "--sync" in sys.argv, "--bare" in sys.argv))
