"""A commit: the events of one decision, or of several appended together, as one CloudEvents 1.0 JSON batch.

https://github.com/cloudevents/spec, JSON batch format. The extension attributes are ours: `sequence` (the event's
place in its aggregate, from 1), `dataversion` (schema version), `commandid`, `correlationid`, `causationid`, and
`traceparent` of the distributed tracing extension; `depth` where policies led to the command. What the sender says of
itself are `actor`, `tenant`, `occurredat`, and the attributes that `metadatakeys` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
import orjson

from aggregates.context import uuid7
from aggregates.encoding import EncodedEvent
from aggregates.errors import InvalidMessage
from aggregates.messages import dumps
from aggregates.origin import UNKNOWN, Origin

Depth = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
"""Number of policies in a row that led to a command; an integer as CloudEvents has them."""


class Envelope(
    msgspec.Struct,
    gc=False,
    rename={
        "causation_id": "causationid",
        "correlation_id": "correlationid",
        "occurred_at": "occurredat",
        "metadata": "_metadata",  # no attribute can have this name: `decode` collects them
    },
):
    """One stored event before its data is decoded.

    Attributes:
        id: UUIDv7 of the event.
        type: the event's wire name.
        time: moment of the decision, RFC 3339 in UTC.
        sequence: place in the aggregate's history, from 1.
        dataversion: schema version of `data`.
        data: the event's fields as JSON bytes.
        commandid: id of the command that caused the event.
        depth: number of policies in a row that led to the command; 0 if none did.
        occurred_at: when what the event says has happened, RFC 3339 in UTC, if that is not `time`.
        metadatakeys: names of the metadata's attributes, with spaces between them.
        metadata: what else the sender of the command has said.
    """

    id: str
    type: str
    time: str
    sequence: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    data: msgspec.Raw
    dataversion: int = 1
    commandid: str = ""
    correlation_id: str | None = None
    causation_id: str | None = None
    traceparent: str | None = None
    depth: Depth = 0
    actor: str | None = None
    tenant: str | None = None
    occurred_at: str | None = None
    metadatakeys: str | None = None
    metadata: Mapping[str, str] | None = None


class Decision(msgspec.Struct, gc=False):
    """The events that one command led to, and what is stored of the command with each of them."""

    command_id: str
    events: Sequence[EncodedEvent]
    correlation_id: str | None = None
    causation_id: str | None = None
    traceparent: str | None = None
    depth: int = 0
    origin: Origin = UNKNOWN


_decode_items = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode = msgspec.json.Decoder(list[Envelope]).decode


def timestamp(moment: datetime | None = None) -> str:
    """Return a moment of UTC, the present one by default, as RFC 3339, to the microsecond."""
    return (moment or datetime.now(UTC)).isoformat()[:-6] + "Z"


def encode(
    source: str,
    aggregate_id: str,
    decisions: Sequence[Decision],
    sequence: int,
    time: str,
) -> bytes:
    """Return the commit as JSON bytes.

    Args:
        source: CloudEvents source, such as `/bank/Account`.
        sequence: the aggregate's version before this commit.
        time: moment of the decision, as `timestamp()` returns it.
    """
    batch: list[dict[str, Any]] = []
    for decision in decisions:
        for event in decision.events:
            sequence += 1
            item = {
                "specversion": "1.0",
                "id": uuid7(),
                "source": source,
                "type": event.name,
                "subject": aggregate_id,
                "time": time,
                "sequence": sequence,
                "dataversion": event.version,
                "commandid": decision.command_id,
                "data": orjson.Fragment(event.data),
            }
            if decision.correlation_id is not None:
                item["correlationid"] = decision.correlation_id
            if decision.causation_id is not None:
                item["causationid"] = decision.causation_id
            if decision.traceparent is not None:
                item["traceparent"] = decision.traceparent
            if decision.depth:
                item["depth"] = decision.depth
            if decision.origin is not UNKNOWN:
                item |= decision.origin.attributes
            batch.append(item)
    return dumps(batch)


def decode(payload: bytes) -> list[Envelope]:
    """Return the events of a commit; each event's data stays undecoded JSON.

    Raises:
        InvalidMessage: these bytes are not a commit.
    """
    try:
        envelopes = _decode(payload)
        for envelope in envelopes:
            if envelope.metadatakeys is not None:
                _collect_metadata(envelopes, payload)
                break
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidMessage(f"not a commit: {error}") from None
    if not envelopes:
        raise InvalidMessage("not a commit: it contains no events")
    return envelopes


def _collect_metadata(envelopes: list[Envelope], payload: bytes) -> None:
    for envelope, item in zip(envelopes, _decode_items(payload), strict=True):
        found = {}
        for key in (envelope.metadatakeys or "").split():
            try:
                found[key] = _decode_text(item[key])
            except (KeyError, msgspec.MsgspecError):
                continue  # another program's, that names what is no text, or is not there
        envelope.metadata = found
