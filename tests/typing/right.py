"""What a user writes, all of it: both checkers accept it, and know the types that `assert_type` names.

Nothing here runs. tests/typing/test_typing.py has mypy and pyright read it as a program that installed eskernel.
"""

# pyright: strict
from collections.abc import Iterator, Sequence
from dataclasses import field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, assert_type

from sqlalchemy import CursorResult, Engine, Table, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import (
    After,
    Aggregate,
    At,
    Cancel,
    Context,
    DeclarationError,
    InvalidId,
    Policy,
    PolicyScenario,
    Reaction,
    Reactions,
    Refusal,
    Rejected,
    Scenario,
    Send,
    applies,
    command,
    event,
    handles,
    policy,
    reacts,
    scenario,
    upcasts,
)
from kernel import (
    Alert,
    App,
    Client,
    CommandMessage,
    Effect,
    LoadedAggregate,
    Outcome,
    Rebuild,
    RebuildProgress,
    Rebuilt,
    Receipt,
    ReceiptWithEvents,
    ReceiptWithState,
    Service,
    Settings,
    load_app,
)
from kernel.errors import CommandError, CommandTimeout, Conflict, EskernelError, Overloaded, SettingsError
from kernel.log import EventLog, JetStreamLog, MemoryLog
from kernel.settings import Loaded, Rates, Stream, load
from kernel.testing import MovableClock, Running, RunningApp
from kernel.testing import running as run_app
from projections import (
    DROP,
    Drop,
    Meta,
    ProjectionScenario,
    Recorded,
    Rows,
    Sql,
    Tallies,
    Tally,
    Transaction,
    projected,
)

# events and commands


@command
class Deposit:
    cents: int


@command(name="take")
class Withdraw:
    cents: int
    note: str = ""


@event(version=2)
class Deposited:
    cents: int
    day: date


@event
class Withdrawn:
    cents: int
    tags: list[str] = field(default_factory=list[str])


assert_type(Deposit(500), Deposit)
assert_type(Deposit(cents=500).cents, int)
assert_type(Withdraw(700, note="rent").note, str)
assert_type(Deposited(500, date(2026, 1, 31)).day, date)
assert_type(Withdrawn(1).tags, list[str])

# the aggregate


class Account(Aggregate):
    balance: int = 0
    closed: bool = False
    opened: date | None = None

    @handles
    def deposit(self, command: Deposit, context: Context) -> Deposited:
        assert_type(context.now, datetime)
        assert_type(context.occurred_at, datetime)
        assert_type(context.actor + context.tenant, str)
        assert_type(dict(context.metadata), dict[str, str])
        assert_type(context.new_id(), str)
        return Deposited(command.cents, context.now.date())

    @handles
    def withdraw(self, command: Withdraw) -> list[Withdrawn]:
        if command.cents > self.balance:
            raise Rejected(f"balance is {self.balance}")
        return [Withdrawn(command.cents)]

    @applies
    def deposited(self, event: Deposited) -> None:
        self.balance += event.cents

    @applies
    def withdrawn(self, event: Withdrawn) -> None:
        self.balance -= event.cents

    @staticmethod
    @upcasts(Deposited, version=1)
    def with_day(fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, "day": "2013-01-01"}


account = Account(id="alice", balance=3)
assert_type(account.id, str)
assert_type(account.balance, int)
assert_type(account.opened, date | None)
# a decorated method keeps its signature
assert_type(account.withdraw(Withdraw(1)), list[Withdrawn])
assert_type(Account.with_day({}), dict[str, Any])


class RenamedAccount(Account, name="Konto"):
    name: str = ""


class Savings(RenamedAccount):
    rate: int = 0


assert_type(RenamedAccount(id="alice", name="Alice").name, str)
assert_type(Savings(id="alice", name="Alice", rate=3).rate, int)

# projections


class Base(DeclarativeBase):
    pass


class Balance(Base):
    __tablename__ = "balances"
    account: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int] = mapped_column(default=0)


class Day(Base):
    __tablename__ = "days"
    day: Mapped[date] = mapped_column(primary_key=True)
    deposits: Mapped[int] = mapped_column(default=0)


