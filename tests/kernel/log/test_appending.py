"""The outcome of an append: callbacks are called at once, each of them, and can't disturb who brings it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kernel.log import Appending


async def test_each_callback_is_called_at_once_before_and_after_the_end() -> None:
    append, told = Appending(), list[int]()
    append.add_done_callback(lambda ended: told.append(ended.result()))
    append.add_done_callback(lambda ended: told.append(-ended.result()))
    append.set_result(7)
    assert told == [7, -7]
    append.add_done_callback(lambda ended: told.append(ended.result() + 1))
    assert told == [7, -7, 8]
    assert await append == 7


async def test_a_callback_that_fails_is_reported_and_not_raised() -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    append = Appending()
    append.add_done_callback(lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
    append.set_exception(ValueError("no"))
    assert isinstance(reported[0]["exception"], ZeroDivisionError)
    with pytest.raises(ValueError, match="no"):
        await append
