"""Every column type carries its values exactly, or in a stated normal form, or refuses them; the record in memory is
what a SELECT gives. docs/column-types.md is the table of it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Computed, DateTime, Engine, Identity, Integer, Numeric, String, func, select, types
from sqlalchemy.orm import DeclarativeBase, mapped_column

from aggregates import Aggregate, DeclarationError, applies, command, event, handles
from kernel import App
from projections import Rows, SchemaError, Tallies, Tally
from projections.database import open_database
from projections.fold import Folded
from tests.conftest import ReadSide, batch_of, envelopes, postgres_database
from tests.projections.samples import SAMPLES, UNSUPPORTED, Sample, shown


@command
class Nothing:
    pass


@event
class Put:
    place: int


@event
class Twisted:
    pass


class Thing(Aggregate):
    @handles
    def nothing(self, command: Nothing) -> None: ...

    @applies
    def put(self, event: Put) -> None: ...

    @applies
    def twisted(self, event: Twisted) -> None: ...


def model_of(kind: Any, sample: Sample, **more: Any) -> Any:
    """Return a model with a column of the type: as a value, or as the key of a tally."""

    class Base(DeclarativeBase):
        pass

    if kind == "key":

        class Count(Base):
            __tablename__ = "counts"
            value = mapped_column(sample.type(), primary_key=True)
            times = mapped_column(Integer)

        return Count

    class Row(Base):
        __tablename__ = "things"
        id = mapped_column(String, primary_key=True)
        value = mapped_column(sample.type(), **{"default": sample.values[0], "nullable": True} | more)

    return Row


def rows_of(sample: Sample, **more: Any) -> App:
    """Return an app that puts the sample's values into rows."""
    model = model_of("row", sample, **more)
    offered = (*sample.values, *sample.refused, None)

    class Things(Rows[model], of=Thing):  # type: ignore[valid-type]
        @applies
        def put(self, row: model, event: Put) -> None:  # type: ignore[valid-type]
            row.value = offered[event.place]  # type: ignore[attr-defined]

        @applies
        def twisted(self, row: model, event: Twisted) -> None:  # type: ignore[valid-type]
            row.value = sample.twist(row.value)  # type: ignore[attr-defined]

    return App("things", aggregates=[Thing], projections=[Things])


def counts_of(sample: Sample) -> App:
    """Return an app that counts the sample's values."""
    model = model_of("key", sample)
    offered = (*sample.values, *sample.refused)

    class Counts(Tallies[model], of=Thing):  # type: ignore[valid-type]
        @applies
        def put(self, tally: Tally[model], event: Put) -> None:  # type: ignore[valid-type]
            tally[offered[event.place]].times += 1  # type: ignore[attr-defined]

    return App("things", aggregates=[Thing], projections=[Counts])


KINDS = [(kind, sample) for sample in SAMPLES for kind in ("sqlite", "postgresql") if sample.both or kind != "sqlite"]


@dataclass
class Tried:
    """A sample's app on a database, which all tests of the sample share; each has aggregates of its own."""

    sample: Sample
    side: ReadSide
    events: int = 0

    def commits(self, *histories: list[Any]) -> list[Any]:
        made = []
        for history in histories:
            self.events += 1
            made.append((self.events, "Thing", f"thing{self.events}", envelopes(Thing, history)))
        return made


