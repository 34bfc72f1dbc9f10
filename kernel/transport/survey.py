"""Requests to all workers of an app. Each answer names all workers, so that a missing answer is noticed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import orjson

from kernel.errors import PayloadTooLarge
from kernel.transport.connection import NatsConnection, publish_frame, status_of

logger = logging.getLogger("eskernel.transport")
ANSWER_S = 2.0
"""Time limit in seconds for the answers. A running worker answers much faster."""


async def survey(
    connection: NatsConnection, subject: str, payload: bytes = b"", timeout: float = ANSWER_S
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the workers' answers, sorted by worker name, and the names of the workers that did not answer in time.

    Raises:
        PayloadTooLarge: the request is larger than the server takes.
    """
    if not connection.fits(subject.encode(), payload):
        raise PayloadTooLarge(
            f"{subject}: a request of {len(payload)} bytes; the server takes {connection.max_payload} (max_payload)"
        )
    answers: dict[str, dict[str, Any]] = {}
    known: set[str] = set()
    complete = asyncio.Event()

    def answered(_subject: bytes, _reply: bytes, payload: bytes, headers: bytes | None) -> None:
        if status_of(headers):  # the server reports that the subject has no subscriber
            complete.set()
            return
        answer = orjson.loads(payload)
        answers[answer["worker"]] = answer
        known.update(answer["workers"])
        if known <= answers.keys():
            complete.set()

    inbox = connection.new_answer_inbox()
    stop = await connection.listen(inbox, answered)
    try:
        connection.send(publish_frame(subject.encode(), payload, reply=inbox.encode()))
        async with asyncio.timeout(timeout):
            await complete.wait()
    except TimeoutError:
        pass
    finally:
        await stop()
    return [answers[name] for name in sorted(answers)], sorted(known - answers.keys())


async def open_survey(
    connection: NatsConnection, subject: str, on_answer: Callable[[dict[str, Any]], None]
) -> Callable[[], None]:
    """Return a function that sends a request without waiting. `on_answer` is called with each answer."""

    def answered(_subject: bytes, _reply: bytes, payload: bytes, headers: bytes | None) -> None:
        if status_of(headers):
            return
        try:
            on_answer(orjson.loads(payload))
        except Exception as error:  # a wrong answer of another worker must not end the connection
            logger.warning("%s: an answer can't be used: %s", subject, error)

    inbox = connection.new_answer_inbox()
    await connection.listen(inbox, answered)

    def request() -> None:
        connection.send(publish_frame(subject.encode(), b"", reply=inbox.encode()))

    return request
