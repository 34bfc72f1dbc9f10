"""All problems of a program's declarations are reported together at start, each with its remedy."""

# no postponed annotations here: the test cases define local classes, which annotations name

import itertools
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import pytest
from sqlalchemy import LargeBinary
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, Context, DeclarationError, applies, command, event, handles, scenario, upcasts
from aggregates.declaration import declare
from kernel import App
from projections import Meta, Recorded, Rows, Sql, Tallies, Tally, Transaction, projected


@event
class Deposited:
    cents: int


@event
class Withdrawn:
    cents: int


@event(version=3)
class Renamed:
    name: str


@event
class Foreign:
    cents: int


@command
class Deposit:
    cents: int


class Account(Aggregate):
    balance: int = 0

    @handles
    def deposit(self, command: Deposit) -> Deposited:
        return Deposited(command.cents)

    @applies
    def deposited(self, event: Deposited | Withdrawn) -> None:
        self.balance += event.cents


class Base(DeclarativeBase):
    pass


class Balance(Base):
    __tablename__ = "balances"
    account: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int] = mapped_column(default=0)
    owner: Mapped[str | None]


class Daily(Base):
    __tablename__ = "daily"
    day: Mapped[date] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(default=0)


class Unset(Base):
    __tablename__ = "unset"
    account: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]


class Blob(Base):
    __tablename__ = "blobs"
    account: Mapped[str] = mapped_column(primary_key=True)
    picture: Mapped[bytes | None] = mapped_column(LargeBinary)


class Worded(Base):
    __tablename__ = "worded"
    account: Mapped[str] = mapped_column(primary_key=True)
    word: Mapped[str] = mapped_column(default="")


class Opaque:
    pass


def problems_of(
    aggregates: Sequence[type[Aggregate]], projections: Sequence[Any] = (), name: str = "bank"
) -> tuple[str, ...]:
    with pytest.raises(DeclarationError) as error:
        App(name, aggregates=aggregates, projections=projections)
    for problem in error.value.problems:
        assert problem in str(error.value)
    return error.value.problems


def one_problem(found: tuple[str, ...], *words: str) -> None:
    assert len(found) == 1, found
    for word in words:
        assert word in found[0], found[0]


def test_a_right_declaration_has_no_problems() -> None:
    class Balances(Rows[Balance], of=Account):
        @applies
        def deposited(self, row: Balance, event: Deposited, meta: Meta) -> None:
            row.cents += event.cents

    class Days(Tallies[Daily], of=Account):
        @applies
        def deposited(self, tally: Tally[Daily], event: Deposited, meta: Meta) -> None:
            tally[meta.time.date(), meta.aggregate_id].count += 1

    app = App("bank", aggregates=[Account], projections=[Balances, Days])
    assert [declared.name for declared in app.projections] == ["Balances", "Days"]
    assert app.projection("Days").kind == "tallies"
    assert app.type_of("Account") is app.type_of(Account)


# aggregates


def _returns_an_event_without_applier() -> type:
    class Shop(Aggregate):
        @handles
        def deposit(self, command: Deposit) -> Deposited | Foreign:
            return Deposited(command.cents)

        @applies
        def deposited(self, event: Deposited) -> None: ...

    return Shop


def _two_handlers() -> type:
    class Shop(Aggregate):
        @handles
        def deposit(self, command: Deposit) -> Deposited:
            return Deposited(command.cents)

        @handles
        def deposit_again(self, command: Deposit) -> Deposited:
            return Deposited(command.cents)

        @applies
        def deposited(self, event: Deposited) -> None: ...

    return Shop


def _two_appliers() -> type:
    class Shop(Aggregate):
        @applies
        def deposited(self, event: Deposited) -> None: ...

        @applies
        def deposited_again(self, event: Deposited) -> None: ...

    return Shop


def _handler_without_annotation() -> type:
    class Shop(Aggregate):
        @handles
        def deposit(self, command) -> Deposited: ...

        @applies
        def deposited(self, event: Deposited) -> None: ...

    return Shop


def _handler_without_result() -> type:
    class Shop(Aggregate):
        @handles
        def deposit(self, command: Deposit): ...

        @applies
        def deposited(self, event: Deposited) -> None: ...

    return Shop


