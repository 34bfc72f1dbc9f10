"""The problems of the declarations of projections."""

# no postponed annotations here: the test cases define local classes, which annotations name

from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import pytest

from aggregates import Aggregate, applies
from projections import Meta, Recorded, Rows, Sql, Tallies, Tally, Transaction
from tests.aggregates.declared import (
    Account,
    Balance,
    Blob,
    Daily,
    Deposited,
    Foreign,
    Unset,
    no_aggregate,
    one_problem,
    problems_of,
    unknown_column_near,
    wordy_tally,
)


def _unknown_column_far() -> Any:
    class P(Rows[Balance], of=Account):
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None:
            row.zzz = event.cents

    return P


def _unknown_counter() -> Any:
    class P(Tallies[Daily], of=Account):
        @applies
        def deposited(self, tally: Tally[Daily], event: Deposited) -> None:
            tally[date(2013, 1, 1), "1"].counts += 1

    return P


def _foreign_event() -> Any:
    class P(Rows[Balance], of=Account):
        @applies
        def foreign(self, row: Balance, event: Foreign) -> None: ...

    return P


def _two_row_handlers() -> Any:
    class P(Rows[Balance], of=Account):
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None: ...

        @applies
        def again(self, row: Balance, event: Deposited) -> None: ...

    return P


def _no_handler() -> Any:
    class P(Rows[Balance], of=Account):
        pass

    return P


def _no_model() -> Any:
    class P(Rows, of=Account):  # type: ignore[type-arg]
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None: ...

    return P


def _model_that_is_not_a_model() -> Any:
    class P(Tallies[int], of=Account):
        @applies
        def deposited(self, tally: Tally[int], event: Deposited) -> None: ...

    return P


def _no_tables() -> Any:
    class P(Sql, of=Account):
        @applies
        def deposited(self, tx: Transaction, events: Sequence[Recorded[Deposited]]) -> None: ...

    return P


def _tables_not_in_a_tuple() -> Any:
    class P(Sql, of=Account):
        tables = Balance  # type: ignore[assignment]

        @applies
        def deposited(self, tx: Transaction, other: Sequence[Recorded[Deposited]]) -> None: ...

    return P


def _row_handler_of_another_model() -> Any:
    class P(Rows[Balance], of=Account):
        @applies
        def deposited(self, row: Daily, event: Deposited) -> None: ...

    return P


def _row_handler_without_event() -> Any:
    class P(Rows[Balance], of=Account):
        @applies
        def deposited(self, row: Balance) -> None: ...

    return P


def _tally_handler_with_a_row() -> Any:
    class P(Tallies[Daily], of=Account):
        @applies
        def deposited(self, tally: Daily, event: Deposited) -> None: ...

    return P


def _sql_handler_with_one_event() -> Any:
    class P(Sql, of=Account):
        tables = (Balance,)

        @applies
        def deposited(self, tx: Transaction, event: Deposited, meta: Meta) -> None: ...

    return P


def _row_handler_with_another_third() -> Any:
    class P(Rows[Balance], of=Account):
        @applies
        def deposited(self, row: Balance, event: Deposited, third: int) -> None: ...

    return P


def _handler_annotation_missing() -> Any:
    class P(Rows[Balance], of=Account):
        @applies
        def deposited(self, row: Balance, event) -> None: ...

    return P


def _wide_key() -> Any:
    class P(Rows[Daily], of=Account):
        @applies
        def deposited(self, row: Daily, event: Deposited) -> None: ...

    return P


def _column_without_start() -> Any:
    class P(Rows[Unset], of=Account):
        @applies
        def deposited(self, row: Unset, event: Deposited) -> None: ...

    return P


def _binary_column() -> Any:
    class P(Rows[Blob], of=Account):
        @applies
        def deposited(self, row: Blob, event: Deposited) -> None: ...

    return P


def _async_row_handler() -> Any:
    class P(Rows[Balance], of=Account):
        @applies
        async def deposited(self, row: Balance, event: Deposited) -> None: ...

    return P


def _absent_aggregate() -> Any:
    class Elsewhere(Aggregate):
        @applies
        def deposited(self, event: Deposited) -> None: ...

    class P(Rows[Balance], of=Elsewhere):
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None: ...

    return P


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (unknown_column_near, ["P.deposited", "Balance has no column 'cent'", "did you mean cents?"]),
        (_unknown_column_far, ["P.deposited", "Balance has no column 'zzz'", "account, cents, owner"]),
        (_unknown_counter, ["P.deposited", "Daily has no column 'counts'", "did you mean count?"]),
        (_foreign_event, ["P.foreign", "no event Foreign", "Deposited, Withdrawn"]),
        (_two_row_handlers, ["P already has a handler for Deposited", "keep one"]),
        (_no_handler, ["P", "@applies"]),
        (_no_model, ["P", "Rows[Model]"]),
        (_model_that_is_not_a_model, ["P", "Tallies[Model]"]),
        (_no_tables, ["P", "tables = (Model, ...)"]),
        (_tables_not_in_a_tuple, ["P", "tables = (Model, ...)"]),
        (_row_handler_of_another_model, ["P.deposited", "row: Model, event: Event"]),
        (_row_handler_without_event, ["P.deposited", "row: Model, event: Event"]),
        (_tally_handler_with_a_row, ["P.deposited", "tally: Tally[Model]"]),
        (_sql_handler_with_one_event, ["P.deposited", "Sequence[Recorded[Event]]"]),
        (_row_handler_with_another_third, ["P.deposited", "optionally a Meta"]),
        (_handler_annotation_missing, ["P.deposited", "'event'", "annotation"]),
        (_wide_key, ["P", "primary key of Daily", "aggregate's id alone"]),
        (_column_without_start, ["Unset.owner", "default=", "nullable"]),
        (_binary_column, ["Blob.picture", "binary", "Sql"]),
        (wordy_tally, ["Worded.word", "numeric"]),
        (_async_row_handler, ["P.deposited", "async"]),
        (no_aggregate, ["P", "of=SomeAggregate"]),
        (_absent_aggregate, ["P", "Elsewhere", "not among the app's aggregates"]),
    ],
)
def test_a_problem_of_a_projection_is_reported_with_its_remedy(make: Callable[[], Any], words: list[str]) -> None:
    one_problem(problems_of([Account], [make()]), *words)
