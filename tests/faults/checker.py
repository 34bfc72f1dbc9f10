"""The conditions that a finished run must meet, whatever happened during it. This imports nothing of the product.

(a) the log's order, (b) commands against the answers to their senders, and the domain's own rule, (c) every row,
(d) every dead letter, (p) what policies owe. (e), leftover processes, leases and consumers, is checked with
`evidence.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.faults.owed import Reactions, check_owed, of_kind, stories_of
from tests.faults.rules import (
    LIMIT,
    PROJECTIONS,
    Attempt,
    Event,
    Garbage,
    Letter,
    Message,
    Tables,
    accepts,
    events_of,
    expected_events,
    fold,
    letters,
    partition_of,
    tank_of,
)

COMMIT = b'[{"specversion"'
SPECULATION_S = 1.0
"""An actor may refuse on a level whose event is still on its way to the log: the event must be there within this time.
A longer time would accept any level of a tank that changes often."""
CLOCK_S = 0.1
"""Greatest difference between two clock readings on one machine, with room for its scheduler."""


class Violation(NamedTuple):
    """A broken promise: its letter (see above), and the details."""

    part: str
    text: str

    def __str__(self) -> str:
        return f"({self.part}) {self.text}"


@dataclass(slots=True)
class History:
    """Everything that a run left behind.

    Attributes:
        last: the stream's last sequence, from the server.
        attempts: every sending of every command.
    """

    app: str
    partitions: int
    last: int
    messages: list[Message]
    attempts: list[Attempt]
    garbage: list[Garbage]
    tables: Tables
    reactions: Reactions = field(default_factory=Reactions)


@dataclass(slots=True)
class _Log:
    """The log, decoded and sorted."""

    tanks: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    commands: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    garbage: list[Message] = field(default_factory=list)


def check(history: History) -> list[Violation]:
    """Return all violations; an empty list means that every promise holds."""
    found: list[Violation] = []
    log = _read(history, found)
    _check_order(log, found)
    _check_rule(log, found)
    by_id: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in history.attempts:
        by_id[attempt.command_id].append(attempt)
    for attempts in by_id.values():
        _check_command(history, log.commands.get(attempts[0].command_id, []), attempts, found)
    for command_id, events in log.commands.items():
        if command_id not in by_id:
            found.append(Violation("b", f"command {command_id!r} of {events[0].tank!r} was never sent"))
    _check_refusals(log, history.attempts, found)
    _check_rows(log, history.tables, found)
    _check_letters(history, log, found)
    _compare("stories", 1, stories_of(history.app, history.messages), history.tables.stories, found)
    owed = check_owed(history.app, history.partitions, history.messages, history.reactions)
    return found + [Violation("p", text) for text in owed]


def verdict_of(attempts: Sequence[Attempt]) -> str:
    """Return the outcome of a command from the answers to all its senders: an acknowledgement outweighs the others."""
    outcomes = {attempt.outcome for attempt in attempts}
    if "acknowledged" in outcomes:
        return "acknowledged"
    return "refused" if outcomes == {"refused"} else "unknown"


def _read(history: History, found: list[Violation]) -> _Log:
    log = _Log()
    known = {attempt.tank for attempt in history.attempts}
    expected = 1
    for message in history.messages:
        if message.sequence != expected:
            found.append(Violation("a", f"the stream goes from {expected - 1} to {message.sequence}"))
        expected = message.sequence + 1
        tank = tank_of(history.app, message.subject)
        if of_kind(history.app, message.subject, "Gauge") is not None and message.payload.startswith(COMMIT):
            continue
        if tank is None or tank not in known:
            log.garbage.append(message)
            continue
        where = f"stream {message.sequence} ({message.subject})"
        if int(message.subject.split(".")[2]) != partition_of(tank, history.partitions):
            found.append(Violation("a", f"{where} is in a wrong partition"))
        try:
            events = events_of(message, tank)
        except (ValueError, KeyError, TypeError) as error:
            found.append(Violation("a", f"{where} is no commit: {error!r}"))
            continue
        for event in events:
            log.tanks[tank].append(event)
            log.commands[event.command_id].append(event)
    if expected != history.last + 1:
        found.append(Violation("a", f"the stream was read up to {expected - 1}, its last is {history.last}"))
    return log


def _check_order(log: _Log, found: list[Violation]) -> None:
    for tank, events in log.tanks.items():
        for place, event in enumerate(events, 1):
            if event.sequence != place:
                where = f"stream {event.message.sequence}"
                found.append(Violation("a", f"{tank!r}: event {event.sequence} where {place} must be ({where})"))
                break


def _check_rule(log: _Log, found: list[Violation]) -> None:
    for tank, events in log.tanks.items():
        level = 0
        for event in events:
            level += event.change
            where = f"{tank!r} event {event.sequence} (stream {event.message.sequence})"
            if not 0 <= level <= LIMIT:
                found.append(Violation("b", f"{where}: level {level} breaks the limit"))
            if event.type != "Marked" and event.data["level"] != level:
                found.append(Violation("b", f"{where}: decided for level {event.data['level']}, it is {level}"))


def _check_command(
    history: History, events: Sequence[Event], attempts: Sequence[Attempt], found: list[Violation]
) -> None:
    first = attempts[0]
    what = f"command {first.command_id} ({first.name} of {first.tank!r})"
    verdict = verdict_of(attempts)
    if not events:
        if verdict == "acknowledged":
            found.append(Violation("b", f"{what} was acknowledged and is not in the log"))
        return
    at = f"stream {sorted({event.message.sequence for event in events})}"
    if verdict == "refused":
        found.append(Violation("b", f"{what} was refused and is in the log, {at}"))
    wanted = expected_events(first)
    if {event.tank for event in events} != {first.tank}:
        found.append(Violation("b", f"{what} is in the log of {sorted({event.tank for event in events})}, {at}"))
    elif len(events) > len(wanted):
        found.append(Violation("b", f"{what} is in the log {len(events) / len(wanted):g} times, {at}"))
    elif [event.fields for event in events] != wanted:
        found.append(Violation("b", f"{what} became {[event.fields for event in events]}, not {wanted}, {at}"))
    elif len({event.message.sequence for event in events}) > 1:
        found.append(Violation("b", f"{what} was torn apart, {at}"))
    true = (events[-1].sequence, events[-1].message.sequence, partition_of(first.tank, history.partitions))
    for attempt in attempts:
        receipt = (attempt.version, attempt.sequence, attempt.partition)
        if attempt.outcome == "acknowledged" and receipt != true:
            found.append(
                Violation("b", f"{what}: the receipt says version, sequence, partition {receipt}, the log {true}")
            )


def _check_refusals(log: _Log, attempts: Sequence[Attempt], found: list[Violation]) -> None:
    """Check that a refusal names a level that the tank had while the sender waited."""
    stands = {tank: _levels(events) for tank, events in log.tanks.items()}
    for attempt in attempts:
        if attempt.outcome != "refused":
            continue
        what = f"command {attempt.command_id} ({attempt.name} {attempt.data} of {attempt.tank!r})"
        words = attempt.reason.split("level is ")
        if len(words) != 2 or not words[1].isdigit():
            found.append(Violation("b", f"{what} was refused in other words than the tank's: {attempt.reason!r}"))
            continue
        level = int(words[1])
        if accepts(attempt, level):
            found.append(Violation("b", f"{what} was refused at level {level}, where it is allowed"))
        times, levels = stands.get(attempt.tank, ([float("-inf")], [0]))
        start = max(0, bisect_left(times, attempt.sent - CLOCK_S) - 1)
        end = bisect_left(times, attempt.answered + SPECULATION_S)
        if level not in levels[start:end]:
            seen = levels[start:end]
            found.append(
                Violation("b", f"{what} was refused at level {level}, which it never had in that time: {seen}")
            )


def _levels(events: Sequence[Event]) -> tuple[list[float], list[int]]:
    """Return the tank's level after each command, and since when."""
    times, levels = [float("-inf")], [0]
    level = 0
    for event, following in zip(events, [*events[1:], None], strict=True):
        level += event.change
        if following is None or following.command_id != event.command_id:
            times.append(event.message.time)
            levels.append(level)
    return times, levels


