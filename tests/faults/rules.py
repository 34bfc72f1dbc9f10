"""The domain of `app.py` once more, as plain functions on plain data. It imports nothing of the product.

The evidence of a run is described here too: messages of the stream, answers to the senders, rows of the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote

LIMIT = 100
PROJECTIONS = ("Levels", "Colours", "Entries")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the stream.

    Attributes:
        time: when the server stored it, in seconds of the epoch.
    """

    sequence: int
    subject: str
    payload: bytes
    time: float = 0.0


@dataclass(slots=True)
class Attempt:
    """A command sent once by one client, and the answer to its sender.

    Attributes:
        outcome: `acknowledged`, `refused` (by the aggregate: nothing was appended), or `unknown`.
        sent, answered: seconds of the epoch.
        reason: the refusal's words, or why the outcome is unknown.
    """

    command_id: str
    tank: str
    name: str
    data: dict[str, Any]
    sent: float = 0.0
    answered: float = 0.0
    outcome: str = "unknown"
    version: int = 0
    sequence: int = 0
    partition: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Garbage:
    """Bytes that the driver published; `sequence` is None where the server's answer was lost."""

    subject: str
    payload: bytes
    sequence: int | None


class Letter(NamedTuple):
    """A row of the dead letter table, in the order of its id."""

    projection: str
    partition: int
    aggregate: str
    aggregate_id: str
    stream_sequence: int
    sequence: int
    payload: bytes


@dataclass(slots=True)
class Tables:
    """Every row of the projections, and the dead letters.

    Attributes:
        levels: tank, level, events, last.
        colours: colour, times, amount.
        entries: tank, sequence, kind, amount, note.
        stories: key, events, digest.
    """

    levels: list[tuple[Any, ...]] = field(default_factory=list)
    colours: list[tuple[Any, ...]] = field(default_factory=list)
    entries: list[tuple[Any, ...]] = field(default_factory=list)
    letters: list[Letter] = field(default_factory=list)
    stories: list[tuple[Any, ...]] = field(default_factory=list)


class Event(NamedTuple):
    """One event of a tank, as stored in the log."""

    tank: str
    message: Message
    sequence: int
    type: str
    data: dict[str, Any]
    command_id: str

    @property
    def note(self) -> str:
        return str(self.data["note"])

    @property
    def change(self) -> int:
        """How the event changes the level."""
        amount = int(self.data.get("amount", 0))
        return {"Filled": amount, "Drained": -amount, "Marked": 0}[self.type]

    @property
    def fields(self) -> tuple[str, int, str]:
        """The fields that follow from the command alone: type, amount, note."""
        return self.type, int(self.data.get("amount", 0)), self.note

    def poisons(self, projection: str) -> bool:
        """Return whether this projection's handler fails on the event."""
        return self.note.startswith(f"poison-{projection} ")


def fnv1a(text: str) -> int:
    """32-bit FNV-1a of the UTF-8 bytes."""
    value = 2166136261
    for byte in text.encode("utf-8"):
        value = ((value ^ byte) * 16777619) % (1 << 32)
    return value


def partition_of(tank: str, partitions: int) -> int:
    return fnv1a(f"Tank/{tank}") % partitions


def tank_of(app: str, subject: str) -> str | None:
    """Return the tank whose events a subject carries; None for any other subject."""
    parts = subject.split(".")
    if len(parts) != 5 or parts[:2] != [app, "evt"] or parts[3] != "Tank" or not parts[2].isdigit():
        return None
    return unquote(parts[4])


def events_of(message: Message, tank: str) -> list[Event]:
    """Decode a commit. Raises `ValueError` or `KeyError` if the bytes are not a commit."""
    found = json.loads(message.payload)
    if not isinstance(found, list) or not found:
        raise ValueError("not a batch of events")
    return [
        Event(
            tank,
            message,
            int(envelope["sequence"]),
            str(envelope["type"]),
            dict(envelope["data"]),
            str(envelope["commandid"]),
        )
        for envelope in found
    ]


def expected_events(attempt: Attempt) -> list[tuple[str, int, str]]:
    """Return type, amount and note of the events of a command that is accepted."""
    data = attempt.data
    if attempt.name == "Burst":
        return [
            ("Filled" if amount >= 0 else "Drained", abs(amount), note)
            for amount, note in zip(data["amounts"], data["notes"], strict=True)
        ]
    if attempt.name == "Mark":
        return [("Marked", 0, data["note"])]
    return [({"Fill": "Filled", "Drain": "Drained"}[attempt.name], data["amount"], data["note"])]


def accepts(attempt: Attempt, level: int) -> bool:
    """Return whether a tank at this level accepts the command."""
    for kind, amount, _ in expected_events(attempt):
        level += {"Filled": amount, "Drained": -amount, "Marked": 0}[kind]
        if not 0 <= level <= LIMIT:
            return False
    return True


def folded(events: Iterable[Event], projection: str) -> list[Event]:
    """Return the events of one tank that a projection folds: those before the first that its handler fails on."""
    taken = []
    for event in events:
        if event.poisons(projection):
            break
        taken.append(event)
    return taken


def fold(tanks: dict[str, list[Event]]) -> Tables:
    """Return the expected rows of the projections' tables for these tanks, without the dead letters."""
    made = Tables()
    colours: dict[str, list[int]] = {}
    for tank, events in tanks.items():
        if own := folded(events, "Levels"):
            made.levels.append((tank, sum(event.change for event in own), len(own), own[-1].note))
        for event in folded(events, "Colours"):
            counters = colours.setdefault(event.note.split(" ")[0], [0, 0])
            counters[0] += 1
            counters[1] += event.change
        made.entries += [(tank, event.sequence, *event.fields) for event in folded(events, "Entries")]
    made.colours = [(colour, times, amount) for colour, (times, amount) in colours.items()]
    return made


def letters(tank: str, events: Sequence[Event], projection: str, partitions: int) -> list[Letter]:
    """Return the expected dead letters for a tank and a projection."""
    waiting = events[len(folded(events, projection)) :]
    place = partition_of(tank, partitions)
    return [
        Letter(projection, place, "Tank", tank, event.message.sequence, event.sequence, event.message.payload)
        for event in waiting
    ]
