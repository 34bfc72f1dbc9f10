"""The messages to actors, and the interface through which actors use the asyncio side."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol

from aggregates.cell import Cell
from aggregates.commit import Decision, Envelope
from aggregates.origin import UNKNOWN, Origin
from aggregates.seen import Seen
from kernel.log.subjects import Address
from kernel.protocol import CommandRequest, ErrorType, Returned
from kernel.telemetry.tracing import Span
from projections.fold import Folded, Plan


class Request:
    """A command on its way through an actor.

    Attributes:
        arrived: when, by the performance counter.
        origin: what its sender says of it.
        error: what the app's own code raised at it.
        fresh: it is decided on a state that was loaded after it came.
        returned: what its answer shall hold beside the receipt.
        span: of a sender that traces it.
    """

    __slots__ = (
        *("arrived", "attempts", "command", "error", "fresh", "origin", "reply", "returned", "searched", "sent"),
        "span",
    )

    def __init__(self, sent: CommandRequest, command: Any, reply: bytes, arrived: float = 0.0) -> None:
        self.arrived = arrived
        self.sent = sent
        self.command = command
        self.reply = reply
        self.attempts = 0
        self.searched = self.fresh = False
        self.origin: Origin = UNKNOWN
        self.returned: Returned | None = None
        self.error: Exception | None = None
        self.span: Span | None = None


class Gateway(Protocol):
    """What actors ask of the asyncio side. No call blocks."""

    def now(self) -> datetime:
        """Return the moment of decision, in UTC."""

    def holds(self, partition: int) -> bool:
        """Say whether this worker still holds the partition."""

    def load(self, address: Address) -> None:
        """Load the aggregate; answer with `Loaded`."""

    def search(self, address: Address, request: Request) -> None:
        """Look for the command in the whole history; answer with `Searched`."""

    def snapshot(self, address: Address, cell: Cell[Any], commit: bytes) -> None:
        """Take a snapshot of a cell, whose last commit this is, unless it is not due yet; then set when it is."""

    def append(self, address: Address, cell: Cell[Any], version: int, decisions: list[Decision]) -> None:
        """Append the decisions as one commit behind `cell.position`; answer with `Appended`."""

    def succeed(self, address: Address, request: Request, version: int, sequence: int, duplicate: bool) -> None:
        """Answer the sender with a receipt, and with what the request shall return."""

    def fail(self, address: Address, request: Request, type: ErrorType, message: str) -> None:
        """Answer the sender with an error."""

    def refuse_version(self, address: Address, request: Request, version: int) -> None:
        """Answer the sender that the aggregate has this version, and not the one that the command is for."""

    def report_bug(self, problem: str) -> None:
        """Report a bug in the kernel."""


class Unstorable(Exception):
    """Events that JSON can't carry."""


class Turn:
    """What the actors of one batch share: the plan, and where results go."""

    __slots__ = ("folded", "plan")

    def __init__(self, plan: Plan, folded: Folded) -> None:
        self.plan = plan
        self.folded = folded


class Fold:
    """Fold these commits. `rows` are the stored records where the actor holds none, `kept` the sequence beside them."""

    __slots__ = ("address", "commits", "kept", "rows", "skip", "turn")

    def __init__(
        self,
        address: Address,
        turn: Turn,
        commits: Sequence[tuple[int, Sequence[Envelope]]],
        rows: list[Any] | None,
        skip: frozenset[int],
        kept: int | None = None,
    ) -> None:
        self.kept = kept
        self.address = address
        self.turn = turn
        self.commits = commits
        self.rows = rows
        self.skip = skip


class Decide:
    """Decide these commands, in order."""

    __slots__ = ("address", "requests")

    def __init__(self, address: Address, requests: list[Request]) -> None:
        self.address = address
        self.requests = requests


class Loaded:
    """The aggregate's cell, or why it can't be had."""

    __slots__ = ("cell", "error")

    def __init__(self, cell: Cell[Any] | None, error: tuple[ErrorType, str] | None = None) -> None:
        self.cell = cell
        self.error = error


class Searched:
    """Version and stream sequence that a repeated command led to, None if it is new, or why that is unknown.

    Attributes:
        seen: the ids of all commands, if the history was read.
    """

    __slots__ = ("error", "found", "request", "seen")

    def __init__(
        self, request: Request, found: tuple[int, int] | None, seen: Seen | None = None, error: str = ""
    ) -> None:
        self.request = request
        self.found = found
        self.seen = seen
        self.error = error


class Appended:
    """Where the commit is in the stream, or why it is not; and the commit itself."""

    __slots__ = ("commit", "result")

    def __init__(self, result: int | Exception, commit: bytes = b"") -> None:
        self.result = result
        self.commit = commit


class DropRows:
    """Forget the folded rows: what is stored differs from them."""


class Leave:
    """The partition is no longer ours: forget the state, others may change it; what waits is for them."""


class Passivate:
    """Forget everything; the shell can serve another aggregate."""
