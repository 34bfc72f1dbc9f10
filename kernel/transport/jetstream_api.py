"""Asking JetStream's API."""

from __future__ import annotations

import asyncio
from typing import Any

import nats.errors
import orjson

from kernel.errors import LogError, Unavailable
from kernel.transport.connection import NatsConnection

NO_MESSAGE, NO_STREAM = 10037, 10059
DEFAULT_PREFIX = "$JS.API"


class ApiError(LogError):
    """JetStream's API refused; carries its error code."""

    def __init__(self, subject: str, error: dict[str, Any]) -> None:
        super().__init__(f"{subject}: {error.get('description')} ({error.get('err_code')})")
        self.code = int(error.get("err_code", 0))


async def call_api(
    connection: NatsConnection, subject: str, body: object, timeout: float | None = None
) -> dict[str, Any]:
    """Ask the JetStream API.

    Args:
        timeout: seconds; the connection's own otherwise.

    Raises:
        ApiError: it answered with an error.
        Unavailable: it did not answer.
    """
    try:
        message = await connection.request(
            f"{connection.api}.{subject}",
            orjson.dumps(body) if body else b"",
            timeout=timeout or connection.request_timeout,
        )
    except nats.errors.NoRespondersError:
        where = (
            "" if connection.api == DEFAULT_PREFIX else f" at {connection.api} (jetstream.domain, jetstream.api_prefix)"
        )
        raise Unavailable(f"JetStream is not enabled on this server{where}, or not yet ready") from None
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise Unavailable(f"JetStream API {subject.split('.', maxsplit=1)[0]}: {error or 'no answer'}") from None
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        # before Python 3.12 wait_for swallows a cancellation that comes together with the answer
        raise asyncio.CancelledError
    answer: dict[str, Any] = orjson.loads(message.data)
    if "error" in answer:
        raise ApiError(subject, answer["error"])
    return answer


def server_version(connection: NatsConnection) -> tuple[int, int]:
    """Return the connected server's major and minor version."""
    version = connection.connected_server_version
    return version.major, version.minor


def version_text(connection: NatsConnection) -> str:
    """Return the connected server's version as people write it."""
    version = connection.connected_server_version
    return f"{version.major}.{version.minor}.{version.patch}"
