"""The wire format of commands and of their answers. docs/wire-format.md describes it for other languages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypedDict, TypeVar, Unpack

import msgspec
import orjson

from aggregates import Aggregate, Rejected
from aggregates.aggregate import name_of
from aggregates.commit import Depth
from aggregates.context import uuid7
from aggregates.messages import spec_of
from aggregates.origin import TOLERANCE, UNKNOWN, Origin, find_problem, parse_moment
from kernel.errors import CommandError, Overloaded, VersionConflict

A = TypeVar("A", bound=Aggregate)

ErrorType = Literal[
    "malformed",  # not JSON, or not of the request's form
    "unknown-aggregate",
    "unknown-command",
    "invalid-command",  # a field is missing, unknown, of the wrong type, or too long
    "invalid-id",
    "rejected",  # the aggregate refused; the message is its own
    "failed",  # the user's code raised something else
    "invalid-event",  # a handler returned an event that can't be stored, or not be read back as the same value
    "too-large",
    "conflict",  # the aggregate has not the version that the sender has seen, or others kept appending to it
    "overloaded",  # try again after `retry_after` seconds
    "unavailable",  # the log can't be reached, or this worker can't read the history yet; nothing was appended
    "unknown-outcome",  # repeat with the same command id to find out
]


MAX_COMMAND_ID = 200
"""Characters of a command's id, and of the ids of its correlation and its cause: they are stored with each event."""
MAX_TRACEPARENT = 128
"""Characters of a trace context; version 00 has 55."""
INTEGERS = -(2**63), 2**63 - 1
"""Smallest and largest integer of a command: what the integer columns of databases carry."""
MAX_MESSAGE = 4_000
"""Characters of an error's message; the rest is cut."""


Returning = Literal["events", "state"]
Version = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class CommandOptions(TypedDict, total=False):
    """What may be said of a command beside its fields. None is the same as leaving it out.

    Attributes:
        command_id: give one to repeat a command across clients or restarts; a new UUIDv7 otherwise.
        if_version: take effect only if the aggregate has this version, that is, so many events; 0: if it has none yet.
        actor: who sends the command; at most 200 characters.
        tenant: the tenant that it is for; at most 200 characters.
        metadata: what else is to be known, texts by name. A name has up to 20 characters, a-z and 0-9, a value up to
            500 characters, all of them together up to 2,000.
        occurred_at: when what the command records has happened, if that is not now: an aware datetime.
        correlation_id: of what belongs together; the command's own id otherwise.
        causation_id: of the command or the event that led to this one.
        traceparent: W3C trace context that the command belongs to; the OpenTelemetry span that the caller is in, if
            there is one, otherwise.
    """

    command_id: str | None
    if_version: int | None
    actor: str | None
    tenant: str | None
    metadata: Mapping[str, str] | None
    occurred_at: datetime | None
    correlation_id: str | None
    causation_id: str | None
    traceparent: str | None


class CommandMessage:
    """A command for an aggregate, with what is said of it.

    Args:
        options: as `Client.execute` takes them; see `CommandOptions`.

    Raises:
        TypeError: `command` is not a command, or there is no such option.

    Attributes:
        aggregate: name of the aggregate's type.
        id: of the aggregate.
        command_id: the one that was given, or a new UUIDv7.
        request: the command in its wire form.
    """

    __slots__ = ("aggregate", "command", "command_id", "id", "request")

    def __init__(
        self, aggregate: type[Aggregate], id: str, command: object, /, **options: Unpack[CommandOptions]
    ) -> None:
        spec = spec_of(type(command))
        if spec is None or spec.kind != "command":
            raise TypeError(f"{command!r} is not a command; mark its class with @command")
        self.aggregate, self.id, self.command = name_of(aggregate), id, command
        self.command_id = options.get("command_id") or uuid7()
        self.request: dict[str, Any] = {
            "aggregate": self.aggregate,
            "id": id,
            "command": spec.name,
            "data": command,
            "command_id": self.command_id,
        }
        for name, value in options.items():
            if name not in _OPTIONS:
                raise TypeError(f"a command has no option {name!r}; there are {', '.join(sorted(_OPTIONS))}")
            if value is not None and name != "command_id":
                self.request[name] = value

    def __repr__(self) -> str:
        return f"CommandMessage({self.aggregate}, {self.id!r}, {self.command!r}, command_id={self.command_id!r})"


