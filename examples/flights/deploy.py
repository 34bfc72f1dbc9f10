"""Deploying the next version of the program beside the one that runs, while commands flow and readers read."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, text

from examples.flights import Aircraft
from examples.flights.load import id_of
from examples.flights.source import Step
from kernel import Client

BETWEEN_READS_S = 0.02
LANES = 8
PATIENCE_S = 300.0


class Deployment:
    """One deployment, there, back and there again.

    Args:
        client: sends the commands.
        engine: for the readers.
        steps: commands that flow meanwhile.
        service: runs a service of an app, with further options, until its block ends.
        where: options by which the command line finds the running service.
        say: prints a line.

    Attributes:
        reads, failed: how often a reader has asked, and got an error.
        commands, refused: how many commands have taken effect, and how many have not.
    """

    def __init__(
        self,
        client: Client,
        engine: Engine,
        steps: Sequence[Step],
        service: Callable[[str, Sequence[str]], AbstractContextManager[Path]],
        where: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        self._client, self._engine, self._steps = client, engine, list(steps)
        self._service, self._where, self._say = service, where, say
        self.reads = self.failed = self.commands = self.refused = 0
        self._done = asyncio.Event()

    @asynccontextmanager
    async def deployed(self, options: Sequence[str]) -> AsyncIterator[None]:
        """Deploy, and go there and back. The new program runs until the block ends.

        Args:
            options: of the second service.
        """
        traffic = [asyncio.ensure_future(self._read()), *(asyncio.ensure_future(self._send(n)) for n in range(LANES))]
        started = time.perf_counter()
        with self._service("examples.flights.later:app", options) as log:
            self._say(f"the new program takes commands {time.perf_counter() - started:.1f} s after its start")
            await self._until(2)
            self._say(f"version 2 is built, verified and shown {time.perf_counter() - started:.1f} s after the start:")
            for line in self._told(log):
                self._say(f"  {line}")
            for version in (1, 2):
                done = await self._roll_back()
                await self._until(version)
                self._say(
                    f"{'back' if version == 1 else 'again'} to version {done['version']} in "
                    f"{1000 * done['seconds']:.0f} ms: the {'old' if version == 1 else 'new'} program has kept its "
                    "tables up to date"
                )
            self._done.set()
            await asyncio.gather(*traffic)
            self._say(
                f"meanwhile {self.commands:,} commands took effect and {self.refused} were refused; {self.reads:,} "
                f"queries were answered and {self.failed} failed"
            )
            yield

    @property
    def smooth(self) -> bool:
        """Whether no read failed, and no command was refused."""
        return not self.refused and not self.failed

    async def _read(self) -> None:
        while not self._done.is_set():
            try:
                await asyncio.to_thread(self._ask, "SELECT count(*), sum(flights), max(last_airport) FROM aircraft")
            except Exception as error:
                self.failed += 1
                self._say(f"a read failed: {error}")
            self.reads += 1
            await asyncio.sleep(BETWEEN_READS_S)

    async def _send(self, lane: int) -> None:
        """Send the commands of some aircraft, slowly enough that they last until the end."""
        own = [step for step in self._steps if hash(step.tail) % LANES == lane]
        for step in own:
            if self._done.is_set():
                return
            try:
                await self._client.execute(Aircraft, step.tail, step.command, command_id=id_of(step))
                self.commands += 1
            except Exception as error:
                self.refused += 1
                self._say(f"a command was refused: {error}")
            await asyncio.sleep(0.05)

    async def _until(self, version: int) -> None:
        query = "SELECT version FROM eskernel_projection WHERE name = 'Fleet' AND state = 'live'"
        async with asyncio.timeout(PATIENCE_S):
            while await asyncio.to_thread(self._ask, query) != [(version,)]:  # noqa: ASYNC110 - another process does it
                await asyncio.sleep(0.01)

    def _ask(self, query: str) -> list[Any]:
        with self._engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(query))]

    async def _roll_back(self) -> dict[str, Any]:
        command = ["-m", "kernel.cli", "projections", "rollback", "Fleet", "--json", *self._where]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        if process.returncode:
            sys.exit(f"the rollback failed: {err.decode()}")
        done: dict[str, Any] = json.loads(out)
        return done

    def _told(self, log: Path) -> Iterator[str]:
        for line in log.read_text().splitlines():
            if "Fleet" in line and ("built; folding" in line or "is live" in line):
                yield line[line.index("Fleet") :]


def longest_delays(rows: Iterable[dict[str, str]]) -> dict[str, int]:
    """Return the longest delay of an arrival of each aircraft, from the file's rows alone."""
    longest: dict[str, int] = {}
    for row in rows:
        if row["tailnum"] not in ("", "NA"):
            delay = 0 if row["arr_delay"] in ("", "NA") else int(row["arr_delay"])
            longest[row["tailnum"]] = max(longest.get(row["tailnum"], 0), delay)
    return longest
