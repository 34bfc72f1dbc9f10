"""A web API of declared commands: what requests and answers carry, on a whole app in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI, Header, HTTPException

from aggregates import Aggregate, DeclarationError, applies, command, event, handles
from kernel import App
from kernel.testing import RunningApp, running
from kernel.web import ConnectedClient, OwnWrites, ProblemRoute, commands_and_queries
from tests.shops import UNLUCKY, Expire, Order, Payment, Place, shop


@asynccontextmanager
async def serving(app: App, **options: Any) -> AsyncIterator[tuple[httpx.AsyncClient, RunningApp, FastAPI]]:
    """Run an app in this process, and its web API; yield a client of that."""
    api = FastAPI()
    api.router.route_class = ProblemRoute
    api.include_router(commands_and_queries(app, **options))
    transport = httpx.ASGITransport(api)
    async with running(app) as kernel, httpx.AsyncClient(transport=transport, base_url="http://shop") as http:
        api.state.client = kernel
        yield http, kernel, api


def orders() -> App:
    """Return the shop without what reacts."""
    return shop("shop", policies=[])


def problem(answer: httpx.Response) -> tuple[int, str]:
    """Return the status and the type of a problem."""
    assert answer.headers["Content-Type"] == "application/problem+json"
    found = answer.json()
    assert found["status"] == answer.status_code
    assert found["title"]
    assert "Traceback" not in answer.text
    return answer.status_code, found["type"].removeprefix("urn:eskernel:")


async def last_event(kernel: RunningApp, aggregate: str, aggregate_id: str) -> dict[str, Any]:
    commits = await kernel.log.read_subject(kernel.log.subjects.address(aggregate, aggregate_id).subject)
    last: dict[str, Any] = json.loads(commits[-1].payload)[-1]
    return last


async def test_a_command_is_answered_with_its_receipt_the_version_and_what_to_read_after() -> None:
    async with serving(orders()) as (http, kernel, _):
        answer = await http.post("/Order/o-1/Place", json={"cents": 700})
        assert answer.status_code == 200
        receipt = answer.json()
        assert (receipt["version"], receipt["duplicate"]) == (1, False)
        assert answer.headers["ETag"] == '"1"'
        assert answer.headers["After"] == f"{receipt['partition']}:{receipt['sequence']}"
        assert (await last_event(kernel, "Order", "o-1"))["data"]["cents"] == 700
        assert (await http.post("/Order/o-2/Place")).status_code == 200  # all of its fields have defaults


async def test_a_lost_update_is_refused_with_the_present_version_and_appends_nothing() -> None:
    async with serving(orders()) as (http, kernel, _):
        placed = await http.post("/Order/o/Place", headers={"If-None-Match": "*"})
        assert problem(await http.post("/Order/o/Place", headers={"If-None-Match": "*"})) == (412, "conflict")
        confirmed = await http.post("/Order/o/Confirm", headers={"If-Match": placed.headers["ETag"]})
        assert confirmed.headers["ETag"] == '"2"'
        lost = await http.post("/Order/o/Refuse", json={"reason": "no"}, headers={"If-Match": placed.headers["ETag"]})
        assert problem(lost) == (412, "conflict")
        assert lost.json()["version"] == 2
        weak = await http.post("/Order/o/Refuse", json={"reason": "no"}, headers={"If-Match": 'W/"2"'})
        assert weak.json()["version"] == 3  # what compresses answers makes tags weak
        assert (await kernel.load(Order, "o")).version == 3


@pytest.mark.parametrize(
    "headers",
    [
        {"If-Match": "1"},
        {"If-Match": "*"},
        {"If-Match": '"1", "2"'},
        {"If-Match": '"' + "9" * 19 + '"'},
        {"If-None-Match": '"1"'},
        {"If-Match": '"1"', "If-None-Match": "*"},
        {"Idempotency-Key": '""'},
    ],
)
async def test_a_condition_that_cannot_be_kept_is_refused_and_not_passed_over(headers: dict[str, str]) -> None:
    async with serving(orders()) as (http, kernel, _):
        assert problem(await http.post("/Order/o/Place", headers=headers)) == (400, "malformed")
        assert (await kernel.load(Order, "o")).version == 0


async def test_a_command_that_is_sent_again_with_its_key_takes_effect_once() -> None:
    async with serving(orders()) as (http, kernel, _):
        first = await http.post("/Order/o/Place", headers={"Idempotency-Key": "k-1"})
        again = await http.post("/Order/o/Place", headers={"Idempotency-Key": '"k-1"'})  # as the draft writes it
        assert again.json() == {**first.json(), "duplicate": True}
        assert first.json()["command_id"] == "k-1"
        assert (await kernel.load(Order, "o")).version == 1


async def test_who_asks_is_stored_and_may_be_nobody() -> None:
    def signed_in(x_user: Annotated[str | None, Header()] = None) -> str:
        if x_user is None:
            raise HTTPException(401, "sign in first", {"WWW-Authenticate": "Basic"})
        return x_user

    async def metadata(request):
        return {"ip": request.headers["X-IP"]}

    options = {"actor": signed_in, "tenant": lambda request: request.headers.get("X-Tenant"), "metadata": metadata}
    async with serving(orders(), **options) as (http, kernel, api):
        headers = {"X-User": "ada", "X-Tenant": "acme", "X-IP": "192.0.2.7"}
        assert (await http.post("/Order/o/Place", headers=headers)).status_code == 200
        stored = await last_event(kernel, "Order", "o")
        assert (stored["actor"], stored["tenant"], stored["ip"]) == ("ada", "acme", "192.0.2.7")
        nobody = await http.post("/Order/o/Confirm", headers={"X-IP": "192.0.2.7"})
        assert problem(nobody) == (401, "about:blank")
        assert nobody.headers["WWW-Authenticate"] == "Basic"
        assert (await kernel.load(Order, "o")).version == 1
        described = api.openapi()["paths"]["/Order/{id}/Place"]["post"]["parameters"]
        assert "x-user" in {parameter["name"] for parameter in described}


async def test_a_state_is_read_with_its_version_and_not_again_if_it_is_known() -> None:
    async with serving(orders()) as (http, _, _):
        assert problem(await http.get("/Order/o")) == (404, "not-found")
        await http.post("/Order/o/Place")
        shown = await http.get("/Order/o")
        assert shown.json() == {"id": "o", "state": "placed"}
        assert shown.headers["ETag"] == '"1"'
        known = await http.get("/Order/o", headers={"If-None-Match": 'W/"7", W/"1"'})
        assert (known.status_code, known.content, known.headers["ETag"]) == (304, b"", '"1"')
        await http.post("/Order/o/Confirm")
        assert (await http.get("/Order/o", headers={"If-None-Match": '"1"'})).json()["state"] == "confirmed"


async def test_a_read_includes_the_own_writes_that_it_names() -> None:
    async with serving(orders()) as (http, _, api):

        @api.get("/orders")
        async def show(client: ConnectedClient, after: OwnWrites) -> list[dict[str, Any]]:
            return await client.query("select id from orders order by id", after=after)

        one = (await http.post("/Order/one/Place")).headers["After"]
        two = (await http.post("/Order/two/Place")).headers["After"]
        both = [{"id": "one"}, {"id": "two"}]
        assert (await http.get("/orders", headers={"After": f"{one}, {two}"})).json() == both
        assert (await http.get("/orders", params={"after": f"{one},{two}"})).json() == both
        for wrong in ("", "1", "1:", "a:1", "1:2:3", "1:2;3:4", "1:" + "9" * 30):
            assert problem(await http.get("/orders", params={"after": wrong})) == (400, "malformed")


async def test_a_read_waits_for_each_of_the_own_writes_that_it_names() -> None:
    async with serving(orders()) as (http, _, api):

        @api.get("/orders")
        async def show(client: ConnectedClient, after: OwnWrites) -> list[dict[str, Any]]:
            return await client.query("select id from orders", after=after, timeout=0.02)

        done = (await http.post("/Order/one/Place")).headers["After"]
        never = f"{done.partition(':')[0]}:999999"
        for after in (never, f"{done},{never}", f"{never},{done}"):
            assert problem(await http.get("/orders", headers={"After": after})) == (504, "behind")
            assert problem(await http.get("/orders", headers={"After": done}, params={"after": after})) == (
                504,
                "behind",
            )


@pytest.mark.parametrize("order", ["a/b", "a b", "%", "%2F", "ü", "a.b~c*>", "o?x=1#y"])
async def test_any_id_can_be_addressed(order: str) -> None:
    from urllib.parse import quote

    app = orders()
    async with serving(app) as (http, kernel, _):
        path = f"/Order/{quote(order, safe='')}"
        assert (await http.post(f"{path}/Place")).status_code == 200
        assert (await kernel.load(Order, order)).version == 1
        assert (await http.get(path)).json()["id"] == order
        assert problem(await http.get("/Order/%00")) == (422, "invalid-id")
        assert problem(await http.post(f"/Order/{'ü' * 200}/Place")) == (422, "invalid-id")


@pytest.mark.parametrize(
    ("path", "body", "kind", "expected"),
    [
        ("/Order/o/Confirm", b"", None, (409, "rejected")),
        ("/Order/o/Place", b'{"cents": "1"}', None, (422, "invalid-command")),
        ("/Order/o/Place", b'{"cent": 1}', None, (422, "invalid-command")),
        ("/Order/o/Place", b"[]", None, (422, "invalid-command")),
        ("/Order/o/Place", b'{"cents": 9223372036854775808}', None, (422, "invalid-command")),
        ("/Order/o/Refuse", b"", None, (422, "invalid-command")),
        ("/Order/o/Place", b"{", None, (400, "malformed")),
        ("/Order/o/Place", b'{"cents": "\xff"}', None, (400, "malformed")),
        ("/Order/o/Place", b"[" * 100_000, None, (400, "malformed")),
        ("/Order/o/Place", b"cents=1", "application/x-www-form-urlencoded", (415, "about:blank")),
        ("/Order/o/Place", b'{"cents": 1}', "text/plain", (415, "about:blank")),
        ("/Order/o/Place", b" " * 1_048_577, None, (413, "too-large")),
        ("/Order/o/Refuse", b'{"reason": "%s"}' % (b"x" * 1_048_500), None, (413, "too-large")),
        ("/Payment/p/Request", b'{"order": "o", "cents": %d}' % UNLUCKY, None, (500, "failed")),
    ],
)
async def test_an_error_is_a_problem_with_the_status_that_fits(
    path: str, body: bytes, kind: str | None, expected: tuple[int, str]
) -> None:
    async with serving(orders()) as (http, kernel, _):
        answer = await http.post(path, content=body, headers={"Content-Type": kind or "application/json"})
        assert problem(answer) == expected
        assert "unlucky" not in answer.text  # what the application's code says is for its log
        assert (await kernel.load(Order, "o")).version == 0


async def test_without_a_client_it_says_that_it_is_not_connected() -> None:
    api = FastAPI()
    api.include_router(commands_and_queries(orders()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://shop") as http:
        answer = await http.post("/Order/o/Place")
        assert problem(answer) == (503, "unavailable")
        assert "api.state.client" in answer.json()["detail"]
        assert answer.headers["Retry-After"] == "1"


async def test_a_client_is_given_as_it_is_or_by_a_dependency() -> None:
    app = orders()
    async with running(app) as kernel:
        for client in (kernel, lambda: kernel, lambda request: kernel):
            api = FastAPI()
            api.include_router(commands_and_queries(app, client), prefix="/v1")
            async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://shop") as http:
                assert (await http.post("/v1/Order/a%2Fb/Place")).status_code == 200
        assert (await kernel.load(Order, "a/b")).version == 3


async def test_only_what_is_exposed_can_be_reached() -> None:
    async with serving(orders(), expose=[Order, Place]) as (http, _, api):
        assert set(api.openapi()["paths"]) == {"/Order/{id}", "/Order/{id}/Place"}
        assert (await http.post("/Order/o/Place")).status_code == 200
        assert (await http.post("/Order/o/Confirm")).status_code == 404
        assert (await http.get("/Payment/p")).status_code == 404


def test_what_the_app_has_not_can_not_be_exposed() -> None:
    with pytest.raises(DeclarationError, match="expose: Unknown is neither a command nor an aggregate of 'shop'"):
        commands_and_queries(orders(), expose=[Unknown, Expire, Payment])


@command
class Unknown:
    pass


def test_openapi_lists_every_command_and_every_aggregate() -> None:
    app = orders()
    api = FastAPI()
    api.include_router(commands_and_queries(app))
    expected = {f"/{declared.name}/{{id}}" for declared in app.types.values()}
    expected |= {f"/{declared.name}/{{id}}/{name}" for declared in app.types.values() for name in declared.commands}
    assert set(api.openapi()["paths"]) == expected


@event
class Grown:
    pass


@command
class Branch:
    """Grow."""

    length: int
    leaves: dict[str, Leaf]
    branches: list[Branch] | None = None


@command
class Leaf:
    description: str


class Tree(Aggregate):
    """A tree."""

    height: int = 0

    @handles
    def branch(self, command: Branch) -> Grown:
        return Grown()

    @applies
    def grown(self, event: Grown) -> None:
        self.height += 1


def test_a_schema_says_what_a_command_takes_without_references() -> None:
    api = FastAPI()
    api.include_router(commands_and_queries(App("trees", aggregates=[Tree])))
    described = api.openapi()["paths"]["/Tree/{id}/Branch"]["post"]
    schema = described["requestBody"]["content"]["application/json"]["schema"]
    assert described["description"] == schema["description"] == "Grow."
    assert schema["required"] == ["length", "leaves"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["length"] == {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    leaf = schema["properties"]["leaves"]["additionalProperties"]
    assert leaf["properties"] == {"description": {"type": "string"}}
    assert "description" not in leaf  # a dataclass's own signature says nothing
    assert "$ref" not in json.dumps(schema)
    state = api.openapi()["paths"]["/Tree/{id}"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert state["required"] == ["id", "height"]


def test_without_fastapi_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['fastapi'] = None\nimport kernel\nimport kernel.web"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: kernel.web needs FastAPI")
    assert done.stderr.rstrip().endswith("pip install 'eskernel[web]'")
