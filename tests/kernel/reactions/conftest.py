"""A running shop, and what its log holds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

import migrations
from aggregates.commit import Envelope, decode
from kernel import App, Client, Service
from kernel.log.base import EventLog
from projections.origin import register
from tests.conftest import settings_for

SETTLE_S = 40.0


class Shop:
    """A service, its client, and questions to both."""

    def __init__(self, service: Service, client: Client) -> None:
        self.service, self.client = service, client

    async def settled(self) -> None:
        """Wait until everything has been reacted to."""
        async with asyncio.timeout(SETTLE_S):
            while not await self.service.parts.reactors.is_settled():
                await asyncio.sleep(0.01)

    async def until(self, found: Callable[[], bool]) -> None:
        """Wait for a condition."""
        async with asyncio.timeout(SETTLE_S):
            while not found():
                await asyncio.sleep(0.01)

    async def events(self) -> list[tuple[str, str, Envelope]]:
        """Return all events of the log: aggregate, id, event."""
        return await events_of(self.service.parts.log)

    async def counts(self) -> Counter[str]:
        """Return how often each event is in the log."""
        return Counter(envelope.type for _, _, envelope in await self.events())


async def events_of(log: EventLog) -> list[tuple[str, str, Envelope]]:
    reader = await log.read(0)
    last = (await log.info()).last
    found: list[tuple[str, str, Envelope]] = []
    at = 0
    while at < last:
        batch = await reader.next(1_000, 5.0)
        for stored in batch.commits:
            address = log.subjects.parse(stored.subject)
            found += [(address.aggregate, address.id, envelope) for envelope in decode(stored.payload)]
            at = stored.sequence
    await reader.close()
    return found


Running = Callable[..., AbstractAsyncContextManager[Shop]]


@pytest.fixture
def running(nats_url: str, database_url: str, tmp_path: Path) -> Running:
    """Return a function that runs an app, as often as it is called on the same log and database."""

    @asynccontextmanager
    async def run(app: App, **settings: Any) -> AsyncIterator[Shop]:
        settings = {"nats": nats_url, "database": database_url} | settings
        folder = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
        async with (
            Service(app, settings_for(folder, **settings)) as service,
            await Client.connect(app, nats=nats_url, database=database_url) as client,
        ):
            yield Shop(service, client)

    return run


@pytest.fixture
def read_side_engine(engine: Engine) -> Engine:
    """A database with the kernel's tables, tied to a log of the app `shop`."""
    migrations.upgrade(engine)
    register(engine, "shop", "2026-01-01T00:00:00Z", 4, 0)
    return engine
