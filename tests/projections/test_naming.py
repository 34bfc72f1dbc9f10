"""Names that people give to tables, columns and constraints: carried, or refused at start in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, ForeignKey, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column

import migrations
from aggregates import Aggregate, DeclarationError, applies, event
from kernel import App
from projections import Recorded, Rows, SchemaError, Sql, Transaction
from projections.declaration import DeclaredProjection
from projections.generations import create, drop_generation, retire_live, show
from projections.naming import MAX_BYTES, physical_name
from projections.schema import prepare
from tests.conftest import ReadSide, envelopes


@event
class Noted:
    text: str


class Notebook(Aggregate):
    @applies
    def noted(self, event: Noted) -> None:
        pass


def rows(model: Any, name: str = "Things") -> Any:
    def noted(self: Any, row: Any, event: Any) -> None:
        pass

    noted.__annotations__ = {"row": model, "event": Noted}

    class Things(Rows[model], of=Notebook, name=name):  # type: ignore[valid-type]
        handler = applies(noted)

    return Things


def model(table: str, *columns: sa.Column[Any], **options: Any) -> Any:
    class Base(DeclarativeBase):
        pass

    made = sa.Table(table, Base.metadata, sa.Column("id", sa.String(9), primary_key=True), *columns, **options)
    return type("Thing", (Base,), {"__table__": made})


def app(*projections: Any) -> App:
    return App("books", aggregates=[Notebook], projections=projections)


def problem(*projections: Any) -> str:
    with pytest.raises(DeclarationError) as refused:
        app(*projections)
    return "\n".join(refused.value.problems)


@pytest.fixture
def migrated(engine: Engine) -> Engine:
    migrations.upgrade(engine)
    return engine


def build(engine: Engine, declared: DeclaredProjection, times: int = 3) -> None:
    """Build and show generations one after the other, and drop all before the last."""
    for _ in range(times):
        with engine.begin() as connection:
            made = create(connection, declared, range(1))
            retire_live(connection, declared.name)
            show(connection, made)
    with engine.begin() as connection:
        for number in range(1, times):
            drop_generation(connection, declared.name, number)


# names


@given(st.text('aä名"%. ', min_size=1, max_size=70), st.integers(1, 2**31 - 1))
def test_a_physical_name_fits_and_tells_generations_and_tables_apart(name: str, number: int) -> None:
    made = physical_name(name, number)
    assert len(made.encode()) <= MAX_BYTES
    assert made.endswith(f"__{number}")
    assert made != physical_name(name, number + 1)
    assert made != physical_name(name + "a", number)


LONG = "a_table_with_a_long_and_telling_name_for_the_monthly_statistics"


@pytest.mark.parametrize(
    "name",
    [LONG, "ä" * 31, "order", "MyThings", 'wi"th', "100%", "it's", "my.things", "größen", "a b", "a:b", "a;b--", "\\"],
)
def test_names_are_carried_by_tables_columns_indexes_and_views(migrated: Engine, name: str) -> None:
    things = model(
        name,
        sa.Column(f"{name[:50]}!", sa.Integer, index=True, nullable=True),
        sa.Column("unique", sa.Integer, sa.CheckConstraint("id <> ''", name=f"{name[:58]}_c"), unique=True),
        sa.Column("number", sa.Integer, nullable=True),
        sa.Index(f"{name[:58]}_i", "number"),
    )
    things.__table__.columns["unique"].nullable = True
    (declared,) = app(rows(things)).projections
    assert prepare(migrated, [declared]).to_build == {"Things": "it is new"}
    build(migrated, declared, 11)
    assert prepare(migrated, [declared]).equal == ["Things"]
    with migrated.connect() as connection:
        assert connection.execute(select(things.__table__)).all() == []
        assert len(sa.inspect(connection).get_indexes(physical_name(name, 11))) >= 2
    assert sa.inspect(migrated).get_view_names() == [name]


def test_the_sixty_four_bytes_of_a_name_are_refused_at_start_on_postgresql(migrated: Engine) -> None:
    for things in (model("ö" * 32), model("things", sa.Column("ö" * 32, sa.Integer, nullable=True))):
        (declared,) = app(rows(things)).projections
        if migrated.dialect.name == "sqlite":
            assert prepare(migrated, [declared]).problems == []
        else:
            with pytest.raises(SchemaError, match=r"has 64 bytes, and PostgreSQL cuts names at 63; shorten it"):
                prepare(migrated, [declared])


def test_a_table_in_a_schema_is_carried_or_refused_at_start(migrated: Engine) -> None:
    things = model("things", sa.Column("number", sa.Integer, nullable=True), schema="reporting")
    (declared,) = app(rows(things)).projections
    if migrated.dialect.name == "sqlite":
        with pytest.raises(SchemaError, match=r"'reporting', and SQLite has no schemas"):
            prepare(migrated, [declared])
        return
    with pytest.raises(SchemaError, match=r'create it with CREATE SCHEMA "reporting"'):
        prepare(migrated, [declared])
    with migrated.begin() as connection:
        connection.execute(text("CREATE SCHEMA reporting"))
    build(migrated, declared)
    assert prepare(migrated, [declared]).equal == ["Things"]
    with migrated.connect() as connection:
        assert connection.execute(select(things.__table__)).all() == []


def test_tables_that_are_one_to_sqlite_are_refused_at_start(migrated: Engine) -> None:
    declared = app(rows(model("things"), "A"), rows(model("Things"), "B")).projections
    if migrated.dialect.name == "sqlite":
        with pytest.raises(SchemaError, match=r"'things' and 'Things' are the same; rename one"):
            prepare(migrated, declared)
    else:
        assert set(prepare(migrated, declared).to_build) == {"A", "B"}


def test_names_that_are_taken_are_declaration_errors() -> None:
    assert "names that begin with 'eskernel_' are the kernel's" in problem(rows(model("eskernel_stream")))
    assert "both fill 'things'" in problem(rows(model("things"), "A"), rows(model("things"), "B"))
    assert "is the name of generation 2 of 'things'" in problem(
        rows(model("things"), "A"), rows(model("things__2"), "B")
    )


def test_what_the_database_refuses_is_told_at_start(migrated: Engine) -> None:
    (declared,) = app(rows(model("things", sa.Column("ID", sa.Integer, nullable=True)))).projections
    if migrated.dialect.name == "sqlite":
        with pytest.raises(SchemaError, match=r"refuses the tables of projection Things: duplicate column name: ID"):
            prepare(migrated, [declared])
    else:
        assert set(prepare(migrated, [declared]).to_build) == {"Things"}


# keys and inheritance


class Base(DeclarativeBase):
    pass


class Country(Base):
    __tablename__ = "countries"
    code: Mapped[str] = mapped_column(primary_key=True)


class Book(Base):
    __tablename__ = "books"
    id: Mapped[str] = mapped_column(primary_key=True)
    country: Mapped[str | None] = mapped_column(ForeignKey("countries.code"))
    previous: Mapped[str | None] = mapped_column(ForeignKey("books.id"))


class Leaf(Base):
    __tablename__ = "leaves"
    book: Mapped[str] = mapped_column(ForeignKey("books.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)


class Leaves(Sql, of=Notebook):
    tables = (Leaf, Book)

    @applies
    def noted(self, tx: Transaction, events: Sequence[Recorded[Noted]]) -> None:
        for recorded in events:
            book, number = recorded.meta.aggregate_id, recorded.meta.sequence
            if number == 1:
                tx.execute(insert(tx.table(Book)).values(id=book, country=recorded.event.text))
            tx.execute(insert(tx.table(Leaf)).values(book=book, number=number))


def test_foreign_keys_refer_to_tables_of_the_same_generation_or_to_those_of_the_user(engine: Engine) -> None:
    with engine.begin() as connection:
        Country.__table__.create(connection)  # type: ignore[attr-defined]
        connection.execute(insert(Country).values(code="it"))
    side = ReadSide(engine, app(Leaves))
    assert side.project([(1, "Notebook", "n", envelopes(Notebook, [Noted("it"), Noted("")]))]) == []
    if engine.dialect.name == "postgresql":  # SQLite checks foreign keys only with a PRAGMA
        (failure,) = side.project([(2, "Notebook", "m", envelopes(Notebook, [Noted("nowhere")]))])
        assert "books_country_fkey" in failure.error or "foreign key" in failure.error
    build(engine, side.app.projections[0])
    assert prepare(engine, side.app.projections).equal == ["Leaves"]
    found = sa.inspect(engine).get_foreign_keys("leaves__4")
    assert [(key["referred_table"], key["options"]) for key in found] == [("books__4", {"ondelete": "CASCADE"})]
    assert {key["referred_table"] for key in sa.inspect(engine).get_foreign_keys("books__4")} == {
        "books__4",
        "countries",
    }


def test_a_foreign_key_to_a_table_that_is_missing_is_refused_at_start(migrated: Engine) -> None:
    (declared,) = app(Leaves).projections
    if migrated.dialect.name == "postgresql":  # SQLite looks for it when a row is written, where it checks at all
        with pytest.raises(SchemaError, match=r'relation "countries" does not exist'):
            prepare(migrated, [declared])


def test_a_foreign_key_to_another_projection_is_a_declaration_error() -> None:
    class Own(DeclarativeBase):
        pass

    class Parent(Own):
        __tablename__ = "parents"
        id: Mapped[str] = mapped_column(primary_key=True)

    class Child(Own):
        __tablename__ = "children"
        id: Mapped[str] = mapped_column(ForeignKey("parents.id"), primary_key=True)

    class Lost(Own):
        __tablename__ = "lost"
        id: Mapped[str] = mapped_column(ForeignKey("nowhere.id"), primary_key=True)

    assert "Child.id: the foreign key to 'parents.id' refers to a view" in problem(rows(Parent, "A"), rows(Child, "B"))
    assert "names no table and column that SQLAlchemy knows" in problem(rows(Lost))


def test_inheritance_over_two_tables_is_a_declaration_error() -> None:
    class Own(DeclarativeBase):
        pass

    class Parent(Own):
        __tablename__ = "parents"
        id: Mapped[str] = mapped_column(primary_key=True)

    class Child(Parent):
        __tablename__ = "children"
        id: Mapped[str] = mapped_column(ForeignKey("parents.id"), primary_key=True)

    assert "its columns are in two tables" in problem(rows(Child))


class Sum(Base):
    __tablename__ = "sums"
    id: Mapped[str] = mapped_column(primary_key=True)
    one: Mapped[int] = mapped_column(default=1)
    two: Mapped[int] = mapped_column(default=2)
    both = column_property(one + two)


class Sums(Rows[Sum], of=Notebook):
    @applies
    def noted(self, row: Sum, event: Noted) -> None:
        row.one += 1


def test_an_expression_in_a_model_is_no_column_of_its_table(engine: Engine) -> None:
    side = ReadSide(engine, app(Sums))
    assert side.project([(1, "Notebook", "n", envelopes(Notebook, [Noted("")]))]) == []
    assert [(row.one, row.both) for row in side.rows(Sum)] == [(2, 4)]
