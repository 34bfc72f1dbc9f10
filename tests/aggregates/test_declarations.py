"""All problems of a program's declarations are reported together at start, each with its remedy: of aggregates."""

# no postponed annotations here: the test cases define local classes, which annotations name

from collections.abc import Callable
from datetime import date
from typing import Any

import pytest

from aggregates import Aggregate, Context, DeclarationError, applies, command, event, handles, scenario, upcasts
from aggregates.declaration import declare
from kernel import App
from projections import Meta, Rows, Tallies, Tally
from tests.aggregates.declared import (
    Account,
    Balance,
    Daily,
    Deposit,
    Deposited,
    Foreign,
    Opaque,
    Renamed,
    Withdrawn,
    no_applier,
    one_problem,
    problems_of,
    state_without_default,
    two_handlers,
)


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
        (two_handlers, ["Shop.deposit_again", "already has a handler for Deposit", "keep one"]),
        (_two_appliers, ["Shop.deposited_again", "already applies Deposited", "keep one"]),
        (_handler_without_annotation, ["Shop.deposit", "'command'", "annotation"]),
        (_handler_without_result, ["Shop.deposit", "annotate the result"]),
        (_handler_of_an_event, ["Shop.deposit", "@command"]),
        (_handler_with_more_parameters, ["Shop.deposit", "Context"]),
        (_handler_with_another_second_parameter, ["Shop.deposit", "Context"]),
        (_applier_of_a_command, ["Shop.deposited", "@event"]),
        (_applier_with_more_parameters, ["Shop.deposited", "one parameter"]),
        (_unresolvable, ["Shop.deposited", "Nowhere", "define or import"]),
        (state_without_default, ["Shop.total", "no default"]),
        (_two_events_of_one_name, ["Shop.other", "'Deposited'", "another name"]),
        (no_applier, ["Shop", "applies no event", "@applies"]),
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
        scenario(no_applier())
