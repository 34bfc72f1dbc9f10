"""A bank account: the tutorial of the README."""

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, Rejected, applies, command, event, handles
from kernel import App
from projections import Rows


@event
class Deposited:
    cents: int


@event
class Withdrawn:
    cents: int


@command
class Deposit:
    cents: int


@command
class Withdraw:
    cents: int


class Account(Aggregate):
    balance: int = 0

    @handles
    def deposit(self, command: Deposit) -> Deposited:
        if command.cents <= 0:
            raise Rejected("a deposit must be positive")
        return Deposited(command.cents)

    @handles
    def withdraw(self, command: Withdraw) -> Withdrawn:
        if command.cents > self.balance:
            raise Rejected(f"balance is {self.balance}")
        return Withdrawn(command.cents)

    @applies
    def deposited(self, event: Deposited) -> None:
        self.balance += event.cents

    @applies
    def withdrawn(self, event: Withdrawn) -> None:
        self.balance -= event.cents


class Base(DeclarativeBase):
    pass


class Balance(Base):
    __tablename__ = "balances"
    account: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int] = mapped_column(default=0)


class Balances(Rows[Balance], of=Account, version=1):
    @applies
    def deposited(self, row: Balance, event: Deposited) -> None:
        row.cents += event.cents

    @applies
    def withdrawn(self, row: Balance, event: Withdrawn) -> None:
        row.cents -= event.cents


app = App("bank", aggregates=[Account], projections=[Balances])