class Movement(Base):
    __tablename__ = "movements"
    id: Mapped[int] = mapped_column(primary_key=True)
    cents: Mapped[int]


class Balances(Rows[Balance], of=Account, version=2):
    @applies
    def deposited(self, row: Balance, event: Deposited, meta: Meta) -> None:
        assert_type(meta.time, datetime)
        assert_type(meta.sequence, int)
        row.cents += event.cents

    @applies
    def withdrawn(self, row: Balance, event: Withdrawn) -> Drop | None:
        row.cents -= event.cents
        return None if row.cents else DROP


class Flow(Base):
    __tablename__ = "flows"
    account: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    cents: Mapped[int] = mapped_column(default=0)


class Flows(Rows[Flow], of=(Account,)):
    def key(self, event: Deposited | Withdrawn, meta: Meta) -> tuple[str, date]:
        assert_type(event.cents, int)
        return meta.aggregate_id, meta.time.date()

    @applies
    def moved(self, row: Flow, event: Deposited | Withdrawn) -> None:
        row.cents += event.cents


class Daily(Tallies[Day], of=(Account,)):
    @applies
    def deposited(self, tally: Tally[Day], event: Deposited) -> None:
        assert_type(tally[event.day], Day)
        tally[event.day].deposits += 1


class Movements(Sql, of=Account, name="moves"):
    tables = (Movement,)

    @applies
    def moved(self, tx: Transaction, events: Sequence[Recorded[Deposited] | Recorded[Withdrawn]]) -> None:
        assert_type(tx.table(Movement), Table)
        rows = [{"cents": recorded.event.cents, "at": recorded.meta.time} for recorded in events]
        assert_type(tx.execute(insert(tx.table(Movement)), rows), CursorResult[Any])


assert_type(Balances.of, type[Aggregate] | tuple[type[Aggregate], ...])
assert_type(Balances.version, int)

# scenarios

empty = scenario(Account)
assert_type(empty, Scenario[Account])
assert_type(empty.given(Deposited(500, date(2026, 1, 31))).when(Withdraw(1)), Scenario[Account])
assert_type(empty.when(Deposit(500)).state(), Account)
assert_type(empty.when(Deposit(500)).state().balance, int)
empty.when(Withdraw(700)).rejects("balance is 0")
empty.when(Withdraw(0)).then(Withdrawn(0))

assert_type(projected(Balances), ProjectionScenario)
projected(Balances).given("alice", Withdrawn(1)).then(Balance(account="alice", cents=-1))
projected(Balances).given("alice", Withdrawn(1)).fails("overdrawn")

# the app, and what runs


async def heard(alert: Alert) -> None:
    assert_type(alert.partitions, tuple[int, ...])


def tenant_of(aggregate: str, id: str, command: object) -> str | None:
    return id.split("-", maxsplit=1)[0]


app = App(
    "bank",
    aggregates=[Account],
    projections=[Balances, Daily, Movements],
    transient=[TimeoutError],
    rate_key=tenant_of,
    on_alert=[heard, print],
)
assert_type(app.name, str)
assert_type(load_app("bank:app"), App)

loaded = load(Path("eskernel.toml"), {"stream.replicas": 3})
assert_type(loaded, Loaded)
assert_type(loaded.settings, Settings)
assert_type(loaded.origins, dict[str, str])
settings = Settings(workers=2, stream=Stream(replicas=3))
assert_type(settings.stream.replicas, int)
assert_type(settings.rates, Rates)
assert_type(settings.embedded, bool)


async def serve() -> None:
    service = Service(app, settings, spec="bank:app")
    await service.start()
    assert_type(service.partitions, list[int])
    await service.stop()


