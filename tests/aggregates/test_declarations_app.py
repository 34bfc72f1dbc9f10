"""The problems of an app's declarations as a whole, and of names."""

# no postponed annotations here: the test cases define local classes, which annotations name

import itertools
from typing import Any

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, DeclarationError, applies, event, handles, scenario
from aggregates.declaration import declare
from kernel import App
from projections import Rows, Tallies, Tally, projected
from tests.aggregates.declared import (
    Account,
    Balance,
    Daily,
    Deposit,
    Deposited,
    Foreign,
    Worded,
    no_aggregate,
    no_applier,
    one_problem,
    problems_of,
    state_without_default,
    two_handlers,
    unknown_column_near,
    wordy_tally,
)

# the app


def _balances(name: str, model: Any = Balance) -> Any:
    class Balances(Rows[model], of=Account, name=name):  # type: ignore[valid-type]
        @applies
        def deposited(self, row: model, event: Deposited) -> None: ...  # type: ignore[valid-type]

    return Balances


def test_two_projections_of_one_name_are_a_problem() -> None:
    one_problem(
        problems_of([Account], [_balances("Same"), _balances("Same", Worded)]), "two projections are named Same"
    )


def test_two_projections_of_one_model_are_a_problem() -> None:
    one_problem(problems_of([Account], [_balances("A"), _balances("B")]), "A", "B", "balances", "one projection")


def test_two_projections_of_one_table_are_a_problem_even_with_two_models() -> None:
    class OtherBase(DeclarativeBase):
        pass

    class OtherBalance(OtherBase):
        __tablename__ = "balances"
        account: Mapped[str] = mapped_column(primary_key=True)

    found = problems_of([Account], [_balances("A"), _balances("B", OtherBalance)])
    one_problem(found, "A", "B", "balances", "one projection")


def test_two_aggregates_of_one_name_are_a_problem() -> None:
    first, second = _two_named_alike(), _two_named_alike()
    one_problem(problems_of([first, second]), "two aggregates are named Twin", "name=")


def _two_named_alike() -> type:
    class Twin(Aggregate):
        @applies
        def deposited(self, event: Deposited) -> None: ...

    return Twin


def test_an_app_without_aggregates_is_a_problem() -> None:
    one_problem(problems_of([]), "'bank'", "no aggregates", "aggregates=[...]")


@pytest.mark.parametrize("name", ["", "1bank", "a.b", "a b", "a*", "ü", "x" * 33, "bank\n", "-a"])
def test_a_name_that_cannot_be_a_stream_is_a_problem(name: str) -> None:
    one_problem(problems_of([Account], name=name), repr(name), "32")


@pytest.mark.parametrize("name", ["b", "Bank-2", "a_b", "x" * 32])
def test_other_names_are_taken(name: str) -> None:
    assert App(name, aggregates=[Account]).name == name


def test_all_problems_of_an_app_come_at_once() -> None:
    aggregates = [Account, two_handlers(), state_without_default()]
    projections = [unknown_column_near(), wordy_tally(), no_aggregate()]
    with pytest.raises(DeclarationError) as error:
        App("1bad", aggregates=aggregates, projections=projections)
    problems = " ".join(error.value.problems)
    for word in ("1bad", "Shop.deposit_again", "Shop.total", "'cent'", "Worded.word", "of=SomeAggregate"):
        assert word in problems
    assert len(error.value.problems) >= 6
    assert str(error.value).startswith(f"{len(error.value.problems)} problem")


def test_several_problems_of_one_class_come_at_once() -> None:
    class Shop(Aggregate):
        total: int

        @handles
        def deposit(self, command: Deposit) -> Foreign: ...

        @applies
        def deposited(self, event): ...

    found = problems_of([Shop])
    for word in ("Shop.total", "Foreign", "'event'"):
        assert any(word in problem for problem in found), word


def test_problems_are_reported_in_any_order_of_the_classes() -> None:
    classes = [Account, two_handlers(), no_applier()]
    outcomes = {frozenset(problems_of(list(order))) for order in itertools.permutations(classes)}
    assert len({len(found) for found in outcomes}) == 1


# names


def _named(given: Any) -> type:
    class Shop(Aggregate, name=given):
        @applies
        def deposited(self, event: Deposited) -> None: ...

    return Shop


def test_an_aggregates_name_is_that_of_its_class_or_the_one_that_is_given() -> None:
    class BankAccount(Account, name="Account-2"):
        name: str = "a field of the state may have this name"

    class Savings(BankAccount):
        pass

    assert declare(Account).name == "Account"
    assert declare(BankAccount).name == "Account-2"
    assert declare(Savings).name == "Savings"  # each class has a name of its own
    assert BankAccount(id="alice").name.startswith("a field")


@pytest.mark.parametrize(
    "name", ["", "a.b", "a b", "Account*", ">", "-a", "a/b", "a\n", "x" * 129, 3, b"Account", ["Account"]], ids=repr
)
def test_a_name_that_cannot_be_part_of_a_subject_is_a_problem(name: Any) -> None:
    class Deposits(Tallies[Daily], of=_named("Other")):
        @applies
        def deposited(self, tally: Tally[Daily], event: Deposited) -> None: ...

    Deposits.of = shop = _named(name)
    one_problem(problems_of([shop], [Deposits]), "Shop", f"name={name!r}")


@pytest.mark.parametrize("name", ["a", "Account_2", "2fa", "Straße", "x" * 128])
def test_a_name_of_letters_and_digits_is_none(name: str) -> None:
    assert App("bank", aggregates=[_named(name)]).types.keys() == {name}


def test_two_classes_may_not_be_given_one_name() -> None:
    one_problem(problems_of([Account, _named("Account")]), "two aggregates are named Account", "name=")


def test_a_projection_follows_its_aggregate_whatever_that_is_named() -> None:
    class BankAccount(Account, name="Konto"):
        pass

    class Balances(Rows[Balance], of=BankAccount):
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None:
            row.cents += event.cents

    app = App("bank", aggregates=[BankAccount], projections=[Balances])
    assert app.projection("Balances").aggregates == ("Konto",)
    assert app.type_of(BankAccount) is app.type_of("Konto")
    scenario(BankAccount).when(Deposit(5)).then(Deposited(5))
    projected(Balances).given("alice", Deposited(5)).then(Balance(account="alice", cents=5))


@pytest.mark.parametrize(
    ("retired", "words"),
    [
        (["Account"], ("Account is both", "retired=[...]")),
        (["a.b"], ("retired: 'a.b'", "subject")),
        ([3], ("retired: 3", "text")),
        ("Loan", ("retired='Loan'", "retired=['Loan']")),
    ],
    ids=str,
)
def test_names_that_cannot_be_retired_are_a_problem(retired: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(DeclarationError) as error:
        App("bank", aggregates=[Account], retired=retired)
    one_problem(error.value.problems, *words)


def test_a_projection_of_something_else_than_a_class_is_a_problem() -> None:
    class Balances(Rows[Balance], of=(Account, Account)):
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None: ...

    one_problem(problems_of([Account], [Balances]), "Balances", "of names an aggregate twice")


def test_a_default_that_all_aggregates_would_share_is_refused_with_a_remedy() -> None:
    with pytest.raises(DeclarationError, match=r"Shelf: mutable default .* field books .*default_factory=list"):

        class Shelf(Aggregate):
            books: list[str] = []

    with pytest.raises(DeclarationError, match=r"Shelved: mutable default"):

        @event
        class Shelved:
            books: list[str] = []
