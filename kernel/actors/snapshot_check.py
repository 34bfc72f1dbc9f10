"""Comparing snapshots with the histories that they stand for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, NamedTuple

from aggregates.cell import Cell
from aggregates.commit import decode
from aggregates.declaration import AggregateType
from aggregates.errors import InvalidMessage
from aggregates.snapshot import Restored, SnapshotCodec, identical
from kernel.log.base import EventLog
from kernel.log.snapshots import SnapshotStore
from kernel.log.subjects import Address


class SnapshotCheck(NamedTuple):
    """What comparing one snapshot showed.

    Attributes:
        outcome: `ok`; `other`, which is never used: of other code, of another log, or damaged; `wrong`: it is used,
            and differs from the history.
        version: of the aggregate in the snapshot, 0 if it can't be read.
    """

    address: Address
    outcome: Literal["ok", "other", "wrong"]
    version: int


async def compare(
    log: EventLog, store: SnapshotStore, types: Sequence[AggregateType[Any]], addresses: Sequence[Address]
) -> AsyncIterator[SnapshotCheck]:
    """Compare the snapshots of these aggregates with their histories, one after the other.

    Raises:
        LogError: the log can't be read.
    """
    codecs = {declared.name: SnapshotCodec(declared) for declared in types}
    by_name = {declared.name: declared for declared in types}
    for address in addresses:
        data, restored = await store.read(address.subject), None
        if data is not None and address.aggregate in codecs:
            restored = codecs[address.aggregate].restore(data, address.id)
        if restored is None:
            yield SnapshotCheck(address, "other", 0)
            continue
        outcome = await _outcome(log, Cell(by_name[address.aggregate], address.id), restored, address)
        yield SnapshotCheck(address, outcome, restored.cell.version)


async def _outcome(
    log: EventLog, replayed: Cell[Any], restored: Restored[Any], address: Address
) -> Literal["ok", "other", "wrong"]:
    for commit in await log.read_subject(address.subject):
        if commit.sequence > restored.cell.position:
            break
        try:
            envelopes = decode(commit.payload)
        except InvalidMessage:
            continue
        replayed.replay(envelopes, commit.sequence)
        if commit.sequence == restored.cell.position:
            if not restored.is_of(commit.payload):
                return "other"
            return "ok" if identical(restored.cell.state, replayed.state) else "wrong"
    return "other"
