"""The event log: the protocol that every implementation fulfils."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

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


_payload = attrgetter("payload")


def size_of(commits: Iterable[Stored]) -> int:
    """Return how many bytes the payloads of commits have together."""
    return sum(map(len, map(_payload, commits)))


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


class Appending:
    """The outcome of an append, as soon as there is one. It can be awaited; `asyncio.wait` takes it in `ensure_future`.

    Unlike a future's, its callbacks are called at once, which saves a turn of the event loop for each commit.
    """

    __slots__ = ("_callback", "_error", "_sequence")

    def __init__(self) -> None:
        self._sequence: int | None = None
        self._error: Exception | None = None
        self._callback: Callable[[Appending], None] | None = None

    def done(self) -> bool:
        """Return whether there is an outcome."""
        return self._sequence is not None or self._error is not None

    def result(self) -> int:
        """Return the commit's stream sequence. It raises what the append ended with, if it failed."""
        if self._error is not None:
            raise self._error
        if self._sequence is None:
            raise asyncio.InvalidStateError("the append is under way")
        return self._sequence

    def exception(self) -> Exception | None:
        """Return what the append ended with, None if it succeeded."""
        return self._error

    def set_result(self, sequence: int) -> None:
        """End with the commit's stream sequence."""
        self._sequence = sequence
        self._end()

    def set_exception(self, error: Exception) -> None:
        """End with an error."""
        self._error = error
        self._end()

    def _end(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            try:
                callback(self)
            except Exception as error:  # it must not end what has brought the outcome
                loop = asyncio.get_running_loop()
                loop.call_exception_handler({"message": "a callback of an append failed", "exception": error})

    def add_done_callback(self, callback: Callable[[Appending], None]) -> None:
        """Have a function called when there is an outcome, at once if there is one."""
        if (first := self._callback) is None:
            self._callback = callback
        else:

            def both(ended: Appending) -> None:
                first(ended)
                callback(ended)

            self._callback = both
        if self.done():
            self._end()

    def __await__(self) -> Generator[Any, None, int]:
        if not self.done():
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def wake(_: Appending) -> None:
                if not future.done():  # who waited may have been cancelled
                    future.set_result(None)

            self.add_done_callback(wake)
            yield from future
        return self.result()


class Count(NamedTuple):
    """How much the log has of an aggregate type."""

    commits: int
    aggregates: int


class EventLog(Protocol):
    """Commits by subject, each with its place in one stream.

    Attributes:
        subjects: the subjects of the log's app.
        max_payload: largest size of a commit in bytes.
    """

    subjects: Subjects

    @property
    def max_payload(self) -> int: ...

    def append(self, subject: str, expected: int, payload: bytes, links: bytes = b"") -> Appending:
        """Append a commit if the subject's last commit has the stream sequence `expected` (0: it has no commit).

        Args:
            links: where the commits before the expected one are, for those who will read them; see `Cell.links`.

        The future's result is the new stream sequence. The future always completes: it raises `Conflict`,
        `PayloadTooLarge`, `Unavailable` (nothing was appended) or `UnknownOutcome`. If the answer to an append is lost,
        the log looks for the payload, so payloads must differ from each other.
        """

    async def read_subject(self, subject: str, after: int = 0, known: Sequence[Stored] = ()) -> list[Stored]:
        """Return the commits of one subject with a sequence greater than `after`, in order.

        Args:
            known: the first of these commits, without a gap, if they were read before: only the others are asked for.
        """

    async def last(self, subject: str) -> Stored | None:
        """Return the subject's last commit, as the stream's leader has it, or None."""

    async def read(
        self, after: int, partition: int | None = None, *, live: bool = False, gentle: bool = False
    ) -> LogReader:
        """Return a reader of all commits, or of those of one partition, that come after the sequence `after`.

        Args:
            live: the reader acknowledges processed commits and follows the replay policy of the settings. Other readers
                get commits as fast as possible.
            gentle: few commits are on their way at a time, so that commands don't wait behind them.
        """

    async def info(self) -> StreamInfo:
        """Return information about the log. Raises `Unavailable`."""

    async def count_commits(self, known: Collection[str]) -> dict[str, Count]:
        """Return how many commits and aggregates there are by aggregate name. Other subjects are not counted.

        Args:
            known: names of aggregates that need not be checked; see `Subjects.aggregate_of`.

        Raises:
            Unavailable: the log did not answer.
        """

    async def close(self) -> None:
        """Close the log; pending appends fail."""
