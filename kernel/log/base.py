"""The event log: one protocol, whatever keeps the events."""

from __future__ import annotations

from asyncio import Future
from typing import NamedTuple, Protocol

from kernel.log.subjects import Subjects


class Stored(NamedTuple):
    """A commit in the log.

    Attributes:
        sequence: its place in the stream, from 1, growing, perhaps with gaps.
        payload: the commit as it was appended.
    """

    sequence: int
    subject: str
    payload: bytes


class CommitBatch(NamedTuple):
    """What a reader got at once.

    Attributes:
        commits: in stream order.
        pending: how many more wait behind them.
        oldest: when the first of them was appended, in Unix time by the log's clock; 0 where that is not known.
    """

    commits: list[Stored]
    pending: int
    oldest: float = 0.0


class StreamInfo(NamedTuple):
    """What a log says about itself.

    Attributes:
        created: when the stream was made, which tells one from its successor of the same name.
        partitions: fixed when it was made.
        first: lowest stream sequence still there.
        last: highest stream sequence of a commit that is there, 0 before the first.
        commits: how many there are.
        durability: a sentence for people: what survives which failure.
    """

    created: str
    partitions: int
    first: int
    last: int
    commits: int
    durability: str


class LogReader(Protocol):
    """A position in the log that moves forward."""

    async def next(self, limit: int, timeout: float | None = None) -> CommitBatch:
        """Return what is there, at most `limit` commits; wait for the first, up to `timeout` seconds."""

    def acknowledge(self, sequence: int) -> None:
        """Say that all up to here is done with; for the log's own monitoring, the reader does not go back to it."""

    async def close(self) -> None:
        """Give back what the reader holds."""


class EventLog(Protocol):
    """Commits by subject, each with its place in one stream.

    Attributes:
        subjects: how its subjects are made and read.
        max_payload: most bytes a commit may have.
    """

    subjects: Subjects

    @property
    def max_payload(self) -> int: ...

    def append(self, subject: str, expected: int, payload: bytes) -> Future[int]:
        """Append a commit if the subject's last one has stream sequence `expected` (0: there is none).

        The future gives the new stream sequence. It never stays pending: it raises `Conflict`, `PayloadTooLarge`,
        `Unavailable` (nothing was appended) or `UnknownOutcome`. An append whose answer was lost is found by its
        payload, so payloads must differ from each other.
        """

    async def read_subject(self, subject: str, after: int = 0) -> list[Stored]:
        """Return the commits of one subject with a sequence greater than `after`, in order."""

    async def last(self, subject: str) -> Stored | None:
        """Return the subject's last commit as the leader has it."""

    async def read(self, after: int, partition: int | None = None, *, live: bool = False) -> LogReader:
        """Return a reader of everything, or of one partition, from the sequence behind `after`.

        Args:
            live: its caller tells with `acknowledge` what is done with, and takes events at the pace that the log is
                set to; others get everything as fast as they read.
        """

    async def info(self) -> StreamInfo:
        """Return what the log says about itself. Raises `Unavailable`."""

    async def close(self) -> None:
        """Let go of the log; pending appends fail."""
