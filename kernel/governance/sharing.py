"""Limits that are set while the service runs: all workers of an app have the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import orjson

from kernel.governance.governor import Governor
from kernel.governance.limits import Overrides
from kernel.transport.connection import Listener, NatsConnection
from kernel.transport.outbox import Outbox
from kernel.transport.survey import open_survey


async def share_limits(
    connection: NatsConnection,
    outbox: Outbox,
    subject: str,
    governor: Governor,
    names: Callable[[], dict[str, Any]],
    subscriptions: AsyncExitStack,
    guarded: Callable[[Listener], Listener],
) -> None:
    """Answer requests for the limits, and adopt the limits that the other workers were given while they ran.

    Args:
        subject: where requests for limits come.
        names: returns this worker's name and those of all workers, which are part of an answer.
        subscriptions: ends the subscriptions.
        guarded: keeps requests away whose reply subject is not allowed.
    """

    def answer(_subject: bytes, reply: bytes, payload: bytes, _headers: bytes | None) -> None:
        answered = governor.answer(payload)
        if reply:
            outbox.publish(reply, orjson.dumps({**names(), **answered}))

    def adopt(answered: dict[str, Any]) -> None:
        if (limits := answered.get("limits")) is not None:
            governor.adopt(Overrides(**limits["overrides"]))

    subscriptions.push_async_callback(await connection.listen(subject, guarded(answer)))
    request = await open_survey(connection, subject, adopt)
    connection.reconnections.append(request)
    request()
