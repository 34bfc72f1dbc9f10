"""The OpenAPI of a web API says what it does: asked at random what it describes, it answers as it is described."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack

import httpx
import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis import Case, GenerationMode

from examples.shop import shop
from examples.shop.web import api
from kernel.testing import running

SCHEMA = schemathesis.openapi.from_dict(api.openapi())
# a change that comes too late, or from a version that is none, is described as an answer as well
SCHEMA.config.checks.positive_data_acceptance.expected_statuses += ["412"]
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations()]


@pytest.fixture(scope="module")
def http() -> Iterator[tuple[asyncio.Runner, httpx.AsyncClient]]:
    """A client of the shop's web API, and what runs its requests; the shop runs in this process."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def start() -> httpx.AsyncClient:
            app = shop("127.0.0.1:1")
            app.reactions.clear()
            api.state.client = await stack.enter_async_context(running(app))
            return await stack.enter_async_context(
                httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://shop")
            )

        yield runner, runner.run(start())
        runner.run(stack.aclose())


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_it_answers_as_it_is_described(operation, mode, http) -> None:
    runner, client = http

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=20, derandomize=True)
    def check(case: Case) -> None:
        make_possible(case)
        request = case.as_transport_kwargs(base_url="http://shop")
        del request["cookies"]
        request["content"] = request.pop("data", None)  # as httpx names it
        answer = runner.run(client.request(**request))
        case.validate_response(answer)

    check()


def make_possible(case: Case) -> None:
    """Take out what a schema can't exclude."""
    if "If-Match" in case.headers:
        case.headers.pop("If-None-Match", None)
    for place, name in ((case.headers, "After"), (case.query, "after")):
        if re.fullmatch("[0-9:, ]+", str(place.get(name, ""))):
            del place[name]  # what it names will never be there
    if isinstance(case.body, dict):
        # 5.0 is an integer of JSON Schema, and no program sends it for one
        case.body = {
            name: int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value
            for name, value in case.body.items()
        }
