"""Specifying aggregates with scenarios, and the rules of the cell that scenarios and the kernel share."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregates import (
    Aggregate,
    Context,
    InvalidMessage,
    Rejected,
    SequenceError,
    applies,
    command,
    event,
    handles,
    scenario,
    upcasts,
)
from aggregates.cell import REMEMBERED_COMMANDS, Cell
from aggregates.commit import Decision, decode
from aggregates.declaration import declare
from examples.bank import Account, Deposit, Deposited, Withdraw, Withdrawn
from tests.histories import encode

TIME = "2013-01-01T12:00:00Z"


@event(name="purse.filled", version=3)
class Filled:
    cents: int
    currency: str
    by: str = "unknown"


@event
class Opened:
    at: datetime
    key: str
    price: Decimal


@command
class Fill:
    cents: int


@command
class Open:
    price: Decimal


@command
class Steal:
    pass


@command
class StealAndReject:
    pass


@command
class Forge:
    pass


@command
class Rest:
    pass


@command
class FillThrice:
    cents: int


class Purses(Aggregate):
    cents: int = 0
    opened: datetime | None = None
    keys: tuple[str, ...] = ()

    @handles
    def fill(self, command: Fill) -> Filled:
        if command.cents <= 0:
            raise Rejected("nothing to put in")
        return Filled(command.cents, "EUR")

    @handles
    def fill_thrice(self, command: FillThrice) -> list[Filled]:
        return [Filled(command.cents, "EUR", str(number)) for number in range(3)]

    @handles
    def open(self, command: Open, context: Context) -> Opened:
        return Opened(context.now, context.new_id(), command.price)

    @handles
    def steal(self, command: Steal) -> Filled:
        self.cents = 0
        return Filled(1, "EUR")

    @handles
    def steal_and_reject(self, command: StealAndReject) -> Filled:
        self.keys += ("stolen",)
        raise Rejected("caught")

    @handles
    def forge(self, command: Forge) -> Filled:
        return "not an event"  # type: ignore[return-value]

    @handles
    def rest(self, command: Rest) -> None:
        return None

    @applies
    def filled(self, event: Filled) -> None:
        self.cents += event.cents

    @applies
    def was_opened(self, event: Opened) -> None:
        self.opened = event.at
        self.keys += (event.key,)

    @staticmethod
    @upcasts(Filled, version=1)
    def cents_not_units(fields: dict[str, Any]) -> dict[str, Any]:
        return {"cents": fields["units"] * 100}

    @staticmethod
    @upcasts(Filled, version=2)
    def with_currency(fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, "currency": "EUR"}


PURSES = declare(Purses)
ACCOUNTS = declare(Account)


# the scenario kit


def test_a_scenario_holds() -> None:
    scenario(Account).given(Deposited(500)).when(Withdraw(300)).then(Withdrawn(300))
    scenario(Account).given(Deposited(500)).when(Withdraw(700)).rejects("balance is 500")
    scenario(Account).given(Deposited(500)).when(Withdraw(700)).rejects()
    scenario(Purses).when(Rest()).then()
    scenario(Purses).when(FillThrice(2)).then(Filled(2, "EUR", "0"), Filled(2, "EUR", "1"), Filled(2, "EUR", "2"))


def test_a_scenario_with_other_events_fails() -> None:
    given = scenario(Account).given(Deposited(500)).when(Withdraw(300))
    for wrong in ([Withdrawn(301)], [], [Deposited(300)], [Withdrawn(300), Withdrawn(300)]):
        with pytest.raises(AssertionError, match="expected"):
            given.then(*wrong)


def test_a_scenario_that_expects_another_outcome_fails() -> None:
    given = scenario(Account).given(Deposited(500))
    with pytest.raises(AssertionError, match="expected a rejection"):
        given.when(Withdraw(300)).rejects()
    with pytest.raises(AssertionError, match="rejected for 'balance is 500'"):
        given.when(Withdraw(700)).rejects("too poor")
    with pytest.raises(Rejected):
        given.when(Withdraw(700)).then()


def test_commands_follow_each_other_and_the_last_one_counts() -> None:
    given = scenario(Account).when(Deposit(500), Withdraw(200))
    given.then(Withdrawn(200))
    given.when(Withdraw(301)).rejects("balance is 300")
    assert given.state().balance == 300


def test_a_state_holds_the_last_commands_events() -> None:
    assert scenario(Account, "alice").given(Deposited(5), Deposited(6)).state() == Account(id="alice", balance=11)
    assert scenario(Account).given(Deposited(5)).when(Withdraw(2)).state().balance == 3


def test_a_common_beginning_is_shared_and_not_changed() -> None:
    rich = scenario(Account).given(Deposited(1000))
    rich.when(Withdraw(1000)).then(Withdrawn(1000))
    rich.when(Withdraw(999)).then(Withdrawn(999))
    assert rich.given(Deposited(1)).state().balance == 1001
    assert rich.state().balance == 1000


def test_a_handler_that_changes_state_is_reported() -> None:
    with pytest.raises(AssertionError, match="Steal changed state"):
        scenario(Purses).given(Filled(5, "EUR")).when(Steal()).then(Filled(1, "EUR"))


def test_a_handler_that_changes_state_and_rejects_is_reported() -> None:
    with pytest.raises(AssertionError, match="StealAndReject changed state"):
        scenario(Purses).when(StealAndReject()).rejects("caught")


def test_a_handler_that_returns_no_event_is_reported() -> None:
    with pytest.raises(InvalidMessage, match=r"Purses\.forge"):
        scenario(Purses).when(Forge()).state()


def test_a_command_without_a_handler_is_reported() -> None:
    with pytest.raises(InvalidMessage, match="no handler for Withdraw"):
        scenario(Purses).when(Withdraw(1)).state()


# context


def test_a_context_brings_the_moment_and_ids_that_a_retry_repeats() -> None:
    moment = datetime(2020, 5, 17, 8, 30, tzinfo=UTC)
    given = scenario(Purses).at(moment).when(Open(Decimal("1.50")))
    first, second = given.state(), given.state()
    assert first.opened == moment
    assert first.keys == second.keys
    assert len(first.keys[0]) == 32
    given.then(Opened(moment, first.keys[0], Decimal("1.50")))
    later = scenario(Purses).at(moment + timedelta(days=1)).when(Open(Decimal(1))).state()
    assert later.opened == moment + timedelta(days=1)


def test_a_context_follows_from_the_commands_id() -> None:
    first, again, other = Context("c1"), Context("c1"), Context("c2")
    drawn = [first.new_id(), first.new_id(), first.random.random()]
    assert drawn == [again.new_id(), again.new_id(), again.random.random()]
    assert drawn[0] != drawn[1]
    assert other.new_id() != drawn[0]
    assert first.command_id == "c1"
    assert first.now.tzinfo is UTC


# upcasting


def stored(version: int, data: dict[str, Any], sequence: int = 1, type: str = "purse.filled") -> bytes:
    envelope = {"id": "e", "type": type, "time": TIME, "sequence": sequence, "data": data, "dataversion": version}
    return orjson.dumps([envelope])


def test_old_events_are_read_through_every_step() -> None:
    cell = Cell(PURSES, "1")
    cell.replay(decode(stored(1, {"units": 3})), 10)
    cell.replay(decode(stored(2, {"cents": 50}, 2)), 11)
    cell.replay(decode(stored(3, {"cents": 7, "currency": "USD", "by": "me"}, 3)), 12)
    assert (cell.state.cents, cell.version, cell.position) == (357, 3, 12)


@pytest.mark.parametrize(
    ("version", "data", "message"),
    [
        (4, {"cents": 1, "currency": "EUR"}, "too old"),
        (0, {"units": 1}, "no upcaster"),
        (3, {"cents": "many", "currency": "EUR"}, "cents"),
        (3, {"cents": 1}, "currency"),
        (2, {"cents": 1.5}, "cents"),
    ],
)
def test_a_stored_event_that_cannot_be_read_is_an_invalid_message(
    version: int, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidMessage, match=message) as error:
        Cell(PURSES, "1").replay(decode(stored(version, data)), 1)
    assert "purse.filled" in str(error.value)


@pytest.mark.parametrize("data", [b'{"units": null}', b"{}", b"[]", b"5"])
def test_an_old_event_that_its_upcaster_cannot_read_is_an_invalid_message(data: bytes) -> None:
    payload = b'[{"id":"e","type":"purse.filled","time":"%b","sequence":1,"dataversion":1,"data":%b}]'
    with pytest.raises(InvalidMessage, match=r"purse\.filled"):
        Cell(PURSES, "1").replay(decode(payload % (TIME.encode(), data)), 1)


def test_an_unknown_event_is_an_invalid_message() -> None:
    with pytest.raises(InvalidMessage, match=r"no event named 'purse\.lost'"):
        Cell(PURSES, "1").replay(decode(stored(1, {}, type="purse.lost")), 1)


# the rules of the cell

amounts = st.integers(-100, 1000)
orders = st.lists(st.one_of(st.builds(Deposit, amounts), st.builds(Withdraw, amounts)), max_size=30)
NAMES = {Deposited: ("Deposited", 1), Withdrawn: ("Withdrawn", 1)}


@given(commands=orders)
def test_deciding_and_evolving_equals_replaying_what_was_stored(commands: list[Any]) -> None:
    live, log = Cell(ACCOUNTS, "1"), []
    for number, order in enumerate(commands):
        before = (live.state.balance, live.version)
        try:
            events = live.decide(order, Context(f"c{number}"))
        except Rejected:
            assert (live.state.balance, live.version) == before
            continue
        assert (live.state.balance, live.version) == before
        log.append(encode("/bank/Account", "1", NAMES, [Decision(f"c{number}", events)], live.version, TIME))
        live.evolve(events)
        live.position = len(log)
        live.remember(f"c{number}", live.version, live.position)
    loaded = Cell(ACCOUNTS, "1")
    for position, payload in enumerate(log, 1):
        loaded.replay(decode(payload), position)
    assert loaded.state == live.state
    assert (loaded.version, loaded.position, loaded.commands) == (live.version, live.position, live.commands)


@given(sequences=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_events_that_do_not_follow_each_other_are_a_sequence_error(sequences: list[int]) -> None:
    cell = Cell(PURSES, "1")
    for place, sequence in enumerate(sequences, 1):
        payload = stored(3, {"cents": 1, "currency": "EUR"}, sequence)
        if sequence != place:
            with pytest.raises(SequenceError, match=f"event {sequence} after {place - 1}"):
                cell.replay(decode(payload), place)
            assert (cell.version, cell.position, cell.state.cents) == (place - 1, place - 1, place - 1)
            return
        cell.replay(decode(payload), place)
    assert cell.version == len(sequences)


def test_a_cell_knows_its_latest_commands_only() -> None:
    cell = Cell(PURSES, "1")
    for number in range(REMEMBERED_COMMANDS + 3):
        cell.remember(f"c{number}", number, number * 10)
    assert list(cell.commands) == [f"c{number}" for number in range(3, REMEMBERED_COMMANDS + 3)]
    assert cell.commands["c5"] == (5, 50)


def test_a_command_of_several_events_is_remembered_with_its_last() -> None:
    cell = Cell(PURSES, "1")
    events = [Filled(1, "EUR"), Filled(2, "EUR"), Filled(3, "EUR")]
    names = {Filled: ("purse.filled", 3)}
    cell.replay(decode(encode("/p", "1", names, [Decision("a", events), Decision("b", events[:1])], 0, TIME)), 42)
    assert cell.commands == {"a": (3, 42), "b": (4, 42)}
    assert cell.state.cents == 7
