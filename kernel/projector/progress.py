"""What the live projections have in hand, and what waits in the log, known without a request."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from kernel.log.base import CommitBatch
from kernel.projector.grouping import Group
from projections.checkpoints import Position

REMEMBERED = 10_000
"""Commits that tell how what is unread spreads over the partitions; beyond, the older ones count half."""
_ELSEWHERE = -1


@dataclass(slots=True)
class Hand:
    """Commits that were read together, and are not written.

    Attributes:
        oldest: when the first of them was appended, in Unix time.
        first: stream sequence of the first of them.
        counts: by partition.
        skipped: of those, how many a projection had folded before, by projection and partition.
    """

    oldest: float
    first: int
    counts: Counter[int] = field(default_factory=Counter)
    skipped: Counter[tuple[int, int]] = field(default_factory=Counter)


class ReadProgress:
    """How far the live projections are behind. The projector keeps it up to date as it reads and writes.

    What is in hand is known exactly. How much is unread is known exactly too, from what came with the last messages
    and from the end of the log whenever that was seen; how it spreads over the partitions is an estimate, by
    what was read last, and with several workers so is the part that is ours. Ages are by the server's clock for when a
    commit was appended and by ours for now. Before the first batch of a service nothing is known of the oldest one's.

    Attributes:
        done: commits written since the start.
        end: the stream sequence that the log is known to have reached.
        projected: the stream sequence up to which everything is written.
    """

    def __init__(self, partitions: int, clock: Callable[[], float] = time.time) -> None:
        self._partitions, self._clock = partitions, clock
        self._position: Position | None = None
        self._owned: frozenset[int] = frozenset()
        self._hands: list[Hand] = []
        self._weights: Counter[int] = Counter()
        self._read_to = 0
        # no unread commit is older; 0 is unknown
        self._since = 0.0
        self.done = 0
        self.end = 0
        self.projected = 0

    def begin(self, position: Position, owned: frozenset[int]) -> None:
        """A session begins to read behind its checkpoints: what was in hand is unread again."""
        if self._hands:
            self._since = self._hands[0].oldest
        elif position.lowest < self._read_to:
            self._since = 0.0
        if owned != self._owned:
            self._weights.clear()
        self._position, self._owned, self._read_to = position, owned, position.lowest
        self._hands = []

    def read(self, groups: Iterable[Group], batch: CommitBatch) -> Hand:
        """A batch was read and sorted."""
        hand = Hand(batch.oldest, batch.commits[0].sequence)
        for group in groups:
            partition, count = group.address.partition, len(group.commits)
            hand.counts[partition] += count
            for projection in group.skip:
                hand.skipped[projection, partition] += count
        self._hands.append(hand)
        self._weights.update(hand.counts)
        self._weights[_ELSEWHERE] += len(batch.commits) - hand.counts.total()
        if self._weights.total() > REMEMBERED:
            self._weights = Counter({one: (count + 1) // 2 for one, count in self._weights.items()})
        self._read_to = batch.commits[-1].sequence
        self._since = batch.oldest
        self.note_end(self._read_to + batch.pending)
        return hand

    def written(self, hand: Hand) -> None:
        """A batch is in the database."""
        self._hands.remove(hand)
        self.done += hand.counts.total()

    @property
    def begun(self) -> bool:
        """Whether a session has begun: before that, nothing is known."""
        return self._position is not None

    def has_written(self, sequence: int) -> bool:
        """Return whether everything up to a stream sequence was read, and what concerns this worker was written."""
        if not self._owned:
            return True
        return self._read_to >= sequence and all(hand.first > sequence for hand in self._hands)

    def note_end(self, end: int) -> None:
        """Note that the log reaches so far."""
        self.end = max(self.end, end)
        if self.end <= self._read_to:
            self._since = self._clock()

    @property
    def unread(self) -> int:
        """Commits in the log that have not been read, whosever they are."""
        # where nothing is built yet, nothing waits for this worker
        return max(0, self.end - self._read_to) if self._owned else 0

    @property
    def behind(self) -> int:
        """Commits that are not projected."""
        return self.unread + sum(hand.counts.total() for hand in self._hands)

    def waiting(self, projections: int, owned: frozenset[int]) -> Iterator[tuple[int, int, float, float]]:
        """Yield projection, partition, commits behind, age of the oldest in seconds, where anything waits."""
        position, now, unread = self._position, self._clock(), self.unread
        if position is None or not (unread or self._hands):
            return
        hands = list(self._hands)
        weights, read_to, end = self._weights.copy(), self._read_to, self.end
        total = weights.total()
        unread_age = max(0.0, now - self._since) if self._since else 0.0
        in_hand: Counter[int] = Counter()
        oldest: dict[int, float] = {}
        for hand in hands:
            in_hand.update(hand.counts)
            for partition in hand.counts:
                oldest.setdefault(partition, hand.oldest)
        for projection in range(projections):
            folded = position.of(projection)
            for partition in owned & folded.keys():
                count: float = in_hand[partition]
                if count:
                    count -= sum(hand.skipped[projection, partition] for hand in hands if hand.skipped)
                age = max(0.0, now - oldest[partition]) if count and oldest[partition] else 0.0
                if unread:
                    share = weights[partition] / total if total else 1 / self._partitions
                    more = share * max(0, end - max(read_to, folded[partition]))
                    age = age or (unread_age if more else 0.0)
                    count += more
                if count:
                    yield projection, partition, count, age
