"""Finds what an id stands for in the log: commands, their events, where projections have them, and what followed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

from sqlalchemy import Connection, Engine

from aggregates import InvalidId, InvalidMessage
from aggregates.commit import Envelope, decode
from kernel.app import App
from kernel.log.base import EventLog, Stored
from kernel.log.subjects import Address
from kernel.projector.replay import reading
from projections.database import reads
from projections.declaration import DeclaredProjection
from projections.inclusion import Inclusion, State, read_inclusion, read_row_inclusion

READ = 8_000
NEAR = 20_000
"""So many commits are read sooner than the place of a time among them is found."""
SKEW = timedelta(hours=1)
"""The clocks of who made an id, of workers and of the server may differ by so much."""
_PLAIN = re.compile(r"[\w.:@=+-]+\Z", re.ASCII)
_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\Z", re.IGNORECASE)
_CAUSED = b'"causationid"'

Kind = Literal["command", "event", "correlation", "causation"]


@dataclass(frozen=True, slots=True)
class Projected:
    """A projection of the app that folds an event.

    Attributes:
        state: `unknown` if the database was not read.
        version: the one that readers see, 0 if they see none.
        position: stream sequence up to which readers see the event's partition.
        error: why the aggregate is parked, and at which event.
    """

    projection: str
    state: State | Literal["unknown"]
    version: int = 0
    position: int = 0
    error: str = ""


@dataclass(slots=True)
class TracedEvent:
    """An event of a command.

    Attributes:
        known: the program declares events of this name.
    """

    envelope: Envelope
    stream_sequence: int
    known: bool
    projections: list[Projected] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class TracedCommand:
    """A command that led to events, as these name it.

    Attributes:
        id: empty for events that name no command.
        cause: the command that has caused it, if that one is in the trace too.
        cause_event: id of the event that has caused it, if it names an event.
    """

    id: str
    address: Address
    events: list[TracedEvent]
    cause: TracedCommand | None = None
    cause_event: str | None = None

    @property
    def first(self) -> Envelope:
        """The first of its events."""
        return self.events[0].envelope

    @property
    def place(self) -> tuple[int, int]:
        """Where its first event is: stream sequence, and sequence in the aggregate."""
        return self.events[0].stream_sequence, self.first.sequence


@dataclass(frozen=True, slots=True)
class Trace:
    """What an id stands for.

    Attributes:
        kinds: what has this id.
        after: stream sequence behind which the log was read.
        commands: in the order of the log.
    """

    id: str
    kinds: frozenset[Kind]
    after: int
    commands: list[TracedCommand]

    def walk(self) -> Iterator[tuple[int, TracedCommand | TracedEvent]]:
        """Yield commands and events as a tree, each with its depth.

        The events of a command are below it. A command is below the event that has caused it, or below the command.
        """
        below: dict[tuple[TracedCommand | None, str | None], list[TracedCommand]] = {}
        for command in self.commands:
            below.setdefault((command.cause, command.cause_event), []).append(command)
        # chains of causes may be longer than Python's stack
        left: list[tuple[int, TracedCommand | TracedEvent]] = [(0, root) for root in below.get((None, None), ())]
        left.reverse()
        while left:
            depth, item = left.pop()
            yield depth, item
            if isinstance(item, TracedEvent):
                continue
            inside: list[tuple[int, TracedCommand | TracedEvent]] = []
            for event in item.events:
                inside.append((depth + 1, event))
                inside += [(depth + 2, command) for command in below.get((item, event.envelope.id), ())]
            inside += [(depth + 1, command) for command in below.get((item, None), ())]
            left += reversed(inside)


class Tracer:
    """Collects the commands that have to do with an id, and those that they caused, from commits in stream order.

    Attributes:
        kinds: what has this id, so far.
    """

    def __init__(self, app: App, parse: Callable[[str], Address], wanted: str) -> None:
        self._app, self._parse, self._wanted = app, parse, wanted
        # text that JSON may escape is found in decoded events only
        self._needle = wanted.encode() if _PLAIN.match(wanted) else b""
        self._causes = {wanted}
        self._commands: dict[tuple[str, str, int], TracedCommand] = {}
        self.kinds: set[Kind] = set()

    def add(self, commits: Iterable[Stored]) -> None:
        """Look at commits. What is no commit is passed over."""
        for commit in commits:
            payload = commit.payload
            if self._needle in payload or (_CAUSED in payload and len(self._causes) > 1):
                try:
                    self._add(commit, decode(payload))
                except (InvalidId, InvalidMessage):
                    continue

    def _add(self, commit: Stored, envelopes: list[Envelope]) -> None:
        by_command: dict[str, list[Envelope]] = {}
        for envelope in envelopes:
            by_command.setdefault(envelope.commandid, []).append(envelope)
        for command_id, events in by_command.items():
            kinds = self._kinds_of(events)
            if not kinds and all(event.causation_id not in self._causes for event in events):
                continue
            address = self._parse(commit.subject)  # takes longer than all the rest
            self.kinds |= kinds
            key = address.subject, command_id, 0 if command_id else commit.sequence
            traced = self._commands.setdefault(key, TracedCommand(command_id, address, []))
            traced.events += [self._event(commit.sequence, address, event) for event in events]
            self._causes.update(event.id for event in events)
            if command_id:
                self._causes.add(command_id)

    def _kinds_of(self, events: list[Envelope]) -> set[Kind]:
        found: set[Kind] = set()
        for event in events:
            if event.commandid == self._wanted:
                found.add("command")
            if event.id == self._wanted:
                found.add("event")
            if event.correlation_id == self._wanted:
                found.add("correlation")
            if event.causation_id == self._wanted:
                found.add("causation")
        return found

    def _event(self, stream_sequence: int, address: Address, envelope: Envelope) -> TracedEvent:
        declared = self._app.types.get(address.aggregate)
        return TracedEvent(envelope, stream_sequence, declared is not None and envelope.type in declared.events)

    def commands(self) -> list[TracedCommand]:
        """Return the commands, each with the one that caused it."""
        found = list(self._commands.values())
        by_id: dict[str, list[tuple[TracedCommand, str | None]]] = {}
        for command in found:
            if command.id:
                by_id.setdefault(command.id, []).append((command, None))
            for event in command.events:
                by_id.setdefault(event.envelope.id, []).append((command, event.envelope.id))
        for command in found:
            causes = by_id.get(command.first.causation_id or "", ())
            # a cause comes before its effect; whoever names a later one, or itself, would make a circle
            earlier = [(cause, event) for cause, event in causes if cause.place < command.place]
            if earlier:
                command.cause, command.cause_event = earlier[-1]
        return found


def folding(app: App, aggregate: str, event: str) -> Iterator[DeclaredProjection]:
    """Yield the projections of an app that fold events of this name."""
    declared = app.types.get(aggregate)
    if declared is None or event not in declared.events:
        return
    cls = declared.events[event].cls
    for projection in app.projections:
        if aggregate in projection.aggregates and any(cls in handler.events for handler in projection.handlers):
            yield projection


async def trace(
    app: App,
    log: EventLog,
    engine: Engine | None,
    wanted: str,
    *,
    aggregate: tuple[str, str] | None = None,
    since: datetime | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Trace:
    """Return what an id stands for: of a command, of an event, or a correlation or causation id.

    The log is read from `since` to its present end. Without that, and if the id is a UUIDv7, the log is read from the
    id's own time; and the whole of it if nothing is found there.

    Args:
        engine: the projection database; None: whether projections include the events is not found out.
        aggregate: type and id of the only aggregate whose history is read.
        progress: called with the number of commits read, and of those to read.

    Raises:
        InvalidId: there can't be such an aggregate.
        LogError, sqlalchemy.exc.DBAPIError: the log or the database failed.
    """
    after = 0
    if aggregate is not None:
        tracer = Tracer(app, log.subjects.parse, wanted)
        tracer.add(await log.read_subject(log.subjects.address(*aggregate).subject))
    else:
        begin = since or made_at(wanted)
        if begin is not None:
            after = await _place_of(log, begin)
        tracer = await _read(app, log, wanted, after, progress)
        if not tracer.kinds and after and since is None:
            after = 0
            tracer = await _read(app, log, wanted, after, progress)
    commands = tracer.commands()
    if commands:
        await asyncio.to_thread(_note_projections, app, engine, commands)
    return Trace(wanted, frozenset(tracer.kinds), after, commands)


def made_at(text: str) -> datetime | None:
    """Return a time before which no event can name this id, or None if the id does not say when it was made."""
    if not _UUID7.match(text):
        return None
    try:
        return datetime.fromtimestamp(int(text[:8] + text[9:13], 16) / 1_000, UTC) - SKEW
    except (ValueError, OverflowError):  # a time that no calendar has
        return None


async def _read(app: App, log: EventLog, wanted: str, after: int, progress: Callable[[int, int], None]) -> Tracer:
    tracer = Tracer(app, log.subjects.parse, wanted)
    last = (await log.info()).last
    done, at = 0, after
    if at >= last:
        return tracer
    async with reading(log, after) as reader:
        while at < last:
            batch = await reader.next(READ, timeout=1.0)
            tracer.add(batch.commits)
            done += len(batch.commits)
            at = batch.commits[-1].sequence if batch.commits else at
            progress(done, done + batch.pending)
    return tracer


async def _place_of(log: EventLog, moment: datetime) -> int:
    """Return a stream sequence behind which all commits since a time are, and not many others."""
    info = await log.info()
    low, high = info.first - 1, info.last  # the commit at `low` is from before, those behind `high` are not
    while high - low > NEAR:
        middle = (low + high) // 2
        reader = await log.read(middle, gentle=True)
        try:
            batch = await reader.next(1, timeout=1.0)
        finally:
            await reader.close()
        when = _time_of(batch.commits[0], batch.oldest) if batch.commits else None
        if when is None:
            return max(low, 0)
        if when < moment:
            low = max(middle, batch.commits[0].sequence)
        else:
            high = middle
    return max(low, 0)


def _time_of(commit: Stored, appended: float) -> datetime | None:
    if appended:
        return datetime.fromtimestamp(appended, UTC)
    try:
        return datetime.fromisoformat(decode(commit.payload)[0].time)
    except (InvalidMessage, ValueError):
        return None


def _note_projections(app: App, engine: Engine | None, commands: list[TracedCommand]) -> None:
    if engine is None:
        _project(app, None, commands)
        return
    with reads(engine).connect() as connection:
        _project(app, connection, commands)


def _project(app: App, connection: Connection | None, commands: list[TracedCommand]) -> None:
    known: dict[tuple[str, Address], Inclusion] = {}
    for command in commands:
        address = command.address
        for event in command.events:
            for declared in folding(app, address.aggregate, event.envelope.type):
                name = declared.name
                if connection is None:
                    event.projections.append(Projected(name, "unknown"))
                    continue
                if declared.keyed:
                    place = event.envelope.sequence, event.stream_sequence
                    own = read_row_inclusion(connection, name, address.aggregate, address.id, *place)
                    event.projections.append(_projected(name, own, event))
                    continue
                if (name, address) not in known:
                    read = read_inclusion(connection, name, address.partition, address.aggregate, address.id)
                    known[name, address] = read
                event.projections.append(_projected(name, known[name, address], event))


def _projected(name: str, inclusion: Inclusion, event: TracedEvent) -> Projected:
    state = inclusion.of(event.envelope.sequence, event.stream_sequence)
    parked, error = inclusion.parked, ""
    if parked is not None and state in ("parked", "waiting"):
        error = f"event {parked.since}: {parked.error}"
    return Projected(name, state, inclusion.version, inclusion.position, error)
