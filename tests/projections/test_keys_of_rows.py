"""Keys of rows: declared, checked, and the same as a text wherever they come from."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, types
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, registry

from aggregates import Aggregate, DeclarationError, Meta, applies, event
from kernel import App
from projections import Drop, Rows, projected
from projections.bulk import Bulk
from projections.codec import Refused, Unsupported
from projections.declaration import declare_projection
from projections.records import Columns
from projections.row_codec import RowCodec
from tests.projections.samples import SAMPLES, Sample, shown


def _model(*keys: Column[Any]) -> Any:
    table = Table("keyed", MetaData(), *keys, Column("n", Integer, default=0))
    return registry().map_imperatively(type("Keyed", (), {}), table).class_


KEYS = types.String, types.Integer, types.Uuid, types.Date, types.DateTime, types.Boolean
CARRIED = [
    sample for sample in SAMPLES if isinstance(sample.type(), KEYS) and not isinstance(sample.type(), types.CHAR)
]


@pytest.mark.parametrize("sample", CARRIED, ids=lambda sample: sample.name)
@pytest.mark.parametrize("composite", [False, True], ids=["alone", "with another"])
def test_a_key_has_one_text_whether_it_is_given_or_stored(engine: Engine, sample: Sample, composite: bool) -> None:
    more = [Column("more", types.String, primary_key=True)] if composite else []
    columns = Columns(_model(Column("key", sample.type(), primary_key=True), *more), sequenced=True)
    codec = RowCodec(columns, "Keyed", engine.dialect, counting=False, keyed=True)
    columns.table.append_column(Column("eskernel_sequence", Integer))
    columns.table.create(engine)
    bulk = Bulk(codec, columns.table, engine.dialect)
    keys = {}
    for value in sample.values:
        try:
            text, key = codec.key_of((value, "m'\"é") if composite else value)
        except Refused:
            continue
        keys[text] = key
    assert keys
    with engine.begin() as connection:
        rows, refused = bulk.carry_own({text: codec.new(*key) for text, key in keys.items()})
        assert not refused
        for parameters in bulk.parameters(rows):
            connection.execute(bulk.upsert, parameters)
    with engine.begin() as connection:
        found, failed = bulk.load(connection, list(keys))
        assert not failed
        own = [columns.names[place] for place in range(columns.keys)]
        loaded = {text: shown([getattr(row, name) for name in own]) for text, row in found.items()}
        assert loaded == {text: shown(list(key)) for text, key in keys.items()}
        connection.execute(bulk.delete, bulk.key_parameters(list(keys)[1:]))
        assert list(bulk.load(connection, list(keys))[0]) == list(keys)[:1]


@pytest.mark.parametrize("kind", [types.Float, types.Numeric, types.JSON, types.Interval])
def test_a_type_whose_values_have_several_forms_is_no_key(engine: Engine, kind: Any) -> None:
    columns = Columns(_model(Column("key", kind(), primary_key=True)), sequenced=True)
    with pytest.raises(Unsupported, match=r"key of Rows has the types|can't be a key"):
        RowCodec(columns, "Keyed", engine.dialect, counting=False, keyed=True)


@event
class Written:
    text: str
    to: str


@event
class Read:
    text: str


class Letter(Aggregate):
    @applies
    def written(self, event: Written | Read) -> None: ...


class Base(DeclarativeBase):
    pass


class Box(Base):
    __tablename__ = "boxes"
    name: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    last: Mapped[str | None]


def problems(projection: Any) -> Sequence[str]:
    with pytest.raises(DeclarationError) as caught:
        App("post", aggregates=[Letter], projections=[projection])
    return caught.value.problems


class Boxes(Rows[Box], of=Letter):
    """A key of two columns, of an event's metadata too; and several rows for one event."""

    def key(self, event: Written, meta: Meta) -> list[tuple[str, date]]:
        return [(event.to, meta.time.date()), (meta.aggregate_id, meta.time.date())]

    @applies
    def written(self, row: Box, event: Written, meta: Meta) -> Drop | None:
        row.last = f"{meta.aggregate_id} {event.text}"
        return None


def test_a_scenario_folds_rows_by_their_key() -> None:
    day = date(2013, 1, 1)
    projected(Boxes).given("l", Written("hi", "ann")).given("m", Written("ho", "ann")).then(
        Box(name="ann", day=day, last="m ho"), Box(name="l", day=day, last="l hi"), Box(name="m", day=day, last="m ho")
    )


def test_a_scenario_fails_where_the_key_does() -> None:
    class Strange(Boxes, of=Letter):
        def key(self, event: Written, meta: Meta) -> Any:  # type: ignore[override]
            return (event.to, event.text)

    projected(Strange).given("l", Written("hi", "ann")).fails("Box.day is 'hi', which is no date")


def test_a_handler_whose_event_has_no_key_is_a_problem() -> None:
    class Wrong(Boxes, of=Letter):
        @applies
        def read(self, row: Box, event: Read) -> None: ...

    assert any("Wrong.key: a handler takes Read, and no key is said for it" in problem for problem in problems(Wrong))


@pytest.mark.parametrize("key", ["a text", lambda self, event: "", staticmethod(len)])
def test_what_is_no_key_function_is_a_problem(key: Any) -> None:
    class Wrong(Boxes, of=Letter):
        pass

    Wrong.key = key  # type: ignore[method-assign]
    assert any("Wrong.key" in problem for problem in problems(Wrong))


def test_a_key_that_takes_something_else_is_a_problem() -> None:
    class Wrong(Boxes, of=Letter):
        def key(self, event: Written, day: date) -> str:  # type: ignore[override]
            return event.to

    class Later(Boxes, of=Letter):
        async def key(self, event: Written) -> str:  # type: ignore[override]
            return event.to

    assert any("Wrong.key: it takes (self, event: Event) and optionally a Meta" in one for one in problems(Wrong))
    assert any("Later.key: make it an ordinary method" in one for one in problems(Later))


def test_a_model_with_another_key_needs_a_key_function() -> None:
    class Wrong(Rows[Box], of=Letter):
        @applies
        def written(self, row: Box, event: Written) -> None: ...

    assert any("give the projection a method `key`" in problem for problem in problems(Wrong))


def test_rows_with_a_key_are_not_named_like_an_aggregate() -> None:
    class Letters(Boxes, of=Letter, name="Letter"):
        pass

    assert any("give the projection another name" in problem for problem in problems(Letters))


def test_a_wrong_number_of_columns_is_refused(engine: Engine) -> None:
    from aggregates.declaration import declare

    codec = declare_projection(Boxes, [declare(Letter)]).codec(engine.dialect)
    assert codec is not None
    with pytest.raises(Refused, match=r"the key of Box is \(name, day\), and 'ann' is not"):
        codec.key_of("ann")
    with pytest.raises(Refused, match="Box.name"):
        codec.key_of(("a\0", date.min))


def test_a_key_of_an_event_that_no_handler_takes_is_a_problem() -> None:
    class Wrong(Boxes, of=Letter):
        def key(self, event: Written | Read, meta: Meta) -> Any:  # type: ignore[override]
            return None

    expected = "Wrong.key: it says a key for Read, which no handler takes"
    assert any(expected in problem for problem in problems(Wrong))
