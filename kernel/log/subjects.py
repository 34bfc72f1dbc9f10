"""The subjects of an app: events, commands, requests to workers; and the partition of each aggregate."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote, unquote

from aggregates import InvalidId
from kernel.settings import Settings

MAX_TOKEN = 255
"""Largest length of an encoded id in bytes. NATS limits a protocol line, which contains the subject, to 4 KB."""

_SAFE = re.compile(r"[A-Za-z0-9_-]{1,255}\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
APP_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}\Z")


class Address(NamedTuple):
    """The address of an aggregate: the subject of its events, its partition, type and id."""

    subject: str
    partition: int
    aggregate: str
    id: str


NOWHERE = Address("", -1, "", "")
"""The address of no aggregate."""


def fnv1a(text: str) -> int:
    """Return the 32-bit FNV-1a hash of the text's UTF-8 bytes (RFC 9923)."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value


def encode_id(aggregate_id: str) -> str:
    """Return the id as one subject token: all characters except letters, digits, `_` and `-` are percent-encoded.

    Raises:
        InvalidId: the id is empty, is longer than 255 bytes when encoded, contains control characters, or is not valid
            Unicode.
    """
    if _SAFE.match(aggregate_id):
        return aggregate_id
    if not aggregate_id:
        raise InvalidId("an aggregate id can't be empty")
    if _CONTROL.search(aggregate_id):
        raise InvalidId(f"aggregate id {aggregate_id[:40]!r} contains control characters")
    try:
        token = quote(aggregate_id, safe="").replace(".", "%2E").replace("~", "%7E")
    except UnicodeEncodeError:
        raise InvalidId(f"aggregate id {aggregate_id[:40]!r} is not valid Unicode") from None
    if len(token) > MAX_TOKEN:
        raise InvalidId(
            f"aggregate id {aggregate_id[:40]!r}... takes {len(token)} bytes as a subject token, at most {MAX_TOKEN}"
        )
    return token


class Subjects:
    """The subjects of one app.

    Args:
        prefix: first token or tokens of all subjects: the app's name, or the setting `stream.subject_prefix`.
        partitions: partition count of the app's stream.
    """

    def __init__(self, prefix: str, partitions: int) -> None:
        self.prefix = prefix
        self._first = prefix.count(".") + 1
        self.partitions = partitions
        self.address = lru_cache(maxsize=65_536)(self._address)
        self.parse = lru_cache(maxsize=65_536)(self._parse)
        self.row = lru_cache(maxsize=65_536)(self._row)

    def partition(self, aggregate: str, aggregate_id: str) -> int:
        """Return the partition: FNV-1a of `aggregate/id` modulo the number of partitions."""
        return fnv1a(f"{aggregate}/{aggregate_id}") % self.partitions

    def _address(self, aggregate: str, aggregate_id: str) -> Address:
        token = encode_id(aggregate_id)
        partition = self.partition(aggregate, aggregate_id)
        return Address(f"{self.prefix}.evt.{partition}.{aggregate}.{token}", partition, aggregate, aggregate_id)

    def _row(self, projection: str, key: str) -> Address:
        """Return the address of a row with a key of its own. No message has its subject."""
        partition = self.partition(projection, key)
        return Address(f"{self.prefix}.row.{partition}.{projection}.{key}", partition, projection, key)

    def _parse(self, subject: str) -> Address:
        parts = subject.split(".")[self._first :]
        if len(parts) != 4 or parts[0] != "evt" or not subject.startswith(f"{self.prefix}."):
            raise InvalidId(f"{subject!r} is not an event subject of {self.prefix}")
        address = self._address(parts[2], unquote(parts[3]))
        if address.subject != subject:
            raise InvalidId(f"{subject!r} is not an event subject of {self.prefix}; expected {address.subject!r}")
        return address

    def partition_of(self, subject: str) -> int:
        """Return the partition whose owner processes a message, also for a message that is not a commit."""
        token = subject.split(".", self._first + 2)[self._first + 1 : self._first + 2]
        named = (
            int(token[0])
            if token and token[0].isascii() and token[0].isdecimal() and len(token[0]) < 6
            else self.partitions
        )
        return named if named < self.partitions else fnv1a(subject) % self.partitions

    def aggregate_of(self, subject: str, known: Collection[str]) -> str:
        """Return the aggregate's name in an event subject, or an empty text for another subject.

        Args:
            known: names for which the form of a subject is enough; checking the partition takes most of the time.
        """
        parts = subject.split(".")
        if len(parts) == self._first + 4 and parts[self._first + 2] in known:
            return parts[self._first + 2]
        try:
            return self._parse(subject).aggregate
        except InvalidId:
            return ""

    def events(self, partition: int | None = None) -> str:
        """Return the subject filter for all events, or for the events of one partition."""
        return f"{self.prefix}.evt.>" if partition is None else f"{self.prefix}.evt.{partition}.>"

    def snapshot(self, subject: str = "") -> str:
        """Return the subject of an aggregate's snapshots, given that of its events; or the filter for all of them."""
        return f"{self.prefix}.snap{subject[len(self.prefix) + 4 :]}" if subject else f"{self.prefix}.snap.>"

    def of_snapshot(self, subject: str) -> str:
        """Return the subject of an aggregate's events, given that of its snapshots."""
        return f"{self.prefix}.evt{subject[len(self.prefix) + 5 :]}"

    def commands(self, partition: int | str | None = None) -> str:
        """Return the subject of a partition's commands, or of commands whose sender does not know the partition."""
        return f"{self.prefix}.cmd" if partition is None else f"{self.prefix}.cmd.{partition}"

    def service(self, what: str) -> str:
        """Return the subject of requests to all workers: `status`, `leases` or `limits`."""
        return f"{self.prefix}.svc.{what}"


def subjects_of(app: str, settings: Settings) -> Subjects:
    """Return an app's subjects without knowing its stream: the subjects of partitions must not be used."""
    return Subjects(settings.stream.subject_prefix or app, 1)
