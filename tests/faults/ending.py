"""How a run ends: the projections catch up, the service stops, and everything is checked."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import orjson

from tests.faults import evidence
from tests.faults.checker import History, Violation, check, verdict_of
from tests.faults.clients import Load
from tests.faults.owed import Reactions
from tests.faults.places import BELLS, Database, Service
from tests.faults.rules import Attempt

CATCH_UP_S = 90.0
LEASES_S = 6.0
"""Seconds to wait for leases to go; a lease that was not given back expires in half of this time."""
CONSUMERS_S = 90.0
"""Seconds to wait for consumers to go: the server removes a killed worker's consumer after a minute without a pull."""


@dataclass(slots=True)
class Result:
    """The outcome of one run."""

    seed: int
    database: str
    workers: int
    faults: dict[str, int] = field(default_factory=dict)
    kills: dict[str, int] = field(default_factory=dict)
    commands: dict[str, int] = field(default_factory=dict)
    sendings: int = 0
    injected: dict[str, int] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)
    events: int = 0
    letters: int = 0
    garbage: int = 0
    snapshots: int = 0
    deadlocks: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    logs: str = ""

    @property
    def ok(self) -> bool:
        return not self.violations


class Injected(Protocol):
    """What injected the faults of a run.

    Attributes:
        done: faults by kind. kills: SIGKILLs by victim. injected: what the faults consisted of.
        violations: the ones visible only during the run.
    """

    done: Counter[str]
    kills: Counter[str]
    injected: Counter[str]
    notes: list[str]
    violations: list[Violation]


