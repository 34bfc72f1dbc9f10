"""The event log: the protocol that every implementation fulfils."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Collection
from typing import NamedTuple, Protocol

from kernel.log.subjects import Subjects


class Stored(NamedTuple):
    """A commit in the log.

    Attributes:
        sequence: the commit's place in the stream, from 1, ascending, possibly with gaps.
        payload: the commit as it was appended.
    """

    sequence: int
    subject: str
    payload: bytes


class CommitBatch(NamedTuple):
    """The result of one read.

    Attributes:
        commits: commits in stream order.
        pending: number of commits that wait behind them.
        oldest: when the first of the commits was appended, in Unix time by the log's clock; 0 if unknown.
    """

    commits: list[Stored]
    pending: int
    oldest: float = 0.0


class StreamInfo(NamedTuple):
    """Information about a log.

    Attributes:
        created: creation time of the stream, which differs from that of a later stream with the same name.
        partitions: number of partitions, fixed at creation.
        first: lowest stream sequence that is stored.
        last: highest stream sequence of a stored commit, 0 if there is none.
        commits: number of stored commits.
        durability: a sentence for people: which failures the events survive.
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
        """Return at most `limit` commits. Wait for the first of them, up to `timeout` seconds."""

    def acknowledge(self, sequence: int) -> None:
        """Report that all commits up to this sequence are processed. Only the log's monitoring uses it."""

    async def close(self) -> None:
        """Release the resources of the reader."""


class EventLog(Protocol):
    """Commits by subject, each with its place in one stream.

    Attributes:
        subjects: the subjects of the log's app.
        max_payload: largest size of a commit in bytes.
    """

    subjects: Subjects

    @property
    def max_payload(self) -> int: ...

    def append(self, subject: str, expected: int, payload: bytes, trail: bytes = b"") -> Future[int]:
        """Append a commit if the subject's last commit has the stream sequence `expected` (0: it has no commit).

        Args:
            trail: where the commits before the expected one are, for those who will read them; see `chain.extend`.

        The future's result is the new stream sequence. The future always completes: it raises `Conflict`,
        `PayloadTooLarge`, `Unavailable` (nothing was appended) or `UnknownOutcome`. If the answer to an append is lost,
        the log looks for the payload, so payloads must differ from each other.
        """

    async def read_subject(self, subject: str, after: int = 0) -> list[Stored]:
        """Return the commits of one subject with a sequence greater than `after`, in order."""

    async def last(self, subject: str) -> Stored | None:
        """Return the subject's last commit, as the stream's leader has it, or None."""

    async def read(self, after: int, partition: int | None = None, *, live: bool = False) -> LogReader:
        """Return a reader of all commits, or of those of one partition, that come after the sequence `after`.

        Args:
            live: the reader acknowledges processed commits and follows the replay policy of the settings. Other readers
                get commits as fast as possible.
        """

    async def info(self) -> StreamInfo:
        """Return information about the log. Raises `Unavailable`."""

    async def count_commits(self, known: Collection[str]) -> dict[str, int]:
        """Return the number of commits by aggregate name. Messages with other subjects are not counted.

        Args:
            known: names of aggregates that need not be checked; see `Subjects.aggregate_of`.

        Raises:
            Unavailable: the log did not answer.
        """

    async def close(self) -> None:
        """Close the log; pending appends fail."""
