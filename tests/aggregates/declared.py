"""What the tests of declarations declare rightly, and how they read the problems of what is wrong."""

# no postponed annotations here: the test cases define local classes, which annotations name

from collections.abc import Sequence
from datetime import date
from typing import Any

import pytest
from sqlalchemy import LargeBinary
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, DeclarationError, applies, command, event, handles
from kernel import App
from projections import Rows, Tallies, Tally


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


# what is wrong


def two_handlers() -> type:
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


def no_applier() -> type:
    class Shop(Aggregate):
        total: int = 0

    return Shop


def state_without_default() -> type:
    class Shop(Aggregate):
        total: int

        @applies
        def deposited(self, event: Deposited) -> None: ...

    return Shop


def unknown_column_near() -> Any:
    class P(Rows[Balance], of=Account):
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None:
            row.cent += event.cents

    return P


def wordy_tally() -> Any:
    class P(Tallies[Worded], of=Account):
        @applies
        def deposited(self, tally: Tally[Worded], event: Deposited) -> None: ...

    return P


def no_aggregate() -> Any:
    class P(Rows[Balance]):
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None: ...

    return P