_OPTIONS = frozenset(CommandOptions.__annotations__)


class CommandRequest(msgspec.Struct):
    """A command as it arrives.

    Attributes:
        command: the command's wire name.
        command_id: repeat it when repeating a command: it takes effect once.
        depth: number of policies in a row that led to the command; 0 if a client sent it.
        if_version: take effect only if the aggregate has this version.
        occurred_at: when what the command records has happened, RFC 3339 with a zone.
        returning: what the answer shall hold beside the receipt.
    """

    aggregate: str
    id: str
    command: str
    data: Any = msgspec.field(default_factory=dict)
    command_id: str = ""
    correlation_id: str | None = None
    causation_id: str | None = None
    traceparent: str | None = None
    depth: Depth = 0
    if_version: Version | None = None
    actor: str | None = None
    tenant: str | None = None
    metadata: dict[str, str] | None = None
    occurred_at: str | None = None
    returning: Returning | None = None


decode_request = msgspec.json.Decoder(CommandRequest).decode
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_MANY_DIGITS = 19 * b"0"
"""What a payload has in which a number may be out of range, once each digit is a zero."""


def find_oversized(request: CommandRequest, payload: bytes) -> str:
    """Return what is wrong with the ids of a request, or with a number of its data, in a sentence; empty if nothing is.

    What a sender may make as long as a message would be stored with every event.
    """
    text = request.command_id
    if request.correlation_id or request.causation_id or request.traceparent:
        text = f"{text}{request.correlation_id}{request.causation_id}{request.traceparent}"
    if (len(text) > MAX_TRACEPARENT or not text.isprintable()) and (problem := _find_bad_id(request)):
        return problem
    return _find_integer(request.data) if _MANY_DIGITS in payload.translate(_DIGITS) else ""


def origin_of(request: CommandRequest, now: Callable[[], datetime]) -> Origin:
    """Return what the sender of a command says of it.

    Args:
        now: returns the present moment.

    Raises:
        ValueError: it can't be stored; the message says what is wrong.
    """
    if not (request.actor or request.tenant or request.metadata or request.occurred_at):
        return UNKNOWN
    actor, tenant, metadata = request.actor or "", request.tenant or "", request.metadata or {}
    if problem := find_problem(actor, tenant, metadata):
        raise ValueError(problem)
    occurred_at = None
    if request.occurred_at:
        try:
            occurred_at = parse_moment(request.occurred_at)
        except ValueError as error:
            raise ValueError(f"occurred_at: {error}") from None
        if occurred_at > now() + TOLERANCE:
            minutes = TOLERANCE.total_seconds() / 60
            raise ValueError(f"occurred_at {request.occurred_at} is more than {minutes:g} minutes ahead of the service")
    return Origin(actor, tenant, metadata, occurred_at)


def _find_bad_id(request: CommandRequest) -> str:
    for name, text, most in (
        ("command_id", request.command_id, MAX_COMMAND_ID),
        ("correlation_id", request.correlation_id, MAX_COMMAND_ID),
        ("causation_id", request.causation_id, MAX_COMMAND_ID),
        ("traceparent", request.traceparent, MAX_TRACEPARENT),
    ):
        if text and len(text) > most:
            return f"{name} has {len(text)} characters, at most {most} are taken"
        if text and _CONTROL.search(text):
            return f"{name} {text!r} contains control characters"
    return ""


def _find_integer(data: Any) -> str:
    """Return a sentence about an integer that events or columns can't carry."""
    low, high = INTEGERS
    left = [data]
    while left:
        value = left.pop()
        for item in value.values() if type(value) is dict else value if type(value) is list else (value,):
            kind = type(item)
            if kind is int:
                if not low <= item <= high:
                    return f"a number has {item.bit_length()} bits; integers are from -2^63 to 2^63 - 1"
            elif kind is dict or kind is list:
                left.append(item)
    return ""


