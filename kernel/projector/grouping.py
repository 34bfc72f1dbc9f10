"""Sorting a batch of commits by aggregate, leaving out what is another worker's, folded already, or no commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from aggregates import InvalidId, InvalidMessage
from aggregates.commit import Envelope, decode
from kernel.log.base import Stored
from kernel.log.subjects import Address, Subjects
from projections.checkpoints import Position
from projections.errors import HandlerFailed
from projections.fold import Plan
from projections.keyed import Router, Routing
from projections.parked import Letter
from projections.unit_of_work import Batch

Commits = list[tuple[int, Sequence[Envelope]]]
SLICE = 1_000
"""Commits whose rows are found before the event loop gets a turn."""
Garbage = Callable[[int, str, int, bytes, str], None]
"""Told of bytes that are no commit of this app: stream sequence, subject, partition, payload, and why."""
_ALL_NEW: frozenset[int] = frozenset()


@dataclass(slots=True)
class Group:
    """The commits of one aggregate in a batch that the same projections, perhaps all, have folded already.

    Attributes:
        skip: the projections that have folded them, by index.
        done: no projection of this worker needs them, or only those whose rows have a key of their own.
        routed: such projections may.
    """

    address: Address
    skip: frozenset[int]
    done: bool
    commits: Commits
    routed: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Type and id of the aggregate."""
        return self.address.aggregate, self.address.id


class Sorter:
    """Sorts the batches of one session.

    Args:
        types: names of the app's aggregates.
        position: where the projections stand; it notes which partitions a batch touches.
        projections: how many there are.
        note_unknown: called for each commit of an aggregate that the app doesn't have: its name and stream sequence.
        plan: of the projections.

    Attributes:
        left_out: events of the last batch that are in no row, since their key failed, in this worker's partitions.
    """

    def __init__(
        self,
        subjects: Subjects,
        types: Collection[str],
        position: Position,
        projections: int,
        garbage: Garbage,
        note_unknown: Callable[[str, int], None],
        plan: Plan,
    ) -> None:
        self._subjects, self._types, self._owned = subjects, types, position.owned
        self._position, self._projections, self._garbage = position, projections, garbage
        self._note_unknown = note_unknown
        self._routers, self._skipped = plan.routers, plan.parked.skipped
        self._routed: frozenset[str] = frozenset().union(*(router.aggregates for router in plan.routers))
        self._read: list[Group] = []
        self.left_out: list[tuple[HandlerFailed, Letter]] = []

    async def sort(self, commits: list[Stored]) -> list[Group]:
        """Decode a batch and sort it by aggregate; gives the loop a turn now and then."""
        highest, paused = self._position.highest, self._position.paused
        # a subject alone is the key where nothing has been folded before, which is nearly always
        groups: dict[str | tuple[str, frozenset[int]], Group] = {}
        for number, (sequence, subject, payload) in enumerate(commits):
            if number % 2_000 == 1_999:
                await asyncio.sleep(0)
            try:
                key = subject if sequence > highest and not paused else (subject, self._folded(subject, sequence))
                group = groups.get(key)
                if group is None:
                    group = groups[key] = self._new_group(key)
                if not group.done or group.routed:
                    group.commits.append((sequence, decode(payload)))
                elif group.address.aggregate not in self._types:
                    self._pass_over(group.address, sequence)
            except (InvalidMessage, InvalidId) as error:
                self._put_aside(sequence, subject, payload, str(error))
        self._read = [group for group in groups.values() if group.commits]
        found = [group for group in self._read if not group.done]
        for group in found:
            self._position.touch(group.address.partition)
        return found

    async def route(self) -> list[Group]:
        """Return the rows with keys of their own, of this worker's partitions, that the last batch belongs to.

        Raises:
            RowsWait: only a newer program can tell.
        """
        found: list[Group] = []
        self.left_out = []
        for router in self._routers:
            places = self._position.of(router.index)
            if places and router.index not in self._position.paused:
                found += await self._route(router, places)
        return found

    async def _route(self, router: Router, places: Mapping[int, int]) -> list[Group]:
        name, row, partition = router.name, self._subjects.row, self._subjects.partition

        def wanted(key: str, sequence: int) -> bool:
            return places.get(row(name, key).partition, sequence) < sequence

        routing, done = Routing(router, self._skipped, min(places.values()), wanted), 0
        for group in self._read:
            if group.address.aggregate in router.aggregates:
                routing.add(group.key, group.commits)
                done += len(group.commits)
                if done > SLICE:
                    done = 0
                    await asyncio.sleep(0)
        self.left_out += [
            (failure, letter)
            for failure, letter in routing.left_out
            if places.get(partition(*letter.aggregate), letter.stream_sequence) < letter.stream_sequence
        ]
        return [Group(row(name, key), _ALL_NEW, False, list(commits)) for key, commits in routing.rows()]

    def _folded(self, subject: str, sequence: int) -> frozenset[int]:
        partition = self._subjects.parse(subject).partition
        return self._position.folded(partition, sequence) if partition in self._owned else _ALL_NEW

    def _new_group(self, key: str | tuple[str, frozenset[int]]) -> Group:
        subject, skip = (key, None) if isinstance(key, str) else key
        address = self._subjects.parse(subject)
        if skip is None:
            skip = self._position.elsewhere(address.partition) if address.partition in self._owned else _ALL_NEW
        routed = address.aggregate in self._routed
        if address.partition not in self._owned or address.aggregate not in self._types:
            return Group(address, skip, True, [], routed)
        return Group(address, skip, len(skip) == self._projections, [], routed)

    def _pass_over(self, address: Address, sequence: int) -> None:
        self._note_unknown(address.aggregate, sequence)
        if address.partition in self._owned:
            # otherwise a query that waits for the commit's sequence waits until the partition is quiet
            self._position.touch(address.partition)

    def _put_aside(self, sequence: int, subject: str, payload: bytes, why: str) -> None:
        partition = self._subjects.partition_of(subject)
        if partition in self._owned and sequence > self._position.least(partition):
            self._position.touch(partition)
            self._garbage(sequence, subject, partition, payload, why)


def batch_of(groups: list[Group]) -> Batch:
    """Return the batch as the writer knows it."""
    return [(group.key, group.commits, group.skip) for group in groups]
