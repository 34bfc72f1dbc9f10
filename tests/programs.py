"""Programs of one app as they follow each other: newer events, further events and aggregates, renamed classes."""

# no postponed annotations here: local classes annotate the handlers of each program

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Integer, String, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, applies, command, event, handles, upcasts
from kernel import App
from projections import Recorded, Rows, Sql, Tallies, Tally, Transaction


@command
class Deposit:
    amount: int


@command
class Close:
    pass


@dataclass(frozen=True)
class Program:
    """One version of the program.

    Attributes:
        app: what it declares.
        account: its class for the aggregate that holds money.
        loan: its class for an aggregate that older programs do not have, or None.
        models: of its projections: rows, tallies, and SQL.
    """

    app: App
    account: type[Aggregate]
    loan: type[Aggregate] | None
    models: tuple[Any, Any, Any]


def program(
    name: str,
    *,
    version: int = 1,
    closes: bool = False,
    loans: bool = False,
    class_name: str = "Account",
    stored_as: str | None = None,
    retired: Sequence[str] = (),
    projected: bool = True,
) -> Program:
    """Make a program.

    Args:
        version: schema version of the event of a deposit. Its field is `cents` in version 1, then `amount`.
        closes: the program has a command and an event more than older ones.
        loans: the program has an aggregate more than older ones.
        class_name, stored_as: of the account.
        projected: with the projections.
    """
    if version == 1:

        @event(name="Deposited")
        class OldDeposited:
            cents: int

            @property
            def amount(self) -> int:
                return self.cents

        Deposited: Any = OldDeposited
    else:

        @event(name="Deposited", version=version)
        class NewDeposited:
            amount: int

        Deposited = NewDeposited

    @event
    class Closed:
        pass

    @event
    class Granted:
        amount: int

    class Account(Aggregate):
        balance: int = 0

        @handles
        def deposit(self, command: Deposit) -> Deposited:
            return Deposited(command.amount)

        @applies
        def deposited(self, event: Deposited) -> None:
            self.balance += event.amount

        if closes:

            @handles
            def close(self, command: Close) -> Closed:
                return Closed()

            @applies
            def closed(self, event: Closed) -> None: ...

        if version > 1:

            @staticmethod
            @upcasts(Deposited, version=1)
            def named(fields: dict[str, Any]) -> dict[str, Any]:
                return {"amount": fields["cents"]}

    class Loan(Aggregate):
        @handles
        def grant(self, command: Deposit) -> Granted:
            return Granted(command.amount)

        @applies
        def granted(self, event: Granted) -> None: ...

    # the class keyword stays what it is without being given: a class that was only renamed
    account = type(Account)(class_name, (Account,), {}, **({"name": stored_as} if stored_as else {}))

    class Base(DeclarativeBase):
        pass

    class Balance(Base):
        __tablename__ = "balances"
        account: Mapped[str] = mapped_column(String, primary_key=True)
        amount: Mapped[int] = mapped_column(Integer, default=0)
        closed: Mapped[int] = mapped_column(Integer, default=0)

    class Amount(Base):
        __tablename__ = "amounts"
        amount: Mapped[int] = mapped_column(Integer, primary_key=True)
        times: Mapped[int] = mapped_column(Integer, default=0)

    class Line(Base):
        __tablename__ = "lines"
        account: Mapped[str] = mapped_column(String, primary_key=True)
        sequence: Mapped[int] = mapped_column(Integer, primary_key=True)
        amount: Mapped[int] = mapped_column(Integer)

    class Balances(Rows[Balance], of=account):
        @applies
        def deposited(self, row: Balance, event: Deposited) -> None:
            row.amount += event.amount

        if closes:

            @applies
            def closed(self, row: Balance, event: Closed) -> None:
                row.closed += 1

    class Amounts(Tallies[Amount], of=account):
        @applies
        def deposited(self, tally: Tally[Amount], event: Deposited) -> None:
            tally[event.amount].times += 1

    class Lines(Sql, of=account):
        tables = (Line,)

        @applies
        def deposited(self, tx: Transaction, events: Sequence[Recorded[Deposited]]) -> None:
            tx.execute(
                insert(tx.table(Line)),
                [
                    {"account": e.meta.aggregate_id, "sequence": e.meta.sequence, "amount": e.event.amount}
                    for e in events
                ],
            )

    app = App(
        name,
        aggregates=[account, *([Loan] if loans else [])],
        projections=[Balances, Amounts, Lines] if projected else [],
        retired=retired,
    )
    return Program(app, account, Loan if loans else None, (Balance, Amount, Line))
