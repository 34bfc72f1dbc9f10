"""`eskernel check --log`: decodes every stored event with this program.

The log is read, and nothing is changed. Where no service runs on the data directory, its server is started for the time
of the check.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aggregates.commit import decode
from aggregates.errors import InvalidId, InvalidMessage
from kernel.cli.common import console
from kernel.cli.progress import commits_bar

if TYPE_CHECKING:
    from kernel.app import App
    from kernel.log import EventLog, Stored
    from kernel.settings import Settings

READ = 4_000
"""Commits in one read."""
RUNS = 20
"""A sample consists of so many runs of commits, evenly spread over the log; the newest commits are among them."""
MAX_ERROR = 300


@dataclass(slots=True)
class Undecoded:
    """Events that this program can't read, for the same reason.

    Attributes:
        kind: `undecodable`; `unknown event`; `unknown aggregate`; or `not a commit`.
        aggregate: aggregate type, empty if the subject names none.
        event: the event's name, empty if the commit can't be read.
        version: the event's schema version, 0 if the commit can't be read.
        count: number of such events.
        sequence: stream sequence of the first.
        aggregate_id: id of the first one's aggregate, or its subject.
        error: why the first can't be read.
    """

    kind: str
    aggregate: str
    event: str
    version: int
    count: int
    sequence: int
    aggregate_id: str
    error: str


@dataclass(slots=True)
class LogReport:
    """The result of a check.

    Attributes:
        stream: name of the stream.
        commits: number of commits that were read.
        total: number of commits in the log.
        events: number of events in the commits that were read.
        decoded: number of events that this program can read, by `Aggregate.Event version`.
        problems: the others.
    """

    stream: str
    commits: int = 0
    total: int = 0
    events: int = 0
    decoded: dict[str, int] = field(default_factory=dict)
    problems: list[Undecoded] = field(default_factory=list)


class LogCheck:
    """Decodes commits, and counts what can't be decoded."""

    def __init__(self, app: App, log: EventLog, stream: str) -> None:
        self._types, self._subjects = app.types, log.subjects
        self.report = LogReport(stream)
        self._found: dict[tuple[str, str, str, int], Undecoded] = {}

    def add(self, commit: Stored) -> None:
        """Decode a commit as the kernel does."""
        self.report.commits += 1
        try:
            address = self._subjects.parse(commit.subject)
            envelopes = decode(commit.payload)
        except (InvalidId, InvalidMessage) as error:
            self.report.events += 1
            self._note("not a commit", "", "", 0, commit.sequence, commit.subject, str(error))
            return
        declared = self._types.get(address.aggregate)
        for envelope in envelopes:
            self.report.events += 1
            name, version = envelope.type, envelope.dataversion
            place = commit.sequence, address.id
            if declared is None:
                why = "this program declares no such aggregate"
                self._note("unknown aggregate", address.aggregate, name, version, *place, why)
            elif (event := declared.events.get(name)) is None:
                known = ", ".join(sorted(declared.events))
                self._note("unknown event", address.aggregate, name, version, *place, f"it is not one of {known}")
            else:
                try:
                    event.decode(envelope.data, version)
                except InvalidMessage as error:
                    self._note("undecodable", address.aggregate, name, version, *place, str(error))
                else:
                    key = f"{address.aggregate}.{name} {version}"
                    self.report.decoded[key] = self.report.decoded.get(key, 0) + 1

    def _note(
        self, kind: str, aggregate: str, event: str, version: int, sequence: int, aggregate_id: str, error: str
    ) -> None:
        key = kind, aggregate, event, version
        if key in self._found:
            self._found[key].count += 1
            return
        self._found[key] = Undecoded(kind, aggregate, event, version, 1, sequence, aggregate_id, error[:MAX_ERROR])
        self.report.problems.append(self._found[key])


