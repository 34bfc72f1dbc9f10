"""Errors as `application/problem+json` (RFC 9457): the status of each, and a route that answers with them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import msgspec
from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from aggregates import EskernelError, InvalidId, InvalidMessage, Rejected
from kernel.errors import (
    CommandError,
    CommandTimeout,
    ConnectionFailed,
    LogError,
    NotDeclared,
    NotProjected,
    QueryTimeout,
    VersionConflict,
)

logger = logging.getLogger("eskernel.web")

PROBLEM = "application/problem+json"
STATUS = {
    "malformed": 400,
    "unknown-aggregate": 404,
    "unknown-command": 404,
    "not-found": 404,
    "rejected": 409,
    "too-large": 413,
    "invalid-command": 422,
    "invalid-id": 422,
    "overloaded": 429,
    "failed": 500,
    "invalid-event": 500,
    "conflict": 503,  # others kept appending; with the present version it is a `VersionConflict`
    "unavailable": 503,
    "not-projected": 503,
    "behind": 504,
    "unknown-outcome": 504,
}
"""The HTTP status for each error type of the wire format, and for those that only the web has."""
RETRY_AFTER_S = 1.0
"""What is said where the service does not say when to try again."""


def problem(status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None, **more: object) -> Response:
    """Return a problem.

    Args:
        kind: error type; empty if the status says all.
        more: further members.
    """
    type_ = f"urn:eskernel:{kind}" if kind else "about:blank"
    body = {"type": type_, "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    return Response(msgspec.json.encode(body), status, headers, PROBLEM)


def problem_of(error: EskernelError) -> Response:
    """Return the answer to a request that an error of eskernel has ended."""
    kind, detail, retry_after = "failed", str(error), RETRY_AFTER_S
    match error:
        case VersionConflict():
            return problem(412, "conflict", error.message, version=error.version)
        case CommandError():
            kind, detail = error.type, error.message
            retry_after = error.retry_after or RETRY_AFTER_S
        case Rejected():
            kind = "rejected"
        case InvalidMessage():
            kind = "invalid-command"
        case InvalidId():
            kind = "invalid-id"
        case NotDeclared():
            kind = "unknown-aggregate"
        case CommandTimeout():
            kind = "unknown-outcome"
        case NotProjected():
            kind = "not-projected"
        case QueryTimeout():
            kind = "behind"
        case LogError() | ConnectionFailed():
            kind = "unavailable"
    status = STATUS.get(kind, 500)
    if status == 500:
        logger.error("answered with 500: %s", error)
        detail = "the reason is in the log of the server"  # it may name what is inside
    headers = {"Retry-After": str(math.ceil(retry_after))} if status in (429, 503) else None
    return problem(status, kind, detail, headers)


class ProblemRoute(APIRoute):
    """A route that answers errors with `application/problem+json` (RFC 9457), and never with a stack trace.

    Give it to a router of your own, `APIRouter(route_class=ProblemRoute)`, or to the whole application with
    `api.router.route_class = ProblemRoute`. Errors of eskernel get the status that fits, those of FastAPI keep theirs.
    An error that is neither is left to FastAPI, which answers 500.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what handles a request."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except EskernelError as error:
                return problem_of(error)
            except RequestValidationError as error:
                places = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]
                return problem(422, "", "; ".join(places))
            except HTTPException as error:
                return problem(error.status_code, "", str(error.detail), error.headers)

        return answer

    def matches(self, scope: Any) -> Any:
        """Match the path as it was sent: an id may hold a slash, which is sent as %2F, and separates nothing."""
        raw: bytes = scope.get("raw_path") or b""
        if b"%2f" not in raw.lower():
            return super().matches(scope)
        match, found = super().matches({**scope, "path": raw.partition(b"?")[0].decode("ascii", "replace")})
        if parameters := found.get("path_params"):
            found["path_params"] = {name: unquote(str(value)) for name, value in parameters.items()}
        return match, found
