"""One run: start everything, load and faults, heal, stop, check."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from tests.faults import evidence
from tests.faults.checker import History, Violation, check, verdict_of
from tests.faults.clients import Load
from tests.faults.faults import Faults
from tests.faults.places import Database, NatsServer, Postgres, Service, Sqlite, free_port
from tests.faults.proxy import Proxy
from tests.faults.rules import Attempt
from tests.faults.schedule import Fault

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
    events: int = 0
    letters: int = 0
    garbage: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    logs: str = ""

    @property
    def ok(self) -> bool:
        return not self.violations


@dataclass(frozen=True, slots=True)
class Options:
    """How to run.

    Attributes:
        workers: 0 starts the service without `--workers`: its process is the worker.
        postgres: URL of a PostgreSQL server; SQLite without it.
        consumers: wait until consumers of killed workers are gone, too.
        keep: keep the directory even if every promise holds.
    """

    workers: int = 2
    postgres: str = ""
    consumers: bool = False
    keep: bool = False


class Run:
    """A run of one schedule in a directory of its own."""

    def __init__(self, seed: int, schedule: list[Fault], options: Options, report: Callable[[str], None]) -> None:
        self.seed, self.schedule, self.options, self.report = seed, schedule, options, report
        self.app = f"f{seed}-{os.getpid()}-{int(time.time() * 1000) % 10_000_000}"
        self.directory = Path(tempfile.mkdtemp(prefix=f"eskernel-faults-{seed}-"))
        self.result = Result(seed, "postgresql" if options.postgres else "sqlite", options.workers)
        self.server = NatsServer(self.directory / "nats")
        self.proxy = Proxy(free_port(), self.server.port)
        self.database: Database = (
            Postgres(options.postgres, self.app.replace("-", "_")) if options.postgres else Sqlite(self.directory)
        )
        self.service = Service(self.app, self.proxy.url, self.database.url, self.directory, options.workers)
        self.load = Load(self.app, self.server.url, self.proxy.url, seed)
        self.faults = Faults(self.service, self.server, self.proxy, self.database, self.load, report)
        self.violations: list[Violation] = []

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

    async def _run(self) -> None:
        await self.server.start()
        await self.proxy.start()
        self.service.start()
        await self.load.start()
        await self.faults.settle("the start")
        await self.faults.run(self.schedule)
        self.report("healing")
        await self.proxy.heal()
        await self.faults.settle("everything was healed")
        await self.load.stop()
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
            stream = await evidence.read_stream(self.server.url, self.app)
            while behind := await asyncio.to_thread(reader.behind, self.app, stream):
                if time.monotonic() > deadline:
                    text = f"the projections did not catch up in {CATCH_UP_S:g} s: {behind[:9]}"
                    self.violations.append(Violation("c", text))
                    return
                await asyncio.sleep(0.2)
            if (await evidence.read_stream(self.server.url, self.app)).last == stream.last:
                return

    async def _stop(self) -> None:
        """Stop the service as a user does, and check for leftovers."""
        url, leases = self.server.url, f"{self.app}-leases"
        last = (await evidence.read_stream(url, self.app)).last
        reading = await evidence.readers(url, self.app, last)
        if self.options.workers and not (reading and await evidence.keys(url, leases)):
            self.violations.append(Violation("f", f"looking for leftovers is blind: in use were {reading}"))
        code = await self.service.terminate(60.0)
        if code != 0:
            how = "did not end within 60 s" if code is None else f"ended with {code}: {self.service.last_line()}"
            self.violations.append(Violation("e", f"the healthy service, asked to stop, {how}"))
        if left := await self.service.none_left(5.0):
            self.violations.append(Violation("e", f"processes outlived the stop: {left}"))
        deadline = time.monotonic() + LEASES_S
        while (held := await evidence.keys(url, leases)) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        if held:
            self.violations.append(Violation("e", f"leases outlived the stop: {held}"))
        if left_over := await evidence.readers(url, self.app, last):
            self.violations.append(Violation("e", f"consumers of a stopped worker outlived it: {left_over}"))
        deadline = time.monotonic() + CONSUMERS_S
        while self.options.consumers and (some := await evidence.consumers(url, self.app)):
            if time.monotonic() > deadline:
                self.violations.append(Violation("e", f"consumers after {CONSUMERS_S:g} s: {some}"))
                break
            await asyncio.sleep(1.0)

    async def _check(self, reader: evidence.Reader) -> None:
        stream = await evidence.read_stream(self.server.url, self.app)
        tables = await asyncio.to_thread(reader.tables)
        history = History(
            self.app, stream.partitions, stream.last, stream.messages, self.load.attempts, self.load.garbage, tables
        )
        found = await asyncio.to_thread(check, history)
        self.violations += found
        self.result.events = sum(message.payload.count(b'"specversion"') for message in stream.messages)
        self.result.garbage = sum(not letter.projection for letter in tables.letters)
        self.result.letters = len(tables.letters) - self.result.garbage
        if found:
            self._keep(history)

    def _keep(self, history: History) -> None:
        """Save the evidence for the verdict."""
        lines = [f"{m.time:.6f} {m.sequence} {m.subject} {m.payload!r}" for m in history.messages]
        (self.directory / "stream.txt").write_text("\n".join(lines))
        (self.directory / "attempts.json").write_bytes(orjson.dumps(history.attempts, option=orjson.OPT_INDENT_2))

    async def _close(self) -> None:
        await self.faults.close()
        await self.load.close()
        await self.service.close()
        await self.proxy.stop()
        await self.server.kill()
        await asyncio.to_thread(self.database.drop)

    def _conclude(self, seconds: float) -> None:
        result, by_id = self.result, dict[str, list[Attempt]]()
        for attempt in self.load.attempts:
            by_id.setdefault(attempt.command_id, []).append(attempt)
        result.commands = {"acknowledged": 0, "refused": 0, "unknown": 0}
        for attempts in by_id.values():
            result.commands[verdict_of(attempts)] += 1
        result.sendings = len(self.load.attempts)
        result.faults = {str(kind): count for kind, count in self.faults.done.items()}
        result.kills = dict(self.faults.kills)
        result.seconds = seconds
        log = self.service.log.read_text(errors="replace") if self.service.log.exists() else ""
        alerts = [line for line in log.splitlines() if "bug in the kernel" in line]
        self.violations += [Violation("g", line) for line in dict.fromkeys(alerts)]
        result.notes = [
            *self.faults.notes,
            *(f"the service ended by itself: {ending}" for ending in self.service.exits),
        ]
        result.notes += [f"{count} x {problem}" for problem, count in self.load.problems.most_common(10)]
        result.notes += [f"{count} x traceback in the service's log: {end}" for end, count in _tracebacks(log).items()]
        result.violations = [str(violation) for violation in [*self.faults.violations, *self.violations]]
        if result.violations or self.options.keep:
            result.logs = str(self.directory)
            (self.directory / "result.json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
        else:
            shutil.rmtree(self.directory, ignore_errors=True)


def _tracebacks(log: str) -> Counter[str]:
    """Count the tracebacks in a log by their last line and the line that precedes them."""
    found: Counter[str] = Counter()
    lines = log.splitlines()
    for place, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last)"):
            end = next((following for following in lines[place + 1 :] if not following.startswith(" ")), "")
            announced = re.sub(r"^[-0-9: ,]+", "", lines[place - 1]) if place else ""
            found[f"{announced[:120]} ... {end[:200]}"] += 1
    return found
