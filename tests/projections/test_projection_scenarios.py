"""Specifying projections without servers."""

from __future__ import annotations

import pytest

from aggregates import DeclarationError
from examples.bank import Account, Balance, Balances, Deposited, Withdrawn
from examples.flights import AirportDay, AirportDays, Arrived, Departed, LongDelay, LongDelays
from projections import Rows, applies, projected
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