@pytest.fixture(scope="module", params=KINDS, ids=lambda pair: f"{pair[0]}-{pair[1].name}")
def tried(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    kind, sample = request.param
    with ExitStack() as stack:
        url = f"sqlite:///{tmp_path_factory.mktemp('types') / 'rows.db'}"
        if kind == "postgresql":
            url = stack.enter_context(postgres_database(request.getfixturevalue("postgres_url")))
        engine = open_database(url)
        yield Tried(sample, ReadSide(engine, rows_of(sample)))
        engine.dispose()


def value_of(record: Any) -> Any:
    return None if record is None else shown(record.value)


def in_memory_and_stored(tried: Tried, batch: list[Any]) -> tuple[list[Any], list[Any]]:
    """Fold a batch and write it. Return the values in memory, and the values loaded from the database."""
    side = tried.side
    folded = Folded(side.plan)
    memory: dict[str, list[Any]] = {}
    for key, own, _ in batch_of(batch):
        memory[key[1]] = [None]
        side.plan.fold(*key, memory[key[1]], own, folded, None)
    write = side.freeze(batch, folded)
    side.writer.commit(write)
    side.position.advance(write.moves, side.generations)
    with side.engine.connect() as connection:
        stored, unreadable = side.writer.load_rows(connection, "Thing", list(memory))
    assert unreadable == []
    return [value_of(rows[0]) for rows in memory.values()], [value_of(rows[0]) for rows in stored.values()]


def test_what_is_in_memory_is_what_a_select_gives(tried: Tried) -> None:
    places = range(len(tried.sample.values))
    histories = [[Put(place)] for place in places] + [[Put(place), Twisted()] for place in places]
    nothing = len(tried.sample.values) + len(tried.sample.refused)
    memory, stored = in_memory_and_stored(tried, tried.commits(*histories, [Put(nothing)]))
    assert memory == stored


def test_a_value_that_a_column_cannot_hold_is_refused_and_others_are_written(tried: Tried) -> None:
    first = len(tried.sample.values)
    histories = [[Put(0), Put(first + number)] for number in range(len(tried.sample.refused))]
    batch = tried.commits([Put(0)], *histories)
    failures = tried.side.project(batch)
    assert [(failure.aggregate[1], failure.sequence, failure.kind) for failure in failures] == [
        (commit[2], 2, "refused") for commit in batch[1:]
    ]
    assert all("Row.value is" in failure.error for failure in failures)
    with tried.side.engine.connect() as connection:
        stored, _ = tried.side.writer.load_rows(connection, "Thing", [commit[2] for commit in batch])
    assert len({str(value_of(rows[0])) for rows in stored.values()}) == 1


def test_a_batch_may_end_anywhere(tried: Tried) -> None:
    """One event at a time, each from the stored row, gives what one batch gives."""
    history = [event for place in range(len(tried.sample.values)) for event in (Put(place), Twisted(), Twisted())]
    (together,) = tried.commits(history)
    failures = tried.side.project([together])
    for envelope in together[3]:
        tried.events += 1
        failures += tried.side.project([(tried.events, "Thing", f"singly{together[0]}", [envelope])])
    with tried.side.engine.connect() as connection:
        stored, _ = tried.side.writer.load_rows(connection, "Thing", [together[2], f"singly{together[0]}"])
    first, second = (value_of(rows[0]) for rows in stored.values())
    assert first == second
    assert len({failure.sequence for failure in failures}) <= 1


def test_a_new_rows_default_is_its_own(tried: Tried) -> None:
    """A default that is a list or a dictionary is shared by no two rows."""
    memory, stored = in_memory_and_stored(tried, tried.commits([Twisted()], [Twisted()]))
    assert memory == stored
    assert memory[0] == memory[1]


def commits(*histories: list[Any]) -> list[Any]:
    return [(place, "Thing", f"thing{place}", envelopes(Thing, history)) for place, history in enumerate(histories, 1)]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_equal_keys_are_one_row(engine: Engine, sample: Sample) -> None:
    if not sample.both and engine.dialect.name == "sqlite":
        return  # it is refused at start, see below
    try:
        side = ReadSide(engine, counts_of(sample))
    except SchemaError as refused:
        assert sample.name.startswith(("JSON", "ARRAY"))
        assert "key" in str(refused) or "operator class" in str(refused)
        return
    places = [place for place, value in enumerate(sample.values) if value is not None]
    history = [[Put(place), Put(place)] for place in places] * 2
    assert side.project(commits(*history)) == []
    side.claim()
    assert side.project([(100 + n, "Thing", f"later{n}", envelopes(Thing, [Put(n)])) for n in places]) == []
    with engine.connect() as connection:
        rows = connection.execute(select(side.generations[0].tables["counts"])).all()
    assert sum(row.times for row in rows) == 5 * len(places)
    assert all(row.times % 5 == 0 for row in rows)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_type_whose_values_would_change_is_refused_at_start(engine: Engine, name: str) -> None:
    odd = Sample(name, UNSUPPORTED[name], (None,), lambda value: value)
    if engine.dialect.name == "sqlite" and name.startswith("TIMESTAMP"):
        return  # SQLite keeps all digits
    with pytest.raises((SchemaError, DeclarationError), match="Row.value|hstore|no type|can't render"):
        ReadSide(engine, rows_of(odd))


@pytest.mark.parametrize("name", [sample.name for sample in SAMPLES if not sample.both])
def test_a_type_that_sqlite_does_not_have_is_refused_at_start(tmp_path: Path, name: str) -> None:
    missing = next(sample for sample in SAMPLES if sample.name == name)
    engine = open_database(f"sqlite:///{tmp_path / 'x.db'}")
    with pytest.raises(SchemaError, match="sqlite has no type"):
        rows_of(missing).plan(engine.dialect)
    engine.dispose()


def test_the_page_of_column_types_is_up_to_date() -> None:
    root = Path(__file__).parents[2]
    made = subprocess.run(
        [sys.executable, "docs/column_types.py"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert (root / "docs/column-types.md").read_text() == made, "run `make docs`"


def test_an_increment_that_a_counter_would_round_is_refused(engine: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Sum(Base):
        __tablename__ = "sums"
        id = mapped_column(String, primary_key=True)
        total = mapped_column(Numeric(12, 2))

    class Sums(Tallies[Sum], of=Thing):
        @applies
        def put(self, tally: Tally[Sum], event: Put) -> None:
            tally["all"].total += Decimal("0.005") if event.place else Decimal("0.01")

    side = ReadSide(engine, App("things", aggregates=[Thing], projections=[Sums]))
    (failure,) = side.project(commits([Put(0), Put(0)], [Put(0), Put(1), Put(0)]))
    assert (failure.aggregate[1], failure.sequence) == ("thing2", 2)
    assert "would round" in failure.error
    assert [row.total for row in side.rows(Sum)] == [Decimal("0.03")]


CASES: dict[str, tuple[Any, str]] = {
    "a default that moves": (lambda: mapped_column(DateTime, default=datetime.now), "another value at each call"),
    "a default of the database": (lambda: mapped_column(DateTime, default=func.now()), "computed by the database"),
    "only a server default": (lambda: mapped_column(Integer, server_default="5"), "server_default is never used"),
    "an onupdate": (lambda: mapped_column(Integer, default=0, onupdate=lambda: 5), "doesn't apply onupdate"),
    "an identity": (lambda: mapped_column(Integer, Identity(), nullable=True), "a rebuild would number its rows"),
    "no value for a new row": (lambda: mapped_column(Integer, nullable=False), "a new row needs a value"),
    "a default that needs a statement": (
        lambda: mapped_column(Integer, default=lambda context: context.get_current_parameters()["id"]),
        "can't be called without a statement",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_default_that_a_rebuild_would_not_give_is_refused(case: str) -> None:
    make, why = CASES[case]

    class Base(DeclarativeBase):
        pass

    class Row(Base):
        __tablename__ = "things"
        id = mapped_column(String, primary_key=True)
        value = make()

    class Things(Rows[Row], of=Thing):
        @applies
        def put(self, row: Row, event: Put) -> None: ...

    with pytest.raises(DeclarationError, match=why):
        App("things", aggregates=[Thing], projections=[Things])


def test_a_computed_column_is_left_to_the_database(engine: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Row(Base):
        __tablename__ = "things"
        id = mapped_column(String, primary_key=True)
        value = mapped_column(Integer, default=0)
        double = mapped_column(Integer, Computed("value * 2"))

    class Things(Rows[Row], of=Thing):
        @applies
        def put(self, row: Row, event: Put) -> None:
            row.value += event.place

    side = ReadSide(engine, App("things", aggregates=[Thing], projections=[Things]))
    assert side.project(commits([Put(3)], [Put(1), Put(4)])) == []
    assert side.project([(9, "Thing", "thing1", envelopes(Thing, [Put(2)], 1))]) == []
    assert sorted((row.value, row.double) for row in side.rows(Row)) == [(5, 10), (5, 10)]


@pytest.mark.parametrize(
    ("kind", "good", "bad"), [(Integer, "7", "07"), (types.Uuid, str(UUID(int=5)), UUID(int=5).hex)]
)
def test_an_id_may_be_a_number_or_a_uuid_in_its_usual_form(engine: Engine, kind: Any, good: str, bad: str) -> None:
    class Base(DeclarativeBase):
        pass

    class Row(Base):
        __tablename__ = "things"
        id = mapped_column(kind, primary_key=True)
        value = mapped_column(Integer, default=0)

    class Things(Rows[Row], of=Thing):
        @applies
        def put(self, row: Row, event: Put) -> None:
            row.value += event.place

    side = ReadSide(engine, App("things", aggregates=[Thing], projections=[Things]))
    first = [(1, "Thing", good, envelopes(Thing, [Put(3)])), (2, "Thing", bad, envelopes(Thing, [Put(1)]))]
    (failure,) = side.project(first)
    assert (failure.aggregate[1], failure.sequence) == (bad, 1)
    side.claim()
    assert side.project([(3, "Thing", good, envelopes(Thing, [Put(2)], 1))]) == []
    assert [(str(row.id), row.value) for row in side.rows(Row)] == [(good, 5)]
