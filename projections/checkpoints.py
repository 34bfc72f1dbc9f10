"""Who may write, and how far everything has been folded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, func, insert, inspect, select, update

from projections.database import reads
from projections.declaration import DeclaredProjection
from projections.errors import SchemaError
from projections.generations import Generation, live_generation, positions
from projections.tables import checkpoint, projection, stream

Move = tuple[str, int, int, int, int]
"""A checkpoint's step: projection, generation, partition, from, to."""


class Position:
    """How far each live generation has folded each partition.

    Args:
        folded: stream sequence by partition, for each projection in the plan's order.
    """

    def __init__(self, folded: Sequence[dict[int, int]]) -> None:
        self._folded = [dict(one) for one in folded]
        self._touched: set[int] = set()
        everything = [sequence for one in folded for sequence in one.values()]
        self.lowest = min(everything, default=0)
        self.highest = max(everything, default=0)

    def least(self, partition: int) -> int:
        """Return up to where every projection has folded a partition."""
        return min((one[partition] for one in self._folded), default=0)

    def of(self, projection: int) -> Mapping[int, int]:
        """Return how far a projection has folded, by partition."""
        return self._folded[projection]

    def folded(self, partition: int, sequence: int) -> frozenset[int]:
        """Return the projections that have folded this place of the stream already."""
        return frozenset(index for index, one in enumerate(self._folded) if one[partition] >= sequence)

    def touch(self, partition: int) -> None:
        """Note that the batch holds something of this partition."""
        self._touched.add(partition)

    def moves(self, generations: Sequence[Generation], to: int) -> list[Move]:
        """Return the steps of the touched partitions."""
        touched, self._touched = self._touched, set()
        return self._steps(generations, to, touched)

    def quiet_moves(self, generations: Sequence[Generation], to: int) -> list[Move]:
        """Return the steps that bring every partition up to a place that has been read."""
        return self._steps(generations, to, None)

    def _steps(self, generations: Sequence[Generation], to: int, touched: set[int] | None) -> list[Move]:
        return [
            (made.name, made.number, partition, old, to)
            for made, one in zip(generations, self._folded, strict=True)
            for partition, old in one.items()
            if old < to and (touched is None or partition in touched)
        ]

    def advance(self, moves: Sequence[Move], generations: Sequence[Generation]) -> None:
        """Take the steps."""
        index_of = {made.name: index for index, made in enumerate(generations)}
        for name, _, partition, _, to in moves:
            self._folded[index_of[name]][partition] = to


@dataclass(frozen=True, slots=True)
class Claim:
    """Partitions of the live generations as their owner took them.

    Attributes:
        epoch: higher than that of any claim before; every batch must find it unchanged.
        position: where the partitions stood.
    """

    epoch: int
    generations: list[Generation]
    position: Position


def knows(engine: Engine, app: str) -> bool:
    """Say whether this database was folded from an app's stream."""
    if not inspect(engine).has_table(stream.name):
        return False
    with reads(engine).connect() as connection:
        return connection.scalar(select(stream.c.app).where(stream.c.app == app)) is not None


def register(engine: Engine, app: str, created: str, partitions: int, last: int) -> None:
    """Tie this database to the app's stream, or make sure that it is the one it is tied to.

    Args:
        created, partitions, last: what the log says about itself.

    Raises:
        SchemaError: this database was folded from another stream, or from more than the stream now holds.
    """
    with engine.begin() as connection:
        known = connection.execute(select(stream).where(stream.c.app == app).with_for_update()).first()
        if known is None:
            if other := connection.scalar(select(stream.c.app)):
                raise SchemaError(f"this database belongs to the app {other!r}; give each app a database of its own")
            connection.execute(insert(stream).values(app=app, created=created, partitions=partitions, epoch=0))
            return
        if known.created != created:
            raise SchemaError(
                f"this database was folded from the stream {app!r} created {known.created}, but the log's was created "
                f"{created}: use that log's own database, or an empty one, and the tables are built from the log"
            )
        if known.partitions != partitions:
            raise SchemaError(f"this database knows {known.partitions} partitions, the stream has {partitions}")
        furthest = connection.scalar(select(func.max(checkpoint.c.sequence))) or 0
        if furthest > last:
            raise SchemaError(
                f"the projections have folded up to sequence {furthest}, but the log ends at {last}: it was truncated, "
                "or restored from an older backup. Restore the newer log, or start with an empty database"
            )


def claim(engine: Engine, app: str, declared: Sequence[DeclaredProjection], partitions: Iterable[int]) -> Claim:
    """Put a new epoch on these partitions of the live generations: whoever had them can't write any more.

    Raises:
        SchemaError: a projection has no live generation; it must be built first.
    """
    owned = sorted(partitions)
    with engine.begin() as connection:
        # the row's lock makes two that claim at once take one epoch after the other
        connection.execute(update(stream).where(stream.c.app == app).values(epoch=stream.c.epoch + 1))
        epoch = int(connection.scalar(select(stream.c.epoch).where(stream.c.app == app)) or 0)
        generations = []
        for one in declared:
            live = live_generation(connection, one)
            if live is None:
                raise SchemaError(f"projection {one.name} version {one.version} has not been built")
            generations.append(live)
            connection.execute(
                update(checkpoint)
                .where(
                    checkpoint.c.projection == live.name,
                    checkpoint.c.generation == live.number,
                    checkpoint.c.partition.in_(owned),
                )
                .values(epoch=epoch)
            )
        stood = [positions(connection, live) for live in generations]
        return Claim(epoch, generations, Position([{one: at[one] for one in owned} for at in stood]))


def reached(connection: Connection, partition: int, names: Sequence[str] = ()) -> dict[str, int]:
    """Return how far the live projections have folded a partition, by projection.

    Args:
        names: only these projections; all of them if empty.
    """
    query = (
        select(checkpoint.c.projection, checkpoint.c.sequence)
        .join(
            projection,
            (projection.c.name == checkpoint.c.projection) & (projection.c.generation == checkpoint.c.generation),
        )
        .where(projection.c.state == "live", checkpoint.c.partition == partition)
    )
    if names:
        query = query.where(projection.c.name.in_(names))
    return {row.projection: row.sequence for row in connection.execute(query)}
