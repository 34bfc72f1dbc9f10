"""Putting a worker together: its parts are built once, in order, and each says how it is closed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Engine

from kernel.actors.snapshots import SnapshotKeeper
from kernel.app import App
from kernel.commands.admission import Admission
from kernel.commands.gateway import CommandGateway
from kernel.commands.replies import ReplyGuard
from kernel.errors import Replaced
from kernel.governance.governor import Governor
from kernel.governance.remote_pace import following
from kernel.log import JetStreamLog, open_log
from kernel.log.base import StreamInfo
from kernel.log.certainty import make_sure
from kernel.log.snapshots import SnapshotStore, open_snapshots
from kernel.log.subjects import Subjects
from kernel.monitoring.alerting import Alerts
from kernel.monitoring.anchor import Anchor
from kernel.monitoring.backlog import BacklogMeter
from kernel.monitoring.connection_events import ConnectionEvents
from kernel.monitoring.detector import Detector
from kernel.monitoring.health import Health
from kernel.monitoring.probes import (
    DatabaseCheck,
    Probes,
    check_commands,
    check_leases,
    check_log,
    check_loop,
    check_reactions,
)
from kernel.monitoring.progress import AppendCheck, ProjectionCheck
from kernel.monitoring.signals import SignalCollector
from kernel.monitoring.watchdog import Watchdog
from kernel.partitions.leases import Leases
from kernel.partitions.members import program_of
from kernel.partitions.ownership import Ownership
from kernel.projector.committer import AWAY
from kernel.projector.deployment import Deployment
from kernel.projector.live import Projector
from kernel.projector.retries import DeadLetterRetries
from kernel.projector.sampling import TablePatrol
from kernel.projector.unknown import UnknownAggregates
from kernel.reactions import store
from kernel.reactions.context import ReactorContext
from kernel.reactions.reactor import Reactors
from kernel.runtime.directory import DataDirectory
from kernel.runtime.nats_server import SYNCED, embedded_commits, start_embedded
from kernel.settings import Settings
from kernel.telemetry.loop_lag import LoopLag
from kernel.telemetry.metrics import DEADLOCKS
from kernel.telemetry.tracing import Tracer, open_tracing
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import dial
from kernel.transport.inboxes import ReplyFilter
from kernel.transport.jetstream_api import version_text
from kernel.transport.outbox import Outbox
from kernel.transport.sender import CommandSender
from projections.contention import count_contention
from projections.database import open_database
from projections.database_check import check_usable
from projections.errors import SchemaError
from projections.identity import identify, read_identity
from projections.origin import knows, read_origin, register
from projections.revision import is_current
from projections.schema import prepare

logger = logging.getLogger("eskernel.service")


@dataclass(frozen=True, slots=True)
class Foundation:
    """What a worker has before anything is started.

    Attributes:
        worker: its name, unlike any other's.
        stopped: set when the service stops.
        lost: stops the service, with a reason why it cannot go on.
    """

    app: App
    settings: Settings
    worker: str
    directory: DataDirectory
    alerts: Alerts
    health: Health
    loop_lag: LoopLag
    stopped: asyncio.Event
    lost: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Places:
    """Where a worker's log and database are.

    Attributes:
        nats_url, database_url: from the settings, or of the server and the file that the service has made.
        durability: a sentence for people: what survives which failure.
    """

    nats_url: str
    database_url: str
    durability: str


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one worker, all of them built and none started but the connection, the log and the leases."""

    places: Places
    engine: Engine
    connection: NatsConnection
    outbox: Outbox
    log: JetStreamLog
    snapshots: SnapshotStore | None
    unknown: UnknownAggregates
    leases: Leases
    governor: Governor
    gateway: CommandGateway
    admission: Admission
    guard: ReplyGuard
    projector: Projector
    sender: CommandSender
    reactors: Reactors
    ownership: Ownership
    detector: Detector
    signals: SignalCollector
    retries: DeadLetterRetries
    patrol: TablePatrol
    deployment: Deployment
    probes: Probes
    anchor: Anchor


async def build(base: Foundation, closing: AsyncExitStack) -> Parts:
    """Build the parts of a worker, in order, and make the database fit the program and the log.

    Args:
        closing: closes what was built, in reverse order; also after a failure halfway.

    Raises:
        ConnectionFailed, DatabaseMismatch, DeclarationError, LogError, SchemaError, SettingsError: what stands in the
            way, and what to do.
    """
    app, settings = base.app, base.settings
    governor = Governor(app, settings.rates)
    nats_url = await _find_server(base, closing)
    database_url = settings.database.url_in(base.directory.path)
    closing.callback(base.alerts.close)
    engine = open_database(database_url, **settings.database.options())
    closing.callback(engine.dispose)
    count_contention(engine, DEADLOCKS.inc)
    await asyncio.to_thread(check_usable, engine)
    connection = await _connect(base, nats_url, closing)
    log = await open_log(
        connection,
        app.name,
        embedded_commits(settings),
        create=not await asyncio.to_thread(knows, engine, app.name),
        worker=base.worker,
        on_replaced=base.lost,
    )
    closing.push_async_callback(log.close)
    info = await log.info()
    durability = SYNCED if settings.embedded and settings.stream.sync else info.durability
    logger.info(
        "log: %d commits (%d to %d) in %d partitions on nats-server %s; %s",
        info.commits, info.first, info.last, info.partitions, version_text(connection), durability,
    )  # fmt: skip
    unknown = UnknownAggregates(app)
    await unknown.survey(log)
    leases = await _join_leases(base, nats_url, log, info, closing)
    async with leases.alone("start"):
        # workers that start together build what is missing one after the other: the second finds it done
        await _prepare_database(base, log, engine, leases)
    places = Places(nats_url, database_url, durability)
    snapshots = await _open_snapshots(settings, connection, log, closing)
    parts = _assemble(base, places, engine, connection, log, snapshots, unknown, leases, governor, closing)
    if app.projections:
        await parts.deployment.begin()
    return parts