async def check_log(
    app: App, log: EventLog, stream: str, sample: int | None, progress: Callable[[int, int], None]
) -> LogReport:
    """Decode the stored events of an app, as they are at the start of the check.

    Args:
        sample: number of commits to read, evenly spread; all by default.
        progress: called with the number of commits read, and of those to read.
    """
    info = await log.info()
    check = LogCheck(app, log, stream)
    check.report.total = info.commits
    for after, to, most in _runs(info.first, info.last, info.commits, sample):
        reader = await log.read(after)
        left, at = most, after
        try:
            while left > 0 and at < to:
                batch = await reader.next(min(READ, left), timeout=1.0)
                for commit in batch.commits:
                    if (at := commit.sequence) > to:
                        break
                    check.add(commit)
                    left -= 1
                progress(check.report.commits, min(info.commits, sample or info.commits))
        finally:
            await reader.close()
    return check.report


def _runs(first: int, last: int, commits: int, sample: int | None) -> list[tuple[int, int, int]]:
    """Return the parts of the log to read: the sequence before each, its last sequence, and how many commits of it."""
    if not commits:
        return []
    if sample is None or sample >= commits:
        return [(0, last, commits)]
    count = min(RUNS, sample)
    sizes = [sample * (run + 1) // count - sample * run // count for run in range(count)]
    span = last - first + 1
    # each run ends where its part of the log ends: the last one has the newest commits
    ends = [first + span * (run + 1) // count - 1 for run in range(count)]
    starts = [max(first, end - size + 1) for end, size in zip(ends, sizes, strict=True)]
    return [(start - 1, end, size) for start, end, size in zip(starts, ends, sizes, strict=True)]


async def examine_log(app: App, settings: Settings, sample: int | None, *, quiet: bool) -> LogReport:
    """Connect to the log that the settings mean, and check it.

    Raises:
        LogError, ConnectionFailed: the log can't be reached, or does not exist.
    """
    from kernel.log import find_log
    from kernel.runtime.directory import worker_name
    from kernel.transport.dial import dial

    async with _reachable(app, settings) as reachable:
        connection = await dial(reachable, app=app.name, role="operator", name=f"eskernel check {app.name}")
        try:
            log = await find_log(connection, app.name, reachable, worker=f"check-{worker_name()}")
            try:
                with commits_bar("decoding", quiet=quiet) as progress:
                    stream = reachable.stream.name or app.name
                    return await check_log(app, log, stream, sample, progress)
            finally:
                await log.close()
        finally:
            await connection.close()


@asynccontextmanager
async def _reachable(app: App, settings: Settings) -> AsyncIterator[Settings]:
    """Yield settings with the URL of a server: of the running service, or of its embedded server, started for this."""
    from kernel.errors import NotRunning
    from kernel.runtime.directory import DataDirectory
    from kernel.runtime.nats_server import EmbeddedServer
    from kernel.runtime.running import find_running
    from kernel.settings.sources import changed

    if not settings.embedded:
        yield settings
        return
    try:
        yield find_running(settings.data, app.name).as_settings()
        return
    except NotRunning:
        directory = DataDirectory(settings.data, app.name)
        if not (directory.path / "nats" / "store").is_dir():
            raise NotRunning(
                f"{directory.path} has no log of {app.name!r}; give --data, or the server with --nats"
            ) from None
    directory.hold()
    server = EmbeddedServer(directory.path / "nats")
    try:
        url = await server.start()
        yield changed(settings, {"connection.servers": url, "stream.sync": False})
    finally:
        await server.stop()
        directory.release()


def print_report(report: LogReport) -> None:
    """Print the report for people."""
    commits = _count(report.total, "commit")
    if report.commits < report.total:
        commits = f"{report.commits:,} of {commits}"
    unread = sum(problem.count for problem in report.problems)
    result = f"{unread:,} do not decode with this program" if unread else "all decode with this program"
    _line(f"log {report.stream}: {_count(report.events, 'event')} in {commits}; {result}")
    for problem in report.problems:
        what = " ".join(filter(None, [problem.aggregate, problem.event, f"version {problem.version}"]))
        what = what if problem.aggregate else "a message"
        _line(f"  {problem.kind}: {what}, {_count(problem.count, 'event')}, first at sequence {problem.sequence} "
              f"({problem.aggregate_id}): {problem.error}")  # fmt: skip


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _line(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
