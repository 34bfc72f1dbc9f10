"""The locks of a cut-over: each is waited for shortly, and all are given back between two tries."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from operator import attrgetter

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from projections import Fenced, generations, views
from projections.contention import is_contention
from projections.following import beside_of, fence_all, retire_ready
from projections.generations import Generation

logger = logging.getLogger("eskernel.projector")

LOCK_MS = 200
"""Longest wait for a lock. Queries that begin meanwhile queue behind it for as long."""
PAUSE_S = 1.0
"""Between two tries. The live projections and the queries go on meanwhile."""
WARN_EVERY_S = 10.0
_LOCK_NOT_AVAILABLE = "55P03"
_SQLITE_BUSY = 5


def take_over(connection: Connection, made: Sequence[Generation], epoch: int) -> int:
    """Stop the live generations and point the views at these, in a transaction that this begins.

    The views come last, and are locked until the transaction ends.

    Args:
        epoch: that the checkpoints of these generations must carry.

    Returns:
        how far the live generations have folded: stream sequence.

    Raises:
        sqlalchemy.exc.DBAPIError: a lock was not to be had (`is_locked`), or the database failed; roll back.
        Fenced: one of these generations is somebody else's by now, or dropped; roll back.
        SchemaError: a view can't be replaced or dropped because others depend on it; roll back.
    """
    limit_locks(connection)
    furthest = 0
    for generation in sorted(made, key=attrgetter("name")):  # as every claim locks the checkpoints
        live = generations.numbers(connection, generation.name, "live", lock=True)
        # in the order in which all writers lock them
        beside = beside_of(connection, generation)
        for number in sorted({*live, *beside, generation.number}):
            epochs = generations.lock_checkpoints(connection, generation.name, number)
            if number == generation.number and set(epochs.values()) != {epoch}:
                raise Fenced(f"generation {number} of {generation.name} was dropped, or another process writes it")
        for number in beside:
            # programs of this version keep up to date from now on what readers see
            fence_all(connection, generation.name, number)
        furthest = max(furthest, *generations.retire_live(connection, generation.name).values(), 0)
    views.lock(connection, [view for generation in made for view in generations.views_of(connection, generation)])
    for generation in made:
        generations.show(connection, generation)
        retire_ready(connection, generation)
    if connection.dialect.name == "postgresql":
        views.execute(connection, "SET LOCAL lock_timeout TO DEFAULT")
    return furthest


def limit_locks(connection: Connection) -> None:
    """Have this transaction wait for locks shortly only: queries that begin meanwhile queue behind it."""
    if connection.dialect.name == "postgresql":
        views.execute(connection, f"SET LOCAL lock_timeout = {LOCK_MS}")


def is_locked(error: DBAPIError) -> bool:
    """Return whether the database failed because another transaction holds a lock."""
    if is_contention(error) or getattr(error.orig, "sqlstate", None) == _LOCK_NOT_AVAILABLE:
        return True
    return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == _SQLITE_BUSY


class LockWait:
    """Counts the tries of a cut-over, and logs who holds the locks."""

    def __init__(self, made: Sequence[Generation]) -> None:
        self.tries = 0
        self._made = made
        self._began = time.monotonic()
        self._warned = -WARN_EVERY_S

    def note(self, connection: Connection) -> None:
        """Count a try that failed. Log it at the first one, and then once in a while."""
        self.tries += 1
        waited = time.monotonic() - self._began
        if waited - self._warned < WARN_EVERY_S:
            return
        self._warned = waited
        holders = []
        for generation in self._made:
            for view in generation.views:
                holders += [f"{view}: {reader}" for reader in views.readers(connection, view)]
        connection.rollback()
        logger.warning(
            "the new tables of %s are ready; the cut-over waits for a lock (%d tries in %.0f s); the live projections "
            "go on meanwhile. Open transactions: %s",
            ", ".join(generation.name for generation in self._made),
            self.tries,
            waited,
            "; ".join(holders) or "none is known",
        )
