"""What is folded is what is stored: an event is encoded once, read back from those bytes, and only then folded."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from aggregates import Aggregate, Context, InvalidEvent, applies, command, event, handles, scenario
from aggregates.cell import Cell
from aggregates.commit import Decision, decode, encode
from aggregates.declaration import EventType, declare
from aggregates.encoding import EncodedEvent

BERLIN = ZoneInfo("Europe/Berlin")
NOON = "2013-01-01T12:00:00Z"


class Colour(enum.Enum):
    RED = "red"


class Name(enum.StrEnum):
    ANNA = "anna"


class Point(NamedTuple):
    x: int
    y: int


@dataclass(frozen=True)
class Money:
    amount: Decimal
    currency: str = "EUR"


@dataclass(frozen=True)
class Tip(Money):
    to: str = ""


def record(kind: Any, value: Any) -> EncodedEvent:
    """Encode an event with one field `value` of that type."""
    held = event(type("Held", (), {"__annotations__": {"value": kind}}))
    return EventType(held, "Held", 1).encode(held(value))


SAME = [
    (int, 2**63),
    (float, 5),
    (str, Name.ANNA),
    (Decimal, Decimal("12345678901234567890.123456789012345678")),
    (Decimal, Decimal("NaN")),
    (Decimal, Decimal("-0.00")),
    (dict[int, int], {1: 2}),
    (dict[Colour, int], {Colour.RED: 1}),
    (dict[datetime, int], {datetime(2024, 1, 1, tzinfo=UTC): 1}),
    (datetime, datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=BERLIN)),
    (datetime, datetime(2024, 10, 27, 2, 30, fold=0, tzinfo=BERLIN)),
    (datetime, datetime(2024, 3, 31, 2, 30, tzinfo=BERLIN)),
    (list[datetime], [datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=BERLIN)]),
    (datetime, datetime(2024, 1, 1)),
    (date, date.min),
    (time, time(1, 2, 3, 4)),
    (timedelta, timedelta(days=-1, microseconds=1)),
    (UUID, UUID(int=1)),
    (bytes, b"\x00\xff"),
    (set[Decimal], {Decimal("1.1")}),
    (frozenset[Colour], frozenset({Colour.RED})),
    (tuple[int, ...], (1, 2)),
    (tuple[int, ...], [1, 2]),
    (list[int], (1, 2)),
    (Sequence[int], (1, 2)),
    (Any, (1, (2, 3))),
    (Any, {"a": [1, None, "x"]}),
    (Point, Point(1, 2)),
    (Money | None, Money(Decimal("0.10"))),
    (list[Money | None], [None, Money(Decimal(1))]),
]
REFUSED = [
    (int, 2.5, "Held.value"),
    (int, 5.0, "Held.value"),
    (dict[Decimal, int], {Decimal("1.10"): 1}, "Held"),
    (int, "5", "Held.value"),
    (int, None, "Held.value"),
    (int, True, "Held.value"),
    (date, datetime(2024, 1, 2, 3, 4), "Held.value"),
    (float, math.nan, "Held.value"),
    (float, math.inf, "Held.value"),
    (list[float], [1.0, math.nan], "Held.value[1]"),
    (Any, math.nan, "Held.value"),
    (Any, {"a": [math.inf]}, "Held.value['a'][0]"),
    (Any, Decimal("1.10"), "Held.value"),
    (Any, datetime(2024, 1, 1), "Held.value"),
    (dict[int | str, int], {1: 2, "1": 3}, "Held.value"),
    (Any, {1: 2}, "key 1"),
    (str, UUID(int=1), None),
    (Money, Tip(Decimal(1), "EUR", "waiter"), "Held.value"),
    (datetime, datetime(1890, 1, 1, tzinfo=BERLIN), "Held"),
    (datetime, datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=1, seconds=30))), "Held"),
]


@pytest.mark.parametrize(("kind", "value"), SAME, ids=str)
def test_a_value_comes_back_as_it_was_decided(kind: Any, value: Any) -> None:
    encoded = record(kind, value)
    again = EventType(type(encoded.event), "Held", 1).decode(encoded.data, 1)  # type: ignore[arg-type]
    assert repr(again) == repr(encoded.event)


@pytest.mark.parametrize(("kind", "value", "named"), REFUSED, ids=str)
def test_a_value_that_would_come_back_otherwise_is_refused_with_its_place(
    kind: Any, value: Any, named: str | None
) -> None:
    try:
        encoded = record(kind, value)
    except InvalidEvent as refused:
        assert named is None or named in str(refused)
    else:
        # JSON has one form for both: then the text is what is folded
        assert named is None and encoded.event.value == str(value)


@event
class Tagged:
    tags: list[str]


@command
class Tag:
    tag: str


@command
class Retag:
    tag: str


@event
class Weighed:
    grams: int


@command
class Weigh:
    grams: float


class Item(Aggregate):
    tags: list[str] = field(default_factory=list)
    grams: int = 0

    @handles
    def tag(self, command: Tag) -> Tagged:
        return Tagged([command.tag])

    @handles
    def weigh(self, command: Weigh) -> list[Weighed]:
        return [Weighed(1), Weighed(command.grams)]  # type: ignore[arg-type]

    @applies
    def tagged(self, event: Tagged) -> None:
        if not self.tags:
            self.tags = event.tags  # and goes on changing it
        else:
            self.tags += event.tags

    @applies
    def weighed(self, event: Weighed) -> None:
        self.grams = event.grams


def test_an_applier_that_keeps_an_events_list_changes_nothing_of_what_is_stored() -> None:
    cell = Cell(declare(Item), "1")
    decisions = []
    for number, tag in enumerate(["a", "z"]):
        events = cell.decide(Tag(tag), Context(f"c{number}"))
        cell.evolve(events)
        decisions.append(Decision(f"c{number}", events))
    stored = decode(encode("/shop/Item", "1", decisions, 0, NOON))
    assert [bytes(envelope.data) for envelope in stored] == [b'{"tags":["a"]}', b'{"tags":["z"]}']
    again = Cell(declare(Item), "1")
    again.replay(stored, 1)
    assert again.state.tags == cell.state.tags == ["a", "z"]


def test_of_several_events_none_is_applied_where_one_is_refused() -> None:
    cell = Cell(declare(Item), "1")
    with pytest.raises(InvalidEvent, match=r"Weighed\.grams could not be read back: Expected `int`, got `float`"):
        cell.decide(Weigh(2.5), Context("c"))
    assert (cell.version, cell.state.grams) == (0, 0)


def test_a_scenario_refuses_what_a_service_refuses() -> None:
    with pytest.raises(InvalidEvent, match=r"Weighed\.grams"):
        scenario(Item).when(Weigh(2.5)).then(Weighed(1))
