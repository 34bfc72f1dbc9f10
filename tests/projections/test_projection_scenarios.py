"""Specifying projections without servers."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import make_url, text

from aggregates import DeclarationError
from examples.bank import Account, Balance, Balances, Deposited, Withdrawn
from examples.flights import AirportDay, AirportDays, Arrived, Departed, LongDelay, LongDelays
from projections import Rows, SchemaError, applies, projected
from projections.database import open_database
from projections.scratch import scratch
from projections.tables import metadata
from tests.apps import Line, Lines, Noted, Pages


def test_rows_are_specified_by_their_models() -> None:
    projected(Balances).given("alice", Deposited(500), Withdrawn(100)).then(Balance(account="alice", cents=400))


def test_a_wrong_a_missing_and_a_further_row_are_noticed() -> None:
    given = projected(Balances).given("alice", Deposited(500)).given("bert", Deposited(1))
    alice, bert = Balance(account="alice", cents=500), Balance(account="bert", cents=1)
    given.then(bert, alice)
    for wrong in ([alice], [alice, bert, Balance(account="carl", cents=0)], [alice, Balance(account="bert", cents=2)]):
        with pytest.raises(AssertionError, match="bert|carl"):
            given.then(*wrong)


def test_tallies_add_up_over_aggregates() -> None:
    from datetime import date

    day = date(2013, 1, 1)
    (
        projected(AirportDays)
        .given("N1", Departed("F1", "JFK", day, 5, 100), Arrived("F1", "BOS", day, 3, 60))
        .given("N2", Departed("F2", "JFK", day, 7, 100))
        .then(
            AirportDay(airport="JFK", day=day, departures=2, delay_minutes=12, arrivals=0),
            AirportDay(airport="BOS", day=day, arrivals=1),
        )
    )


def test_sql_handlers_run() -> None:
    from datetime import date

    late = Arrived("F1", "BOS", date(2013, 1, 1), 200, None)
    in_time = Arrived("F2", "BOS", date(2013, 1, 1), 2, None)
    projected(LongDelays).given("N1", late, in_time).then(LongDelay(tail="N1", flight="F1", minutes=200))
    projected(Lines).given("n", Noted("a", 1)).given("n", Noted("b", 1)).then(
        Line(notebook="n", sequence=1, text="a"), Line(notebook="n", sequence=2, text="b")
    )


def test_a_handler_that_raises_fails_the_scenario() -> None:
    projected(Pages).given("n", Noted("poison row", 1)).fails("no such page")
    projected(Lines).given("n", Noted("poison sql", 1)).fails("no such line")
    with pytest.raises(AssertionError, match="no handler failed"):
        projected(Pages).given("n", Noted("fine", 1)).fails("no such page")


def test_a_wrong_declaration_is_reported() -> None:
    class Broken(Rows[Balance], of=Account):
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None:
            row.centz += event.cents  # type: ignore[attr-defined]

    with pytest.raises(DeclarationError, match="did you mean cents"):
        projected(Broken).given("alice", Deposited(1)).then()


# on a real database


def everything_in(url: str) -> set[tuple[object, ...]]:
    engine = open_database(url)
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "sqlite":
                return {tuple(row) for row in connection.execute(text("SELECT type, name, sql FROM sqlite_master"))}
            found = connection.execute(
                text("SELECT nspname, relname, relkind FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace")
            )
            schemas = connection.execute(text("SELECT nspname FROM pg_namespace"))
            return {tuple(row) for row in found if not row[0].startswith("pg_toast")} | {tuple(row) for row in schemas}
    finally:
        engine.dispose()


def test_a_scenario_runs_on_a_real_database_and_leaves_nothing_behind(database_url: str) -> None:
    before = everything_in(database_url) if database_url.startswith("postgresql") else set()
    given = projected(Balances, database=database_url).given("alice", Deposited(500), Withdrawn(100))
    for _ in range(2):
        given.then(Balance(account="alice", cents=400))
    with pytest.raises(AssertionError, match="400"):
        given.then(Balance(account="alice", cents=1))
    with pytest.raises(AssertionError, match="no handler failed"):
        given.fails("anything")
    if database_url.startswith("postgresql"):
        assert everything_in(database_url) == before
    else:
        assert not any(Path(make_url(database_url).database or "").parent.glob("*.db*"))


def test_a_scenario_does_not_touch_what_a_service_has_in_the_same_database(fresh_postgres: str) -> None:
    engine = open_database(fresh_postgres)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE balances__1 (account text PRIMARY KEY, cents int)"))
        connection.execute(text("INSERT INTO balances__1 VALUES ('alice', 7)"))
        connection.execute(text("CREATE VIEW balances AS SELECT * FROM balances__1"))
        metadata.create_all(connection)
    before = everything_in(fresh_postgres)
    projected(Balances, database=fresh_postgres).given("alice", Deposited(5)).then(Balance(account="alice", cents=5))
    assert everything_in(fresh_postgres) == before
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT cents FROM balances")) == 7
        assert connection.scalar(text("SELECT count(*) FROM eskernel_stream")) == 0
    engine.dispose()


def test_a_scenario_finds_the_types_of_extensions_in_other_schemas(fresh_postgres: str) -> None:
    engine = open_database(fresh_postgres)
    with engine.begin() as connection:
        connection.execute(text("CREATE DOMAIN shouted AS text CHECK (value = upper(value))"))
        connection.execute(text("CREATE TABLE harmless (id int)"))
    engine.dispose()
    with scratch(fresh_postgres, ["balances"]) as scenario, scenario.begin() as connection:
        assert connection.scalar(text("SELECT 'A'::shouted")) == "A"


def test_a_scenario_refuses_a_file_that_exists(tmp_path: Path) -> None:
    file = tmp_path / "mine.db"
    file.write_text("")
    with pytest.raises(SchemaError, match=r"mine\.db exists; name a new file"):
        projected(Balances, database=f"sqlite:///{file}").then()
    assert file.read_text() == ""


def test_a_scenario_says_when_the_user_may_not_make_a_schema(fresh_postgres: str) -> None:
    engine = open_database(fresh_postgres)
    with engine.begin() as connection:
        role = f"reader_{make_url(fresh_postgres).database}"
        connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'x'"))
    url = make_url(fresh_postgres).set(username=role, password="x").render_as_string(hide_password=False)
    with pytest.raises(SchemaError, match="schema of its own: permission denied .*GRANT CREATE ON DATABASE"):
        projected(Balances, database=url).then()
    with engine.begin() as connection:
        connection.execute(text(f"DROP ROLE {role}"))
    engine.dispose()
