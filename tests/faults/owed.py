"""What a policy owes for the events of tanks, once more, against the log. This imports nothing of the product.

(v) The view over tanks and gauges is a plain fold of the events in the order of the log.
(p) Each command that is owed is in the log exactly once, or was rejected once, in the order of its tank's events; no
timer is fired early, or twice; and each effect took place.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from urllib.parse import unquote

from tests.faults.rules import Message, fnv1a

DELAY_S = 1.5
"""A timer is due so long after its event."""
LARGE = 20
"""So much is filled by an event that sets a timer."""
ODD = 7
"""Amounts that are multiples of it are rejected."""


@dataclass(frozen=True, slots=True)
class Happened:
    """An event of a tank or of a gauge."""

    id: str
    type: str
    sequence: int
    data: dict[str, object]
    time: float
    cause: str


def stories_of(app: str, messages: Sequence[Message]) -> list[tuple[str, int, int]]:
    """Return the rows of the view over tanks and gauges: key, events, digest."""
    rows: dict[str, tuple[int, int]] = {}
    for message in sorted(messages, key=lambda message: message.sequence):
        tank = of_kind(app, message.subject, "Tank")
        key = of_kind(app, message.subject, "Gauge") if tank is None else tank
        if key is None or not message.payload.startswith(b'[{"specversion"'):
            continue
        for envelope in json.loads(message.payload):
            colour = [] if tank is None else [f"colour {envelope['data']['note'].split(' ')[0]}"]
            for story in (key, *colour):
                events, digest = rows.get(story, (0, 0))
                rows[story] = events + 1, zlib.crc32(f"{digest} {envelope['id']}".encode())
    return [(story, *row) for story, row in rows.items()]


@dataclass(slots=True)
class Reactions:
    """What is known of policies and effects apart from the log.

    Attributes:
        rejected: event and place of the commands that were rejected.
        bells: ids of the events that the effect took place for, as often as it did.
    """

    rejected: list[tuple[str, str]] = field(default_factory=list)
    bells: list[str] = field(default_factory=list)


def of_kind(app: str, subject: str, kind: str) -> str | None:
    """Return the id of the aggregate whose events a subject carries; None for any other subject."""
    parts = subject.split(".")
    if len(parts) != 5 or parts[:2] != [app, "evt"] or parts[3] != kind or not parts[2].isdigit():
        return None
    return unquote(parts[4])


def check_owed(app: str, partitions: int, messages: Sequence[Message], known: Reactions) -> list[str]:
    """Return what is not as it is owed."""
    tanks, gauges, found = _read(app, partitions, messages)
    rejected = Counter(known.rejected)
    causes = {event.id: tank for tank, events in tanks.items() for event in events}
    for gauge, events in gauges.items():
        for event in events:
            if causes.get(event.cause) != gauge:
                found.append(f"{event.type} of gauge {gauge!r} has no cause among the events of its tank")
    for tank, events in tanks.items():
        found += _check_tank(tank, events, gauges.get(tank, []), rejected)
    rang = Counter(event.id for events in gauges.values() for event in events if event.type == "Rang")
    bells = Counter(known.bells)
    found += [f"event {event} had no effect" for event in rang if not bells[event]]
    found += [f"an effect took place for {event}, which is not in the log" for event in bells if event not in rang]
    return found


def _read(
    app: str, partitions: int, messages: Sequence[Message]
) -> tuple[dict[str, list[Happened]], dict[str, list[Happened]], list[str]]:
    tanks: dict[str, list[Happened]] = defaultdict(list)
    gauges: dict[str, list[Happened]] = defaultdict(list)
    found = []
    for message in messages:
        for kind, kept in (("Tank", tanks), ("Gauge", gauges)):
            key = of_kind(app, message.subject, kind)
            if key is None or not message.payload.startswith(b'[{"specversion"'):
                continue
            if int(message.subject.split(".")[2]) != fnv1a(f"{kind}/{key}") % partitions:
                found.append(f"stream {message.sequence} ({message.subject}) is in a wrong partition")
            for envelope in json.loads(message.payload):
                time = datetime.fromisoformat(envelope["time"]).timestamp()
                cause = envelope.get("causationid", "")
                kept[key].append(
                    Happened(envelope["id"], envelope["type"], envelope["sequence"], envelope["data"], time, cause)
                )
    return tanks, gauges, found


def _check_tank(
    tank: str, events: Sequence[Happened], gauge: Sequence[Happened], rejected: Counter[tuple[str, str]]
) -> list[str]:
    found = []
    made: dict[tuple[str, object], list[Happened]] = defaultdict(list)
    for event in gauge:
        made[event.type, event.data["sequence"]].append(event)
    noted = [event.data["sequence"] for event in gauge if event.type == "Noted"]
    if noted != sorted(noted):  # type: ignore[type-var]
        found.append(f"gauge {tank!r} was told out of order: {noted}")
    for place, event in enumerate(events):
        what = f"{event.type} {event.sequence} of tank {tank!r}"
        drained = event.type == "Drained"
        odd = drained and int(str(event.data["amount"])) % ODD == 0
        wanted = {"Noted": int(drained and not odd), "Objected": int(odd)}
        for kind, count in wanted.items():
            if (there := len(made.pop((kind, event.sequence), []))) != count:
                found.append(f"{what} led to {there} {kind}, not to {count}")
        if rejected[event.id, "0"] != int(odd):
            found.append(f"{what}: {rejected[event.id, '0']} recorded rejections, not {int(odd)}")
        found += _check_timer(what, event, events[place + 1 :], made.pop(("Rang", event.sequence), []))
    found += [f"gauge {tank!r} has {kind} {sequence}, which nothing led to" for kind, sequence in made]
    return found


def _sets(event: Happened) -> bool:
    return event.type == "Filled" and int(str(event.data["amount"])) >= LARGE


def _check_timer(what: str, event: Happened, later: Sequence[Happened], rang: Sequence[Happened]) -> list[str]:
    if not _sets(event):
        return [f"{what} sets no timer, and one was fired"] if rang else []
    if len(rang) > 1:
        return [f"the timer of {what} was fired {len(rang)} times"]
    if not rang:
        changed = any(_sets(other) or other.type == "Marked" for other in later)
        return [] if changed else [f"the timer of {what} was not fired"]
    early = event.time + DELAY_S - rang[0].time
    return [f"the timer of {what} was fired {early:.3f} s early"] if early > 0 else []
