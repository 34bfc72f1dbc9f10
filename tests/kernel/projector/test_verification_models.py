"""Tables of all kinds are compared with the log: names, keys, types and defaults that models may have."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    JSON,
    Computed,
    DateTime,
    Enum,
    ForeignKey,
    Identity,
    Integer,
    String,
    func,
    insert,
    text,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from kernel.app import App
from kernel.projector.verification import Verified
from projections import Recorded, Rows, SchemaError, Sql, Transaction, applies
from tests.apps import Notebook, Noted
from tests.kernel.projector.test_table_verification import running


class Base(DeclarativeBase):
    pass


def differences(found: Sequence[Verified]) -> list[tuple[str, int, int, int]]:
    return [
        (table.view, table.changed, table.missing, table.extra)
        for each in found
        for table in each.tables
        if table.differing
    ]


class Odd(Base):
    __tablename__ = 'Odd 100% "x":y'
    notebook: Mapped[str] = mapped_column("Note Book", String, primary_key=True, key="nb")
    n: Mapped[int] = mapped_column("n %s :x", default=0, key="count")
    last: Mapped[str | None] = mapped_column("Last")


class Odds(Rows[Odd], of=Notebook):
    @applies
    def noted(self, row: Odd, event: Noted) -> None:
        row.n += 1
        row.last = event.text


class Line(Base):
    __tablename__ = "odd_lines"
    id: Mapped[int] = mapped_column(Integer, Identity(), primary_key=True)
    n: Mapped[int]
    name: Mapped[str] = mapped_column("line name", key="k")
    state: Mapped[str] = mapped_column(server_default="new")
    hits: Mapped[int] = mapped_column(server_default=text("0"))
    at: Mapped[Any] = mapped_column(DateTime, server_default=func.current_timestamp())
    double: Mapped[int] = mapped_column(Computed("n * 2"))


class Lines(Sql, of=Notebook):
    tables = (Line,)

    @applies
    def noted(self, tx: Transaction, events: Sequence[Recorded[Noted]]) -> None:
        table = tx.table(Line)
        for e in events:
            tx.execute(insert(table), [{"n": e.meta.sequence, "k": e.meta.aggregate_id}])
        tx.execute(update(table).values(hits=5).where(table.c.n == 2))


def odd(name: str) -> App:
    return App(name, aggregates=[Notebook], projections=[Odds, Lines])


async def test_odd_names_and_values_that_the_database_makes(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    async with running(odd(app_name), nats_url, database_url, tmp_path) as here:
        await here.note(60)
        assert differences(await here.verify()) == []
        odd_table = '"Odd 100% ""x"":y__1"'
        with here.engine.begin() as connection:
            connection.exec_driver_sql(
                f"update {odd_table} set \"Last\" = 'other' where \"Note Book\" = 'n3'",
                execution_options={"no_parameters": True},
            )
            connection.exec_driver_sql("update odd_lines__1 set n = 77 where \"line name\" = 'n4' and n = 2")
        assert differences(await here.verify()) == [('Odd 100% "x":y', 1, 0, 0), ("odd_lines", 0, 1, 1)]


@pytest.mark.parametrize("change", ["state = 'gone'", "hits = 1"])
async def test_columns_with_a_constant_default_are_compared(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, change: str
) -> None:
    async with running(odd(app_name), nats_url, database_url, tmp_path) as here:
        await here.note(60)
        here.change(f"update odd_lines__1 set {change} where \"line name\" = 'n4' and n = 2")
        assert differences(await here.verify()) == [("odd_lines", 0, 1, 1)]


class Child(Base):
    __tablename__ = "children"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent: Mapped[int] = mapped_column(ForeignKey("parents.id"))
    text: Mapped[str]


class Parent(Base):
    __tablename__ = "parents"
    id: Mapped[int] = mapped_column(primary_key=True)
    notebook: Mapped[str] = mapped_column(String)


class Families(Sql, of=Notebook):
    tables = (Child, Parent)

    @applies
    def noted(self, tx: Transaction, events: Sequence[Recorded[Noted]]) -> None:
        for e in events:
            made = tx.execute(insert(tx.table(Parent)).values(notebook=e.meta.aggregate_id))
            key = made.inserted_primary_key[0]  # type: ignore[index]
            tx.execute(insert(tx.table(Child)).values(parent=key, text=e.event.text))


def families(name: str) -> App:
    return App(name, aggregates=[Notebook], projections=[Families])


async def test_keys_that_the_database_makes_may_differ_where_they_are_referred_to(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    async with running(families(app_name), nats_url, database_url, tmp_path) as here:
        await here.note(20)
        with here.engine.begin() as connection:
            # as after a transaction that was rolled back
            whose = connection.scalar(text("select notebook from parents__1 where id = 2"))
            connection.execute(text("insert into parents__1 (id, notebook) values (1000, :whose)"), {"whose": whose})
            connection.execute(text("update children__1 set parent = 1000 where parent = 2"))
            connection.execute(text("delete from parents__1 where id = 2"))
        assert differences(await here.verify()) == []


class Colour(enum.Enum):
    RED = 1
    GREEN = 2


class Thing(Base):
    __tablename__ = "things"
    notebook: Mapped[str] = mapped_column(primary_key=True)
    notes: Mapped[int] = mapped_column(default=0)
    last: Mapped[str] = mapped_column(String, default="0")
    at: Mapped[Any] = mapped_column(DateTime, nullable=True)
    data: Mapped[Any] = mapped_column(JSON, default=list)


class Things(Rows[Thing], of=Notebook):
    @applies
    def noted(self, row: Thing, event: Noted) -> None:
        row.notes += 1
        row.last = str(event.number)
        row.data = [event.number]


class Note2(Base):
    __tablename__ = "notes"
    notebook: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Other(Base):
    __tablename__ = "others"
    notebook: Mapped[str] = mapped_column(primary_key=True)


class Notes(Sql, of=Notebook):
    tables = (Note2, Other)

    @applies
    def noted(self, tx: Transaction, events: Sequence[Recorded[Noted]]) -> None:
        for e in events:
            row = {"notebook": e.meta.aggregate_id, "sequence": e.meta.sequence, "text": e.event.text}
            tx.execute(insert(tx.table(Note2)), [row])
            if e.meta.sequence == 1:
                tx.execute(insert(tx.table(Other)), [{"notebook": e.meta.aggregate_id}])


def things(name: str) -> App:
    return App(name, aggregates=[Notebook], projections=[Things, Notes])


class Base2(DeclarativeBase):
    pass


class KeyRenamed(Base2):
    __tablename__ = "things"
    id: Mapped[str] = mapped_column(primary_key=True)
    notes: Mapped[int] = mapped_column(default=0)


class ThingsByOtherKey(Rows[KeyRenamed], of=Notebook, name="Things", version=2):
    @applies
    def noted(self, row: KeyRenamed, event: Noted) -> None:
        row.notes += 1 + (event.number == 3)


class Base3(DeclarativeBase):
    pass


class Retyped(Base3):
    __tablename__ = "things"
    notebook: Mapped[str] = mapped_column(primary_key=True)
    notes: Mapped[str] = mapped_column(default="0")
    last: Mapped[int] = mapped_column(default=0)
    colour: Mapped[Colour] = mapped_column(Enum(Colour, name="colour_of_thing"), default=Colour.RED)
    data: Mapped[Any] = mapped_column(DateTime, nullable=True)


class ThingsOfOtherTypes(Rows[Retyped], of=Notebook, name="Things", version=2):
    @applies
    def noted(self, row: Retyped, event: Noted) -> None:
        row.notes = str(int(row.notes) + 1)
        row.last = event.number
        row.colour = Colour.GREEN


class FewerKeys(Base3):
    __tablename__ = "notes"
    notebook: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str]


class Added(Base3):
    __tablename__ = "added"
    notebook: Mapped[str] = mapped_column(primary_key=True)


class NotesOfOtherTables(Sql, of=Notebook, name="Notes", version=2):
    tables = (FewerKeys, Added)

    @applies
    def noted(self, tx: Transaction, events: Sequence[Recorded[Noted]]) -> None:
        for e in events:
            if e.meta.sequence == 1:
                tx.execute(insert(tx.table(FewerKeys)), [{"notebook": e.meta.aggregate_id, "text": e.event.text}])
                tx.execute(insert(tx.table(Added)), [{"notebook": e.meta.aggregate_id}])


async def test_a_rehearsal_compares_tables_whose_keys_types_and_names_have_changed(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    async with running(things(app_name), nats_url, database_url, tmp_path) as here:
        await here.note(60)
        renamed = App(app_name, aggregates=[Notebook], projections=[ThingsByOtherKey])
        (found,) = await here.verify(renamed, same=False)
        assert differences([found]) == [("things", 0, 1, 1)]
        (things_found, notes) = await here.verify(
            App(app_name, aggregates=[Notebook], projections=[ThingsOfOtherTypes, NotesOfOtherTables]), same=False
        )
        table = things_found.tables[0]
        assert (table.columns, table.added) == ({"data": 20}, ["colour"])
        assert {each.view: (each.changed, each.missing, each.extra) for each in notes.tables} == {
            "notes": (0, 0, 40), "added": (0, 20, 0), "others": (0, 0, 20),
        }  # fmt: skip
        with here.engine.connect() as connection:
            assert (
                not connection.execute(
                    text("select 1 from information_schema.columns where udt_name = 'colour_of_thing'")
                ).all()
                if connection.dialect.name == "postgresql"
                else True
            )


@pytest.mark.parametrize("change", ["at = 'yesterday'", "data = '[7'"])
async def test_a_stored_value_that_its_type_can_not_read_is_named(
    nats_url: str, app_name: str, tmp_path: Path, change: str
) -> None:
    database = f"sqlite:///{tmp_path / 'own.db'}"
    async with running(things(app_name), nats_url, database, tmp_path) as here:
        await here.note(20)
        here.change(f"update things__1 set {change} where notebook = 'n4'")
        found = await here.verify(name="Things")
        assert differences(found) == [("things", 1, 0, 0)]
        (example,) = found[0].tables[0].examples
        assert (example.key, list(example.stored.values())) == ({"notebook": "n4"}, [change.split("'")[1]])


class Audited(Sql, of=Notebook, name="Notes", version=2):
    tables = (Note2, Other)

    @applies
    def noted(self, tx: Transaction, events: Sequence[Recorded[Noted]]) -> None:
        tx.execute(text("insert into audit values (1)"))


async def test_a_handler_that_writes_to_other_tables_is_refused_and_writes_nothing(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    async with running(things(app_name), nats_url, database_url, tmp_path) as here:
        await here.note(20)
        with here.engine.begin() as connection:
            connection.execute(text("create table audit (x integer)"))
        new = App(app_name, aggregates=[Notebook], projections=[Audited])
        with pytest.raises(SchemaError, match="a handler changes more than its projection's own tables"):
            await here.verify(new, same=False)
        with here.engine.connect() as connection:
            assert connection.execute(text("select count(*) from audit")).scalar() == 0
