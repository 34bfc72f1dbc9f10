"""Snapshots: a cell comes back as it was, or is not taken; and only with the code that made it."""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from aggregates import Aggregate, applies, command, event, handles
from aggregates.cell import Cell
from aggregates.commit import Decision, decode, encode, timestamp
from aggregates.context import Context, uuid7
from aggregates.declaration import declare
from aggregates.fingerprint import fingerprint
from aggregates.seen import LATEST, Seen
from aggregates.snapshot import SnapshotCodec, identical
from tests.programs import program


@command
class Add:
    name: str
    at: datetime


@event
class Added:
    name: str
    at: datetime


class Colour(Enum):
    RED = "red"


@dataclass
class Line:
    name: str
    price: Decimal


class Basket(Aggregate):
    lines: list[Line] = field(default_factory=list)
    by_name: dict[str, int] = field(default_factory=dict)
    colour: Colour = Colour.RED
    names: frozenset[str] = frozenset()
    first: datetime | None = None
    latest: datetime | None = None

    @handles
    def add(self, command: Add) -> Added:
        return Added(command.name, command.at)

    @applies
    def added(self, event: Added) -> None:
        self.lines.append(Line(event.name, Decimal("1.10")))
        self.by_name[event.name] = self.by_name.get(event.name, 0) + 1
        self.names |= {event.name}
        self.first = self.first or event.at
        self.latest = event.at


def play(cell: Cell[Any], commands: list[Any], start: int = 1) -> None:
    """Have a cell decide commands, and fold what would be stored."""
    for number, sent in enumerate(commands, start):
        command_id = uuid7()
        decision = Decision(command_id, cell.decide(sent, Context(command_id)))
        cell.replay(decode(encode("/test", "b", [decision], cell.version, NOW)), 10 * number)


NOW = timestamp()


def test_a_cell_comes_back_with_everything_that_it_was() -> None:
    declared = declare(Basket)
    codec, cell = SnapshotCodec(declared), Cell(declared, "b")
    play(cell, [Add(f"n{number % 3}", datetime(2026, 1, 1, tzinfo=UTC)) for number in range(30)])
    data = codec.take(cell, b"commit")
    assert data is not None
    found = codec.restore(data, "b")
    assert found is not None
    restored = found.cell
    assert restored.state == cell.state
    assert (restored.version, restored.position, restored.trail) == (cell.version, cell.position, cell.trail)
    assert restored.commands == cell.commands
    more = [Add("z", datetime(2026, 1, 2, tzinfo=UTC))]
    play(cell, more, start=31)
    play(restored, more, start=31)
    assert restored.state == cell.state
    assert (restored.trail, restored.links) == (cell.trail, cell.links)


def test_a_snapshot_of_another_aggregate_or_of_damaged_bytes_is_not_used() -> None:
    declared = declare(Basket)
    codec, cell = SnapshotCodec(declared), Cell(declared, "b")
    play(cell, [Add("a", datetime.now(UTC))])
    data = codec.take(cell, b"commit") or b""
    assert codec.restore(data, "b") is not None
    assert codec.restore(data, "c") is None
    for damaged in (b"", b"{}", data[:-1], data[1:], data.replace(b"red", b"rad")):
        assert codec.restore(damaged, "b") is None


def test_a_snapshot_knows_its_last_commit() -> None:
    cell = Cell(declare(Basket), "b")
    play(cell, [Add("a", datetime.now(UTC))])
    codec = SnapshotCodec(cell.declared)
    restored = codec.restore(codec.take(cell, b"commit") or b"", "b")
    assert restored is not None
    assert restored.is_of(b"commit")
    assert not restored.is_of(b"another commit")


@event
class Set:
    pass


def _holds(value: Any, annotation: Any) -> Cell[Any]:
    class Holder(Aggregate):
        held: Any = None

        @applies
        def was_set(self, event: Set) -> None: ...

    Holder.__annotations__["held"] = annotation
    cell = Cell(declare(Holder), "h")
    cell.state.held = value
    return cell