def _check_rows(log: _Log, tables: Tables, found: list[Violation]) -> None:
    wanted = fold(log.tanks)
    _compare("levels", 1, wanted.levels, tables.levels, found)
    _compare("colours", 1, wanted.colours, tables.colours, found)
    _compare("entries", 2, wanted.entries, tables.entries, found)


def _compare(
    table: str, keys: int, wanted: list[tuple[Any, ...]], rows: list[tuple[Any, ...]], found: list[Violation]
) -> None:
    right, there = {row[:keys]: row for row in wanted}, {row[:keys]: row for row in rows}
    for key, count in Counter(row[:keys] for row in rows).items():
        if count > 1:
            found.append(Violation("c", f"{table} {key}: {count} rows"))
    for key, row in right.items():
        if key not in there:
            found.append(Violation("c", f"{table} {key}: no row, must be {row}"))
        elif there[key] != row:
            found.append(Violation("c", f"{table} {key}: is {there[key]}, must be {row}"))
    for key, row in there.items():
        if key not in right:
            found.append(Violation("c", f"{table} {key}: a row {row} that nothing led to"))


def _check_letters(history: History, log: _Log, found: list[Violation]) -> None:
    there: dict[tuple[str, str, str], list[Letter]] = defaultdict(list)
    for letter in history.tables.letters:
        if letter.projection:
            there[letter.projection, letter.aggregate, letter.aggregate_id].append(letter)
    for tank, events in log.tanks.items():
        for projection in PROJECTIONS:
            wanted = letters(tank, events, projection, history.partitions)
            stored = there.pop((projection, "Tank", tank), [])
            if stored == wanted:
                continue
            what = f"dead letters of {tank!r} for {projection}"
            is_, must = [letter.sequence for letter in stored], [letter.sequence for letter in wanted]
            if is_ != must:
                found.append(Violation("d", f"{what}: events {is_}, must be {must}"))
            else:
                differing = [letter.sequence for letter, right in zip(stored, wanted, strict=True) if letter != right]
                found.append(Violation("d", f"{what}: events {differing} have another place or other bytes"))
    for key, stray in there.items():
        found.append(Violation("d", f"dead letters of {key}: {len(stray)} that nothing led to"))
    _check_garbage(history, log, found)


def _check_garbage(history: History, log: _Log, found: list[Violation]) -> None:
    published = {(piece.subject, piece.payload) for piece in history.garbage}
    stored = {message.sequence: message for message in log.garbage}
    for piece in history.garbage:
        if piece.sequence is not None and (
            piece.sequence not in stored
            or (stored[piece.sequence].subject, stored[piece.sequence].payload) != (piece.subject, piece.payload)
        ):
            found.append(Violation("a", f"garbage acknowledged at {piece.sequence} is not there"))
    for message in log.garbage:
        if (message.subject, message.payload) not in published:
            found.append(Violation("a", f"stream {message.sequence} ({message.subject}): was never published"))
    kept = Counter(
        (letter.stream_sequence, letter.aggregate_id, letter.payload)
        for letter in history.tables.letters
        if not letter.projection
    )
    wanted = {(message.sequence, message.subject, message.payload) for message in log.garbage}
    for key in wanted:
        if kept[key] != 1:
            found.append(Violation("d", f"garbage at {key[0]} ({key[1]}) is kept {kept[key]} times"))
    for key in kept:
        if key not in wanted:
            found.append(Violation("d", f"kept as garbage at {key[0]} ({key[1]}), and is none"))
