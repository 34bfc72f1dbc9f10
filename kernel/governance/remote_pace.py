"""The pace of a rebuild outside of the workers: it follows the rebuild lane of those that run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import nats.errors
import orjson

from kernel.governance.governor import REBUILD_WORTH_S
from kernel.governance.pace import Pace
from kernel.governance.rates import TokenBucket
from kernel.log.subjects import Subjects
from kernel.settings.governance import Limit
from kernel.transport.connection import NatsConnection
from kernel.transport.survey import ask_all

logger = logging.getLogger("eskernel.governance")
INTERVAL_S = 1.0
FIRST_S = 0.3
"""What answers within this time counts at the start; a worker that has just died must not hold up others."""


@asynccontextmanager
async def following(connection: NatsConnection, subjects: Subjects, alone: Limit) -> AsyncIterator[Pace]:
    """Have a pace that is kept at the lowest rate of the running workers' rebuild lanes, asked for each second.

    The workers are told how much was read meanwhile: they slow their lane from what they know of it.

    Args:
        alone: the limit while no worker answers.
    """
    bucket = TokenBucket(alone.rate, alone.burst, time.monotonic())
    pace = Pace(bucket, "rebuild", REBUILD_WORTH_S)

    async def look(rebuilt: int, timeout: float) -> None:
        try:
            told = orjson.dumps({"rebuilt": rebuilt})
            workers, _ = await ask_all(connection, subjects.service("limits"), told, timeout)
        except (OSError, TimeoutError, nats.errors.Error) as error:
            logger.info("the workers' limits can't be asked for: %s", error)
        else:
            _follow(bucket, workers, alone)

    async def go_on_looking() -> None:
        told = 0
        while True:
            await asyncio.sleep(INTERVAL_S)
            rebuilt, told = pace.done - told, pace.done
            await look(rebuilt, INTERVAL_S)

    await look(0, FIRST_S)
    looking = asyncio.ensure_future(go_on_looking())
    try:
        yield pace
    finally:
        looking.cancel()
        await asyncio.wait({looking})


def _follow(bucket: TokenBucket, workers: list[dict[str, Any]], alone: Limit) -> None:
    now = time.monotonic()
    lanes = [one["limits"]["lanes"]["rebuild"] for one in workers if "limits" in one]
    limited = [lane for lane in lanes if lane["present"] is not None]
    if not lanes:
        bucket.set(alone.rate, alone.burst, now)
    elif not limited:
        bucket.set(None, None, now)
    else:
        lowest = min(limited, key=lambda lane: lane["present"])
        burst = lowest["burst"]
        bucket.set(lowest["present"], burst if burst is None else min(burst, max(1.0, lowest["present"])), now)
