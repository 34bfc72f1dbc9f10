"""What a request says: of its command, of who asks, of what it has written before.

The dependencies are coroutine functions: FastAPI calls others in threads.
"""

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import msgspec
from fastapi import Depends, Header, HTTPException, Path, Query, Request
from pydantic.json_schema import SkipJsonSchema

from kernel.client import Client
from kernel.errors import CommandError, Unavailable
from kernel.protocol import MAX_COMMAND_ID, CommandOptions, Receipt

Given: TypeAlias = str | SkipJsonSchema[None]
"""A text that may be missing; in a schema it is a text, since no header says null."""
Dependency: TypeAlias = Callable[..., Any]
"""A dependency of FastAPI, or a function whose only parameter is called `request`."""

_TEXT = r"^[^\x00-\x1f\x7f]+$"
_VERSION = r'(?:W/)?"([0-9]{1,18})"'
_POSITIONS = r"[0-9]{1,5}:[0-9]{1,18}( *, *[0-9]{1,5}:[0-9]{1,18})*"


def _described(text: str, **schema: object) -> dict[str, Any]:
    """Return what a header or a parameter is described with; it is checked by us, in our words."""
    return {"description": text, "json_schema_extra": schema}


AggregateId = Annotated[str, Path(**_described("of the aggregate", minLength=1, maxLength=255, pattern=_TEXT))]


async def connected(request: Request) -> Client:
    """Return the client of the application."""
    client: Client | None = getattr(request.app.state, "client", None)
    if client is None:
        raise Unavailable("this program is not connected; set `api.state.client` to a kernel.Client in its lifespan")
    return client


async def own_writes(
    header: Annotated[
        Given,
        Header(alias="After", **_described("After of earlier answers: include those", pattern=f"^{_POSITIONS}$")),
    ] = None,
    query: Annotated[
        Given, Query(alias="after", **_described("the same, in a link", pattern=f"^{_POSITIONS}$"))
    ] = None,
) -> list[Receipt]:
    """Return the receipts of what the sender of a request has written before."""
    receipts = []
    for given in (header, query):
        if given is None:
            continue
        if not re.fullmatch(_POSITIONS, given):
            raise CommandError("malformed", f"After: {given[:80]!r} is not the After of an answer, such as 19:1042")
        for position in given.split(","):
            partition, _, sequence = position.partition(":")
            receipts.append(Receipt(0, int(sequence), int(partition), ""))
    return receipts


ConnectedClient = Annotated[Client, Depends(connected)]
"""Annotates a parameter of an endpoint: the client in `api.state.client`."""

OwnWrites = Annotated[list[Receipt], Depends(own_writes)]
"""Annotates a parameter of an endpoint: for `client.query(..., after=...)`, so that the answer includes own writes.

They come from the request's header `After`, or from `?after=` in a link: the `After` of the answer to a command, or of
several, with commas between.
"""


async def options_of(
    if_match: Annotated[
        Given,
        Header(
            alias="If-Match", **_described("take effect only if the ETag is still this one", pattern=f"^{_VERSION}$")
        ),
    ] = None,
    if_none_match: Annotated[
        Given,
        Header(alias="If-None-Match", **_described("`*`: only if there is none of this id yet", pattern=r"^\*$")),
    ] = None,
    idempotency_key: Annotated[
        Given,
        Header(
            alias="Idempotency-Key",
            **_described(
                "id of the command: repeated, it takes effect once",
                minLength=1,
                maxLength=MAX_COMMAND_ID,
                pattern=_TEXT,
            ),
        ),
    ] = None,
) -> CommandOptions:
    """Return what the headers of a request say of its command."""
    options = CommandOptions()
    if if_match is not None:
        if not (found := re.fullmatch(_VERSION, if_match)):
            raise CommandError(
                "malformed", f'If-Match: {if_match[:80]!r} is not one version as in an ETag, such as "3"'
            )
        options["if_version"] = int(found[1])
    if if_none_match is not None:
        if if_none_match != "*" or if_match is not None:
            raise CommandError("malformed", "If-None-Match: a command takes `*`, and no If-Match beside it")
        options["if_version"] = 0
    if idempotency_key is not None:
        options["command_id"] = idempotency_key.removeprefix('"').removesuffix('"')
        if not options["command_id"]:
            raise CommandError("malformed", "Idempotency-Key is empty")
    return options


async def data_of(request: Request, most: int) -> object:
    """Return what the body of a request says in JSON. No body is an empty object.

    Args:
        most: bytes.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        # other types can be sent by a form of a foreign page, in the name of its reader
        raise HTTPException(415, f"Content-Type is {kind!r}; a command is application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise CommandError("too-large", f"the body has more than {most:,} bytes, the most that the service takes")
    try:
        return msgspec.json.decode(body) if body else {}
    except (ValueError, RecursionError) as error:
        raise CommandError("malformed", f"the body is not JSON: {error}") from None


async def _nothing() -> None:
    """Say nothing."""


def dependency(given: Dependency | None) -> Dependency:
    """Return a dependency of FastAPI."""
    if given is None:
        return _nothing
    parameters = [(each.name, each.annotation) for each in inspect.signature(given).parameters.values()]
    if parameters != [("request", inspect.Parameter.empty)]:
        return given

    async def take(request: Request) -> Any:  # a lambda can't annotate what it takes
        value = given(request)
        return await value if inspect.isawaitable(value) else value

    return take
