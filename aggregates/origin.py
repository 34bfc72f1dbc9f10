"""Where a command comes from: who sent it, for which tenant, what else its sender says, and when it happened."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

import msgspec

MAX_NAME = 200
"""Characters of an actor, and of a tenant."""
MAX_VALUE = 500
"""Characters of one value of the metadata."""
MAX_METADATA = 2_000
"""Characters of all metadata of a command, names and values: they are stored with each of its events."""
TOLERANCE = timedelta(minutes=5)
"""The clock of a sender may be ahead of the service's by so much."""
RESERVED = frozenset({
    *("specversion", "id", "source", "type", "subject", "time", "datacontenttype", "dataschema", "data"),
    *("sequence", "sequencetype", "dataversion", "commandid", "correlationid", "causationid"),
    *("traceparent", "tracestate", "depth", "actor", "tenant", "metadatakeys", "occurredat"),
})  # fmt: skip
"""Attributes of CloudEvents, and of ours."""
RESERVED_PREFIX = "eskernel"

_KEY = re.compile(r"[a-z0-9]{1,20}\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NOTHING: Mapping[str, str] = MappingProxyType({})


class Origin(msgspec.Struct, frozen=True):
    """What the sender of a command says beside the command itself. It is stored with the events.

    Attributes:
        actor, tenant: empty if the sender named none.
        metadata: further attributes, texts by name.
        occurred_at: when what the command records has happened, if that is not the moment of its decision.
    """

    actor: str = ""
    tenant: str = ""
    metadata: Mapping[str, str] = _NOTHING
    occurred_at: datetime | None = None

    @property
    def attributes(self) -> dict[str, str]:
        """The CloudEvents attributes that an event has of it."""
        found = {}
        if self.actor:
            found["actor"] = self.actor
        if self.tenant:
            found["tenant"] = self.tenant
        if self.occurred_at is not None:
            found["occurredat"] = self.occurred_at.astimezone(UTC).isoformat().replace("+00:00", "Z")
        if self.metadata:
            found["metadatakeys"] = " ".join(self.metadata)
            found |= self.metadata
        return found


UNKNOWN = Origin()
"""Of a command whose sender says nothing about it."""


def find_problem(actor: str, tenant: str, metadata: Mapping[str, str]) -> str:
    """Return what is wrong with what a sender says, in a sentence; empty if nothing is."""
    for name, text in (("actor", actor), ("tenant", tenant)):
        if len(text) > MAX_NAME:
            return f"{name} has {len(text)} characters, at most {MAX_NAME} are taken"
        if _CONTROL.search(text):
            return f"{name} {text!r} contains control characters"
    size = 0
    for key, value in metadata.items():
        if not _KEY.match(key):
            return f"metadata {key[:40]!r}: a name is 1 to 20 characters, lower-case letters a-z and digits"
        if key in RESERVED or key.startswith(RESERVED_PREFIX):
            return f"metadata {key!r}: this name is reserved; choose another"
        if len(value) > MAX_VALUE:
            return f"metadata {key!r} has {len(value)} characters, at most {MAX_VALUE} are taken"
        if _CONTROL.search(value):
            return f"metadata {key!r} contains control characters: {value!r}"
        size += len(key) + len(value)
    if size > MAX_METADATA:
        return f"the metadata have {size} characters together, at most {MAX_METADATA} are taken"
    return ""


def parse_moment(text: str) -> datetime:
    """Return an RFC 3339 time in UTC.

    Raises:
        ValueError: it is none, or has no zone; the message says so.
    """
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{text[:40]!r} is not a time such as 2026-01-31T12:00:00Z") from None
    raise ValueError(f"{text[:40]!r} has no time zone; write it as 2026-01-31T12:00:00Z")
