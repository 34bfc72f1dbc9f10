"""Services of several programs with the same log and the same database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from kernel import App, Client, Service
from tests.conftest import settings_for
from tests.ledgers import ledger

Run = Callable[..., Any]


@pytest.fixture
def run(nats_url: str, database_url: str, tmp_path: Path) -> Run:
    """Make a service of a program; all of them have the same log and the same database."""

    def make(app: App, place: str, **values: Any) -> Service:
        settings = settings_for(tmp_path / place, nats=nats_url, database=database_url, partitions=8, **values)
        return Service(app, settings)

    return make


@pytest.fixture
async def client(run: Run, nats_url: str, database_url: str, app_name: str) -> AsyncIterator[Client]:
    """A client of the old program; its stream is there already."""
    async with run(ledger(app_name), "first"):
        pass
    async with await Client.connect(ledger(app_name), nats=nats_url, database=database_url) as connected:
        yield connected
