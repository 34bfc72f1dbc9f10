"""Calls to JetStream's API."""

from __future__ import annotations

import asyncio
import base64
from typing import Any, NamedTuple

import nats.errors
import orjson
from nats.aio.msg import Msg

from kernel.errors import LogError, PayloadTooLarge, Unavailable
from kernel.transport.connection import NatsConnection

NO_MESSAGE, NO_STREAM, NOT_ENABLED = 10037, 10059, 10039
DEFAULT_PREFIX = "$JS.API"
_REMEDIES = {
    10027: "raise max_streams of the NATS account: an app has a stream for its log, one for its leases, and one for "
    "snapshots",
    10028: "raise max_mem of the NATS account, or max_memory_store of the server: leases are kept in memory, and so "
    "is a log with stream.storage = 'memory'",
    10047: "raise max_file of the NATS account, or max_file_store of the server: the log is kept in files",
    10023: "raise the limits of the NATS account, or of the servers",
    10026: "raise max_consumers of the NATS account: each worker reads the log with a consumer of its own",
}
"""What helps where the server refuses for want of something, by the API's error code."""


class NotPermitted(Unavailable):
    """The server lets the user of the connection not ask JetStream's API, or not hear its answer."""


class ApiError(LogError):
    """JetStream's API refused a request.

    Attributes:
        code: the API's error code.
    """

    def __init__(self, subject: str, error: dict[str, Any]) -> None:
        self.code = int(error.get("err_code", 0))
        remedy = _REMEDIES.get(self.code, "")
        why = f"{subject}: {error.get('description')} ({error.get('err_code')})"
        super().__init__(f"{why}; {remedy}" if remedy else why)


async def call_api(
    connection: NatsConnection, subject: str, body: object, timeout: float | None = None
) -> dict[str, Any]:
    """Call JetStream's API.

    Args:
        timeout: time limit in seconds for the answer; by default the connection's `request_timeout`.

    Raises:
        ApiError: the API answered with an error.
        PayloadTooLarge: the request is larger than the server takes.
        NotPermitted: the server lets this user not ask, or not hear the answer.
        Unavailable: the API did not answer.
    """
    task = asyncio.current_task()
    cancelled = task.cancelling() if task is not None else 0
    request = orjson.dumps(body) if body else b""
    if len(request) > connection.max_payload:
        raise PayloadTooLarge(
            f"JetStream API {subject}: a request of {len(request)} bytes; the server takes {connection.max_payload} "
            "(max_payload)"
        )
    try:
        message = await _request(
            connection, f"{connection.api}.{subject}", request, timeout or connection.request_timeout
        )
    except nats.errors.NoRespondersError:
        where = (
            "" if connection.api == DEFAULT_PREFIX else f" at {connection.api} (jetstream.domain, jetstream.api_prefix)"
        )
        raise Unavailable(f"JetStream is not enabled on this server{where}, or not ready yet") from None
    except (nats.errors.Error, TimeoutError, OSError) as error:
        why: object = connection.explain_silence() or error or "no answer"
        raise Unavailable(f"JetStream API {subject.split('.', maxsplit=1)[0]}: {why}") from None
    if task is not None and task.cancelling() > cancelled:
        # before Python 3.12 wait_for swallows a cancellation that arrives together with the answer
        raise asyncio.CancelledError
    answer: dict[str, Any] = orjson.loads(message.data)
    if "error" in answer:
        raise ApiError(subject, answer["error"])
    return answer


async def _request(connection: NatsConnection, subject: str, request: bytes, timeout: float) -> Msg:
    """Send a request and return the answer; a refusal of the server, which it sends apart, ends the wait too."""
    refused = asyncio.get_running_loop().create_future()

    def note(denied: str) -> None:
        why = connection.explain_silence()
        if denied == subject:
            why = f"the user of this connection may not publish to {subject}: see its permissions"
        if why and not refused.done():
            refused.set_result(why)

    connection.denials.append(note)
    asking = asyncio.ensure_future(connection.request(subject, request, timeout=timeout))
    waiting: set[asyncio.Future[Any]] = {asking, refused}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            return asking.result()
        raise NotPermitted(f"JetStream API {subject.removeprefix(connection.api)[1:]}: {refused.result()}")
    finally:
        connection.denials.remove(note)
        asking.cancel()


class Message(NamedTuple):
    """A message of a stream."""

    sequence: int
    subject: str
    payload: bytes


async def last_message(
    connection: NatsConnection, stream: str, subject: str, timeout: float | None = None
) -> Message | None:
    """Return the subject's last message, as the stream's leader has it, or None if there is none.

    Args:
        timeout: time limit in seconds for the answer; by default the connection's `request_timeout`.

    Raises:
        ApiError, Unavailable: as `call_api`.
    """
    try:
        answer = await call_api(connection, f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject}, timeout)
    except ApiError as error:
        if error.code == NO_MESSAGE:
            return None
        raise
    message = answer["message"]
    return Message(message["seq"], message["subject"], base64.b64decode(message.get("data", "")))


def server_version(connection: NatsConnection) -> tuple[int, int]:
    """Return the connected server's major and minor version."""
    version = connection.connected_server_version
    return version.major, version.minor


def version_text(connection: NatsConnection) -> str:
    """Return the connected server's version as text."""
    version = connection.connected_server_version
    return f"{version.major}.{version.minor}.{version.patch}"