_encode = msgspec.json.Encoder().encode


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """What the sender of a command gets when it has taken effect.

    Attributes:
        version: the aggregate's version afterwards: how many events it has.
        sequence: stream sequence of the commit; what `after=` waits for.
        partition: partition of the aggregate.
        command_id: the command's id.
        duplicate: the command had taken effect before; this is its first receipt again.
    """

    version: int
    sequence: int
    partition: int
    command_id: str
    duplicate: bool = False


class ReceiptWithEvents(Receipt, frozen=True, gc=True):
    """A receipt that holds what the command led to.

    Attributes:
        events: in their order; also of a repeated command, those that it led to the first time.
    """

    events: tuple[Any, ...] = ()


class ReceiptWithState(Receipt, Generic[A], frozen=True, gc=True, kw_only=True):
    """A receipt that holds the aggregate.

    Attributes:
        state: after the command; of a repeated command, the present one. It is the caller's own.
    """

    state: A


class ReturnedEvent(msgspec.Struct, gc=False):
    """An event in an answer, named as in the log."""

    type: str
    dataversion: int
    data: msgspec.Raw


class Returned(msgspec.Struct, omit_defaults=True):
    """What an answer holds beside the receipt.

    Attributes:
        omitted: why it does not hold what was asked for; empty if it does.
    """

    events: list[ReturnedEvent] | None = None
    state: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    omitted: str = ""


def encode_receipt(receipt: Receipt, returned: Returned | None = None) -> bytes:
    """Return the answer to a command that took effect."""
    if returned is None:
        return b'{"ok":%b}' % _encode(receipt)
    return b'{"ok":%b,"returned":%b}' % (_encode(receipt), _encode(returned))


def encode_error(
    type: ErrorType,
    message: str,
    command_id: str = "",
    retry_after: float | None = None,
    version: int | None = None,
) -> bytes:
    """Return the answer to a command that did not.

    Args:
        version: that the aggregate has, where the sender expected another one.
    """
    # an answer larger than the server takes would cost the whole connection
    # and a text that is no Unicode, such as a file's name with foreign bytes, the answer
    text = message[:MAX_MESSAGE].encode(errors="replace").decode()
    error: dict[str, object] = {"type": type, "message": text}
    if command_id:
        error["command_id"] = command_id[:MAX_COMMAND_ID]
    if retry_after is not None:
        error["retry_after"] = retry_after
    if version is not None:
        error["version"] = version
    return orjson.dumps({"error": error})


class _Error(msgspec.Struct):
    type: str
    message: str
    retry_after: float | None = None
    version: int | None = None


class _Answer(msgspec.Struct):
    ok: Receipt | None = None
    error: _Error | None = None
    returned: Returned | None = None


class Answered(Receipt, frozen=True, gc=True, kw_only=True):
    """A receipt with what came beside it, not decoded yet."""

    returned: Returned


_decode_answer = msgspec.json.Decoder(_Answer).decode


def decode_answer(payload: bytes) -> Receipt:
    """Return the receipt, an `Answered` if the answer holds more.

    Raises:
        aggregates.Rejected: the aggregate refused.
        Overloaded: try later.
        VersionConflict: the aggregate has another version than the sender expected.
        CommandError: anything else.
    """
    answer = _decode_answer(payload)
    if (ok := answer.ok) is not None:
        if answer.returned is None:
            return ok
        return Answered(ok.version, ok.sequence, ok.partition, ok.command_id, ok.duplicate, returned=answer.returned)
    error = answer.error or _Error("malformed", "the service's answer has neither ok nor error")
    if error.type == "rejected":
        raise Rejected(error.message)
    if error.type == "overloaded":
        raise Overloaded(error.type, error.message, error.retry_after)
    if error.type == "conflict" and error.version is not None:
        raise VersionConflict(error.message, error.version)
    raise CommandError(error.type, error.message, error.retry_after)