async def _open_snapshots(
    settings: Settings, connection: NatsConnection, log: JetStreamLog, closing: AsyncExitStack
) -> SnapshotStore | None:
    if not settings.snapshots.every:
        return None
    stream = settings.stream
    store = await open_snapshots(connection, log.stream, log.subjects, stream.storage, stream.replicas)
    if store is not None:
        closing.push_async_callback(store.close)
    return store


async def _find_server(base: Foundation, closing: AsyncExitStack) -> str:
    """Return the URL of the servers that the settings name, or of one that is started here."""
    settings = base.settings
    if not settings.embedded:
        return ",".join(settings.connection.servers)
    server, keeping = await start_embedded(base.directory.path, sync=settings.stream.sync)
    closing.push_async_callback(server.stop)
    closing.callback(keeping.cancel)
    return server.url


async def _connect(base: Foundation, nats_url: str, closing: AsyncExitStack) -> NatsConnection:
    settings = base.settings
    events = ConnectionEvents(base.stopped, base.lost)
    connection = await dial(
        settings,
        app=base.app.name,
        role="service",
        name=f"eskernel {base.app.name}",
        url=nats_url if settings.embedded else "",
        on_event=events.note,
    )
    events.establish()
    closing.push_async_callback(connection.close)
    return connection


async def _join_leases(
    base: Foundation, nats_url: str, log: JetStreamLog, info: StreamInfo, closing: AsyncExitStack
) -> Leases:
    settings, directory = base.settings, base.directory

    def note(event: str) -> None:
        if event == "closed" and not base.stopped.is_set():
            base.lost("the leases' connection to NATS was closed for good; the lines before say why")

    # its own: a renewal that waits behind the answers of histories may come too late
    connection = await dial(
        settings,
        app=base.app.name,
        role="service",
        name=f"eskernel {base.app.name} leases",
        url=nats_url if settings.embedded else "",
        on_event=note,
    )
    closing.push_async_callback(connection.close)
    leases = Leases(
        connection,
        log.stream,
        base.worker,
        info.partitions,
        ttl=settings.lease,
        program=program_of(base.app),
        replicas=settings.stream.replicas,
        on_mismatch=base.lost,
    )
    closing.push_async_callback(leases.close)
    await leases.start()
    if dead := directory.dead():
        # only this worker knows that they are dead: the others wait until the leases run out
        await leases.bury(dead)
        directory.forget(dead)
    directory.mark(base.worker)
    return leases


async def _prepare_database(base: Foundation, log: JetStreamLog, engine: Engine, leases: Leases) -> None:
    """Bring the kernel's tables up to date, and compare the database with the log and with the program."""
    app = base.app

    def upgrade() -> None:
        if is_current(engine):
            return
        from migrations import upgrade  # Alembic takes its time to load, and this is the one place for it

        upgrade(engine)

    # in threads, and loaded there too: meanwhile the lease is renewed
    shared = app.projections or app.reactions
    if shared:
        await leases.check_database(await asyncio.to_thread(read_identity, engine))
    await asyncio.to_thread(upgrade)
    if shared:
        leases.database = await asyncio.to_thread(identify, engine)
    await recognise(log, engine, app.name)
    if app.reactions:
        info = await log.info()
        begun = await asyncio.to_thread(store.register, engine, app.reactions, info.partitions, info.last)
        for name, after in begun:
            logger.info("%s runs for the first time, and begins after stream sequence %d", name, after)
    declared = {each.name for each in app.reactions}
    for kind, name in await asyncio.to_thread(store.read_known, engine):
        if name not in declared:
            logger.warning(
                "the database knows the %s %s, which the app does not declare: nobody reacts for it; if no other "
                "program declares it, forget it with `eskernel %s drop %s`",
                kind, name, "policies" if kind == "policy" else "effects", name,
            )  # fmt: skip
    found = await asyncio.to_thread(prepare, engine, app.projections)
    for orphan in found.orphans:
        logger.warning(
            "the database has the projection %s, which the app does not declare: its views%s are not kept up to date; "
            "if no other program declares it, drop it with `eskernel projections drop %s`",
            orphan.name, "".join(f" {view}" for view in orphan.views), orphan.name,
        )  # fmt: skip


