"""The pace of a rebuild in its own process: it follows the rebuild lanes of the running workers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson

from kernel.governance.governor import REBUILD_WORTH_S
from kernel.governance.pace import Pace
from kernel.governance.rates import TokenBucket
from kernel.log.subjects import Subjects
from kernel.settings.governance import Limit
from kernel.transport.connection import ConnectionTrouble, NatsConnection
from kernel.transport.survey import survey

logger = logging.getLogger("eskernel.governance")
INTERVAL_S = 1.0
FIRST_S = 0.3
"""Time limit in seconds for the first answers: a worker that has just died must not delay the start of a rebuild."""


@asynccontextmanager
async def following(connection: NatsConnection, subjects: Subjects, fallback: Limit) -> AsyncIterator[Pace]:
    """Provide a pace that follows the slowest rebuild lane of the running workers, updated every second.

    Each request contains the number of commits read since the last one: the workers need it to adapt their lanes.

    Args:
        fallback: the limit while no worker answers.
    """
    bucket = TokenBucket(fallback.rate, fallback.burst, time.monotonic())
    pace = Pace(bucket, "rebuild", REBUILD_WORTH_S)

    async def update(rebuilt: int, timeout: float) -> None:
        try:
            request = orjson.dumps({"rebuilt": rebuilt})
            workers, _ = await survey(connection, subjects.service("limits"), request, timeout)
        except (OSError, TimeoutError, ConnectionTrouble) as error:
            logger.info("the workers' limits can't be read: %s", error)
        else:
            _follow(bucket, workers, fallback)

    async def keep_updating() -> None:
        reported = 0
        while True:
            await asyncio.sleep(INTERVAL_S)
            rebuilt, reported = pace.done - reported, pace.done
            await update(rebuilt, INTERVAL_S)

    await update(0, FIRST_S)
    updating = asyncio.ensure_future(keep_updating())
    try:
        yield pace
    finally:
        updating.cancel()
        await asyncio.wait({updating})


def _follow(bucket: TokenBucket, workers: list[dict[str, Any]], fallback: Limit) -> None:
    now = time.monotonic()
    lanes = [worker["limits"]["lanes"]["rebuild"] for worker in workers if "limits" in worker]
    limited = [lane for lane in lanes if lane["present"] is not None]
    if not lanes:
        bucket.set(fallback.rate, fallback.burst, now)
    elif not limited:
        bucket.set(None, None, now)
    else:
        lowest = min(limited, key=lambda lane: lane["present"])
        burst = lowest["burst"]
        bucket.set(lowest["present"], burst if burst is None else min(burst, max(1.0, lowest["present"])), now)
