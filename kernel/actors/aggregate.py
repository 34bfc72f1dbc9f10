"""The actors: one per live aggregate, children of their partition's parent, all in this process (Thespian).

Actors never wait and never raise. What needs waiting (loading, appending) they ask of the `Gateway`, and they are told
the result by a message. While something is under way an actor stashes commands; those are then decided together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from thespian.actors import Actor, ActorAddress

from aggregates import Context, Rejected
from aggregates.cell import Cell
from aggregates.commit import Decision
from kernel.actors.mailbox import (
    Appended,
    Decide,
    DropRows,
    Fold,
    Gateway,
    Leave,
    Loaded,
    Passivate,
    Request,
    Searched,
    Unstorable,
)
from kernel.errors import Conflict, LogError, PayloadTooLarge, UnknownOutcome
from kernel.log.subjects import Address
from kernel.protocol import ErrorType
from projections.errors import HandlerFailed

MAX_DECISIONS = 100
"""Commands decided together in one commit."""
Verdict = tuple[ErrorType, str] | None
"""What a command led to: an error and its message, nothing at all (`None`), or events (`APPENDED`)."""
APPENDED: Verdict = ("failed", "appended")
_MOVED = "the aggregate's partition has moved to another worker"
MAX_ATTEMPTS = 8
"""Decisions of one command against ever newer state before giving up."""


def _plain_receive(actor: Actor) -> Callable[[Any, ActorAddress], None]:
    receive: Callable[[Any, ActorAddress], None] = actor.receiveMessage
    return receive


def _keep(_actor: Actor, _receive: object) -> None:
    """Thespian would put its own receiver here, which looks up a logger at each message."""


class AggregateActor(Actor):  # type: ignore[misc]
    """A thin shell around one aggregate's cell and its folded rows."""

    _receive = property(_plain_receive, _keep)

    gateway: Gateway

    def __init__(self) -> None:
        self.address: Address | None = None
        self.cell: Cell[Any] | None = None
        self.rows: list[Any] | None = None
        self.sequence: int | None = None
        self.stash: list[Request] | None = None
        self.deciding: list[tuple[Request, int, Verdict]] | None = None
        self.loading = False
        self.alone = False
        self.left = False

    def receiveMessage(self, message: Any, sender: ActorAddress) -> None:  # noqa: N802, ARG002 - Thespian's name
        """Handle one message; a failure is answered, never raised."""
        try:
            kind = type(message)
            if kind is Fold:
                self._fold(message)
            elif kind is Decide:
                self._take(message)
            elif kind is Appended:
                self._appended(message.result)
            elif kind is Loaded:
                self._loaded(message)
            elif kind is Searched:
                self._searched(message)
            elif kind is Leave:
                self._leave()
            elif kind is DropRows:
                self.rows = self.sequence = None
            elif kind is Passivate:
                self.address = self.cell = self.rows = self.sequence = self.stash = None
        except Exception as error:
            self.gateway.alert(f"{self.address and self.address.subject}: {type(error).__name__}: {error}")

    def _fold(self, fold: Fold) -> None:
        turn = fold.turn
        if turn.failure is not None:
            return  # the batch will be folded again
        if fold.rows is not None:
            self.rows, self.sequence = fold.rows, None
        self.address = address = fold.address
        try:
            rows = self.rows or []
            self.sequence = turn.plan.fold(
                address.aggregate, address.id, rows, fold.commits, turn.folded, self.sequence, fold.skip, fold.kept
            )
        except HandlerFailed as failure:
            turn.failure = failure
        if self.cell is not None and self.sequence is not None and self.sequence > self.cell.version:
            self.left = True  # somebody else has written: what we know is out of date
            self._forget_cell()

    def _leave(self) -> None:
        self.left = True
        requests, self.stash = self.stash or [], None
        for request in requests:
            self._fail(request, "unavailable", _MOVED)
        self._forget_cell()

    def _forget_cell(self) -> None:
        """Load the state again before the next decision; one that is under way is concluded with what it has."""
        if self.deciding is None and not self.loading:
            self.cell = None
            self.left = False

    def _take(self, decide: Decide) -> None:
        self.address = decide.address
        self.stash = decide.requests if self.stash is None else self.stash + decide.requests
        if not self.loading and self.deciding is None:
            self._next()

    def _next(self) -> None:
        """Go on with what is stashed: load if the state is not here, else decide."""
        assert self.address is not None
        if not self.stash:
            self.stash = None
        elif self.cell is None:
            self.loading = True
            self.gateway.load(self.address)
        else:
            self._decide(self.cell)

    def _loaded(self, loaded: Loaded) -> None:
        self.loading = False
        self.cell = loaded.cell
        if self.left:
            # what was loaded may have been out of date on arrival
            self._forget_cell()
            self._next()
        elif loaded.error is not None:
            requests, self.stash = self.stash or [], None
            for request in requests:
                self._fail(request, *loaded.error)
        else:
            self._next()

    def _searched(self, searched: Searched) -> None:
        assert self.address is not None
        self.loading = False
        if self.left:
            self._forget_cell()
        request = searched.request
        if searched.found is not None:
            self.gateway.succeed(self.address, request, *searched.found, True)
        elif searched.error:
            self._fail(request, "unavailable", searched.error)
        else:
            request.searched = True
            self.stash = [request, *(self.stash or [])]
        self._next()

    def _decide(self, cell: Cell[Any]) -> None:
        assert self.address is not None
        requests, self.stash = self.stash or [], None
        if not self.gateway.holds(self.address.partition):
            # frozen, perhaps, while somebody else took over: not even a refusal of ours would be worth anything
            for request in requests:
                self._fail(request, "unavailable", _MOVED)
            self.cell = None
            return
        limit = 1 if self.alone else MAX_DECISIONS
        version = cell.version
        decisions: list[Decision] = []
        deciding: list[tuple[Request, int, Verdict]] = []
        for place, request in enumerate(requests):
            sent = request.sent
            if deciding and (
                len(decisions) == limit or any(one[0].sent.command_id == sent.command_id for one in deciding)
            ):
                self.stash = requests[place:]
                break
            known = cell.commands.get(sent.command_id)
            if known is not None:
                self.gateway.succeed(self.address, request, known[0], known[1], True)
                continue
            if not request.searched and sent.command_id in cell.seen:
                if not decisions:
                    # nothing is decided until it is known: what happens meanwhile could push it out of memory
                    self.loading = True
                    self.stash = requests[place + 1 :]
                    self.gateway.search(self.address, request)
                    return
                self.stash = requests[place:]
                break
            verdict: Verdict = None
            events: list[Any] = []
            try:
                events = cell.decide(request.command, Context(sent.command_id))
            except Rejected as rejection:
                verdict = "rejected", str(rejection)
            except Exception as error:
                verdict, request.error = ("failed", f"{type(error).__name__}: {error}"), error
            if not events:
                if decisions:
                    # it rests on events that are not in the log yet, and perhaps never will be
                    deciding.append((request, cell.version, verdict))
                else:
                    self._conclude(request, cell.version, cell.position, verdict)
                continue
            try:
                cell.evolve(events)
            except Exception as error:
                # an applier failed halfway: only the log knows the state now
                request.error = error
                self._fail(request, "failed", f"{type(error).__name__} while applying: {error}")
                self.cell = None
                self.stash = [one[0] for one in deciding] + requests[place + 1 :]
                self._next()
                return
            request.attempts += 1
            decisions.append(
                Decision(sent.command_id, events, sent.correlation_id, sent.causation_id, sent.traceparent)
            )
            deciding.append((request, cell.version, APPENDED))
        if decisions:
            self.deciding = deciding
            self.gateway.append(self.address, cell, version, decisions)
        elif self.stash is not None:
            self._next()

    def _appended(self, result: int | Exception) -> None:
        assert self.address is not None
        deciding, self.deciding = self.deciding or [], None
        cell = self.cell
        if isinstance(result, int) and cell is not None:
            cell.position = result
            self.alone = False
            for request, version, verdict in deciding:
                if verdict is APPENDED:
                    cell.remember(request.sent.command_id, version, result)
                    self.gateway.succeed(self.address, request, version, result, False)
                else:
                    self._conclude(request, version, result, verdict)
        else:
            self.cell = None  # it has folded events that are not in the log, as far as we know
            again = [request for request, _, _ in deciding]
            if isinstance(result, PayloadTooLarge | Unstorable) and len(again) > 1:
                self.alone = True  # one of them is to blame, or all together: one by one
            elif isinstance(result, Conflict):
                if result.uncertain:
                    # ours may be in the log below somebody else's: only the whole history knows
                    for request in again:
                        request.searched = False
                for request in [one for one in again if one.attempts >= MAX_ATTEMPTS]:
                    again.remove(request)
                    self._fail(request, "conflict", f"{self.address.aggregate} {self.address.id} kept changing")
            else:
                for request, _, verdict in deciding:
                    # what appended nothing is only told that it was decided on what was not stored
                    self._fail(request, _error_type(result) if verdict is APPENDED else "unavailable", str(result))
                again = []
            if again:
                self.stash = again + (self.stash or [])
        if self.left:
            self._forget_cell()
        self._next()

    def _conclude(self, request: Request, version: int, sequence: int, verdict: Verdict) -> None:
        assert self.address is not None
        if verdict is None:
            self.gateway.succeed(self.address, request, version, sequence, False)
        else:
            self._fail(request, *verdict)

    def _fail(self, request: Request, type: ErrorType, message: str) -> None:
        assert self.address is not None
        self.gateway.fail(self.address, request, type, message)


# Thespian inspects the constructor at every creation: half of its cost, unless the signature is there already
AggregateActor.__init__.__signature__ = inspect.signature(AggregateActor.__init__)  # type: ignore[attr-defined]


def _error_type(error: int | Exception) -> ErrorType:
    if isinstance(error, UnknownOutcome):
        return "unknown-outcome"
    if isinstance(error, PayloadTooLarge):
        return "too-large"
    return "unavailable" if isinstance(error, LogError) else "failed"
