"""What is done about one event: a policy's commands and timers, or an effect's handler."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from aggregates import InvalidId, InvalidMessage, Rejected
from aggregates.commit import Envelope
from aggregates.errors import NewerEvent
from aggregates.meta import Meta
from aggregates.reacting import Cancelled, DeclaredReaction, Due, EventReaction, Owed
from kernel.app import App
from kernel.effect import Effect
from kernel.errors import CommandError, NotDeclared
from kernel.log.subjects import Address
from kernel.protocol import Receipt
from kernel.reactions.requests import request_of, restore, sent_of, store
from kernel.reactions.timers import DueTimer
from kernel.telemetry.metrics import REACTION_COMMANDS
from projections.errors import reason

Send = Callable[[dict[str, Any], float], Awaitable[Receipt]]
"""Sends a command in its wire form until there is an answer, or for so many seconds."""
RecordRejection = Callable[[dict[str, Any]], Awaitable[None]]
Rejections = dict[str, dict[str, str]]
"""Why commands were rejected, by the event's id, and by the place among what follows from the event."""
AGAIN_S = 1.0
"""A command that this worker may not send is tried again after so long: the permissions may be corrected."""
FOREVER = float("inf")
MAX_KEY = 200
MAX_REACTIONS = 1 << 20
"""Reactions to one event at most: the place of a timer has so much room."""


class Failed(Exception):
    """An event that could not be reacted to: its aggregate is parked.

    Attributes:
        transient: it is tried again by itself.
    """

    def __init__(self, error: str, transient: bool) -> None:
        super().__init__(error)
        self.transient = transient


@dataclass(slots=True)
class Task:
    """One event for one policy or effect.

    Attributes:
        number: of the event in its commit, from 1.
        first_place: of its timers, where it is not what follows from the number.
        owed: what a policy owes for it, or why that can't be said.
    """

    address: Address
    stream_sequence: int
    number: int
    envelope: Envelope
    handler: EventReaction | None
    owed: Sequence[Owed] | Exception = ()
    timers: list[dict[str, Any]] = field(default_factory=list)
    first_place: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """Type and id of the event's aggregate."""
        return self.address.aggregate, self.address.id

    @property
    def meta(self) -> Meta:
        """The event's metadata."""
        return Meta(self.envelope, self.address.id, self.stream_sequence)


class Worker(Protocol):
    """What does the work of one policy or effect."""

    def prepare(self, task: Task) -> bool:
        """Look at an event; return whether anything is to be done about it."""

    async def perform(self, task: Task) -> None:
        """Do it.

        Raises:
            Failed: it could not be done, and the event has to wait.
            aggregates.errors.NewerEvent: only a newer program can read the event.
        """


