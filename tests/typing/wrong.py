"""What a user gets wrong: each marked line is refused by both checkers, no other line is.

A mark names mypy's code, then pyright's rule; several are divided by commas.
"""

# pyright: standard
# ruff: noqa: B018

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, applies, command, event, handles, scenario
from kernel import App, Client, Receipt, Settings
from kernel.errors import CommandError
from projections import Rows, Tallies, Tally, projected


@command
class Deposit:
    cents: int


@event
class Deposited:
    cents: int


Deposit()  # E: call-arg | reportCallIssue
Deposit("500")  # E: arg-type | reportArgumentType
Deposit(500, pence=3)  # E: call-arg | reportCallIssue
Deposit(500).cents = 3  # E: misc | reportAttributeAccessIssue
Deposit(500).pence  # E: attr-defined | reportAttributeAccessIssue


class Account(Aggregate):
    balance: int = 0

    @handles
    def deposit(self, command: Deposit) -> Deposited:
        return Deposited(command.pence)  # E: attr-defined | reportAttributeAccessIssue

    @applies
    def deposited(self, event: Deposited) -> None:
        self.balance += event.cents
        self.total = event.cents + "0"  # E: operator | reportOperatorIssue


Account("alice")  # E: call-arg | reportCallIssue
Account(id="alice").balances  # E: attr-defined | reportAttributeAccessIssue
Account(id="alice").deposit(Deposited(1))  # E: arg-type | reportArgumentType


class Renamed(Account, name=3):  # E: arg-type | reportArgumentType, reportGeneralTypeIssues
    pass


class Misspelt(Account, nam="Account"):  # E: call-arg | reportCallIssue, reportGeneralTypeIssues
    pass


scenario(Deposit)  # E: type-var | reportArgumentType
scenario(Account).state().cents  # E: attr-defined | reportAttributeAccessIssue


class Base(DeclarativeBase):
    pass


class Balance(Base):
    __tablename__ = "balances"
    account: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int] = mapped_column(default=0)


class Balances(Rows[Balance], of=Account, version="2"):  # E: arg-type | reportArgumentType, reportGeneralTypeIssues
    @applies
    def deposited(self, row: Balance, event: Deposited) -> None:
        row.pence += event.cents  # E: attr-defined | reportAttributeAccessIssue


class OfNothing(Rows[Balance], of=Balance):  # E: arg-type | reportArgumentType, reportGeneralTypeIssues
    pass


class Keyed(Rows[Balance], of=(Account, Balance)):  # E: arg-type | reportArgumentType, reportGeneralTypeIssues
    def key(self, event: Deposited) -> str:
        return str(event.pence)  # E: attr-defined | reportAttributeAccessIssue


class Daily(Tallies[Balance], of=Account):
    @applies
    def deposited(self, tally: Tally[Balance], event: Deposited) -> None:
        tally["today"].deposits += 1  # E: attr-defined | reportAttributeAccessIssue


projected(Account)  # E: arg-type | reportArgumentType
App("bank", aggregates=[Balance])  # E: list-item | reportArgumentType
App("bank", aggregates=[Account], projections=[Account])  # E: list-item | reportArgumentType
App("bank", [Account])  # E: call-arg | reportCallIssue
app = App("bank", aggregates=[Account], projections=[Balances])
Settings(lease="long")  # E: arg-type | reportArgumentType


async def use(client: Client, receipt: Receipt) -> None:
    client.execute(Account, "alice", Deposit(1))  # E: unused-coroutine | reportUnusedCoroutine
    await client.execute("Account", "alice", Deposit(1))  # E: call-overload | reportArgumentType
    await client.execute(Account, "alice", Deposit(1), "an id")  # E: call-overload | reportCallIssue
    await client.execute(Account, "alice", Deposit(1), if_versoin=3)  # E: call-overload | reportCallIssue
    send = client.execute
    await send(Account, "a", Deposit(1), returning="rows")  # E: call-overload | reportArgumentType, reportCallIssue
    receipt.sequence = 1  # E: misc | reportAttributeAccessIssue
    rows = await client.query("SELECT 1", after=3)  # E: arg-type | reportArgumentType
    rows.first()  # E: attr-defined | reportAttributeAccessIssue
    try:
        await client.execute(Account, "alice", Deposit(1))
    except CommandError as error:
        error.retry_after + 1  # E: operator | reportOptionalOperand


App("bank", aggregates=[Account], policies=[Balances])  # E: list-item | reportArgumentType
App("bank", aggregates=[Account], effects=[Account])  # E: list-item | reportArgumentType
