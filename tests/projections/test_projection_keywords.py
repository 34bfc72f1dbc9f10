"""What stands in a projection's class line is checked when the app is declared, all of it at once."""

from __future__ import annotations

from typing import Any

import pytest

from aggregates import Aggregate, DeclarationError
from examples.bank import Account, Balance, Balances, Deposited
from kernel import App
from projections import Projection, Rows, applies, projected


def declared(**keywords: Any) -> type[Projection]:
    class Wrong(Rows[Balance], **keywords):
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None:
            row.cents += event.cents

    return Wrong


def problems(*projections: Any) -> list[str]:
    with pytest.raises(DeclarationError) as caught:
        App("bank", aggregates=[Account], projections=projections)
    return caught.value.problems


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({}, "say whose events it folds"),
        ({"of": None}, "of=None is not an aggregate"),
        ({"of": "Account"}, "of='Account' is a text; give the aggregate's class"),
        ({"of": (Account, Account)}, "of names an aggregate twice"),
        ({"of": (Account, "Account")}, "of='Account' is a text"),
        ({"of": ()}, "give one aggregate, or a tuple of several"),
        ({"of": [Account]}, "give one aggregate, or a tuple of several"),
        ({"of": int}, "is not an aggregate"),
        ({"of": Aggregate}, "is not an aggregate"),
        ({"of": Account("1")}, "is not an aggregate"),
        *(
            ({"of": Account, "version": version}, f"version={version!r} is not a whole number from 1")
            for version in (0, -1, "1", True, None, 1.0, 2**31)
        ),
        *(
            ({"of": Account, "name": name}, f"name={name!r} can't be a projection's name")
            for name in ("", " ", "a b", "a/b", "a\0", "1st", "a*", "a\n", "n" * 129, None, 5)
        ),
    ],
)
def test_a_wrong_keyword_is_a_problem_of_the_declarations(keywords: dict[str, Any], says: str) -> None:
    wrong = declared(**keywords)
    (problem,) = problems(wrong)
    assert problem.startswith("Wrong: ")
    assert says in problem
    with pytest.raises(DeclarationError, match="Wrong: "):
        projected(wrong).then()


def test_all_wrong_keywords_are_reported_at_once() -> None:
    assert len(problems(declared(of=Account, version=0, name=""), declared(of=()))) == 3


def test_an_unknown_keyword_is_named_with_those_that_there_are() -> None:
    with pytest.raises(DeclarationError, match="Wrong: a projection has no keyword off; it has of, version and name"):
        declared(off=Account)


@pytest.mark.parametrize("given", [Balances(), "Balances", Account, None])
def test_what_is_not_a_projection_is_named(given: object) -> None:
    (problem,) = problems(given)
    assert "is not a projection" in problem


def test_a_projection_that_derives_from_another_keeps_what_it_does_not_say() -> None:
    class Later(Balances, version=7):
        pass

    class Same(Balances):
        pass

    assert (Later.of, Later.version, Later.name) == (Account, 7, "Later")
    assert (Same.of, Same.version, Same.name) == (Account, Balances.version, "Balances")


@pytest.mark.parametrize("name", ["Balances", "_b", "balances.v2", "größe-1", "n" * 128])
def test_ordinary_names_are_accepted(name: str) -> None:
    (accepted,) = App("bank", aggregates=[Account], projections=[declared(of=Account, name=name)]).projections
    assert accepted.name == name