class PolicyWorker:
    """Sends what a policy owes, and collects its timers.

    Args:
        rejected: commands that were rejected before.
        record: records that a command was rejected.
        depth: how many policies in a row may lead to a command.
    """

    def __init__(
        self,
        app: App,
        declared: DeclaredReaction,
        send: Send,
        rejected: Rejections,
        record: RecordRejection,
        depth: int,
    ) -> None:
        self._app, self._declared, self._send = app, declared, send
        self._rejected, self._record, self._depth = rejected, record, depth

    def prepare(self, task: Task) -> bool:
        """See `Worker.prepare`."""
        task.owed = self._find_owed(task)
        return isinstance(task.owed, Exception) or bool(task.owed)

    def _find_owed(self, task: Task) -> Sequence[Owed] | Exception:
        handler, envelope = task.handler, task.envelope
        if handler is None:
            return NewerEvent(_newer(task))
        try:
            event = handler.event.decode(envelope.data, envelope.dataversion)
            return self._declared.owed(handler, event, task.meta)
        except Exception as error:  # handlers are the app's code
            return error

    async def perform(self, task: Task) -> None:
        """See `Worker.perform`."""
        owed = task.owed
        if isinstance(owed, Exception):
            raise _failure(owed, self._app) from owed
        await self._do(task, owed)
        self._rejected.pop(task.envelope.id, None)  # the event is done: nothing asks for it any more

    async def _do(self, task: Task, owed: Sequence[Owed]) -> None:
        for each in owed:
            if isinstance(each, Cancelled):
                task.timers.append(self._timer(task, _checked_key(each.key), None, None))
            elif each.moment is not None:
                request = self._request(each, task)
                if each.moment - task.meta.time >= _SECOND:
                    request["depth"] = 0  # it is an appointment, and no loop
                owed_text = store(request, each.place, task.envelope, task.address.id)
                key = _checked_key(each.key) if each.key else str(request["command_id"])
                task.timers.append(self._timer(task, key, each.moment, owed_text))
            else:
                await self._send_now(task, each)

    def _timer(self, task: Task, key: str, moment: datetime | None, owed: str | None) -> dict[str, Any]:
        place = (task.first_place or task.number * MAX_REACTIONS) + len(task.timers)
        return {
            "name": key,
            "partition": task.address.partition,
            "stream_sequence": task.stream_sequence,
            "place": place,
            "due": None if moment is None else round((moment - _EPOCH) / _MICROSECOND),
            "owed": owed,
        }

    def _request(self, due: Due, task: Task) -> dict[str, Any]:
        if task.envelope.depth >= self._depth:
            raise Failed(
                f"a loop: {task.envelope.depth} policies in a row have led to this event, and {self._declared.name} "
                "sends another command; see policies.depth",
                transient=False,
            )
        try:
            return request_of(self._app, self._declared.name, due, task.envelope)
        except (NotDeclared, TypeError, ValueError) as error:
            raise Failed(reason(error), transient=False) from error

    async def _send_now(self, task: Task, due: Due) -> None:
        request = self._request(due, task)
        why = self._known(task.envelope, due.place) or await self.deliver(request)
        if why:
            await self._note_rejection(task, due.place, request, why)
            await self._react_to_rejection(task, due, why)

    async def _react_to_rejection(self, task: Task, due: Due, why: str) -> None:
        if "." in due.place:
            return  # what on_rejected has sent: recorded, and no more
        try:
            owed = self._declared.owed_after(due, why, task.meta)
        except Exception as error:  # the app's code
            raise _failure(error, self._app) from error
        await self._do(task, owed)

    async def _note_rejection(self, task: Task, place: str, request: dict[str, Any], why: str) -> None:
        event_id = task.envelope.id
        if self._known(task.envelope, place):
            return
        await self._record(
            {
                "policy": self._declared.name,
                "event_id": event_id,
                "place": place,
                "partition": task.address.partition,
                "stream_sequence": task.stream_sequence,
                "aggregate": request["aggregate"],
                "aggregate_id": request["id"],
                "command": request["command"],
                "command_id": request["command_id"],
                "reason": why,
                "rejected": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        self._rejected.setdefault(event_id, {})[place] = why

    async def deliver(self, request: dict[str, Any]) -> str:
        """Send a command until it has an outcome. Return why it was rejected; nothing if it has taken effect.

        Raises:
            Failed: neither.
        """
        while True:
            try:
                await self._send(request, FOREVER)
            except Rejected as rejection:
                REACTION_COMMANDS.labels(policy=self._declared.name, outcome="rejected").inc()
                return str(rejection) or "rejected"
            except CommandError as error:
                if error.type in ("unavailable", "overloaded", "unknown-outcome"):
                    await asyncio.sleep(AGAIN_S)
                    continue
                REACTION_COMMANDS.labels(policy=self._declared.name, outcome="failed").inc()
                what = f"{request['command']} for {request['aggregate']} {request['id']}"
                raise Failed(f"{what}: {error}", transient=error.type == "conflict") from error
            except InvalidId as error:
                raise Failed(f"{request['command']}: {error}", transient=False) from error
            REACTION_COMMANDS.labels(policy=self._declared.name, outcome="ok").inc()
            return ""

    async def fire(self, timer: DueTimer) -> list[dict[str, Any]]:
        """Send the command of a timer whose time has come. Return timers that follow from its rejection.

        Raises:
            Failed: it could not be sent.
        """
        stored, envelope = restore(timer.owed)
        why = self._known(envelope, stored.place) or await self.deliver(stored.request)
        if not why:
            return []
        address = Address("", timer.partition, "", stored.aggregate_id)
        task = Task(address, timer.stream_sequence, 0, envelope, None, first_place=timer.place + 1)
        await self._note_rejection(task, stored.place, stored.request, why)
        try:
            sent = sent_of(self._app, stored.request)
        except Exception as error:  # another program has stored it
            raise _failure(error, self._app) from error
        await self._react_to_rejection(task, Due(stored.place, sent), why)
        self._rejected.pop(envelope.id, None)
        return task.timers

    def remember(self, rejected: Rejections) -> None:
        """Add commands that were rejected before."""
        for event_id, places in rejected.items():
            self._rejected.setdefault(event_id, {}).update(places)

    def _known(self, envelope: Envelope, place: str) -> str:
        """Return why a command was rejected before; nothing if it was not."""
        return self._rejected.get(envelope.id, {}).get(place, "")


class EffectWorker:
    """Runs the handlers of an effect."""

    def __init__(self, app: App, declared: DeclaredReaction) -> None:
        assert isinstance(declared.instance, Effect)
        self._app, self._effect = app, declared.instance

    def prepare(self, task: Task) -> bool:  # noqa: ARG002 - see `Worker.prepare`
        """See `Worker.prepare`: there always is."""
        return True

    async def perform(self, task: Task) -> None:
        """See `Worker.perform`."""
        handler, envelope = task.handler, task.envelope
        if handler is None:
            raise NewerEvent(_newer(task))
        try:
            event = handler.event.decode(envelope.data, envelope.dataversion)
            arguments = (event, task.meta) if handler.wants_meta else (event,)
            async with asyncio.timeout(self._effect.timeout):
                await handler.function(self._effect, *arguments)
        except NewerEvent:
            raise
        except TimeoutError as error:
            raise Failed(f"TimeoutError: not done within {self._effect.timeout:g} s", transient=True) from error
        except Exception as error:  # the world outside: what failed may succeed later
            raise Failed(reason(error), transient=not isinstance(error, InvalidMessage)) from error


def _newer(task: Task) -> str:
    return f"{task.address.aggregate} has no event named {task.envelope.type!r}: a newer program has appended it"


def _failure(error: Exception, app: App) -> Exception:
    if isinstance(error, NewerEvent):
        return error
    return Failed(reason(error), isinstance(error, app.transient))


def _checked_key(key: object) -> str:
    if not isinstance(key, str) or not key or len(key) > MAX_KEY or not key.isprintable():
        raise Failed(f"a timer's key is a printable text of at most {MAX_KEY} characters, not {key!r:.80}", False)
    return key


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = datetime.resolution * 1_000_000
_MICROSECOND = datetime.resolution
