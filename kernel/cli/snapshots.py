"""`eskernel snapshots`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from kernel.cli import EXIT_CODES
from kernel.cli.common import Where, asynchronous, console, fail, print_json, target_options
from kernel.cli.exit_codes import FAILED

if TYPE_CHECKING:
    from kernel.client import Client
    from kernel.log.snapshots import SnapshotStore
    from kernel.log.subjects import Address


@click.group()
def snapshots() -> None:
    """List the snapshots of aggregates, compare them with the log, or delete them.

    A snapshot spares a service reading an aggregate's whole history. It is used only with the code that has made it.
    """


@snapshots.command("list", epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def list_(as_json: bool, where: Where) -> None:
    """Print how many snapshots there are of each aggregate type, and why a type can have none."""
    from aggregates.snapshot import SnapshotCodec

    target = where.find()
    async with await target.client() as client:
        store = _store(client)
        info = await store.info()
        counted: Counter[str] = Counter()
        if info is not None:
            counted = Counter(address.aggregate for address in await _addresses(client, store))
    types = [
        {"aggregate": declared.name, "snapshots": counted[declared.name], "problem": SnapshotCodec(declared).problem}
        for declared in target.app.types.values()
    ]
    stored = int(info["state"]["bytes"]) if info is not None else 0
    if as_json:
        print_json({"stream": store.name, "bytes": stored, "types": types})
        return
    _line(f"{store.name}: {sum(counted.values())} snapshots, {stored} bytes")
    for found in types:
        problem = f"; none can be taken: {found['problem']}" if found["problem"] else ""
        _line(f"  {found['aggregate']}: {found['snapshots']}{problem}")


@snapshots.command(epilog=EXIT_CODES)
@click.argument("aggregate", required=False)
@click.option("--most", type=click.IntRange(1), help="Compare only so many, taken at random.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, without a progress bar.")
@target_options
@asynchronous
async def verify(aggregate: str | None, most: int | None, as_json: bool, where: Where) -> None:
    """Compare snapshots with the histories that they stand for: all, or those of one AGGREGATE type.

    A snapshot that differs is listed, and the exit code is 1: the appliers of its aggregate use something beside the
    events, or its code has changed in a way that the fingerprint does not see. `eskernel snapshots drop` deletes them.
    """
    import random
    import sys

    from kernel.actors.snapshot_check import compare

    target = where.find()
    async with await target.client() as client:
        store = _store(client)
        addresses = await _addresses(client, store) if await store.info() is not None else []
        addresses = [address for address in addresses if aggregate in (None, address.aggregate)]
        if most is not None and most < len(addresses):
            addresses = random.sample(addresses, most)
        await store.listen()
        wrong: list[dict[str, Any]] = []
        counted: Counter[str] = Counter()
        with click.progressbar(length=len(addresses), label="comparing", file=sys.stderr, hidden=as_json) as bar:
            async for check in compare(client.log, store, list(target.app.types.values()), addresses):
                counted[check.outcome] += 1
                if check.outcome == "wrong":
                    address = check.address
                    wrong.append({"aggregate": address.aggregate, "id": address.id, "version": check.version})
                bar.update(1)
        await store.close()
    if as_json:
        print_json({"ok": counted["ok"], "other": counted["other"], "wrong": wrong})
    else:
        _line(f"{counted['ok']} equal their histories; {counted['other']} are of other code or another log, and unused")
        for found in wrong:
            _line(f"{found['aggregate']} {found['id']}: differs at version {found['version']}")
    if wrong:
        fail(f"{len(wrong)} snapshots differ from their histories; delete them: eskernel snapshots drop", FAILED)


@snapshots.command(epilog=EXIT_CODES)
@click.argument("aggregate", required=False)
@target_options
@asynchronous
async def drop(aggregate: str | None, where: Where) -> None:
    """Delete all snapshots, or those of one AGGREGATE type. The service takes new ones as it goes on."""
    target = where.find()
    if aggregate is not None:
        target.app.type_of(aggregate)
    async with await target.client() as client:
        store = _store(client)
        dropped = await store.drop(aggregate or "") if await store.info() is not None else 0
    _line(f"{dropped} snapshots are deleted")


def _store(client: Client) -> SnapshotStore:
    from kernel.log.snapshots import SnapshotStore

    return SnapshotStore(client.connection, client.log.stream, client.log.subjects)


async def _addresses(client: Client, store: SnapshotStore) -> list[Address]:
    """Return the aggregates that have snapshots."""
    from aggregates import InvalidId

    found = []
    for subject in await store.subjects():
        try:
            found.append(client.log.subjects.parse(client.log.subjects.of_snapshot(subject)))
        except InvalidId:
            continue
    return found


def _line(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