class CheckedRun(ABC):
    """A run that is checked at its end.

    Attributes:
        url: of a server.
        in_use: whether consumers and leases must be seen before the stop.
        consumers: whether to wait until consumers of killed workers are gone, too.
        keep: whether to keep the directory even if every promise holds.
    """

    url: str
    in_use: bool = True
    consumers: bool = False
    keep: bool = False

    def __init__(self, app: str, directory: str, result: Result, report: Callable[[str], None]) -> None:
        self.app, self.result, self.report = app, result, report
        self.directory = Path(tempfile.mkdtemp(prefix=directory))
        self.services: list[Service] = []
        self.database: Database | None = None
        self.load: Load | None = None
        self.faults: Injected | None = None
        self.violations: list[Violation] = []

    @abstractmethod
    async def _run(self) -> None:
        """Start, inject, heal, and call `_finish`."""

    @abstractmethod
    async def _close(self) -> None:
        """End everything, in any state."""

    async def run(self) -> Result:
        """Do the run; no process is left running, even after an error."""
        started = time.monotonic()
        try:
            await self._run()
        except Exception:
            self.violations.append(Violation("f", f"the run broke off: {traceback.format_exc()}"))
        finally:
            await self._close()
            self._conclude(time.monotonic() - started)
        return self.result

    async def _finish(self) -> None:
        assert self.database is not None
        reader = evidence.Reader(self.database.url)
        try:
            await self._catch_up(reader)
            await self._stop()
            await self._check(reader)
        finally:
            reader.close()

    async def _catch_up(self, reader: evidence.Reader) -> None:
        """Wait until the projections have folded the log to its end."""
        deadline = time.monotonic() + CATCH_UP_S
        while True:
            stream = await evidence.read_stream(self.url, self.app)
            while behind := await asyncio.to_thread(reader.behind, self.app, stream):
                if time.monotonic() > deadline:
                    text = f"the projections did not catch up in {CATCH_UP_S:g} s: {behind[:9]}"
                    self.violations.append(Violation("c", text))
                    return
                await asyncio.sleep(0.2)
            if (await evidence.read_stream(self.url, self.app)).last == stream.last:
                return

    async def _stop(self) -> None:
        """Stop the service as a user does, and check for leftovers."""
        url, leases = self.url, f"{self.app}-leases"
        last = (await evidence.read_stream(url, self.app)).last
        reading = await evidence.readers(url, self.app, last)
        if self.in_use and not (reading and await evidence.keys(url, leases)):
            self.violations.append(Violation("f", f"looking for leftovers is blind: in use were {reading}"))
        for service in self.services:
            code = await service.terminate(60.0)
            if code != 0:
                how = "did not end within 60 s" if code is None else f"ended with {code}: {service.last_line()}"
                self.violations.append(Violation("e", f"the healthy service, asked to stop, {how}"))
            if left := await service.none_left(5.0):
                self.violations.append(Violation("e", f"processes outlived the stop: {left}"))
        deadline = time.monotonic() + LEASES_S
        while (held := await evidence.keys(url, leases)) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        if held:
            self.violations.append(Violation("e", f"leases outlived the stop: {held}"))
        # in a cluster the deletion of a consumer takes its time
        while (left_over := await evidence.readers(url, self.app, last)) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        if left_over:
            self.violations.append(Violation("e", f"consumers of a stopped worker outlived it: {left_over}"))
        deadline = time.monotonic() + CONSUMERS_S
        while self.consumers and (some := await evidence.consumers(url, self.app)):
            if time.monotonic() > deadline:
                self.violations.append(Violation("e", f"consumers after {CONSUMERS_S:g} s: {some}"))
                break
            await asyncio.sleep(1.0)

    async def _check(self, reader: evidence.Reader) -> None:
        stream = await evidence.read_stream(self.url, self.app)
        tables = await asyncio.to_thread(reader.tables)
        assert self.load is not None
        reactions = Reactions(await asyncio.to_thread(reader.rejected), self.bells())
        history = History(
            self.app, stream.partitions, stream.last, stream.messages, self.load.attempts, self.load.garbage, tables,
            reactions,
        )  # fmt: skip
        found = await asyncio.to_thread(check, history)
        self.violations += found
        self.result.deadlocks = await asyncio.to_thread(reader.deadlocks)
        for name in (f"{self.app}-snapshots", f"KV_{self.app}-leases"):
            strays = [subject for subject in await evidence.subjects(self.url, name) if "deputy" in subject]
            self.violations += [Violation("h", f"the service was a deputy: {subject}") for subject in strays]
        self.result.snapshots = len(await evidence.subjects(self.url, f"{self.app}-snapshots"))
        self.result.events = sum(message.payload.count(b'"specversion"') for message in stream.messages)
        self.result.garbage = sum(not letter.projection for letter in tables.letters)
        self.result.letters = len(tables.letters) - self.result.garbage
        if found:
            self._keep(history)

    def bells(self) -> list[str]:
        """Return the ids of the events that the effect has taken place for."""
        return [bell for file in self.directory.rglob(BELLS) for bell in file.read_text().split()]

    def _keep(self, history: History) -> None:
        """Save the evidence for the verdict."""
        lines = [f"{m.time:.6f} {m.sequence} {m.subject} {m.payload!r}" for m in history.messages]
        (self.directory / "stream.txt").write_text("\n".join(lines))
        (self.directory / "attempts.json").write_bytes(orjson.dumps(history.attempts, option=orjson.OPT_INDENT_2))

    def _conclude(self, seconds: float) -> None:
        result, by_id = self.result, dict[str, list[Attempt]]()
        for attempt in self.load.attempts if self.load is not None else ():
            by_id.setdefault(attempt.command_id, []).append(attempt)
        result.commands = {"acknowledged": 0, "refused": 0, "unknown": 0}
        for attempts in by_id.values():
            result.commands[verdict_of(attempts)] += 1
        faults, load = self.faults, self.load
        result.sendings = len(load.attempts) if load is not None else 0
        if faults is not None:
            result.faults = {str(kind): count for kind, count in faults.done.items()}
            result.kills, result.injected = dict(faults.kills), dict(faults.injected)
            result.notes += faults.notes
            self.violations[:0] = faults.violations
        result.seconds = seconds
        logs = [service.log for service in self.services if service.log.exists()]
        log = "\n".join(file.read_text(errors="replace") for file in logs)
        alerts = [line for line in log.splitlines() if is_alert(line)]
        self.violations += [Violation("g", line) for line in dict.fromkeys(alerts)]
        result.notes += [
            f"the service ended by itself: {ending}" for service in self.services for ending in service.exits
        ]
        if load is not None:
            result.notes += [f"{count} x {problem}" for problem, count in load.problems.most_common(10)]
        result.notes += [f"{count} x traceback in the service's log: {end}" for end, count in _tracebacks(log).items()]
        result.violations = [str(violation) for violation in self.violations]
        if result.violations or self.keep:
            result.logs = str(self.directory)
            (self.directory / "result.json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
        else:
            shutil.rmtree(self.directory, ignore_errors=True)


_WHEN_AND_WHICH = re.compile(r"^[-0-9:.,TZ ]+|: Tank .*")
"""What differs between lines that say the same."""


def is_alert(line: str) -> bool:
    """Return whether a line of the service's log says what must not happen, or what did not happen."""
    if any(words in line for words in ("bug in the kernel", "differs from its history", "it was truncated")):
        return True
    # a deadlock is tried again, and is no error
    return "deadlock" in line.lower() and ("[error" in line or line.startswith("psycopg.errors"))


def _tracebacks(log: str) -> Counter[str]:
    """Count the tracebacks in a log by their last line and the line that precedes them."""
    found: Counter[str] = Counter()
    lines = log.splitlines()
    for place, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last)"):
            end = next((following for following in lines[place + 1 :] if not following.startswith(" ")), "")
            announced = _WHEN_AND_WHICH.sub("", lines[place - 1]) if place else ""
            found[f"{announced[:120]} ... {end[:200]}"] += 1
    return found
