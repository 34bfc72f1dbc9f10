"""The checker of what policies owe finds each way of not doing it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.faults.owed import DELAY_S, Reactions, check_owed, stories_of
from tests.faults.rules import Message, fnv1a

PARTITIONS = 64
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp()


class Story:
    """A log in which everything that is owed was done: a note, a rejection, a timer, a timer that was cancelled."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.tank(1, "Filled", 30)
        self.tank(2, "Drained", 8)
        self.tank(3, "Drained", 14)
        self.gauge(1, "Noted", 2)
        self.gauge(2, "Objected", 3)
        self.gauge(3, "Rang", 1, NOON + 1 + DELAY_S)
        self.tank(4, "Filled", 20)
        self.tank(5, "Marked", 0)
        self.tank(6, "Drained", 3)
        self.gauge(4, "Noted", 6)
        self.tank(7, "Filled", 25)
        self.gauge(5, "Rang", 7, NOON + 7 + DELAY_S)
        self.reactions = Reactions([("t-3", "0")], ["g-3", "g-5"])

    def tank(self, sequence: int, kind: str, amount: int) -> None:
        self._add("Tank", f"t-{sequence}", sequence, kind, {"amount": amount}, NOON + sequence, "")

    def gauge(self, sequence: int, kind: str, of: int, time: float = NOON) -> None:
        self._add("Gauge", f"g-{sequence}", sequence, kind, {"sequence": of}, time, f"t-{of}")

    def _add(
        self, aggregate: str, key: str, sequence: int, kind: str, data: dict[str, Any], time: float, cause: str
    ) -> None:
        moment = datetime.fromtimestamp(time, UTC).isoformat()
        event = {"specversion": "1.0", "id": key, "type": kind, "sequence": sequence, "data": data, "time": moment}
        self.events.append((aggregate, event | {"causationid": cause}))

    def problems(self) -> list[str]:
        messages = [
            Message(
                number,
                f"app.evt.{fnv1a(f'{aggregate}/x') % PARTITIONS}.{aggregate}.x",
                json.dumps([event], separators=(",", ":")).encode(),
            )
            for number, (aggregate, event) in enumerate(self.events, 1)
        ]
        return check_owed("app", PARTITIONS, messages, self.reactions)

    def without(self, key: str) -> None:
        self.events = [(aggregate, event) for aggregate, event in self.events if event["id"] != key]

    def swap(self, first: str, second: str) -> None:
        places = {event["id"]: place for place, (_, event) in enumerate(self.events)}
        one, other = places[first], places[second]
        self.events[one], self.events[other] = self.events[other], self.events[one]


def test_what_is_done_as_it_is_owed_is_right() -> None:
    assert Story().problems() == []


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda story: story.without("g-1"), "led to 0 Noted, not to 1"),
        (lambda story: story.gauge(6, "Noted", 2), "led to 2 Noted, not to 1"),
        (lambda story: story.gauge(6, "Noted", 3), "led to 1 Noted, not to 0"),
        (lambda story: story.without("g-2"), "led to 0 Objected, not to 1"),
        (lambda story: story.without("g-5"), "was not fired"),
        (lambda story: story.gauge(6, "Rang", 1, NOON + 9), "was fired 2 times"),
        (lambda story: story.gauge(6, "Rang", 4, NOON + 4), "s early"),
        (lambda story: story.gauge(6, "Rang", 2, NOON + 9), "sets no timer"),
        (lambda story: story.gauge(6, "Noted", 77), "which nothing led to"),
        (lambda story: story.swap("g-1", "g-4"), "out of order"),
        (lambda story: story.reactions.rejected.clear(), "0 recorded rejections, not 1"),
        (lambda story: story.reactions.rejected.append(("t-2", "0")), "1 recorded rejections, not 0"),
        (lambda story: story.reactions.bells.clear(), "had no effect"),
        (lambda story: story.reactions.bells.append("g-1"), "an effect took place for g-1"),
    ],
)
def test_what_is_not_as_it_is_owed_is_found(spoil: Callable[[Story], None], problem: str) -> None:
    story = Story()
    spoil(story)
    assert any(problem in each for each in story.problems()), story.problems()


def test_a_bell_that_rings_twice_is_right() -> None:
    story = Story()
    story.reactions.bells.append("g-3")
    assert story.problems() == []


def test_a_story_in_another_order_has_another_digest() -> None:
    def told(first: int, second: int) -> list[tuple[str, int, int]]:
        event = '[{{"specversion":"1.0","id":"{}","data":{{"note":"red {}"}}}}]'
        messages = [
            Message(1, "app.evt.1.Tank.x", event.format(first, first).encode()),
            Message(2, "app.evt.2.Tank.y", event.format(second, second).encode()),
        ]
        return stories_of("app", messages)

    rows = {story: events for story, events, _ in told(1, 2)}
    assert rows == {"x": 1, "y": 1, "colour red": 2}
    assert told(1, 2) != told(2, 1)
