"""Whether anybody keeps up to date what readers see: a query that waits for it otherwise waits in vain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from kernel.errors import NotProjected
from kernel.log.subjects import Subjects
from kernel.transport.connection import ConnectionTrouble, NatsConnection
from kernel.transport.survey import survey
from projections.following import live_version

LOOK_S = 0.5
"""After waiting so long, and then again and again, the workers are asked."""


async def watch_projected(
    connection: NatsConnection, subjects: Subjects, engine: Engine, names: Sequence[str], deadline: float
) -> NotProjected:
    """Wait until no worker keeps up to date what readers see of these projections, and return an error that says so.

    Args:
        names: may change meanwhile.
        deadline: until when the caller can wait, by `time.monotonic()`.
    """
    before = False
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            error = await find_unprojected(connection, subjects, engine, list(names), deadline)
        except (ConnectionTrouble, DBAPIError, OSError, TimeoutError):
            error = None  # the caller's own attempts show it
        if error is not None and before:
            return error
        # a moment after a cut-over at its start, a worker does not answer yet: the next look decides
        before = error is not None


async def find_unprojected(
    connection: NatsConnection, subjects: Subjects, engine: Engine, names: Sequence[str], deadline: float
) -> NotProjected | None:
    """Return an error if no worker keeps up to date what readers see of these projections, and waiting does not help.

    Args:
        deadline: until when the caller can wait, by `time.monotonic()`.
    """
    workers, _ = await survey(connection, subjects.service("status"))
    deployments = [worker["deployment"] for worker in workers if "deployment" in worker]
    if not deployments:
        return None  # none answers, as in a restart: it may come back in time

    def read_versions() -> dict[str, int]:
        with engine.connect() as reading:
            return {name: live_version(reading, name) for name in names}

    for name, version in (await asyncio.to_thread(read_versions)).items():
        if version and any(each["declares"].get(name) == version for each in deployments):
            continue
        builds = [each["build"] for each in deployments if each["build"] and name in each["build"]["projections"]]
        left = deadline - time.monotonic()
        if not version and any(build["eta"] is not None and build["eta"] < left for build in builds):
            continue
        seen = f"readers see version {version} of {name}, and no running program" if version else f"{name}"
        what = f"{seen} keeps it up to date" if version else f"{seen} has not been built"
        told = "; ".join(build["told"] for build in builds)
        return NotProjected(f"{what}{f'. {told}' if told else ''}")
    return None
