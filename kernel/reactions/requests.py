"""The commands that policies owe, in their wire form."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson

from aggregates.aggregate import name_of
from aggregates.commit import Envelope
from aggregates.messages import dumps, parse, spec_of
from aggregates.policies import Send
from aggregates.reacting import Due, derive_command_id
from kernel.app import App
from kernel.errors import NotDeclared

_decode = msgspec.json.Decoder(Envelope).decode


class Stored(msgspec.Struct):
    """A command that a timer owes, as it is kept in SQL.

    Attributes:
        request: in its wire form.
        place: where it stands among what the policy owes for the event.
        envelope: the event, without its data.
        aggregate_id: whose event it is.
    """

    request: dict[str, Any]
    place: str
    envelope: msgspec.Raw
    aggregate_id: str


def request_of(app: App, policy: str, due: Due, envelope: Envelope) -> dict[str, Any]:
    """Return a command that a policy owes in its wire form. Its id follows from the event, the policy and the place.

    Who sent the event's command, for which tenant, and the metadata go on with it; when the event occurred does not.
    A timer that is due within a second of its event counts as sent at once: a loop through it is noticed.

    Raises:
        NotDeclared: the app has no such aggregate, or that has no such command.
    """
    send = due.send
    declared = app.type_of(name_of(send.aggregate))
    spec = spec_of(type(send.command))
    if spec is None or declared.commands.get(spec.name) is not type(send.command):
        known = ", ".join(sorted(declared.commands))
        raise NotDeclared(
            f"{policy} sends {type(send.command).__name__}, which {declared.name} does not handle; it has {known}"
        )
    request: dict[str, Any] = {
        "aggregate": declared.name,
        "id": send.id,
        "command": spec.name,
        "data": send.command,
        "command_id": derive_command_id(envelope.id, policy, due.place, due.moment),
        "correlation_id": envelope.correlation_id or envelope.commandid or None,
        "causation_id": envelope.id,
        "traceparent": envelope.traceparent,
        "depth": envelope.depth + 1,
        "actor": envelope.actor,
        "tenant": envelope.tenant,
        "metadata": envelope.metadata,
    }
    return request


def store(request: dict[str, Any], place: str, envelope: Envelope, aggregate_id: str) -> str:
    """Return the text that is kept of a command until its time comes."""
    bare = msgspec.json.encode(msgspec.structs.replace(envelope, data=msgspec.Raw(b"null")))
    kept = {"request": request, "place": place, "envelope": orjson.Fragment(bare), "aggregate_id": aggregate_id}
    return dumps(kept).decode()


def restore(text: str) -> tuple[Stored, Envelope]:
    """Return the command of a timer, and the event that set it."""
    stored = msgspec.json.decode(text, type=Stored)
    return stored, _decode(stored.envelope)


def sent_of(app: App, request: dict[str, Any]) -> Send:
    """Return what a request in its wire form sends.

    Raises:
        NotDeclared, aggregates.InvalidMessage: this program does not know it.
    """
    declared = app.type_of(str(request["aggregate"]))
    command = declared.commands.get(str(request["command"]))
    if command is None:
        raise NotDeclared(f"{declared.name} has no command {request['command']!r}")
    data = orjson.loads(dumps(request["data"]))
    return Send(declared.cls, str(request["id"]), parse(command, data))
