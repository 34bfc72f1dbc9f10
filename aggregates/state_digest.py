"""The digest of an aggregate's state, by which two programs compare what they fold."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from aggregates.aggregate import Aggregate

SIZE = 4
"""Bytes of a digest."""


def digest_state(state: Aggregate) -> bytes:
    """Return the digest of a state: equal for equal fields, in whatever order they are declared."""
    fields = {name: value for name, value in vars(state).items() if name != "id"}
    return blake2b(msgspec.json.encode(fields, enc_hook=repr, order="deterministic"), digest_size=SIZE).digest()
