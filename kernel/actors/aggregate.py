"""The actor of one live aggregate.

Actors never wait and never raise. The `Gateway` does what takes time (loading, appending) and sends the result as a
message. Meanwhile the actor stashes the commands that come, and then decides them together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

import msgspec
from thespian.actors import Actor, ActorAddress

from aggregates import Context, InvalidEvent, InvalidMessage, Rejected
from aggregates.cell import NEVER, Cell
from aggregates.commit import Decision
from aggregates.encoding import EncodedEvent
from aggregates.state_codec import encode_state
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
from kernel.log.subjects import NOWHERE
from kernel.protocol import ErrorType, Returned, ReturnedEvent, Returning

MAX_DECISIONS = 100
"""Commands decided together in one commit."""
MAX_ATTEMPTS = 8
"""Decisions of one command against ever newer state before giving up."""
_MOVED = "the aggregate's partition has moved to another worker"


class Phase(Enum):
    """What an aggregate's actor waits for. In every phase but the first it stashes the commands that come."""

    READY = auto()
    """Nothing: commands are decided at once, after loading the state where it is not in memory."""
    LOADING = auto()
    """The aggregate's state, from the log."""
    SEARCHING = auto()
    """The search for a command id in the aggregate's history."""
    APPENDING = auto()
    """The outcome of a commit."""


# once: looking up a member of an enum at each message would cost more than the message
_READY, _LOADING, _SEARCHING, _APPENDING = Phase


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """What a command led to, while its answer waits for an append.

    Attributes:
        version: of the aggregate after the command.
        appended: the command made events; they are in the commit that is being appended.
        error: why the command was refused, or failed.
        outdated: the command is for another version.
    """

    request: Request
    version: int
    appended: bool
    error: tuple[ErrorType, str] | None = None
    outdated: bool = False


def _plain_receive(actor: Actor) -> Callable[[Any, ActorAddress], None]:
    receive: Callable[[Any, ActorAddress], None] = actor.receiveMessage
    return receive


def _keep(_actor: Actor, _receive: object) -> None:
    """Ignore Thespian's own receiver, which looks up a logger at each message."""


