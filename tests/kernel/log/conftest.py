"""Logs of every kind, each empty."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from kernel.log import JetStreamLog, MemoryLog
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import connect
from tests.conftest import open_log
from tests.kernel.log.logs import PARTITIONS, Log


@pytest.fixture(params=["memory", "jetstream", "jetstream-grouped", "jetstream-2.10"])
def place(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The log's location: the URL of a server, or none, and options of `open_log`."""
    if request.param == "memory":
        return "", {}
    url = request.getfixturevalue("old_nats_url" if request.param == "jetstream-2.10" else "nats_url")
    return url, {"group_commit": "always"} if request.param == "jetstream-grouped" else {}


@pytest.fixture
async def log(place: tuple[str, dict[str, Any]], app_name: str) -> AsyncIterator[Log]:
    url, options = place
    if not url:
        yield MemoryLog(app_name, PARTITIONS)
        return
    connection = await connect(url, name="contract")
    opened = await open_log(connection, app_name, partitions=PARTITIONS, **options)
    yield opened
    await opened.close()
    await connection.close()


@pytest.fixture
async def connection(nats_url: str) -> AsyncIterator[NatsConnection]:
    connected = await connect(nats_url, name="test")
    yield connected
    await connected.close()


@pytest.fixture
async def grouped(connection: NatsConnection, app_name: str) -> AsyncIterator[JetStreamLog]:
    opened = await open_log(connection, app_name, partitions=PARTITIONS, group_commit="always")
    yield opened
    await opened.close()
