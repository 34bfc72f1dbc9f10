"""Generations are copies of a projection's tables, of which the view shows one; and the kernel's own tables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import CheckConstraint, Engine, Index, UniqueConstraint, insert, inspect, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import migrations
from aggregates import Aggregate, applies, event
from kernel import App
from projections import Rows, SchemaError
from projections.checkpoints import reached
from projections.declaration import DeclaredProjection
from projections.generations import (
    FENCE,
    create,
    drop_generation,
    generation,
    live_generation,
    numbers,
    positions,
    retire_live,
    show,
)
from projections.origin import register
from projections.revision import HEAD, is_current
from projections.tables import checkpoint, dead_letter, metadata, projection


@event
class Noted:
    text: str


class Notebook(Aggregate):
    @applies
    def noted(self, event: Noted) -> None:
        pass


class Base(DeclarativeBase):
    pass


class Page(Base):
    __tablename__ = "pages"
    __table_args__ = (
        Index("pages_by_text", "text"),
        UniqueConstraint("number", name="pages_number_once"),
        CheckConstraint("number >= 0", name="pages_number_positive"),
    )
    book: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(default="", index=True)
    number: Mapped[int] = mapped_column(default=0)
    order: Mapped[int] = mapped_column("Order", default=0)


class Pages(Rows[Page], of=Notebook):
    @applies
    def noted(self, row: Page, event: Noted) -> None:
        row.text = event.text


def declared(version: int = 1) -> DeclaredProjection:
    (projection,) = App("books", aggregates=[Notebook], projections=[Pages]).projections
    projection.version = version
    return projection


@pytest.fixture
def migrated(engine: Engine) -> Iterator[Engine]:
    migrations.upgrade(engine)
    yield engine


def texts(engine: Engine) -> list[str]:
    with Session(engine) as session:
        return list(session.scalars(select(Page.text).order_by(Page.book)))


def add(engine: Engine, number: int, book: str, words: str, place: int = 0) -> None:
    table = generation(declared(), number).tables["pages"]
    with engine.begin() as connection:
        connection.execute(insert(table).values(book=book, text=words, number=place, Order=1))


# generations


def test_a_new_generation_is_empty_at_the_beginning_and_not_shown(migrated: Engine) -> None:
    with migrated.begin() as connection:
        made = create(connection, declared(), range(4))
        assert made.number == 1
        assert positions(connection, made) == dict.fromkeys(range(4), 0)
        assert live_generation(connection, declared()) is None
        assert numbers(connection, "Pages", "building") == [1]
        assert "pages" not in inspect(connection).get_view_names()
        assert inspect(connection).has_table("pages__1")


def test_the_view_shows_the_live_generation(migrated: Engine) -> None:
    with migrated.begin() as connection:
        show(connection, create(connection, declared(), range(4)))
    add(migrated, 1, "a", "old")
    assert texts(migrated) == ["old"]
    with migrated.begin() as connection:
        second = create(connection, declared(), range(4))
    add(migrated, second.number, "a", "new")
    add(migrated, second.number, "b", "new too", 1)
    assert texts(migrated) == ["old"]
    with migrated.begin() as connection:
        retire_live(connection, "Pages")
        show(connection, second)
    assert texts(migrated) == ["new", "new too"]
    with migrated.begin() as connection:
        live = live_generation(connection, declared())
        assert live is not None
        assert live.number == 2
        assert numbers(connection, "Pages", "retired") == [1]
        assert numbers(connection, "Pages", "live") == [2]


def test_a_cut_over_that_is_rolled_back_changes_nothing(migrated: Engine) -> None:
    with migrated.begin() as connection:
        show(connection, create(connection, declared(), range(2)))
        second = create(connection, declared(), range(2))
    add(migrated, 1, "a", "old")
    add(migrated, 2, "a", "new")
    with migrated.connect() as connection:
        transaction = connection.begin()
        retire_live(connection, "Pages")
        show(connection, second)
        transaction.rollback()
    assert texts(migrated) == ["old"]
    with migrated.connect() as connection:
        assert numbers(connection, "Pages", "live") == [1]
        assert connection.scalars(select(checkpoint.c.epoch).distinct()).all() == [0]


def test_a_retired_generation_tells_where_it_stood_and_its_owner_is_fenced(migrated: Engine) -> None:
    with migrated.begin() as connection:
        assert retire_live(connection, "Pages") == {}
        show(connection, create(connection, declared(), range(3)))
        connection.execute(checkpoint.update().where(checkpoint.c.partition == 1).values(sequence=9))
        assert reached(connection, 1) == {"Pages": 9}
        assert reached(connection, 1, ["Others"]) == {}
        assert retire_live(connection, "Pages") == {0: 0, 1: 9, 2: 0}
        assert connection.scalars(select(checkpoint.c.epoch).distinct()).all() == [FENCE]
        assert reached(connection, 1) == {}
        assert live_generation(connection, declared()) is None


def test_a_generation_of_another_version_is_not_the_live_one(migrated: Engine) -> None:
    with migrated.begin() as connection:
        show(connection, create(connection, declared(1), range(2)))
        assert live_generation(connection, declared(1)) is not None
        assert live_generation(connection, declared(2)) is None


def test_a_dropped_generation_leaves_nothing_and_its_number_is_free_of_ghosts(migrated: Engine) -> None:
    with migrated.begin() as connection:
        create(connection, declared(), range(2))
        show(connection, create(connection, declared(), range(2)))
        for number in (1, 2):
            letter = {
                "projection": "Pages", "generation": number, "partition": 0, "aggregate": "Notebook",
                "aggregate_id": "a", "stream_sequence": 1, "sequence": 1, "payload": b"", "error": "", "failed": "",
            }  # fmt: skip
            connection.execute(insert(dead_letter).values(letter))
        drop_generation(connection, "Pages", 1)
        assert not inspect(connection).has_table("pages__1")
        for table in (checkpoint, projection, dead_letter):
            assert set(connection.scalars(select(table.c.generation))) == {2}, table.name
        assert create(connection, declared(), range(2)).number == 3
    add(migrated, 2, "a", "still here")
    assert texts(migrated) == ["still here"]


def test_a_generation_that_is_dropped_twice_is_no_error(migrated: Engine) -> None:
    with migrated.begin() as connection:
        create(connection, declared(), range(2))
        drop_generation(connection, "Pages", 1)
        drop_generation(connection, "Pages", 1)


def test_names_of_indexes_and_constraints_do_not_clash(migrated: Engine) -> None:
    with migrated.begin() as connection:
        for _ in range(3):
            create(connection, declared(), range(2))
    found = inspect(migrated)
    names = [{index["name"] for index in found.get_indexes(f"pages__{number}")} for number in (1, 2, 3)]
    for number, own in enumerate(names, 1):
        assert f"pages_by_text__{number}" in own
        assert len(own - {f"pages_number_once__{number}"}) == 2
    assert len(set().union(*names)) == sum(map(len, names))
    # the model's own table is unchanged
    assert {index.name for index in Page.__table__.indexes} == {"pages_by_text", "ix_pages_text"}


def test_constraints_hold_in_every_generation(migrated: Engine) -> None:
    with migrated.begin() as connection:
        for _ in range(2):
            create(connection, declared(), range(2))
    for number in (1, 2):
        add(migrated, number, "a", "x", 5)
        with pytest.raises(Exception, match=r"(?i)unique|duplicate"):
            add(migrated, number, "b", "x", 5)
        with pytest.raises(Exception, match=r"(?i)check"):
            add(migrated, number, "c", "x", -1)


def test_a_table_in_the_way_is_not_touched(migrated: Engine) -> None:
    with migrated.begin() as connection:
        connection.execute(text("CREATE TABLE pages__1 (precious INTEGER)"))
        connection.execute(text("INSERT INTO pages__1 VALUES (42)"))
    with pytest.raises(SchemaError, match="pages__1"), migrated.begin() as connection:
        create(connection, declared(), range(2))
    with migrated.connect() as connection:
        assert connection.scalar(text("SELECT precious FROM pages__1")) == 42
        assert numbers(connection, "Pages", "building") == []


def test_a_table_in_the_way_of_the_view_is_not_touched(migrated: Engine) -> None:
    with migrated.begin() as connection:
        connection.execute(text("CREATE TABLE pages (precious INTEGER)"))
        connection.execute(text("INSERT INTO pages VALUES (42)"))
        made = create(connection, declared(), range(2))
    with pytest.raises(SchemaError, match="a table named pages"), migrated.begin() as connection:
        show(connection, made)
    with migrated.connect() as connection:
        assert connection.scalar(text("SELECT precious FROM pages")) == 42
        assert numbers(connection, "Pages", "live") == []


# the kernel's tables


def test_migrations_make_the_tables_that_the_code_sees(migrated: Engine) -> None:
    found = inspect(migrated)
    with migrated.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "version_table": migrations.VERSION_TABLE}
        )
        assert compare_metadata(context, metadata) == []
    for table in metadata.sorted_tables:
        assert [column["name"] for column in found.get_columns(table.name)] == [column.name for column in table.columns]
        key = found.get_pk_constraint(table.name)["constrained_columns"]
        assert key == [column.name for column in table.primary_key.columns]
        nullable = {column["name"]: column["nullable"] for column in found.get_columns(table.name)}
        assert nullable == {column.name: column.nullable for column in table.columns}


def test_migrating_twice_changes_nothing(migrated: Engine) -> None:
    register(migrated, "books", "2013", 4, 0)
    migrations.upgrade(migrated)
    migrations.upgrade(migrated)
    with migrated.connect() as connection:
        assert migrations.current(connection) == migrations.head()
    register(migrated, "books", "2013", 4, 0)


def test_tables_of_a_newer_program_are_refused(migrated: Engine) -> None:
    with migrated.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {migrations.VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(SchemaError, match=r"9999.*run the newer"):
        migrations.upgrade(migrated)


def test_an_empty_database_has_no_revision(engine: Engine) -> None:
    with engine.connect() as connection:
        assert migrations.current(connection) is None
    migrations.upgrade(engine)
    with engine.connect() as connection:
        assert migrations.current(connection) == migrations.head() is not None


def test_a_start_without_migrations_to_do_knows_so_without_alembic(engine: Engine) -> None:
    assert migrations.head() == HEAD
    assert not is_current(engine)
    migrations.upgrade(engine)
    assert is_current(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE eskernel_schema SET version_num = '0001'"))
    assert not is_current(engine)
