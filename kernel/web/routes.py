"""The routes: a POST for each command, a GET for the state of each aggregate."""

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Annotated, Any, TypeAlias

import msgspec
from fastapi import APIRouter, Depends, Header, Request, Response

from aggregates import DeclarationError, EskernelError, InvalidMessage
from aggregates.declaration import AggregateType
from aggregates.messages import parse
from aggregates.state_codec import encode_state
from kernel.app import App
from kernel.client import Client
from kernel.protocol import CommandOptions, Receipt
from kernel.web.problems import ProblemRoute, problem
from kernel.web.requests import AggregateId, Dependency, connected, data_of, dependency, options_of
from kernel.web.schemas import AFTER, ETAG, answers, command_schema, problems, schema_of, state_schema, text_of

Endpoint: TypeAlias = Callable[..., Coroutine[Any, Any, Response]]


def commands_and_queries(
    app: App,
    client: Client | Callable[..., Client | Awaitable[Client]] | None = None,
    *,
    actor: Dependency | None = None,
    tenant: Dependency | None = None,
    metadata: Dependency | None = None,
    expose: Sequence[type] | None = None,
    timeout: float = 15.0,
) -> APIRouter:
    """Return a router with a POST for each declared command, and a GET for the state of each aggregate.

    `POST /{Aggregate}/{id}/{Command}` takes the command's fields as a JSON object, and answers with the receipt when it
    has taken effect. `If-Match: "3"` is `if_version=3`, `If-None-Match: *` is `if_version=0`, `Idempotency-Key` is the
    command's id. The answer's `ETag` is the aggregate's version; its `After` is for what is read next, see `OwnWrites`.

    `GET /{Aggregate}/{id}` answers with the state, folded from the log, and its version as `ETag`.

    Errors are problem+json: 409 where the aggregate refuses, 412 if it has another version, 422 for a command that is
    not valid, 429 and 503 with `Retry-After`.

    Args:
        client: a connected client, or a dependency that returns one; the one in `api.state.client` by default.
        actor: a dependency of FastAPI that returns who asks; it may raise `HTTPException(401)`. A function whose only
            parameter is called `request`, such as a lambda, is given the request.
        tenant: likewise, for which tenant.
        metadata: likewise, texts by name.
        expose: the command classes that can be sent, and the aggregate classes whose state can be read; all of the
            app's by default, also the commands that only policies send.
        timeout: seconds for a command; see `Client.execute`.

    Raises:
        DeclarationError: `expose` has what the app has not.
    """
    commands = {command for declared in app.types.values() for command in declared.commands.values()}
    known = {declared.cls for declared in app.types.values()} | commands
    exposed = known if expose is None else set(expose)
    if unknown := exposed - known:
        sentence = "expose: {} is neither a command nor an aggregate of {!r}; remove it"
        raise DeclarationError([sentence.format(getattr(each, "__name__", each), app.name) for each in unknown])
    provide = connected if client is None else dependency(_given(client) if isinstance(client, Client) else client)
    origin = [dependency(given) for given in (actor, tenant, metadata)]
    router = APIRouter(route_class=ProblemRoute)
    for declared in app.types.values():
        for name, command in declared.commands.items():
            if command in exposed:
                _add_command(router, declared, name, _sending(declared, command, provide, origin, timeout))
        if declared.cls in exposed:
            _add_state(router, declared, _reading(declared, provide))
    return router


def _given(client: Client) -> Dependency:
    async def give() -> Client:
        return client

    return give


def _add_command(router: APIRouter, declared: AggregateType[Any], name: str, send: Endpoint) -> None:
    command = declared.commands[name]
    schema = command_schema(command)
    body = {"required": bool(schema.get("required")), "content": {"application/json": {"schema": schema}}}
    failures = problems(400, 404, 409, 412, 413, 415, 422, 429, 500, 503, 504)
    router.add_api_route(
        f"/{declared.name}/{{id}}/{name}",
        send,
        methods=["POST"],
        tags=[declared.name],
        summary=name,
        description=text_of(command),
        operation_id=f"{declared.name}_{name}",
        openapi_extra={"requestBody": body},
        responses=answers(schema_of(Receipt), ETAG | AFTER) | failures,
    )


def _add_state(router: APIRouter, declared: AggregateType[Any], read: Endpoint) -> None:
    unchanged: dict[int | str, Any] = {304: {"description": "the version is still that of If-None-Match"}}
    router.add_api_route(
        f"/{declared.name}/{{id}}",
        read,
        methods=["GET"],
        tags=[declared.name],
        summary=declared.name,
        description=text_of(declared.cls),
        operation_id=declared.name,
        responses={**answers(state_schema(declared.cls), ETAG), **unchanged, **problems(404, 422, 500, 503)},
    )


def _sending(
    declared: AggregateType[Any], command: type, provide: Dependency, origin: Sequence[Dependency], timeout: float
) -> Endpoint:
    actor_of, tenant_of, metadata_of = origin

    # FastAPI reads these annotations, so they are no texts in this module
    async def send(
        request: Request,
        id: AggregateId,
        options: Annotated[CommandOptions, Depends(options_of)],
        client: Annotated[Client, Depends(provide)],
        actor: Annotated[Any, Depends(actor_of)],
        tenant: Annotated[Any, Depends(tenant_of)],
        metadata: Annotated[Any, Depends(metadata_of)],
    ) -> Response:
        options |= {"actor": actor, "tenant": tenant, "metadata": metadata}
        fields = await data_of(request, client.connection.max_payload)
        receipt = await client.execute(declared.cls, id, parse(command, fields), timeout=timeout, **options)
        headers = {"ETag": f'"{receipt.version}"', "After": f"{receipt.partition}:{receipt.sequence}"}
        return Response(msgspec.json.encode(receipt), 200, headers, "application/json")

    return send


def _reading(declared: AggregateType[Any], provide: Dependency) -> Endpoint:
    seen = Header(alias="If-None-Match", description="an ETag: 304 if the version is still that one")

    async def read(
        id: AggregateId,
        client: Annotated[Client, Depends(provide)],
        if_none_match: Annotated[str, seen] = "",
    ) -> Response:
        loaded = await client.load(declared.cls, id)
        if not loaded.version:
            return problem(404, "not-found", f"{declared.name} {id} has no events")
        headers = {"ETag": f'"{loaded.version}"', "Cache-Control": "no-cache"}
        if headers["ETag"] in {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}:
            return Response(None, 304, headers)
        try:
            state = encode_state(loaded.state)
        except InvalidMessage as error:  # no fault of who asks
            raise EskernelError(str(error)) from None
        return Response(state, 200, headers, "application/json")

    return read
