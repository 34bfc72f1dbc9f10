"""Digests of the states of all aggregates after each of their events: where two programs fold them differently.

The old and the new program need not be in one process: one run saves the digests, and another one compares them.
"""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from aggregates import InvalidId, InvalidMessage
from aggregates.cell import Cell
from aggregates.commit import Envelope, decode
from aggregates.errors import SequenceError
from aggregates.state_digest import SIZE, digest_state
from kernel.app import App
from kernel.governance.pace import Pace, unpaced
from kernel.log.base import EventLog
from kernel.projector.replay import READ, RebuildProgress, reading

EXAMPLES = 10
Key = tuple[str, str]
_FORMAT = "eskernel states 1"


@dataclass(slots=True)
class States:
    """The digests of all aggregates.

    Attributes:
        sequence: stream sequence up to which they were folded.
        digests: for each aggregate, `SIZE` bytes for each of its events that could be folded.
        failures: the events that could not be folded, and why.
    """

    app: str
    sequence: int = 0
    digests: dict[Key, bytearray] = field(default_factory=dict)
    failures: dict[Key, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Parting:
    """An aggregate whose states differ.

    Attributes:
        sequence: the first of its events after which they do.
        error: why one of the programs can't fold that event; empty if both can.
    """

    aggregate: str
    aggregate_id: str
    sequence: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the comparison of two programs' states has found.

    Attributes:
        same: aggregates whose states were the same after each event.
        differing: aggregates whose states were not.
        examples: the first of those.
    """

    same: int
    differing: int
    examples: list[Parting]


async def digest_states(
    app: App,
    log: EventLog,
    progress: Callable[[RebuildProgress], None] = lambda _: None,
    pace: Pace | None = None,
    last: int | None = None,
) -> States:
    """Fold all aggregates of a program, and digest their states after each event.

    Args:
        last: stream sequence up to which they are folded; the log's end by default.

    Raises:
        LogError: the log failed.
    """
    pace, started = pace or unpaced(), time.perf_counter()
    info = await log.info()
    end = info.last if last is None else min(last, info.last)
    states = States(app.name, end)
    cells: dict[Key, Cell[Any]] = {}
    done = events = at = 0
    async with reading(log) as reader:
        while at < end:
            if not (room := await pace.room(READ)):
                continue
            batch = await reader.next(room, timeout=1.0)
            pace.spend(len(batch.commits))
            for sequence, subject, payload in batch.commits:
                if sequence <= end:
                    events += _fold(app, log, states, cells, subject, payload, sequence)
                at, done = sequence, done + 1
            progress(RebuildProgress(done, max(info.commits, done), events, time.perf_counter() - started, "states"))
            await asyncio.sleep(0)
    return states


def _fold(
    app: App, log: EventLog, states: States, cells: dict[Key, Cell[Any]], subject: str, payload: bytes, position: int
) -> int:
    """Fold one commit, and return the number of its events that could be folded."""
    try:
        address, envelopes = log.subjects.parse(subject), decode(payload)
    except (InvalidId, InvalidMessage):
        return 0
    key = address.aggregate, address.id
    declared = app.types.get(address.aggregate)
    if declared is None or key in states.failures:
        return 0
    cell = cells.get(key)
    if cell is None:
        cell = cells[key] = Cell(declared, address.id)
        states.digests[key] = bytearray()
    for number, envelope in enumerate(envelopes):
        try:
            _replay(cell, envelope, position)
        except Exception as error:  # of the app's own code, or an event that it can't read
            states.failures[key] = envelope.sequence, f"{type(error).__name__}: {error}"
            return number
        states.digests[key] += digest_state(cell.state)
    return len(envelopes)


def _replay(cell: Cell[Any], envelope: Envelope, position: int) -> None:
    if envelope.sequence != cell.version + 1:
        raise SequenceError(f"event {envelope.sequence} after {cell.version}")
    cell.replay([envelope], position)


def compare_states(before: States, after: States) -> Comparison:
    """Compare the digests of two programs, as far as both were folded."""
    same, parted = 0, []
    for key, old in before.digests.items():
        new = after.digests.get(key)
        if new is None:
            parted.append(Parting(*key, 1, "the new program has no such aggregate"))
            continue
        failures = [states.failures[key] for states in (after, before) if key in states.failures]
        first = _first_difference(old, new)
        if first is None and len(old) != len(new) and failures:
            first = min(len(old), len(new)) // SIZE + 1
        if first is None:
            same += 1
        else:
            parted.append(Parting(*key, first, next((why for at, why in failures if at == first), "")))
    parted.sort(key=lambda parting: (parting.aggregate, parting.aggregate_id))
    return Comparison(same, len(parted), parted[:EXAMPLES])


def _first_difference(old: bytearray, new: bytearray) -> int | None:
    common = min(len(old), len(new))
    if old[:common] == new[:common]:
        return None
    return (
        next(place for place in range(0, common, SIZE) if old[place : place + SIZE] != new[place : place + SIZE])
        // SIZE
        + 1
    )


def save(states: States, path: Path) -> None:
    """Write digests to a file."""
    with gzip.open(path, "wb") as file:
        file.write(orjson.dumps({"format": _FORMAT, "app": states.app, "sequence": states.sequence}) + b"\n")
        for key, digests in states.digests.items():
            failure = states.failures.get(key)
            file.write(orjson.dumps([*key, digests.hex(), *(failure or ())]) + b"\n")


def load(path: Path, app: str) -> States:
    """Read the digests of an app from a file.

    Raises:
        ValueError: it holds none, or those of another app.
    """
    try:
        with gzip.open(path, "rb") as file:
            lines: Iterator[bytes] = iter(file)
            header = orjson.loads(next(lines))
            if header["format"] != _FORMAT:
                raise ValueError(header["format"])
            states = States(header["app"], header["sequence"])
            for line in lines:
                aggregate, aggregate_id, digests, *failure = orjson.loads(line)
                states.digests[aggregate, aggregate_id] = bytearray.fromhex(digests)
                if failure:
                    states.failures[aggregate, aggregate_id] = failure[0], failure[1]
    except (OSError, EOFError, StopIteration, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was not written by `eskernel rehearse --save-states`: {error}") from None
    if states.app != app:
        raise ValueError(f"{path} holds the states of the app {states.app!r}, and this one is {app!r}")
    return states
