"""The wire format of commands and of their answers. docs/wire-format.md describes it for other languages."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
import orjson

from aggregates.commit import Depth
from kernel.errors import CommandError, Overloaded

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
    "conflict",  # others kept appending to the aggregate
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


class CommandRequest(msgspec.Struct):
    """A command as it arrives.

    Attributes:
        command: the command's wire name.
        command_id: repeat it when repeating a command: it takes effect once.
        depth: number of policies in a row that led to the command; 0 if a client sent it.
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


def encode_receipt(receipt: Receipt) -> bytes:
    """Return the answer to a command that took effect."""
    return b'{"ok":%b}' % _encode(receipt)


def encode_error(type: ErrorType, message: str, command_id: str = "", retry_after: float | None = None) -> bytes:
    """Return the answer to a command that did not."""
    # an answer larger than the server takes would cost the whole connection
    # and a text that is no Unicode, such as a file's name with foreign bytes, the answer
    text = message[:MAX_MESSAGE].encode(errors="replace").decode()
    error: dict[str, object] = {"type": type, "message": text}
    if command_id:
        error["command_id"] = command_id[:MAX_COMMAND_ID]
    if retry_after is not None:
        error["retry_after"] = retry_after
    return orjson.dumps({"error": error})


class _Error(msgspec.Struct):
    type: str
    message: str
    retry_after: float | None = None


class _Answer(msgspec.Struct):
    ok: Receipt | None = None
    error: _Error | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode


def decode_answer(payload: bytes) -> Receipt:
    """Return the receipt.

    Raises:
        aggregates.Rejected: the aggregate refused.
        Overloaded: try later.
        CommandError: anything else.
    """
    from aggregates import Rejected

    answer = _decode_answer(payload)
    if answer.ok is not None:
        return answer.ok
    error = answer.error or _Error("malformed", "the service's answer has neither ok nor error")
    if error.type == "rejected":
        raise Rejected(error.message)
    if error.type == "overloaded":
        raise Overloaded(error.type, error.message, error.retry_after)
    raise CommandError(error.type, error.message, error.retry_after)
