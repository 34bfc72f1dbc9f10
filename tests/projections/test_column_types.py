"""Every column type carries its values exactly, or in a stated normal form, or refuses them; the record in memory is
what a SELECT gives. docs/column-types.md is the table of it."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, Integer, String, select
from sqlalchemy.orm import DeclarativeBase, mapped_column

from aggregates import Aggregate, DeclarationError, applies, command, event, handles
from kernel import App
from projections import Rows, SchemaError, Tallies, Tally
from projections.database import open_database
from projections.fold import Folded
from tests.conftest import ReadSide, batch_of, envelopes
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


def of_database(engine: Engine) -> tuple[Sample, ...]:
    return tuple(sample for sample in SAMPLES if sample.both or engine.dialect.name == "postgresql")


@pytest.fixture(params=SAMPLES, ids=lambda sample: sample.name)
def sample(request: pytest.FixtureRequest, engine: Engine) -> Sample:
    chosen: Sample = request.param
    if not chosen.both and engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no such type; that is refused, see below")
    return chosen


def value_of(record: Any) -> Any:
    return None if record is None else shown(record.value)


def in_memory_and_stored(side: ReadSide, batch: list[Any]) -> tuple[list[Any], list[Any]]:
    """Fold a batch and write it. Return the values in memory, and those that are loaded from the database."""
    folded = Folded(side.plan)
    memory: dict[str, list[Any]] = {}
    for key, own, _ in batch_of(batch):
        memory[key[1]] = [None]
        side.plan.fold(*key, memory[key[1]], own, folded, None)
    side.writer.commit(side.freeze(batch, folded))
    with side.engine.connect() as connection:
        stored, unreadable = side.writer.load_rows(connection, "Thing", list(memory))
    assert unreadable == []
    return [value_of(rows[0]) for rows in memory.values()], [value_of(rows[0]) for rows in stored.values()]


def commits(*histories: list[Any]) -> list[Any]:
    return [(place, "Thing", f"thing{place}", envelopes(Thing, history)) for place, history in enumerate(histories, 1)]


def test_what_is_in_memory_is_what_a_select_gives(engine: Engine, sample: Sample) -> None:
    side = ReadSide(engine, rows_of(sample))
    places = range(len(sample.values) + len(sample.refused) + 1)
    memory, stored = in_memory_and_stored(
        side,
        commits(*([Put(place)] for place in places), *([Put(place), Twisted()] for place in range(len(sample.values)))),
    )
    assert memory == stored


def test_a_value_that_a_column_cannot_hold_is_refused_and_others_are_written(engine: Engine, sample: Sample) -> None:
    side = ReadSide(engine, rows_of(sample))
    first = len(sample.values)
    histories = [[Put(0), Put(first + number)] for number in range(len(sample.refused))]
    failures = side.project(commits([Put(0)], *histories))
    assert [(failure.aggregate[1], failure.sequence, failure.kind) for failure in failures] == [
        (f"thing{number + 2}", 2, "refused") for number in range(len(sample.refused))
    ]
    assert all("Row.value is" in failure.error for failure in failures)
    with engine.connect() as connection:
        stored, _ = side.writer.load_rows(connection, "Thing", [f"thing{n + 1}" for n in range(len(histories) + 1)])
    assert len({str(value_of(rows[0])) for rows in stored.values()}) == 1


def test_a_batch_may_end_anywhere(engine: Engine, sample: Sample) -> None:
    """One event at a time, each from the stored row, gives what one batch gives."""
    history = [event for place in range(len(sample.values)) for event in (Put(place), Twisted(), Twisted())]
    side = ReadSide(engine, rows_of(sample))
    made = envelopes(Thing, history)
    together = side.project([(1, "Thing", "together", made)])
    for number, envelope in enumerate(made, 2):
        together += side.project([(number, "Thing", "singly", [envelope])])
    with engine.connect() as connection:
        stored, _ = side.writer.load_rows(connection, "Thing", ["together", "singly"])
    assert value_of(stored["together"][0]) == value_of(stored["singly"][0])
    assert len({failure.sequence for failure in together}) <= 1


def test_a_new_rows_default_is_its_own(engine: Engine, sample: Sample) -> None:
    """A default that is a list or a dictionary is shared by no two rows."""
    side = ReadSide(engine, rows_of(sample))
    memory, stored = in_memory_and_stored(side, commits([Twisted()], [Twisted()]))
    assert memory == stored
    assert memory[0] == memory[1]


def test_equal_keys_are_one_row(engine: Engine, sample: Sample) -> None:
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
    with pytest.raises((SchemaError, DeclarationError), match="Row.value|hstore|no type"):
        ReadSide(engine, rows_of(odd))


@pytest.mark.parametrize("name", [sample.name for sample in SAMPLES if not sample.both])
def test_a_type_that_sqlite_does_not_have_is_refused_at_start(tmp_path: Path, name: str) -> None:
    missing = next(sample for sample in SAMPLES if sample.name == name)
    engine = open_database(f"sqlite:///{tmp_path / 'x.db'}")
    with pytest.raises(SchemaError, match="sqlite has no type"):
        rows_of(missing).plan(engine.dialect)
    engine.dispose()
