"""The service that `test_crash.py` kills: `python -m tests.crash_service NAME DATA NATS DATABASE [LEASE]`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from kernel import Service
from tests.apps import notebooks
from tests.conftest import settings_for


async def main(name: str, data: str, nats: str, database: str, lease: str = "3") -> None:
    embedded = None if nats == "embedded" else nats
    settings = settings_for(Path(data), nats=embedded, database=database, max_actors=20, lease=float(lease))
    service = Service(notebooks(name), settings)
    await service.start()
    print(service.nats_url, flush=True)
    await service.stopped.wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
