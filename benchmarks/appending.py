"""The rows about appending."""

from __future__ import annotations

from pathlib import Path

import nats
from nats.aio.client import Client

from benchmarks import append_ways as ways
from benchmarks import places
from benchmarks.report import Row
from benchmarks.rounds import in_turns, medians, rounded
from kernel.log import JetStreamLog, open_log
from kernel.settings.sources import settings_of
from kernel.transport.dial import connect

EVENTS, EVENTS_SYNCED, RIVAL_SYNCED, EVENTS_AWAITED = 60_000, 20_000, 6_000, 1_500


async def measure(path: Path) -> list[Row]:
    """Measure appends with the default settings, and with a wait for the disk at each commit."""
    return [await _plain(path / "plain"), await _synced(path / "synced")]


async def _plain(path: Path) -> Row:
    async with places.nats(path) as url:
        connection, client = await connect(url, name="bench"), await nats.connect(url)
        log = await open_log(connection, "bench", settings_of({"jetstream.group_commit": "never"}))
        try:
            task = _task(log, EVENTS)
            figures = await in_turns(
                "append",
                {
                    "limit": lambda: ways.by_hand(client, task),
                    "ours": lambda: ways.ours(log, task),
                    "rival": lambda: ways.by_publish_async(client, task),
                },
            )
        finally:
            await _close(log, client)
    found = medians(figures)
    return Row(
        "append: acked, expected sequence, 1,000 aggregates, file storage",
        "commits/s",
        **found,
        aim_limit=0.8,
        aim_rival=2,
        durability="process crash; a power cut may lose 2 minutes (all)",
        limit_is="nc.publish with an inbox, 4,000 in flight",
        rival_is="nats-py publish_async, one in flight per aggregate",
        extra={"rounds": rounded(figures)},
    )


async def _synced(path: Path) -> Row:
    async with places.nats(path, sync=True) as url:
        connection, client = await connect(url, name="bench"), await nats.connect(url)
        log = await open_log(connection, "bench", settings_of({"jetstream.group_commit": "always"}))
        try:
            task, few, short = (_task(log, count) for count in (EVENTS_SYNCED, RIVAL_SYNCED, EVENTS_AWAITED))
            few.last = short.last = task.last
            figures = await in_turns(
                "append with a sync per commit",
                {
                    "limit": lambda: ways.by_batches(client, task),
                    "ours": lambda: ways.ours(log, task),
                    "rival": lambda: ways.by_publish_async(client, few),
                    "awaited": lambda: ways.by_awaiting(client, short),
                },
            )
        finally:
            await _close(log, client)
    found = medians(figures)
    awaited = found.pop("awaited")
    return Row(
        "append: the same, a sync per commit",
        "commits/s",
        **found,
        aim_limit=0.5,
        aim_rival=4,
        durability="power cut (all)",
        limit_is="atomic batches of 200 by hand, 5 in flight",
        rival_is="nats-py publish_async, one in flight per aggregate",
        extra={"awaited_one_by_one": round(awaited, 1), "rounds": rounded(figures)},
    )


def _task(log: JetStreamLog, count: int) -> ways.Task:
    subjects = [log.subjects.address("Account", f"account-{number}").subject for number in range(ways.AGGREGATES)]
    return ways.Task(subjects, [0] * ways.AGGREGATES, ways.payloads(count))


async def _close(log: JetStreamLog, client: Client) -> None:
    await log.close()
    await log._connection.close()
    await client.close()