_SHARED: list[int] = []


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (defaultdict(int), dict[str, int]),
        ((1, 2), list[int]),
        ([_SHARED, _SHARED], list[list[int]]),
        (2.0, int),
        (object(), Any),
        (datetime(2026, 1, 1), str),
    ],
    ids=["default dictionary", "tuple", "an object twice", "float", "object", "datetime"],
)
def test_a_state_that_would_come_back_as_another_is_not_taken(value: Any, annotation: Any) -> None:
    cell = _holds(value, annotation)
    assert SnapshotCodec(cell.declared).take(cell, b"commit") is None


def test_an_attribute_that_is_no_field_is_not_lost() -> None:
    cell = _holds(1, int)
    assert SnapshotCodec(cell.declared).take(cell, b"commit") is not None
    cell.state.cache = {}
    assert SnapshotCodec(cell.declared).take(cell, b"commit") is None


def test_identical_means_equal_in_type_and_order_too() -> None:
    assert identical({"a": [1, (2.5, None)], "b": {1}}, {"a": [1, (2.5, None)], "b": {1}})
    moment = datetime.now(UTC)
    assert identical([moment, moment], [moment, moment])
    assert identical(float("nan"), float("nan"))
    for one, other in [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ([1], [1.0]),
        ([True], [1]),
        ([1], [1, 2]),
        (Decimal("1.0"), Decimal("1.00")),
        ({1}, {True}),
    ]:
        assert not identical(one, other)


# code


def test_a_program_with_other_code_has_another_fingerprint() -> None:
    """From one source: only closures, constants and classes differ."""
    variants = [
        program("a"),
        program("a", version=2),
        program("a", closes=True),
    ]
    prints = [fingerprint(declare(made.account)) for made in variants]
    assert None not in prints
    assert len(set(prints)) == len(variants)
    assert fingerprint(declare(program("a").account)) == prints[0]


CODE = """
from aggregates import Aggregate, applies, event
from {helper} import LIMIT, bounded
import {helper} as rules

@event
class Added:
    number: int

class Total(Aggregate):
    total: int = 0

    @applies
    def added(self, event: Added) -> None:
        self.total = bounded(self.total + event.number) + {constant}
"""
HELPER = "LIMIT = {limit}\n\ndef bounded(number: int) -> int:\n    return min(number, LIMIT){more}\n"


def test_a_change_anywhere_that_the_code_leads_to_changes_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    prints = []
    for number, (limit, more, constant) in enumerate([(10, "", 0), (11, "", 0), (10, " - 1", 0), (10, "", 1)]):
        helper, name = f"helper_{number}", f"total_{number}"
        folder = tmp_path / str(number)
        folder.mkdir()
        (tmp_path / f"{helper}.py").write_text(HELPER.format(limit=limit, more=more))
        (tmp_path / f"{name}.py").write_text(CODE.format(helper=helper, constant=constant))
        prints.append(fingerprint(declare(import_module(name).Total)))
    assert None not in prints
    assert len(set(prints)) == len(prints)
    file = tmp_path / "helper_0.py"
    file.write_text(file.read_text() + "\n# the same code\n")
    assert fingerprint(declare(sys.modules["total_0"].Total)) != prints[0]


# command ids


def test_ids_are_remembered_through_a_snapshot_one_by_one_or_by_their_greatest() -> None:
    seen = Seen()
    ids = [f"{number:08}" for number in range(3 * LATEST)]
    for command_id in ids:
        seen.add(command_id)
    restored = Seen.restore(*seen.store())
    assert all(command_id in restored for command_id in ids)
    later = [f"{number:08}" for number in range(3 * LATEST, 4 * LATEST)]
    assert not any(command_id in restored for command_id in later)
    assert restored.horizon < ids[-LATEST]
    again = Seen.restore(*restored.store())
    assert all(command_id in again for command_id in ids)


def test_after_a_snapshot_a_new_id_below_an_earlier_one_is_taken_for_a_known_one() -> None:
    seen = Seen()
    seen.add("z")
    for number in range(2 * LATEST):
        seen.add(f"{number:08}")
    restored = Seen.restore(*seen.store())
    assert "y" in restored
    assert "zz" not in restored


def test_few_ids_are_all_remembered_one_by_one() -> None:
    seen = Seen()
    for number in range(LATEST):
        seen.add(f"{number:08}")
    restored = Seen.restore(*seen.store())
    assert restored.horizon == ""
    assert "00000000x" not in restored
