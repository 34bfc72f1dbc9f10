"""A service in a process of its own: prints READY, and stops when its standard input ends."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from kernel import Service
from kernel.app import load_app
from kernel.settings.sources import settings_of


async def _main(spec: str, data: str, sync: bool) -> None:
    service = Service(load_app(spec), settings_of({"data": Path(data), "stream.sync": sync}), spec)
    await service.start()
    try:
        print(f"READY {service.durability}", flush=True)
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await service.stop()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], "--sync" in sys.argv))