def _subject_of(subjects: Subjects, aggregate: str, aggregate_id: str) -> bytes:
    return subjects.commands(subjects.partition(aggregate, aggregate_id)).encode()


def _make_reactors(
    base: Foundation, log: JetStreamLog, engine: Engine, sender: CommandSender, leases: Leases
) -> Reactors:
    threads = ThreadPoolExecutor(1, "eskernel-react")
    context = ReactorContext(base.app, log, engine, base.settings, sender.send, time.time, threads)
    return Reactors(context, leases.holds)


async def recognise(log: JetStreamLog, engine: Engine, app: str) -> None:
    """Tie the database to the log, or make sure that it was folded from this log."""
    # before the log's end: meanwhile other workers append and fold
    origin = await asyncio.to_thread(read_origin, engine, app)

    async def look() -> None:
        info = await log.info()
        digest = await log.digest(origin.anchor) if origin is not None and origin.anchor else ""
        await asyncio.to_thread(register, engine, app, info.created, info.partitions, info.last, digest, origin)
        if origin is not None and origin.created != info.created:
            logger.info(
                "the stream was created at %s, and the one that the database was folded from at %s: it was restored or "
                "moved, and is the same log", info.created, origin.created,
            )  # fmt: skip
        await log.mark(info)

    await make_sure(look, log.patience, (Replaced, SchemaError))


def _assemble(
    base: Foundation,
    places: Places,
    engine: Engine,
    connection: NatsConnection,
    log: JetStreamLog,
    snapshots: SnapshotStore | None,
    unknown: UnknownAggregates,
    leases: Leases,
    governor: Governor,
    closing: AsyncExitStack,
) -> Parts:
    app, settings = base.app, base.settings
    tracing: Tracer = open_tracing(app, settings.tracing.enabled)
    outbox = Outbox(connection)
    keeper = SnapshotKeeper(snapshots, settings.snapshots.every, settings.snapshots.verify)
    gateway = CommandGateway(app, log, outbox, leases.holds, settings.passivation, keeper, tracing)
    closing.callback(gateway.close)
    closing.push_async_callback(gateway.stop_reading)
    guard = ReplyGuard(ReplyFilter.of(app.name, settings))
    admission = Admission(app, log.subjects, outbox, gateway, governor, settings.commands, guard, tracing)
    closing.callback(admission.close)
    projector = Projector(app, log, engine, gateway.residents, leases.holds, settings, governor.live, tracing, unknown)
    closing.push_async_callback(projector.close)
    sender = CommandSender(connection, partial(_subject_of, log.subjects), connection.new_answer_inbox())
    reactors = _make_reactors(base, log, engine, sender, leases)
    closing.push_async_callback(reactors.close)
    ownership = Ownership(connection, log.subjects, leases, admission, projector, reactors)
    closing.push_async_callback(ownership.leave)
    backlog = BacklogMeter(settings.backlog, [declared.name for declared in app.projections])
    signals = SignalCollector(gateway, log.appender, projector, base.loop_lag, lambda: backlog.worst)
    detector = Detector(
        settings,
        backlog,
        projector.progress,
        lambda: projector.partitions,
        log.appender,
        gateway.measure_load,
        base.alerts,
    )
    database_check = DatabaseCheck(engine, projector, base.worker)
    closing.callback(database_check.close)
    appends = AppendCheck(log, detector)
    projection = ProjectionCheck(projector, log, detector, lambda: projector.partitions, governor.live)
    deployment = Deployment(
        app,
        log,
        engine,
        settings,
        leases.alone,
        # other workers may be at work, and live projection goes before
        partial(following, connection, log.subjects, settings.rates.rebuild),
        projector.begin_again,
    )
    closing.push_async_callback(deployment.close)
    watchdog = Watchdog(app, base.loop_lag)
    closing.callback(watchdog.stop)
    watchdog.start()
    probes = Probes(
        base.health,
        {
            "log": partial(check_log, connection, log, projector.progress),
            "appends": appends.check,
            "database": database_check.check,
            "leases": partial(check_leases, ownership),
            "projection": projection.check,
            "builds": deployment.check,
            "reactions": partial(check_reactions, reactors),
            "commands": check_commands,
            "loop": partial(check_loop, base.loop_lag, watchdog),
        },
        {"appends": appends.observe, "projection": projection.observe},
    )
    closing.callback(probes.close)
    return Parts(
        places=places,
        engine=engine,
        connection=connection,
        outbox=outbox,
        log=log,
        snapshots=snapshots,
        unknown=unknown,
        leases=leases,
        governor=governor,
        gateway=gateway,
        admission=admission,
        guard=guard,
        projector=projector,
        sender=sender,
        reactors=reactors,
        ownership=ownership,
        detector=detector,
        signals=signals,
        retries=DeadLetterRetries(app, engine, log.subjects, projector.projects, settings.dead_letters),
        patrol=TablePatrol(app, log, engine, settings.verification.rows),
        deployment=deployment,
        probes=probes,
        anchor=Anchor(app, engine, log, lambda: projector.state == AWAY or not base.health.components["database"].ok),
    )
