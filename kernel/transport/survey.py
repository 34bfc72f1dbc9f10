"""Asking all workers of an app at once: each names the others, so that a missing one is noticed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import orjson

from kernel.transport.connection import NatsConnection, publish_frame, status_of

logger = logging.getLogger("eskernel.transport")
ANSWER_S = 2.0
"""A worker that is there answers long before."""


async def ask_all(
    connection: NatsConnection, subject: str, payload: bytes = b"", timeout: float = ANSWER_S
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the workers' answers, sorted by their names, and the names of those that gave none in time."""
    told: dict[str, dict[str, Any]] = {}
    known: set[str] = set()
    complete = asyncio.Event()

    def answered(_subject: bytes, _reply: bytes, payload: bytes, headers: bytes | None) -> None:
        if status_of(headers):  # nobody listens
            complete.set()
            return
        one = orjson.loads(payload)
        told[one["worker"]] = one
        known.update(one["workers"])
        if known <= told.keys():
            complete.set()

    inbox = connection.new_inbox()
    stop = await connection.listen(inbox, answered)
    try:
        connection.send(publish_frame(subject.encode(), payload, reply=inbox.encode()))
        async with asyncio.timeout(timeout):
            await complete.wait()
    except TimeoutError:
        pass
    finally:
        await stop()
    return [told[name] for name in sorted(told)], sorted(known - told.keys())


async def ask_others(
    connection: NatsConnection, subject: str, told: Callable[[dict[str, Any]], None]
) -> Callable[[], None]:
    """Return a function that asks without waiting; `told` is called with each answer, whenever it comes."""

    def answered(_subject: bytes, _reply: bytes, payload: bytes, headers: bytes | None) -> None:
        if status_of(headers):
            return
        try:
            told(orjson.loads(payload))
        except Exception as error:  # another worker's answer must not cost the connection
            logger.warning("%s: an answer that can't be used: %s", subject, error)

    inbox = connection.new_inbox()
    await connection.listen(inbox, answered)

    def ask() -> None:
        connection.send(publish_frame(subject.encode(), b"", reply=inbox.encode()))

    return ask