def _handler_of_an_event() -> type:
    class Shop(Aggregate):
        @handles
        def deposit(self, command: Deposited) -> Deposited: ...

        @applies
        def deposited(self, event: Deposited) -> None: ...

    return Shop


def _handler_with_more_parameters() -> type:
    class Shop(Aggregate):
        @handles
        def deposit(self, command: Deposit, context: Context, third: int) -> Deposited: ...

        @applies
        def deposited(self, event: Deposited) -> None: ...

    return Shop


def _handler_with_another_second_parameter() -> type:
    class Shop(Aggregate):
        @handles
        def deposit(self, command: Deposit, now: date) -> Deposited: ...

        @applies
        def deposited(self, event: Deposited) -> None: ...

    return Shop


def _applier_of_a_command() -> type:
    class Shop(Aggregate):
        @applies
        def deposited(self, event: Deposit) -> None: ...

        @applies
        def withdrawn(self, event: Withdrawn) -> None: ...

    return Shop


def _applier_with_more_parameters() -> type:
    class Shop(Aggregate):
        @applies
        def deposited(self, event: Deposited, more: int) -> None: ...

    return Shop


def _unresolvable() -> type:
    class Shop(Aggregate):
        @applies
        def deposited(self, event: "Nowhere") -> None: ...  # noqa: F821

    return Shop


def _state_without_default() -> type:
    class Shop(Aggregate):
        total: int

        @applies
        def deposited(self, event: Deposited) -> None: ...

    return Shop


def _two_events_of_one_name() -> type:
    @event(name="Deposited")
    class Other:
        cents: int

    class Shop(Aggregate):
        @applies
        def deposited(self, event: Deposited) -> None: ...

        @applies
        def other(self, event: Other) -> None: ...

    return Shop


def _no_applier() -> type:
    class Shop(Aggregate):
        total: int = 0

    return Shop


def _upcaster_missing() -> type:
    class Shop(Aggregate):
        @applies
        def renamed(self, event: Renamed) -> None: ...

        @staticmethod
        @upcasts(Renamed, version=1)
        def first(fields: dict[str, Any]) -> dict[str, Any]:
            return fields

    return Shop


def _upcaster_of_the_current_version() -> type:
    class Shop(Aggregate):
        @applies
        def deposited(self, event: Deposited) -> None: ...

        @staticmethod
        @upcasts(Deposited, version=1)
        def first(fields: dict[str, Any]) -> dict[str, Any]:
            return fields

    return Shop


def _upcaster_of_a_foreign_event() -> type:
    class Shop(Aggregate):
        @applies
        def deposited(self, event: Deposited) -> None: ...

        @staticmethod
        @upcasts(Renamed, version=1)
        def first(fields: dict[str, Any]) -> dict[str, Any]:
            return fields

    return Shop


def _opaque(annotation: Any) -> Callable[[], type]:
    def make() -> type:
        @event
        class Packed:
            thing: annotation  # type: ignore[valid-type]

        class Shop(Aggregate):
            @applies
            def packed(self, event: Packed) -> None: ...

        return Shop

    return make


def _opaque_command() -> type:
    @command
    class Pack:
        thing: Opaque

    class Shop(Aggregate):
        @handles
        def pack(self, command: Pack) -> Deposited: ...

        @applies
        def deposited(self, event: Deposited) -> None: ...

    return Shop


def _async_applier() -> type:
    class Shop(Aggregate):
        @applies
        async def deposited(self, event: Deposited) -> None: ...

    return Shop


