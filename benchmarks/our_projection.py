"""Live projection and rebuild by the kernel, on an existing log and an empty database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine

import migrations
from kernel.actors.snapshots import NO_SNAPSHOTS
from kernel.app import App
from kernel.commands.gateway import CommandGateway
from kernel.log import JetStreamLog, StreamInfo
from kernel.projector.live import Projector
from kernel.projector.rebuild import Rebuild
from kernel.projector.verification import Verification
from kernel.settings import Settings
from kernel.transport.outbox import Outbox
from projections import generations
from projections.database import open_database
from projections.origin import register


class Discard:
    """Takes frames and sends them nowhere."""

    def send(self, frames: bytes) -> None:
        pass

    def fits(self, *_message: bytes) -> bool:
        return True


@contextmanager
def _database(app: App, url: str, info: StreamInfo) -> Iterator[Engine]:
    engine = open_database(url)
    try:
        migrations.upgrade(engine)
        register(engine, app.name, info.created, info.partitions, info.last)
        yield engine
    finally:
        engine.dispose()


async def live(app: App, log: JetStreamLog, url: str) -> float:
    """Project everything with the service's own projector, actors and residents; return commits per second."""
    info = await log.info()
    with _database(app, url, info) as engine:
        with engine.begin() as connection:
            for declared in app.projections:
                # live though empty: a service would build an empty projection by replay
                generations.show(connection, generations.create(connection, declared, range(info.partitions)))
        settings = Settings()
        gateway = CommandGateway(
            app, log, Outbox(Discard()), lambda _partition: True, settings.passivation, NO_SNAPSHOTS
        )

        async def fenced() -> None:
            raise AssertionError("the projector was fenced, but there is no other writer")

        projector = Projector(app, log, engine, gateway.residents, lambda _partition: True)
        projector.assign(frozenset(range(info.partitions)))
        started = time.perf_counter()
        projector.start(fenced)
        try:
            while projector.position < info.last or not _written(projector):
                assert projector.state in ("starting", "running"), projector.state
                await asyncio.sleep(0.005)
            rate = info.commits / (time.perf_counter() - started)
            assert projector.state == "running", projector.state
        finally:
            await projector.stop(60.0)
            await projector.close()
            gateway.close()
        return rate


def _written(projector: Projector) -> bool:
    return not projector.committer.lasting


async def rebuild(app: App, log: JetStreamLog, url: str) -> float:
    """Build every projection by replay; return the log's commits per second, however often they were read."""
    info = await log.info()
    with _database(app, url, info) as engine:
        started = time.perf_counter()
        await Rebuild(app, log, engine, app.projections).run()
        return info.commits / (time.perf_counter() - started)


async def verify(app: App, log: JetStreamLog, url: str, *, same: bool = True) -> float:
    """Build every projection, then compare the tables with a second fold; return the log's commits per second.

    Args:
        same: verify. Otherwise rehearse, with the program that the tables are of.
    """
    info = await log.info()
    with _database(app, url, info) as engine:
        await Rebuild(app, log, engine, app.projections).run()
        started = time.perf_counter()
        found = await Verification(app, log, engine, app.projections, same=same).run()
        rate = info.commits / (time.perf_counter() - started)
        assert not any(verified.differing for verified in found), found
        return rate
