"""Snapshots of live aggregates: when they are taken, and whether one may be used."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Any

from aggregates.cell import NEVER, Cell
from aggregates.declaration import AggregateType
from aggregates.snapshot import Restored, SnapshotCodec, identical
from kernel.log.snapshots import SnapshotStore
from kernel.log.subjects import Address
from kernel.telemetry.metrics import SNAPSHOTS_TAKEN, SNAPSHOTS_USED

logger = logging.getLogger("eskernel.actors")
SHARE = 0.05
"""Most of the event loop's time that is spent on taking snapshots."""
BYTES_PER_EVENT = 512
"""A large state is stored less often: so many bytes of snapshots for each event, about as many as the event has."""
SAMPLED = 10_000
"""Longest history that is read to verify a snapshot, in events."""
CHECK_EVERY_S = 1.0
"""Not more than one snapshot is verified in this time, unless all are: reading a history takes long."""
MOST_LATE = 500
"""Most snapshots that wait for their time, and keep their states in memory. The oldest are given up: the next event of
the aggregate offers one again."""


class SnapshotKeeper:
    """Takes snapshots, and has aggregates loaded from them.

    Args:
        store: where they are; None: there are none. It is also an attribute.
        every: number of events of an aggregate after which one is taken.
        verify: share of the loaded snapshots that are compared with the history.
    """

    def __init__(self, store: SnapshotStore | None, every: int, verify: float) -> None:
        self.store, self._every, self._verify = store, every, verify
        self._codecs: dict[str, SnapshotCodec[Any]] = {}
        self._next = self._next_check = 0.0
        self._late: dict[str, tuple[Address, Cell[Any], int, bytes]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._complained: set[str] = set()

    def _codec(self, declared: AggregateType[Any]) -> SnapshotCodec[Any]:
        codec = self._codecs.get(declared.name)
        if codec is None:
            codec = self._codecs[declared.name] = SnapshotCodec(declared)
            if codec.problem:
                logger.info("%s: no snapshots: %s", declared.name, codec.problem)
        return codec

    def offer(self, address: Address, cell: Cell[Any], commit: bytes) -> None:
        """Take a snapshot if one is due, as soon as there is time for it. Between two decisions only. It never raises.

        Args:
            commit: the last commit in the cell.
        """
        try:
            self._offer(address, cell, commit)
        except Exception:
            cell.due = NEVER
            logger.exception("%s: no snapshot could be taken, which is a bug of the kernel", address.subject)

    def _offer(self, address: Address, cell: Cell[Any], commit: bytes) -> None:
        if self.store is None:
            cell.due = NEVER
            return
        now = time.perf_counter()
        if cell.version < self._every:
            cell.due = self._every
            return
        if now < self._next:
            self._postpone(address, cell, commit, self._next - now)
            return
        data = self._codec(cell.declared).take(cell, commit)
        cell.due = cell.version + max(self._every, len(data or b"") // BYTES_PER_EVENT)
        if data is None or len(data) > self.store.most:
            SNAPSHOTS_TAKEN.labels(outcome="unfit" if data is None else "too-large").inc()
            self._complain(cell.declared, "not of a state that comes back as the same" if data is None else "too large")
        else:
            SNAPSHOTS_TAKEN.labels(outcome="ok").inc()
            self.store.write(address.subject, data)
        self._next = time.perf_counter() + (time.perf_counter() - now) / SHARE

    def _postpone(self, address: Address, cell: Cell[Any], commit: bytes, seconds: float) -> None:
        self._late.pop(address.subject, None)
        self._late[address.subject] = (address, cell, cell.version, commit)
        if len(self._late) > MOST_LATE:
            del self._late[next(iter(self._late))]
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._take_late)

    def _take_late(self) -> None:
        """Take the snapshot that has waited longest, of a cell that is at rest and in which nothing has happened."""
        self._timer = None
        while self._late:
            if (seconds := self._next - time.perf_counter()) > 0:
                self._timer = asyncio.get_running_loop().call_later(seconds, self._take_late)
                return
            subject = next(iter(self._late))
            address, cell, version, commit = self._late.pop(subject)
            if cell.version == version >= cell.due:
                self.offer(address, cell, commit)

    def forget(self) -> None:
        """Take none of the snapshots that wait for their time: the aggregates may be another worker's."""
        self._late.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def restore(
        self, declared: AggregateType[Any], address: Address, known: bytes | None = None
    ) -> Restored[Any] | None:
        """Return an aggregate's snapshot if there is one of this code; what was appended since is missing.

        Args:
            known: the snapshot, if it was read before.
        """
        if self.store is None:
            return None
        codec = self._codec(declared)
        if codec.problem or (data := known or await self.store.read(address.subject)) is None:
            return None
        restored = codec.restore(data, address.id)
        if restored is None:
            SNAPSHOTS_USED.labels(outcome="other-code").inc()
            return None
        restored.cell.due = restored.cell.version + self._every
        return restored

    def is_sampled(self, cell: Cell[Any]) -> bool:
        """Say whether a restored cell is to be compared with its history."""
        if cell.version > SAMPLED or random.random() >= self._verify:
            return False
        now = time.perf_counter()
        if now < self._next_check and self._verify < 1:
            return False
        self._next_check = now + CHECK_EVERY_S
        return True

    def compare(self, restored: Cell[Any], replayed: Cell[Any]) -> None:
        """Compare a restored cell with what its history leads to; if they differ, use no snapshots of the type."""
        if identical(restored.state, replayed.state):
            SNAPSHOTS_USED.labels(outcome="verified").inc()
            return
        SNAPSHOTS_USED.labels(outcome="wrong").inc()
        declared = restored.declared
        self._codec(declared).problem = "one differs from its history"
        logger.error(
            "the snapshot of %s %s differs from its history at version %d, so no snapshots of %s are used any more: do "
            "its appliers use time, randomness or something outside? `eskernel snapshots verify` compares them all",
            declared.name, restored.state.id, restored.version, declared.name,
        )  # fmt: skip

    def count_use(self, fits: bool) -> None:
        """Count a restored cell that was used, or that did not fit the log."""
        SNAPSHOTS_USED.labels(outcome="ok" if fits else "other-log").inc()

    def _complain(self, declared: AggregateType[Any], why: str) -> None:
        if declared.name not in self._complained:
            self._complained.add(declared.name)
            logger.info("%s: a snapshot was not stored: %s", declared.name, why)


NO_SNAPSHOTS = SnapshotKeeper(None, 0, 0.0)
"""Takes none, and has none."""
