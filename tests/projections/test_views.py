"""What others build on a projection's view stays when the view moves, and only the kernel writes its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, delete, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import migrations
from aggregates import Aggregate, applies, event
from kernel import App
from projections import Recorded, Rows, SchemaError, Sql, Transaction, views
from projections.database import is_infrastructure, open_database
from projections.declaration import DeclaredProjection
from projections.generations import check_replaceable, create, retire_live, show
from projections.statements import named_tables
from projections.views import View, dependents
from tests.conftest import ReadSide, envelopes


@event
class Noted:
    text: str


class Notebook(Aggregate):
    @applies
    def noted(self, event: Noted) -> None:
        pass


def pages(*columns: sa.Column[Any], version: int = 1, table: str = "pages") -> DeclaredProjection:
    """Declare a projection whose table has these columns after its key."""

    class Base(DeclarativeBase):
        pass

    model = type(
        "Page",
        (Base,),
        {"__table__": sa.Table(table, Base.metadata, sa.Column("book", sa.String(20), primary_key=True), *columns)},
    )

    def noted(self: Any, row: Any, event: Any) -> None: ...

    noted.__annotations__ = {"row": model, "event": Noted}

    class Pages(Rows[model], of=Notebook, version=version):  # type: ignore[valid-type]
        handler = applies(noted)

    (declared,) = App("books", aggregates=[Notebook], projections=[Pages]).projections
    return declared


def number(name: str = "number", kind: Any = sa.Integer) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=True)


def cut_over(engine: Engine, declared: DeclaredProjection) -> None:
    """Build an empty generation and show it, as a rebuild does."""
    with engine.begin() as connection:
        made = create(connection, declared, range(2))
        check_replaceable(connection, made)
    with engine.begin() as connection:
        retire_live(connection, declared.name)
        show(connection, made)


@pytest.fixture
def migrated(engine: Engine) -> Engine:
    migrations.upgrade(engine)
    return engine


@pytest.fixture
def postgres(fresh_postgres: str) -> Iterator[Engine]:
    engine = open_database(fresh_postgres)
    migrations.upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def reporter(postgres: Engine) -> Iterator[str]:
    """A role that others have allowed to read."""
    name = f"reporter_{postgres.url.database}"
    run(postgres, f"CREATE ROLE {name}")
    yield name
    run(postgres, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


def run(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def scalar(engine: Engine, statement: str) -> Any:
    with engine.connect() as connection:
        return connection.scalar(text(statement))


def columns(engine: Engine, view: str) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(text(f"SELECT * FROM {view}")).keys())


# what others hang on it


CHANGES = {
    "the same columns": [number(), number("more")],
    "one column more": [number(), number("more"), number("last")],
    "one column more in the middle": [number(), number("between"), number("more")],
    "another type": [number("number", sa.Text), number("more")],
    "one column less": [number()],
}


@pytest.mark.parametrize("change", CHANGES)
def test_grants_comments_options_and_the_owner_stay_over_a_cut_over(
    postgres: Engine, reporter: str, change: str
) -> None:
    cut_over(postgres, pages(number(), number("more")))
    run(
        postgres,
        f"GRANT SELECT ON pages TO {reporter}",
        f"GRANT SELECT (number) ON pages TO {reporter} WITH GRANT OPTION",
        "COMMENT ON VIEW pages IS 'for the report''s 100%'",
        "COMMENT ON COLUMN pages.number IS 'counts'",
        "ALTER VIEW pages SET (security_barrier = true)",
    )
    cut_over(postgres, pages(*[column._copy() for column in CHANGES[change]], version=2))
    assert scalar(postgres, f"SELECT has_table_privilege('{reporter}', 'pages', 'select')")
    assert scalar(postgres, f"SELECT has_column_privilege('{reporter}', 'pages', 'number', 'select with grant option')")
    assert scalar(postgres, "SELECT obj_description('pages'::regclass)") == "for the report's 100%"
    assert scalar(postgres, "SELECT col_description('pages'::regclass, 2)") == "counts"
    assert scalar(postgres, "SELECT reloptions FROM pg_class WHERE oid = 'pages'::regclass") == [
        "security_barrier=true"
    ]
    assert sorted(columns(postgres, "pages")) == sorted(["book", *(column.name for column in CHANGES[change])])


def test_a_view_that_another_role_owns_stays_readable(postgres: Engine, reporter: str) -> None:
    cut_over(postgres, pages(number()))
    run(
        postgres,
        f"GRANT ALL ON SCHEMA public TO {reporter}",
        f"GRANT SELECT ON pages__1 TO {reporter}",
        f"ALTER VIEW pages OWNER TO {reporter}",
    )
    for declared in (pages(number(), version=2), pages(number("other"), version=3)):
        cut_over(postgres, declared)
        assert scalar(postgres, "SELECT viewowner FROM pg_views WHERE viewname = 'pages'") == reporter
        assert columns(postgres, "pages")[0] == "book"


@pytest.mark.parametrize("change", ["the same columns", "one column more", "one column more in the middle"])
def test_views_on_the_view_see_the_new_generation(migrated: Engine, change: str) -> None:
    cut_over(migrated, pages(number(), number("more")))
    run(migrated, "CREATE VIEW rich AS SELECT book, number FROM pages WHERE number > 100")
    cut_over(migrated, pages(*[column._copy() for column in CHANGES[change]], version=2))
    run(migrated, "INSERT INTO pages__2 (book, number) VALUES ('a', 500), ('b', 5)")
    assert scalar(migrated, "SELECT book FROM rich") == "a"
    assert set(columns(migrated, "pages")) == {"book", *(column.name for column in CHANGES[change])}


@pytest.mark.parametrize("change", ["another type", "one column less"])
def test_a_view_in_the_way_of_a_cut_over_is_named_before_anything_is_built(postgres: Engine, change: str) -> None:
    cut_over(postgres, pages(number(), number("more")))
    run(
        postgres,
        "CREATE VIEW rich AS SELECT number, more FROM pages",
        "CREATE MATERIALIZED VIEW kept AS SELECT more FROM pages",
        "CREATE FUNCTION first_page() RETURNS SETOF pages LANGUAGE sql AS 'SELECT * FROM pages LIMIT 1'",
    )
    declared = pages(*[column._copy() for column in CHANGES[change]], version=2)
    with (
        pytest.raises(
            SchemaError, match=r"view pages can't be replaced.*first_page.*materialized view kept.*view rich"
        ),
        postgres.begin() as connection,
    ):
        check_replaceable(connection, create(connection, declared, range(2)))
    with pytest.raises(SchemaError, match=r"keep the columns and their types"):
        cut_over(postgres, declared)
    assert scalar(postgres, "SELECT max(generation) FROM eskernel_projection") == 1


def test_triggers_of_others_stay_over_a_cut_over_on_sqlite(tmp_path: Any) -> None:
    engine = open_database(f"sqlite:///{tmp_path}/p.db")
    migrations.upgrade(engine)
    cut_over(engine, pages(number()))
    run(
        engine,
        "CREATE TABLE wishes (book TEXT)",
        "CREATE TRIGGER wish INSTEAD OF INSERT ON pages BEGIN INSERT INTO wishes VALUES (new.book); END",
    )
    cut_over(engine, pages(number(), version=2))
    run(engine, "INSERT INTO pages (book) VALUES ('a')")
    assert scalar(engine, "SELECT book FROM wishes") == "a"
    engine.dispose()


def test_the_view_of_a_table_that_the_projection_no_longer_has_goes_with_the_cut_over(migrated: Engine) -> None:
    cut_over(migrated, pages(number()))
    cut_over(migrated, pages(number(), version=2, table="sheets"))
    found = sa.inspect(migrated)
    assert found.get_view_names() == ["sheets"]
    assert found.has_table("pages__1")


def test_who_uses_a_view_that_would_go_is_named_before_anything_is_built(postgres: Engine) -> None:
    cut_over(postgres, pages(number()))
    run(postgres, "CREATE VIEW rich AS SELECT number FROM pages")
    with pytest.raises(SchemaError, match=r"view pages can't be dropped.*no longer has this table.*view rich"):
        cut_over(postgres, pages(number(), version=2, table="sheets"))


# writers


WRITES = [
    "INSERT INTO pages (book, number) VALUES ('x', 1)",
    "UPDATE pages SET number = 2",
    "UPDATE pages SET number = 2 WHERE book = 'nobody''s'",
    "DELETE FROM pages",
    "DELETE FROM pages WHERE false",
    "INSERT INTO pages (book, number) VALUES ('x', 1) RETURNING book",
    "INSERT INTO pages (book, number) SELECT book, number FROM pages WHERE false",
]


OF_NO_ROW = [statement for statement in WRITES if "nobody" in statement or "false" in statement]


@pytest.mark.parametrize("statement", WRITES)
def test_the_view_cannot_be_written(migrated: Engine, statement: str) -> None:
    cut_over(migrated, pages(number()))
    for version in (2, 3):
        run(migrated, f"INSERT INTO pages__{version - 1} (book, number) VALUES ('a', 1)")
        if migrated.dialect.name == "sqlite" and statement in OF_NO_ROW:
            run(migrated, statement)
        else:
            with pytest.raises(DBAPIError, match=r"is a view .* tx\.table\(Model\)") as refused:
                run(migrated, statement)
            assert not is_infrastructure(refused.value)
        assert scalar(migrated, f"SELECT number FROM pages__{version - 1}") == 1
        cut_over(migrated, pages(number("number"), number(f"c{version}"), version=version))


def test_a_view_of_an_older_program_is_protected_at_the_next_start(postgres: Engine) -> None:
    cut_over(postgres, pages(number()))
    run(postgres, "DROP FUNCTION eskernel_refuse_write CASCADE")
    run(postgres, "INSERT INTO pages (book, number) VALUES ('x', 1)")
    with postgres.begin() as connection:
        views.protect(connection, View(None, "pages"))
    with pytest.raises(DBAPIError, match=r"tx\.table\(Model\)"):
        run(postgres, "INSERT INTO pages (book, number) VALUES ('y', 1)")


def test_queries_reach_the_index_of_the_table_behind_the_view(postgres: Engine) -> None:
    cut_over(postgres, pages(number()))
    run(postgres, "INSERT INTO pages__1 (book) SELECT g::text FROM generate_series(1, 5000) g", "ANALYZE pages__1")
    with postgres.connect() as connection:
        plan = "\n".join(connection.scalars(text("EXPLAIN SELECT number FROM pages WHERE book = '77'")))
    assert "Index Scan" in plan
    assert "Subquery" not in plan


# handlers


class Base(DeclarativeBase):
    pass


class Line(Base):
    __tablename__ = "lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


def statements(name: str) -> Any:
    """Return the statement that the handler of this name executes; each names the view."""
    own = Line.__table__
    return {
        "insert": insert(Line).values(id=1, text="x"),
        "update": update(Line).values(text="x"),
        "delete": delete(Line).where(Line.id == 99),
        "select": select(Line),
        "table": own.select(),
        "subquery": select(sa.literal(1)).where(select(Line.id).exists()),
        "text": text("SELECT count(*) FROM lines"),
        "quoted": text('SELECT 1 AS one FROM (SELECT 1 AS o) x, "lines"'),
        "joined": text("SELECT 1 AS one FROM lines__1 l\nLEFT JOIN lines USING (id)"),
        "written": text("INSERT INTO lines VALUES (1, 'x')"),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["insert", "update", "delete", "select", "table", "subquery", "text", "quoted", "joined", "written"],
)
def test_a_handler_that_uses_the_view_instead_of_its_table_is_refused(engine: Engine, name: str) -> None:
    class Lines(Sql, of=Notebook):
        tables = (Line,)

        @applies
        def noted(self, tx: Transaction, events: Sequence[Recorded[Noted]]) -> None:
            tx.execute(statements(name))

    side = ReadSide(engine, App("books", aggregates=[Notebook], projections=[Lines]))
    (failure,) = side.project([(1, "Notebook", "n", envelopes(Notebook, [Noted("word")]))])
    assert "view" in failure.error
    assert "tx.table(Model)" in failure.error
    assert side.rows(Line) == []


def test_a_handler_uses_its_own_table_and_names_that_only_look_like_the_view(engine: Engine) -> None:
    class Lines(Sql, of=Notebook):
        tables = (Line,)

        @applies
        def noted(self, tx: Transaction, events: Sequence[Recorded[Noted]]) -> None:
            own = tx.table(Line)
            tx.execute(insert(own), [{"id": recorded.meta.stream_sequence, "text": "lines"} for recorded in events])
            tx.execute(update(own).where(own.c.text == "from lines").values(text="x"))
            tx.execute(text(f"UPDATE {own.name} SET text = 'read from lines' WHERE id IS DISTINCT FROM 0"))

    side = ReadSide(engine, App("books", aggregates=[Notebook], projections=[Lines]))
    assert side.project([(1, "Notebook", "n", envelopes(Notebook, [Noted("word")]))]) == []
    assert [line.text for line in side.rows(Line)] == ["read from lines"]


@pytest.mark.parametrize(
    ("statement", "names"),
    [
        ("SELECT * FROM a JOIN b ON a.x = b.x, c AS d, e", {"a", "b", "c", "e"}),
        ('SELECT * FROM a, "B" x, c', {"a", "b", "c"}),
        ("SELECT extract(day FROM a), trim(both 'x' from c), b FROM d WHERE e IN (1, f) ORDER BY g, h", {"d"}),
        ("SELECT 1 FROM (SELECT 2 AS x, y FROM a) q, b, (c CROSS JOIN d) -- , e", {"a", "b", "c", "d"}),
        ("INSERT INTO a (b, c) VALUES (1, 2), (3, 4) ON CONFLICT (b) DO UPDATE SET c = d, e = 1", {"a"}),
        ('DELETE FROM "odd ""name" WHERE x IS DISTINCT FROM y', {'odd "name'}),
        ("UPDATE public.a SET b = 1, c = 2", {"a"}),
        ("SELECT 'from a' FROM other.a", {"other.a"}),
        ("WITH x AS (SELECT 1) INSERT INTO a (b, c) SELECT b, c FROM ONLY x", {"a", "x"}),
    ],
)
def test_the_names_in_a_statement(statement: str, names: set[str]) -> None:
    assert named_tables(statement) == names


def test_what_depends_on_a_table_itself_keeps_it(postgres: Engine) -> None:
    cut_over(postgres, pages(number()))
    run(postgres, "CREATE VIEW direct AS SELECT number FROM pages__1")
    with postgres.connect() as connection:
        assert dependents(connection, View(None, "pages__1")) == ["view direct", "view pages"]
        assert dependents(connection, View(None, "pages")) == []
