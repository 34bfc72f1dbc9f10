"""Reading aggregates' histories for their actors: to load one, or to find a command in it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from aggregates import InvalidMessage, SequenceError
from aggregates.cell import Cell
from aggregates.commit import Envelope, decode
from aggregates.declaration import AggregateType
from aggregates.errors import NewerEvent
from aggregates.seen import Seen
from aggregates.snapshot import Restored
from kernel.actors.mailbox import Loaded, Request, Searched
from kernel.actors.read_ahead import ReadAhead
from kernel.actors.snapshots import SnapshotKeeper
from kernel.errors import LogError
from kernel.log.base import EventLog, Stored
from kernel.log.subjects import Address
from kernel.protocol import ErrorType, Returned, ReturnedEvent
from kernel.telemetry.logging import about
from kernel.telemetry.metrics import LOAD_SECONDS, LOADS

logger = logging.getLogger("eskernel.actors")


class Histories:
    """Reads histories.

    Args:
        send: sends a message to a live aggregate's actor.
        snapshots: of aggregates.

    Attributes:
        ahead: what is read in one go after a take-over.
    """

    def __init__(self, log: EventLog, send: Callable[[Address, Any], None], snapshots: SnapshotKeeper) -> None:
        self._log, self._send, self._snapshots = log, send, snapshots
        self.ahead = ReadAhead(log, snapshots.store)
        self._tasks: set[asyncio.Task[None]] = set()

    def load(self, declared: AggregateType[Any], address: Address) -> None:
        """Load an aggregate; its actor is sent `Loaded`."""
        self._spawn(self._load(declared, address))

    async def _load(self, declared: AggregateType[Any], address: Address) -> None:
        cell: Cell[Any] | None = None
        LOADS.inc()
        started = time.perf_counter()
        error: tuple[ErrorType, str] | None = None
        try:
            cell = await self._read(declared, address)
        except LogError as problem:
            error = ("unavailable", str(problem))
        except NewerEvent as problem:
            error = ("unavailable", f"the history has events of a newer program, which this one can't read: {problem}")
        except (InvalidMessage, SequenceError) as problem:
            error = ("failed", f"the stored history can't be read: {problem}")
        except Exception as problem:
            error = ("failed", f"{type(problem).__name__} while replaying: {problem}")
        LOAD_SECONDS.observe(time.perf_counter() - started)
        self._send(address, Loaded(cell, error))

    async def _read(self, declared: AggregateType[Any], address: Address) -> Cell[Any]:
        ahead = self.ahead.take(address.subject)
        if ahead.commits and _begins(ahead.commits[0]):
            return self._replayed(declared, address, await self._log.read_subject(address.subject, 0, ahead.commits))
        restored = await self._snapshots.restore(declared, address, ahead.snapshot)
        if restored is not None and not self._snapshots.is_sampled(restored.cell):
            cell = restored.cell
            known = [commit for commit in ahead.commits if commit.sequence >= cell.position]
            if known and known[0].sequence > cell.position:
                known = []
            stored = await self._log.read_subject(address.subject, cell.position - 1, known)
            fits = bool(stored) and stored[0].sequence == cell.position and restored.is_of(stored[0].payload)
            self._snapshots.count_use(fits)
            if fits:
                for commit in stored[1:]:
                    self._replay(cell, commit, address)
                return cell
            restored = None
        stored = await self._log.read_subject(address.subject)
        return self._replayed(declared, address, stored, restored)

    def _replayed(
        self,
        declared: AggregateType[Any],
        address: Address,
        stored: Sequence[Stored],
        restored: Restored[Any] | None = None,
    ) -> Cell[Any]:
        """Replay a whole history.

        Args:
            restored: a snapshot to be compared with it.
        """
        cell = Cell(declared, address.id)
        for commit in stored:
            self._replay(cell, commit, address)
            if restored is not None and commit.sequence == restored.cell.position and restored.is_of(commit.payload):
                self._snapshots.compare(restored.cell, cell)
        if stored:
            self._snapshots.offer(address, cell, stored[-1].payload)
        return cell

    def _replay(self, cell: Cell[Any], commit: Stored, address: Address) -> None:
        try:
            envelopes = decode(commit.payload)
        except InvalidMessage as problem:
            # no event of anybody's; the projections pass over it too, into the quarantine
            logger.warning(
                "%s: passing over stream sequence %d: %s", address.subject, commit.sequence, problem,
                extra=about(address.aggregate, address.id, stream_sequence=commit.sequence),
            )  # fmt: skip
            cell.advance(commit.sequence)
            return
        cell.replay(envelopes, commit.sequence)

    def search(self, address: Address, request: Request) -> None:
        """Look for a command in an aggregate's history; its actor is sent `Searched`."""
        self._spawn(self._search(address, request))

    async def _search(self, address: Address, request: Request) -> None:
        """A repeated command that the cell doesn't remember: only the whole history knows."""
        try:
            stored = await self._log.read_subject(address.subject)
            version = sequence = 0
            seen = Seen()
            for commit in stored:
                for envelope in _events_of(commit):
                    if envelope.commandid:
                        seen.add(envelope.commandid)
                    if envelope.commandid == request.sent.command_id:
                        version, sequence = envelope.sequence, commit.sequence
        except Exception as problem:
            self._send(address, Searched(request, None, error=str(problem)))
        else:
            self._send(address, Searched(request, (version, sequence) if version else None, seen))

    def collect_events(self, address: Address, request: Request, sequence: int, answer: Callable[[str], None]) -> None:
        """Note in a repeated command what it led to the first time.

        Args:
            sequence: stream sequence of its commit.
            answer: called afterwards, with the reason if the log can't be read.
        """
        self._spawn(self._collect_events(address, request, sequence, answer))

    async def _collect_events(
        self, address: Address, request: Request, sequence: int, answer: Callable[[str], None]
    ) -> None:
        problem = ""
        try:
            stored = await self._log.read_subject(address.subject, sequence - 1)
            request.returned = Returned([
                ReturnedEvent(envelope.type, envelope.dataversion, envelope.data)
                for commit in stored[:1]
                for envelope in _events_of(commit)
                if envelope.commandid == request.sent.command_id
            ])  # fmt: skip
        except Exception as error:
            problem = str(error)
        answer(problem)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _begins(commit: Stored) -> bool:
    """Return whether a commit is the first of its aggregate."""
    events = _events_of(commit)
    return bool(events) and events[0].sequence == 1


def _events_of(commit: Stored) -> list[Envelope]:
    try:
        return decode(commit.payload)
    except InvalidMessage:
        return []