async def use() -> list[dict[str, Any]]:
    async with await Client.connect(app, nats="nats://localhost:4222", database="sqlite:///bank.db") as client:
        assert_type(client, Client)
        receipt = await client.execute(Account, "alice", Deposit(500), command_id="once", timeout=5.0)
        assert_type(receipt, Receipt)
        receipt = await client.execute(
            Account,
            "alice",
            Deposit(500),
            if_version=3,
            actor="bert",
            tenant="acme",
            metadata={"ip": "::1"},
            occurred_at=datetime(2013, 1, 1, tzinfo=UTC),
        )
        with_events = await client.execute(Account, "alice", Deposit(500), returning="events")
        assert_type(with_events, ReceiptWithEvents)
        assert_type(with_events.events, tuple[Any, ...])
        with_state = await client.execute(Account, "alice", Deposit(500), returning="state", if_version=0)
        assert_type(with_state, ReceiptWithState[Account])
        assert_type(with_state.state.balance, int)
        commands = [CommandMessage(Account, "alice", Deposit(cents), command_id=f"c{cents}") for cents in range(3)]
        async for outcome in client.execute_many(commands, in_flight=5, raise_errors=True):
            assert_type(outcome, Outcome)
            assert_type(outcome.receipt, Receipt)
            assert_type(outcome.error, EskernelError | None)
        assert_type(receipt.sequence, int)
        assert_type(receipt.duplicate, bool)
        assert_type(client.log, JetStreamLog)
        loaded = await client.load(Account, "alice", at=3)
        assert_type(loaded, LoadedAggregate[Account])
        assert_type(loaded.state.balance, int)
        try:
            await client.execute(Account, "alice", Withdraw(700))
        except Overloaded as error:
            assert_type(error.retry_after, float | None)
        except CommandError as error:
            assert_type(error.type, str)
        except (Rejected, InvalidId, CommandTimeout):
            pass
        rows = await client.query("SELECT * FROM balances WHERE account = :id", {"id": "alice"}, after=receipt)
        assert_type(rows, list[dict[str, Any]])
        return rows


async def test(running: Running) -> None:
    async with running(app, Settings(), now=datetime(2026, 1, 1, tzinfo=UTC)) as kernel:
        assert_type(kernel, RunningApp)
        assert_type(await kernel.execute(Account, "alice", Deposit(500)), Receipt)
        assert_type(await kernel.load(Account, "alice"), LoadedAggregate[Account])
        assert_type(kernel.clock, MovableClock)
        kernel.clock.advance(timedelta(hours=1))
        await kernel.settled(timeout=5.0)
    async with run_app(app) as kernel:
        assert_type(await kernel.query("SELECT 1"), list[dict[str, Any]])


def show(progress: RebuildProgress) -> None:
    assert_type(progress.done, int)


async def rebuild(log: EventLog, engine: Engine) -> list[Rebuilt]:
    made = await Rebuild(app, log, engine, [app.projection("Balances")], show).run()
    assert_type(made[0].generation, int)
    return made


log: EventLog = MemoryLog(app.name)


def explain(error: EskernelError) -> str:
    if isinstance(error, Conflict):
        assert_type(error.actual, int | None)
    if isinstance(error, SettingsError):
        assert_type(error.problems, list[str])
    if isinstance(error, DeclarationError):
        assert_type(error.problems, tuple[str, ...])
    return str(error)


class Gifts(Policy, of=(Account,), start="beginning"):
    @reacts
    def deposited(self, event: Deposited, meta: Meta) -> Iterator[Reaction]:
        yield Send(Account, "fund", Deposit(event.cents))
        yield After(timedelta(days=30), Send(Account, meta.aggregate_id, Withdraw(1)), key=meta.aggregate_id)

    @reacts
    def withdrawn(self, event: Withdrawn) -> Reactions:
        return Cancel("fund") if event.cents else None

    def on_rejected(self, refusal: Refusal) -> Reactions:
        assert_type(refusal.sent, Send)
        return [Send(Account, "fund", refusal.sent.command), At(refusal.meta.time, refusal.sent)]


class Letters(Effect, of=Account, timeout=5, concurrency=2):
    @reacts
    async def deposited(self, event: Deposited, meta: Meta) -> None:
        assert_type(meta.event_id, str)


assert_type(policy(Gifts).when(Withdrawn(5)).cancels("fund"), PolicyScenario)
reacting = App("bank", aggregates=[Account], policies=[Gifts], effects=[Letters()])
