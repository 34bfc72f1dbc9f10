"""Reading aggregates' histories for their actors: to load one, or to find a command in it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from aggregates import InvalidMessage, SequenceError
from aggregates.cell import Cell
from aggregates.commit import Envelope, decode
from aggregates.declaration import AggregateType
from aggregates.errors import NewerEvent
from kernel.actors.mailbox import Loaded, Request, Searched
from kernel.errors import LogError
from kernel.log.base import EventLog, Stored
from kernel.log.subjects import Address
from kernel.protocol import ErrorType
from kernel.telemetry.logging import about
from kernel.telemetry.metrics import LOAD_SECONDS, LOADS

logger = logging.getLogger("eskernel.actors")
MAX_LOADS = 256
"""Histories read at the same time."""


class Histories:
    """Reads histories, so many at a time.

    Args:
        send: sends a message to a live aggregate's actor.
    """

    def __init__(self, log: EventLog, send: Callable[[Address, Any], None]) -> None:
        self._log, self._send = log, send
        self._loads = asyncio.Semaphore(MAX_LOADS)
        self._tasks: set[asyncio.Task[None]] = set()

    def load(self, declared: AggregateType[Any], address: Address) -> None:
        """Load an aggregate; its actor is sent `Loaded`."""
        self._spawn(self._load(declared, address))

    async def _load(self, declared: AggregateType[Any], address: Address) -> None:
        cell = Cell(declared, address.id)
        LOADS.inc()
        started = time.perf_counter()
        error: tuple[ErrorType, str] | None = None
        try:
            async with self._loads:
                stored = await self._log.read_subject(address.subject)
            for commit in stored:
                try:
                    envelopes = decode(commit.payload)
                except InvalidMessage as problem:
                    # no event of anybody's; the projections pass over it too, into the quarantine
                    logger.warning(
                        "%s: passing over stream sequence %d: %s", address.subject, commit.sequence, problem,
                        extra=about(address.aggregate, address.id, stream_sequence=commit.sequence),
                    )  # fmt: skip
                    cell.advance(commit.sequence)
                    continue
                cell.replay(envelopes, commit.sequence)
        except LogError as problem:
            error = ("unavailable", str(problem))
        except NewerEvent as problem:
            error = ("unavailable", f"the history has events of a newer program, which this one can't read: {problem}")
        except (InvalidMessage, SequenceError) as problem:
            error = ("failed", f"the stored history can't be read: {problem}")
        except Exception as problem:
            error = ("failed", f"{type(problem).__name__} while replaying: {problem}")
        LOAD_SECONDS.observe(time.perf_counter() - started)
        self._send(address, Loaded(None if error else cell, error))

    def search(self, address: Address, request: Request) -> None:
        """Look for a command in an aggregate's history; its actor is sent `Searched`."""
        self._spawn(self._search(address, request))

    async def _search(self, address: Address, request: Request) -> None:
        """A repeated command that the cell doesn't remember: only the whole history knows."""
        try:
            async with self._loads:
                stored = await self._log.read_subject(address.subject)
            version = sequence = 0
            for commit in stored:
                for envelope in _events_of(commit):
                    if envelope.commandid == request.sent.command_id:
                        version, sequence = envelope.sequence, commit.sequence
        except Exception as problem:
            self._send(address, Searched(request, None, str(problem)))
        else:
            self._send(address, Searched(request, (version, sequence) if version else None))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _events_of(commit: Stored) -> list[Envelope]:
    try:
        return decode(commit.payload)
    except InvalidMessage:
        return []