def _async_handler() -> type:
    class Shop(Aggregate):
        @handles
        async def deposit(self, command: Deposit) -> Deposited: ...

        @applies
        def deposited(self, event: Deposited) -> None: ...

    return Shop


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_returns_an_event_without_applier, ["Shop.deposit", "Foreign", "add a method with @applies"]),
        (_two_handlers, ["Shop.deposit_again", "already has a handler for Deposit", "keep one"]),
        (_two_appliers, ["Shop.deposited_again", "already applies Deposited", "keep one"]),
        (_handler_without_annotation, ["Shop.deposit", "'command'", "annotation"]),
        (_handler_without_result, ["Shop.deposit", "annotate the result"]),
        (_handler_of_an_event, ["Shop.deposit", "@command"]),
        (_handler_with_more_parameters, ["Shop.deposit", "Context"]),
        (_handler_with_another_second_parameter, ["Shop.deposit", "Context"]),
        (_applier_of_a_command, ["Shop.deposited", "@event"]),
        (_applier_with_more_parameters, ["Shop.deposited", "one parameter"]),
        (_unresolvable, ["Shop.deposited", "Nowhere", "define or import"]),
        (_state_without_default, ["Shop.total", "no default"]),
        (_two_events_of_one_name, ["Shop.other", "'Deposited'", "another name"]),
        (_no_applier, ["Shop", "applies no event", "@applies"]),
        (_upcaster_missing, ["Renamed", "Shop", "from version 2", "@upcasts(Renamed, version=2)"]),
        (_upcaster_of_the_current_version, ["Shop.first", "Deposited", "older"]),
        (_upcaster_of_a_foreign_event, ["Shop.first", "Renamed", "does not apply"]),
        (_opaque(Opaque), ["Packed.thing", "Opaque", "JSON"]),
        (_opaque(list[Opaque]), ["Packed.thing", "Opaque", "JSON"]),
        (_opaque(dict[str, Opaque]), ["Packed.thing", "Opaque", "JSON"]),
        (_opaque(Opaque | None), ["Packed.thing", "Opaque", "JSON"]),
        (_opaque_command, ["Pack.thing", "Opaque", "JSON"]),
        (_async_applier, ["Shop.deposited", "async"]),
        (_async_handler, ["Shop.deposit", "async"]),
    ],
)
def test_a_problem_of_an_aggregate_is_reported_with_its_remedy(make: Callable[[], type], words: list[str]) -> None:
    found = problems_of([make()])
    one_problem(found, *words)


@pytest.mark.parametrize("stranger", [int, "text", object()])
def test_a_class_that_is_not_an_aggregate_is_refused(stranger: Any) -> None:
    with pytest.raises(DeclarationError, match=r"derive the class from aggregates\.Aggregate"):
        declare(stranger)


def test_a_scenario_of_a_wrong_class_reports_its_problems() -> None:
    with pytest.raises(DeclarationError, match="applies no event"):
        scenario(_no_applier())


# projections


def _unknown_column_near() -> Any:
    class P(Rows[Balance], of=Account):
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None:
            row.cent += event.cents

    return P


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


def _wordy_tally() -> Any:
    class P(Tallies[Worded], of=Account):
        @applies
        def deposited(self, tally: Tally[Worded], event: Deposited) -> None: ...

    return P


def _async_row_handler() -> Any:
    class P(Rows[Balance], of=Account):
        @applies
        async def deposited(self, row: Balance, event: Deposited) -> None: ...

    return P


def _no_aggregate() -> Any:
    class P(Rows[Balance]):
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None: ...

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
        (_unknown_column_near, ["P.deposited", "Balance has no column 'cent'", "did you mean cents?"]),
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
        (_wordy_tally, ["Worded.word", "numeric"]),
        (_async_row_handler, ["P.deposited", "async"]),
        (_no_aggregate, ["P", "of=SomeAggregate"]),
        (_absent_aggregate, ["P", "Elsewhere", "not among the app's aggregates"]),
    ],
)
def test_a_problem_of_a_projection_is_reported_with_its_remedy(make: Callable[[], Any], words: list[str]) -> None:
    one_problem(problems_of([Account], [make()]), *words)


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
    aggregates = [Account, _two_handlers(), _state_without_default()]
    projections = [_unknown_column_near(), _wordy_tally(), _no_aggregate()]
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
    classes = [Account, _two_handlers(), _no_applier()]
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
    assert app.projection("Balances").aggregate == "Konto"
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
    class Balances(Rows[Balance], of=(Account, Account)):  # type: ignore[arg-type]
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None: ...

    one_problem(problems_of([Account], [Balances]), "Balances", "of has 2 values", "one aggregate")