class AggregateActor(Actor):  # type: ignore[misc]
    """A thin shell around one aggregate's cell and its folded rows.

    Attributes:
        address: the aggregate that the shell serves at present.
        cell: the aggregate's state, or None where it has to be loaded first.
        rows: the folded rows, or None where the database has to be asked first.
        sequence: of the last event folded into the rows, where that is known.
        stash: commands that wait for the present phase to end.
        verdicts: of the commands whose commit is being appended.
        stale: the state may be out of date; it is dropped at the end of the phase.
        singly: commands are decided one by one, since a commit of several was too large.
    """

    _receive = property(_plain_receive, _keep)

    gateway: Gateway

    def __init__(self) -> None:
        self.address = NOWHERE
        self.cell: Cell[Any] | None = None
        self.rows: list[Any] | None = None
        self.sequence: int | None = None
        self.stash: Sequence[Request] = ()
        self.verdicts: Sequence[Verdict] = ()
        self.phase = _READY
        self.stale = False
        self.singly = False

    def receiveMessage(self, message: Any, sender: ActorAddress) -> None:  # noqa: N802, ARG002 - Thespian's name
        """Handle one message; a failure is answered, never raised."""
        try:
            kind = type(message)
            if kind is Fold:
                self._fold(message)
            elif kind is Decide:
                self._take(message)
            elif kind is Appended:
                self._appended(message.result, message.commit)
            elif kind is Loaded:
                self._loaded(message)
            elif kind is Searched:
                self._searched(message)
            elif kind is Leave:
                self._leave()
            elif kind is DropRows:
                self.rows = self.sequence = None
            elif kind is Passivate:
                self._reset()
        except Exception as error:
            self.gateway.report_bug(f"{self.address.subject}: {type(error).__name__}: {error}")

    def _reset(self) -> None:
        self.address, self.phase = NOWHERE, _READY
        self.cell = self.rows = self.sequence = None
        self.stash = self.verdicts = ()
        self.stale = self.singly = False

    # events

    def _fold(self, fold: Fold) -> None:
        turn = fold.turn
        if fold.rows is not None:
            self.rows, self.sequence = fold.rows, None
        self.address = address = fold.address
        rows = self.rows or []
        self.sequence = turn.plan.fold(
            address.aggregate, address.id, rows, fold.commits, turn.folded, self.sequence, fold.skip, fold.kept
        )
        if self.cell is not None and self.sequence is not None and self.sequence > self.cell.version:
            self._forget()  # another writer has appended

    # ownership and freshness of the state

    def _leave(self) -> None:
        requests, self.stash = self.stash, ()
        for request in requests:
            self._fail(request, "unavailable", _MOVED)
        self._forget()

    def _forget(self) -> None:
        """Load the state again before the next decision; what is under way is concluded with the state that it has."""
        self.stale = self.phase is not _READY
        if not self.stale:
            self.cell = None

    def _end_phase(self) -> None:
        self.phase = _READY
        if self.stale:
            self._forget()

    # commands

    def _take(self, decide: Decide) -> None:
        self.address = decide.address
        self.stash = [*self.stash, *decide.requests] if self.stash else decide.requests
        if self.phase is _READY:
            self._go_on()

    def _go_on(self) -> None:
        """Go on with what is stashed: load if the state is not here, else decide."""
        if not self.stash:
            return
        if self.cell is None:
            self.phase = _LOADING
            for request in self.stash:
                request.fresh = True
            self.gateway.load(self.address)
        else:
            self._decide(self.cell)

    def _loaded(self, loaded: Loaded) -> None:
        stale = self.stale  # what was loaded may have been out of date on arrival
        self.cell = loaded.cell
        self._end_phase()
        if loaded.error is not None and not stale:
            requests, self.stash = self.stash, ()
            for request in requests:
                self._fail(request, *loaded.error)
        else:
            self._go_on()

    def _searched(self, searched: Searched) -> None:
        self._end_phase()
        request = searched.request
        if searched.seen is not None and self.cell is not None and self.cell.seen.horizon:
            self.cell.seen = searched.seen  # the snapshot knew the earlier ids only roughly
        if searched.found is not None:
            self._repeat(request, searched.found)
        elif searched.error:
            self._fail(request, "unavailable", searched.error)
        else:
            request.searched = True
            self.stash = [request, *self.stash]
        self._go_on()

    def _decide(self, cell: Cell[Any]) -> None:
        requests, self.stash = self.stash, ()
        if not self.gateway.holds(self.address.partition):
            # this worker may have been frozen while another took over: not even a refusal of ours would be right
            for request in requests:
                self._fail(request, "unavailable", _MOVED)
            self.cell = None
            return
        limit = 1 if self.singly else MAX_DECISIONS
        before = cell.version
        decisions: list[Decision] = []
        verdicts: list[Verdict] = []
        for place, request in enumerate(requests):
            sent = request.sent
            if verdicts and (len(decisions) == limit or _holds(verdicts, sent.command_id)):
                self.stash = requests[place:]
                break
            known = cell.commands.get(sent.command_id)
            if known is not None:
                if decisions and sent.returning == "state":
                    self.stash = requests[place:]  # the state rests on events that are not in the log yet
                    break
                self._repeat(request, known)
                continue
            if not request.searched and sent.command_id in cell.seen:
                if decisions:
                    self.stash = requests[place:]
                    break
                # nothing is decided until it is known: what happens meanwhile could push it out of memory
                self.phase = _SEARCHING
                self.stash = requests[place + 1 :]
                self.gateway.search(self.address, request)
                return
            if sent.if_version is not None and sent.if_version != cell.version:
                if sent.if_version > cell.version and not request.fresh:
                    # another writer may have appended, and the sender have seen it
                    self.stash = requests[place:]
                    if decisions:
                        break
                    self.cell = None
                    self._go_on()
                    return
                outdated = Verdict(request, cell.version, False, outdated=True)
                if decisions:
                    verdicts.append(outdated)
                else:
                    self._answer(outdated, cell.position)
                continue
            error: tuple[ErrorType, str] | None = None
            events: list[EncodedEvent] = []
            try:
                events = cell.decide(request.command, Context(sent.command_id, self.gateway.now, request.origin))
            except Rejected as rejection:
                error = "rejected", str(rejection)
            except InvalidEvent as problem:
                error, request.error = ("invalid-event", str(problem)), problem
            except Exception as problem:
                error, request.error = ("failed", f"{type(problem).__name__}: {problem}"), problem
            if not events:
                if sent.returning is not None:
                    request.returned = _returned(sent.returning, cell, events)
                verdict = Verdict(request, cell.version, False, error)
                if decisions:
                    # it rests on events that are not in the log yet, and perhaps never will be
                    verdicts.append(verdict)
                else:
                    self._answer(verdict, cell.position)
                continue
            try:
                cell.evolve(events)
            except Exception as problem:
                # an applier failed halfway: only the log knows the state now
                cell.due = NEVER
                request.error = problem
                self._fail(request, "failed", f"{type(problem).__name__} while applying: {problem}")
                self.cell = None
                self.stash = [verdict.request for verdict in verdicts] + list(requests[place + 1 :])
                self._go_on()
                return
            request.attempts += 1
            if sent.returning is not None:
                request.returned = _returned(sent.returning, cell, events)
            decisions.append(
                Decision(
                    *(sent.command_id, events, sent.correlation_id, sent.causation_id, sent.traceparent, sent.depth),
                    request.origin,
                )
            )
            verdicts.append(Verdict(request, cell.version, True))
        if decisions:
            self.phase, self.verdicts = _APPENDING, verdicts
            self.gateway.append(self.address, cell, before, decisions)
        else:
            self._go_on()

    def _appended(self, result: int | Exception, commit: bytes) -> None:
        verdicts, self.verdicts = self.verdicts, ()
        # now, so that an answer that fails does not leave the aggregate waiting
        self.phase = _READY
        if isinstance(result, int) and self.cell is not None:
            self.cell.advance(result)
            self.singly = False
            for verdict in verdicts:
                if verdict.appended:
                    self.cell.remember(verdict.request.sent.command_id, verdict.version, result)
                self._answer(verdict, result)
            if self.cell.version >= self.cell.due:
                self.gateway.snapshot(self.address, self.cell, commit)
        else:
            self.cell = None  # it has folded events that are not in the log, as far as we know
            if again := self._to_decide_again(verdicts, result):
                self.stash = [*again, *self.stash]
        self._end_phase()
        self._go_on()

    def _to_decide_again(self, verdicts: Sequence[Verdict], result: int | Exception) -> list[Request]:
        """Return the commands that a failed append leaves to be decided again; the others are answered."""
        requests = [verdict.request for verdict in verdicts]
        if isinstance(result, PayloadTooLarge | Unstorable) and len(requests) > 1:
            self.singly = True  # one of them is to blame, or all together: one by one
            return requests
        if isinstance(result, Conflict):
            if result.uncertain:
                # ours may be in the log below another writer's: only the whole history knows
                for request in requests:
                    request.searched = False
            for request in [request for request in requests if request.attempts >= MAX_ATTEMPTS]:
                requests.remove(request)
                self._fail(request, "conflict", f"{self.address.aggregate} {self.address.id} kept changing")
            return requests
        for verdict in verdicts:
            # what appended nothing is only told that it was decided on what was not stored
            self._fail(verdict.request, _error_type(result) if verdict.appended else "unavailable", str(result))
        return []

    def _repeat(self, request: Request, found: tuple[int, int]) -> None:
        """Answer a command that took effect before with its first receipt."""
        if request.sent.returning == "state":
            if self.cell is None:
                self._fail(request, "unavailable", "the aggregate's state is loaded again")
                return
            request.returned = _returned("state", self.cell, ())
        self.gateway.succeed(self.address, request, *found, True)

    def _answer(self, verdict: Verdict, sequence: int) -> None:
        if verdict.outdated:
            self.gateway.refuse_version(self.address, verdict.request, verdict.version)
        elif verdict.error is None:
            self.gateway.succeed(self.address, verdict.request, verdict.version, sequence, False)
        else:
            self._fail(verdict.request, *verdict.error)

    def _fail(self, request: Request, type: ErrorType, message: str) -> None:
        self.gateway.fail(self.address, request, type, message)


# Thespian inspects the constructor at every creation: half of its cost, unless the signature is there already
AggregateActor.__init__.__signature__ = inspect.signature(AggregateActor.__init__)  # type: ignore[attr-defined]


def _returned(returning: Returning, cell: Cell[Any], events: Sequence[EncodedEvent]) -> Returned:
    if returning == "events":
        return Returned([ReturnedEvent(event.name, event.version, msgspec.Raw(event.data)) for event in events])
    try:
        return Returned(state=msgspec.Raw(encode_state(cell.state)))
    except InvalidMessage as problem:
        return Returned(omitted=str(problem))


def _holds(verdicts: Sequence[Verdict], command_id: str) -> bool:
    return any(verdict.request.sent.command_id == command_id for verdict in verdicts)


def _error_type(error: int | Exception) -> ErrorType:
    if isinstance(error, UnknownOutcome):
        return "unknown-outcome"
    if isinstance(error, PayloadTooLarge):
        return "too-large"
    return "unavailable" if isinstance(error, LogError) else "failed"
