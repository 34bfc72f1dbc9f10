"""The database is compared with the program: changed models, renamed and removed projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm
from sqlalchemy import Column, Engine, Integer, String, Table, delete, insert, select, text

import migrations
from aggregates import Aggregate, applies, event
from kernel import App
from projections import Rows, SchemaError, generations
from projections.declaration import DeclaredProjection
from projections.generations import create, is_built, numbers, recorded, retire_live, show
from projections.schema import drop_projection, examine, orphans, prepare
from projections.tables import checkpoint, dead_letter, generation_table, sequence


@event
class Noted:
    text: str


class Notebook(Aggregate):
    @applies
    def noted(self, event: Noted) -> None:
        pass


def projection_of(
    *columns: Column[Any], version: int = 1, name: str = "Pages", table: str = "pages", key: Any = None
) -> DeclaredProjection:
    class Base(sa.orm.DeclarativeBase):
        pass

    first = Column("id", String(9), primary_key=True) if key is None else key
    model = type("Page", (Base,), {"__table__": Table(table, Base.metadata, first, *columns)})

    def noted(self: Any, row: Any, event: Any) -> None:
        pass

    noted.__annotations__ = {"row": model, "event": Noted}

    class Pages(Rows[model], of=Notebook, version=version, name=name):  # type: ignore[valid-type]
        handler = applies(noted)

    return App("books", aggregates=[Notebook], projections=[Pages]).projections[0]


def build(engine: Engine, *projections: DeclaredProjection) -> None:
    with engine.begin() as connection:
        for declared in projections:
            made = create(connection, declared, range(2))
            retire_live(connection, declared.name)
            show(connection, made)


@pytest.fixture
def migrated(engine: Engine) -> Engine:
    migrations.upgrade(engine)
    return engine


def count(name: str = "count", kind: Any = Integer, **options: Any) -> Column[Any]:
    return Column(name, kind, **({"nullable": True} | options))


# changed models

BEFORE: list[Callable[[], Column[Any]]] = [count, lambda: count("text", String(20), default="", nullable=False)]
CHANGES: dict[str, tuple[Callable[[], DeclaredProjection], str]] = {
    "a column more": (lambda: projection_of(*(c() for c in BEFORE), count("more")), "column more is not in the table"),
    "a column less": (lambda: projection_of(BEFORE[0]()), "column text is no longer declared"),
    "renamed": (lambda: projection_of(count("number"), BEFORE[1]()), "count is no longer declared.*number is not in"),
    "another type": (lambda: projection_of(count(kind=String(5)), BEFORE[1]()), "count has the type (?i:integer)"),
    "longer": (lambda: projection_of(BEFORE[0](), count("text", String(30), default="", nullable=False)), r"\(30\)"),
    "not null": (lambda: projection_of(count(nullable=False, default=0), BEFORE[1]()), "declared as NOT NULL"),
    "null": (lambda: projection_of(BEFORE[0](), count("text", String(20))), "is NOT NULL, and is declared as nullable"),
    "a default": (lambda: projection_of(count(default=0, server_default="7"), BEFORE[1]()), "declared with '?7"),
    "a key": (
        lambda: projection_of(*(c() for c in BEFORE), key=Column("book", String(9), primary_key=True)),
        "book is",
    ),
    "unique": (lambda: projection_of(count(unique=True), BEFORE[1]()), r"the table lacks UNIQUE \(count\)"),
    "an index": (lambda: projection_of(count(index=True), BEFORE[1]()), r"the table lacks INDEX"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_without_a_new_version_is_refused(migrated: Engine, change: str) -> None:
    build(migrated, projection_of(*(column() for column in BEFORE)))
    make, says = CHANGES[change]
    with pytest.raises(SchemaError, match=f"version is still 1: .*{says}.*Raise it to version=2"):
        prepare(migrated, [make()])
    # a raised version is all that it takes
    raised = make()
    raised.version = 2
    assert prepare(migrated, [raised]).to_build == {"Pages": "version 1 is live"}
    build(migrated, raised)
    assert prepare(migrated, [raised]).equal == ["Pages"]


def test_what_does_not_concern_the_table_needs_no_new_version(migrated: Engine) -> None:
    build(migrated, projection_of(count(default=1), BEFORE[1]()))
    with migrated.begin() as connection:
        connection.execute(text("CREATE INDEX of_an_operator ON pages__1 (count)"))
    assert prepare(migrated, [projection_of(count(default=5, doc="other"), BEFORE[1]())]).equal == ["Pages"]


def test_a_label_that_an_enum_type_lacks_is_told(migrated: Engine) -> None:
    build(migrated, projection_of(count("mood", sa.Enum("good", name="moods"))))
    changed = projection_of(count("mood", sa.Enum("good", "bad", name="moods")), version=2)
    if migrated.dialect.name == "postgresql":
        with pytest.raises(SchemaError, match=r'type moods lacks bad \(ALTER TYPE "moods" ADD VALUE'):
            prepare(migrated, [changed])
    else:
        assert prepare(migrated, [changed]).to_build == {"Pages": "version 1 is live"}


def test_the_comparison_changes_nothing(migrated: Engine) -> None:
    build(migrated, projection_of(count()))
    before = sa.inspect(migrated).get_table_names()
    prepare(migrated, [projection_of(count()), projection_of(count(), name="Others", table="others")])
    assert sa.inspect(migrated).get_table_names() == before


def test_tables_that_somebody_dropped_are_built_again(migrated: Engine) -> None:
    declared = projection_of(count())
    build(migrated, declared)
    with migrated.begin() as connection:
        connection.execute(text("DROP TABLE pages__1" + (" CASCADE" if migrated.dialect.name != "sqlite" else "")))
    assert "missing" in prepare(migrated, [declared]).to_build["Pages"]
    build(migrated, declared)
    with migrated.connect() as connection:
        assert is_built(connection, declared)


# removed and renamed projections


def test_a_renamed_projection_is_told_with_its_remedy(migrated: Engine) -> None:
    build(migrated, projection_of(count()))
    renamed = projection_of(count(), name="Sheets")
    with pytest.raises(SchemaError, match=r"belongs to the projection Pages.*name='Pages'.*projections drop Pages"):
        prepare(migrated, [renamed])
    drop_projection(migrated, "Pages", [renamed])
    assert prepare(migrated, [renamed]).to_build == {"Sheets": "it is new"}
    build(migrated, renamed)
    assert prepare(migrated, [renamed]).equal == ["Sheets"]


def test_a_removed_projection_is_listed_and_can_be_dropped(migrated: Engine) -> None:
    gone, kept = projection_of(count()), projection_of(count(), name="Others", table="others")
    build(migrated, gone, kept)
    build(migrated, gone)
    (orphan,) = prepare(migrated, [kept]).orphans
    assert (orphan.name, orphan.generations, [str(view) for view in orphan.views]) == ("Pages", [1, 2], ["pages"])
    assert orphan.tables == ["pages__1", "pages__2"]
    with pytest.raises(SchemaError, match="the app declares the projection Others"):
        drop_projection(migrated, "Others", [kept])
    with pytest.raises(SchemaError, match=r"no projection 'Page'.*it has Pages"):
        drop_projection(migrated, "Page", [kept])
    drop_projection(migrated, "Pages", [kept])
    found = sa.inspect(migrated)
    assert found.get_view_names() == ["others"]
    assert [name for name in found.get_table_names() if not name.startswith("eskernel_")] == ["others__1"]
    with migrated.connect() as connection:
        for table in (checkpoint, dead_letter, sequence, generation_table):
            assert "Pages" not in connection.scalars(select(table.c.projection)).all()
        assert orphans(connection, [kept]) == []
        assert numbers(connection, "Pages", "live") == []


def test_a_removed_projection_on_which_others_have_built_is_not_dropped(migrated: Engine) -> None:
    build(migrated, projection_of(count()))
    with migrated.begin() as connection:
        connection.execute(text("CREATE VIEW rich AS SELECT count FROM pages"))
    if migrated.dialect.name == "postgresql":
        with pytest.raises(SchemaError, match=r"view pages can't be dropped.*view rich"):
            drop_projection(migrated, "Pages", [])
        assert sa.inspect(migrated).has_table("pages__1")


def test_tables_of_a_database_from_before_the_list_of_tables_are_found(migrated: Engine) -> None:
    old, gone = projection_of(count()), projection_of(count(), name="Others", table="others")
    build(migrated, old, gone)
    with migrated.begin() as connection:
        connection.execute(text("CREATE TABLE archive__1 (precious INTEGER)"))
        connection.execute(text("CREATE VIEW archive AS SELECT precious + 1 AS more FROM archive__1"))
        connection.execute(delete(generation_table).where(generation_table.c.projection != "Kept"))
        if migrated.dialect.name == "postgresql":
            connection.execute(text("DROP FUNCTION eskernel_refuse_write CASCADE"))
    found = prepare(migrated, [old])
    assert (found.equal, [(orphan.name, orphan.tables) for orphan in found.orphans]) == (
        ["Pages"],
        [("Others", ["others__1"])],
    )
    with migrated.connect() as connection:
        assert [table.physical for table in recorded(connection, "Pages")] == ["pages__1"]
    with pytest.raises(Exception, match=r"tx\.table"), migrated.begin() as connection:
        connection.execute(text("INSERT INTO pages (id) VALUES ('a')"))


def test_a_table_that_goes_from_one_projection_to_another_gets_a_number_of_its_own(migrated: Engine) -> None:
    build(migrated, projection_of(count(), name="A"))
    build(migrated, projection_of(count(), name="A", version=2, table="others"))
    taker = projection_of(count(), name="B")
    assert prepare(migrated, [taker, projection_of(count(), name="A", version=2, table="others")]).problems == []
    build(migrated, taker)
    with migrated.connect() as connection:
        assert [table.physical for table in recorded(connection, "B")] == ["pages__2"]
        made = generations.generation(taker, 2)
        connection.execute(insert(made.tables["pages"]).values(id="a", count=1))
        assert connection.scalar(text("SELECT count FROM pages")) == 1


def test_a_table_in_the_way_is_told_before_anything_is_built(migrated: Engine) -> None:
    with migrated.begin() as connection:
        connection.execute(text("CREATE TABLE pages (precious INTEGER)"))
    with pytest.raises(SchemaError, match=r"a table named pages exists, and the kernel did not create it"):
        prepare(migrated, [projection_of(count())])


def test_an_examination_within_a_transaction_sees_what_a_start_would_see(engine: Engine) -> None:
    with engine.connect() as connection:
        migrations.upgrade_within(connection)
        assert examine(connection, [projection_of(count())]).to_build == {"Pages": "it is new"}
        connection.rollback()
    assert sa.inspect(engine).get_table_names() == []
