"""An app whose projection of balances gets a column more in version 2: programs that are deployed one after another."""

# no postponed annotations here: local classes annotate the handlers of each program

import random
from typing import Any

from sqlalchemy import Integer, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, applies, command, event, handles, upcasts
from kernel import App
from projections import Rows, Tallies, Tally


@command
class Pay:
    cents: int


@command
class Refund:
    cents: int


class Purse(Aggregate):
    """The aggregate's name and id, for clients of all programs."""


def ledger(
    name: str, version: int = 1, *, newer_events: bool = False, arbitrary: bool = False, limit: int = 10_000
) -> App:
    """Return a program.

    Args:
        version: of the projection of balances. Version 2 counts the payments too.
        newer_events: it decides events of a later schema version, and has a command more.
        arbitrary: its balances depend on more than the events.
        limit: above it, its aggregate counts a payment half.
    """
    if newer_events:

        @event(name="Paid", version=2)
        class NewPaid:
            cents: int
            note: str = ""

        Paid: Any = NewPaid
    else:

        @event(name="Paid")
        class OldPaid:
            cents: int

        Paid = OldPaid

    class Purse(Aggregate):
        total: int = 0

        @handles
        def pay(self, command: Pay) -> Paid:
            return Paid(command.cents)

        @applies
        def paid(self, event: Paid) -> None:
            self.total += event.cents if event.cents <= limit else event.cents // 2

        if newer_events:

            @handles
            def refund(self, command: Refund) -> Paid:
                return Paid(-command.cents, note="refund")

            @staticmethod
            @upcasts(Paid, version=1)
            def noted(fields: dict[str, Any]) -> dict[str, Any]:
                return {**fields, "note": ""}

    class Base(DeclarativeBase):
        pass

    class Balance(Base):
        __tablename__ = "balances"
        purse: Mapped[str] = mapped_column(String, primary_key=True)
        cents: Mapped[int] = mapped_column(Integer, default=0)
        if version > 1:
            payments: Mapped[int] = mapped_column(Integer, default=0)

    class Volume(Base):
        __tablename__ = "volumes"
        cents: Mapped[int] = mapped_column(Integer, primary_key=True)
        times: Mapped[int] = mapped_column(Integer, default=0)

    class Balances(Rows[Balance], of=Purse, version=version):
        if version > 1:

            @applies
            def counted(self, row: Balance, event: Paid) -> None:
                row.cents += random.randint(0, 1_000_000) if arbitrary else event.cents
                row.payments += 1
        else:

            @applies
            def paid(self, row: Balance, event: Paid) -> None:
                row.cents += event.cents

    class Volumes(Tallies[Volume], of=Purse):
        @applies
        def paid(self, tally: Tally[Volume], event: Paid) -> None:
            tally[event.cents].times += 1

    return App(name, aggregates=[Purse], projections=[Balances, Volumes])


def bare_ledger(name: str) -> App:
    """Return a program with a projection in which no purse has a row, and one that counts the payments of each."""

    @event(name="Paid")
    class Paid:
        cents: int

    @event
    class Closed:
        pass

    class Purse(Aggregate):
        total: int = 0

        @handles
        def pay(self, command: Pay) -> Paid:
            return Paid(command.cents)

        @applies
        def paid(self, event: Paid) -> None:
            self.total += event.cents

        @applies
        def closed(self, event: Closed) -> None:
            self.total = 0

    class Base(DeclarativeBase):
        pass

    class Hole(Base):
        __tablename__ = "holes"
        purse: Mapped[str] = mapped_column(String, primary_key=True)

    class Count(Base):
        __tablename__ = "counted"
        purse: Mapped[str] = mapped_column(String, primary_key=True)
        payments: Mapped[int] = mapped_column(Integer, default=0)

    class Empty(Rows[Hole], of=Purse):
        @applies
        def closed(self, row: Hole, event: Closed) -> None:
            pass

    class Counted(Rows[Count], of=Purse):
        @applies
        def paid(self, row: Count, event: Paid) -> None:
            row.payments += 1

    return App(name, aggregates=[Purse], projections=[Empty, Counted])
