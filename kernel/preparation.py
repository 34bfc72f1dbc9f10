"""Preparing a deployment: beside the running service, a new program builds what it needs, and keeps it up to date.

Readers see nothing of it. As soon as a service of the new program starts, it shows what is ready, and goes on with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

from sqlalchemy import Engine

from kernel.actors.snapshots import SnapshotKeeper
from kernel.app import App
from kernel.assembly import recognise
from kernel.commands.gateway import CommandGateway
from kernel.errors import LogError, NotRunning
from kernel.governance.remote_pace import following
from kernel.log import JetStreamLog, find_log
from kernel.partitions.leases import Leases
from kernel.partitions.members import Members, program_of, shares_of
from kernel.projector.deployment import BuildStatus, Deployment
from kernel.projector.live import Projector
from kernel.projector.unknown import UnknownAggregates
from kernel.runtime.directory import worker_name
from kernel.settings import Settings
from kernel.transport.connection import ConnectionTrouble, NatsConnection
from kernel.transport.dial import dial
from kernel.transport.outbox import Outbox
from projections.database import open_database
from projections.errors import SchemaError
from projections.identity import identify
from projections.revision import is_current
from projections.schema import prepare

logger = logging.getLogger("eskernel.projector")


class Preparation:
    """A process that builds what a new program needs and follows the log, until a service of that program runs.

    Args:
        app: the new program.
        settings: with the servers and the database of the service that runs.
        told: called with each new status of the build; with None when everything is built.
    """

    def __init__(
        self, app: App, settings: Settings, told: Callable[[BuildStatus | None], None] = lambda _: None
    ) -> None:
        self._app, self._settings, self._told = app, settings, told
        self._worker = worker_name()
        self._taken_over = asyncio.Event()
        self._closing = AsyncExitStack()

    async def run(self, *, follow: bool = True) -> bool:
        """Build, and follow the log until a service of the program runs, or until cancelled.

        Args:
            follow: otherwise it ends as soon as everything is built. What comes meanwhile is folded at the start of
                the service.

        Returns:
            whether a service of the program runs by now.

        Raises:
            NotRunning: the app has no service, and has had none.
            DatabaseMismatch, DeclarationError, LogError, NotReproducible, SchemaError, TooManyFailures,
            sqlalchemy.exc.DBAPIError: what stands in the way.
        """
        async with self._closing:
            return await self._run(follow)

    async def _run(self, follow: bool) -> bool:
        app, settings, closing = self._app, self._settings, self._closing
        connection = await self._connect("prepare")
        log = await find_log(connection, app.name, settings, worker=self._worker)
        closing.push_async_callback(log.close)
        engine = open_database(settings.database.url or "", **settings.database.options())
        closing.callback(engine.dispose)
        leases = await self._join(log)
        await self._check_database(log, engine, leases)
        gateway = CommandGateway(
            app, log, Outbox(connection), leases.holds, settings.passivation, SnapshotKeeper(None, 0, 0.0)
        )
        closing.callback(gateway.close)
        closing.push_async_callback(gateway.stop_reading)
        projector = Projector(
            app, log, engine, gateway.residents, leases.holds, settings, unknown=UnknownAggregates(app)
        )
        closing.push_async_callback(projector.close)
        pace = partial(following, connection, log.subjects, settings.rates.rebuild)
        deployment = Deployment(app, log, engine, settings, leases.alone, pace, projector.begin_again, show=False)
        closing.push_async_callback(deployment.close)
        await leases.join()

        async def share() -> None:
            try:
                await self._share(leases, projector)
            except (LogError, ConnectionTrouble, OSError) as error:
                logger.warning("leases: %s", error)

        sharing = asyncio.create_task(self._keep_sharing(leases, projector))
        closing.callback(sharing.cancel)
        projector.start(share)
        await self._build(deployment)
        if follow:
            await self._taken_over.wait()
        await projector.stop(settings.drain)
        await leases.close()
        return self._taken_over.is_set()

    async def _connect(self, role: str) -> NatsConnection:
        name = f"eskernel {self._app.name} {role}"
        connection = await dial(self._settings, app=self._app.name, role="service", name=name)
        self._closing.push_async_callback(connection.close)
        return connection

    async def _join(self, log: JetStreamLog) -> Leases:
        info = await log.info()
        leases = Leases(
            await self._connect("prepare leases"),
            log.stream,
            self._worker,
            info.partitions,
            ttl=self._settings.lease,
            program=program_of(self._app),
            follows=True,
            replicas=self._settings.stream.replicas,
        )
        self._closing.push_async_callback(leases.close)
        await leases.start()
        return leases

    async def _check_database(self, log: JetStreamLog, engine: Engine, leases: Leases) -> None:
        def upgrade() -> None:
            if is_current(engine):
                return
            from migrations import upgrade

            upgrade(engine)

        await asyncio.to_thread(upgrade)
        leases.database = await asyncio.to_thread(identify, engine)
        await leases.check_database(leases.database)
        await recognise(log, engine, self._app.name)
        await asyncio.to_thread(prepare, engine, self._app.projections)

    async def _build(self, deployment: Deployment) -> None:
        """Build what is missing, and raise what stands in the way."""
        await deployment.begin(short=False)
        for name, version in deployment.behind.items():
            raise SchemaError(
                f"readers see version {version} of {name}, and this program declares an older one: there is nothing to "
                f"prepare. `eskernel projections rollback {name} --app ...` goes back to it"
            )
        deployment.start()
        ended = asyncio.ensure_future(deployment.wait())
        self._closing.callback(ended.cancel)
        while not ended.done():
            self._told(deployment.status)
            await asyncio.wait({ended}, timeout=0.2)
        if deployment.failure is not None:
            raise deployment.failure
        self._told(None)

    async def _keep_sharing(self, leases: Leases, projector: Projector) -> None:
        while True:
            try:
                await leases.renew()
                await self._share(leases, projector)
            except (LogError, ConnectionTrouble, OSError) as error:
                logger.warning("leases: %s", error)
            await asyncio.sleep(leases.ttl / 3)

    async def _share(self, leases: Leases, projector: Projector) -> None:
        members: Members = await leases.members()
        projector.assign(frozenset(), shares_of(leases.me, members.others, leases.partitions))
        if any(not each.follows and each.program.digest == leases.me.program.digest for each in members.others):
            self._taken_over.set()


def check_running(settings: Settings) -> None:
    """Raise if the settings don't say which service the preparation is for.

    Raises:
        NotRunning: there are no servers in them.
        SchemaError: there is no database in them.
    """
    if settings.embedded:
        raise NotRunning("no running service was found; `eskernel prepare` works beside one, or with --nats")
    if settings.database.url is None:
        raise SchemaError("no projection database is set; give --database URL")
