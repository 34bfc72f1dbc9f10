"""Many commands: bounded, in order for each aggregate, with outcomes in the order of the commands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregates import Rejected
from examples.bank import Account, Deposit
from kernel.protocol import CommandMessage, Receipt
from kernel.transport.importing import AHEAD, Outcome, send_many
from tests.conftest import run

Deal = tuple[str, int]


def messages(deals: Iterable[Deal]) -> list[CommandMessage]:
    return [CommandMessage(Account, name, Deposit(cents)) for name, cents in deals]


class Bank:
    """Takes commands, some of them for longer, and notes the order."""

    def __init__(self, turns: Callable[[CommandMessage], int] = lambda _: 0) -> None:
        self.begun: list[CommandMessage] = []
        self.ended: list[CommandMessage] = []
        self.most = 0
        self._turns = turns

    async def take(self, command: CommandMessage) -> Receipt:
        self.begun.append(command)
        self.most = max(self.most, len(self.begun) - len(self.ended))
        try:
            for _ in range(self._turns(command)):
                await asyncio.sleep(0)
            if command.command.cents == 0:  # type: ignore[attr-defined]
                raise Rejected("nothing")
            return Receipt(len(self.begun), 0, 0, command.command_id)
        finally:
            self.ended.append(command)


def many(bank: Bank, commands: Any, in_flight: int = 4, **options: Any) -> AsyncGenerator[Outcome, None]:
    return send_many(bank.take, commands, in_flight, options.pop("progress", None), raise_errors=False, **options)


@given(deals=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 5)), max_size=80), flight=st.integers(1, 5))
def test_outcomes_come_in_order_and_no_command_overtakes_one_of_its_aggregate(deals: list[Deal], flight: int) -> None:
    async def check() -> None:
        sent = messages(deals)
        bank = Bank(lambda command: command.command.cents)  # type: ignore[attr-defined]
        outcomes = [outcome async for outcome in many(bank, sent, flight)]
        assert [outcome.command for outcome in outcomes] == sent
        assert [outcome.error is None for outcome in outcomes] == [cents > 0 for _, cents in deals]
        assert bank.most <= flight
        for name in "abcdef":
            mine = [command for command in sent if command.id == name]
            assert [command for command in bank.begun if command.id == name] == mine
            assert [command for command in bank.ended if command.id == name] == mine

    run(check())


async def test_no_more_is_read_than_outcomes_are_taken() -> None:
    read = 0

    async def source() -> AsyncIterator[CommandMessage]:
        nonlocal read
        for number in range(100):
            read += 1
            yield CommandMessage(Account, f"a{number}", Deposit(1))

    taken = 0
    async with aclosing(many(Bank(), source(), in_flight=2)) as outcomes:
        async for _ in outcomes:
            taken += 1
            for _ in range(20):
                await asyncio.sleep(0)
            assert read <= taken + AHEAD * 2 + 1
    assert taken == read == 100


async def test_nothing_goes_on_when_the_loop_ends_early() -> None:
    before = asyncio.all_tasks()
    bank = Bank(lambda _: 3)
    async with aclosing(many(bank, messages((f"a{number}", 1) for number in range(50)))) as outcomes:
        async for _ in outcomes:
            break
    assert asyncio.all_tasks() == before
    begun = len(bank.begun)
    await asyncio.sleep(0)
    assert len(bank.begun) == len(bank.ended) == begun < 50


async def test_a_loop_that_is_cancelled_leaves_nothing_running() -> None:
    before = asyncio.all_tasks()
    bank = Bank(lambda _: 1_000_000)

    async def load() -> None:
        async for _ in many(bank, messages((f"a{number}", 1) for number in range(50))):
            pass

    loading = asyncio.ensure_future(load())
    while not bank.begun:
        await asyncio.sleep(0)
    loading.cancel()
    await asyncio.wait([loading])
    assert asyncio.all_tasks() == before
    assert len(bank.begun) == len(bank.ended) == 4


async def test_the_first_error_may_be_raised() -> None:
    bank = Bank()
    outcomes = send_many(bank.take, messages([("a", 1), ("b", 0), *[("c", 1)] * 90]), 1, None, raise_errors=True)
    assert (await anext(outcomes)).receipt.version == 1
    with pytest.raises(Rejected, match="nothing"):
        await anext(outcomes)
    assert len(bank.begun) < 90


async def test_what_the_source_raises_comes_behind_the_outcomes_of_what_it_gave() -> None:
    def source() -> Iterable[CommandMessage]:
        yield from messages([("a", 1), ("b", 0)])
        raise OSError("the file ends here")

    found = []
    with pytest.raises(OSError, match="ends here"):
        async for outcome in many(Bank(lambda _: 2), source()):
            found.append(outcome.error)
    assert [error is None for error in found] == [True, False]


async def test_progress_is_told_at_the_end_also_of_nothing() -> None:
    told: list[int] = []
    assert [outcome async for outcome in many(Bank(), [], progress=told.append)] == []
    outcomes = [outcome async for outcome in many(Bank(), messages([("a", 1)] * 30), progress=told.append)]
    assert (told[0], told[-1], len(outcomes)) == (0, 30, 30)


def test_an_option_that_no_command_has_is_refused() -> None:
    with pytest.raises(TypeError, match="no option 'if_versoin'"):
        CommandMessage(Account, "a", Deposit(1), if_versoin=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="not a command"):
        CommandMessage(Account, "a", 5)
