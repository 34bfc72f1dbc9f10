"""Checkpoints: how far each generation has folded each partition, and which epoch may write."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from sqlalchemy import Connection, Engine, select, update

from projections.contention import outlast_contention
from projections.database import reads
from projections.declaration import DeclaredProjection
from projections.errors import Fenced, SchemaError
from projections.generations import (
    FENCE,
    RETIRED_EPOCH,
    Generation,
    live_generation,
    lock_checkpoints,
    numbers,
    positions,
)
from projections.heads import mark_keepers
from projections.tables import checkpoint, projection, stream

Move = tuple[str, int, int, int, int]
"""A step of a checkpoint: projection, generation, partition, sequence before, sequence after."""


class Position:
    """How far each live generation has folded each partition.

    Args:
        folded: stream sequence by partition, for each projection in the plan's order.

    Attributes:
        paused: projections that stay where they are.
        lowest, highest: lowest and highest sequence at the claim, of projections that are not paused.
    """

    def __init__(self, folded: Sequence[dict[int, int]]) -> None:
        self._folded = [dict(sequences) for sequences in folded]
        self._touched: set[int] = set()
        self.paused: frozenset[int] = frozenset()
        self.pause(self.paused)

    def pause(self, paused: frozenset[int]) -> None:
        """Leave these projections where they are: nothing is read or folded for them. Call it before anything else."""
        self.paused = paused
        self._active = [each for index, each in enumerate(self._folded) if index not in paused] or self._folded
        everything = [sequence for sequences in self._active for sequence in sequences.values()]
        self.highest = max(everything, default=0)
        self.lowest = min(everything, default=0) if len(paused) < len(self._folded) else self.highest

    def least(self, partition: int) -> int:
        """Return the sequence up to which every projection that is not paused has folded a partition."""
        return min((sequences[partition] for sequences in self._active), default=0)

    def of(self, projection: int) -> Mapping[int, int]:
        """Return how far a projection has folded, by partition."""
        return self._folded[projection]

    def folded(self, partition: int, sequence: int) -> frozenset[int]:
        """Return the projections that have folded this stream sequence already."""
        return frozenset(
            index
            for index, sequences in enumerate(self._folded)
            if sequences[partition] >= sequence or index in self.paused
        )

    def touch(self, partition: int) -> None:
        """Note that the batch contains a commit of this partition."""
        self._touched.add(partition)

    def moves(self, generations: Sequence[Generation], to: int) -> list[Move]:
        """Return the steps of the touched partitions."""
        touched, self._touched = self._touched, set()
        return self._steps(generations, to, touched)

    def quiet_moves(self, generations: Sequence[Generation], to: int) -> list[Move]:
        """Return the steps that bring every partition up to a stream sequence that has been read."""
        return self._steps(generations, to, None)

    def _steps(self, generations: Sequence[Generation], to: int, touched: set[int] | None) -> list[Move]:
        return sorted(
            (made.name, made.number, partition, old, to)
            for index, (made, sequences) in enumerate(zip(generations, self._folded, strict=True))
            for partition, old in sequences.items()
            if old < to and index not in self.paused and (touched is None or partition in touched)
        )

    def advance(self, moves: Sequence[Move], generations: Sequence[Generation]) -> None:
        """Take the steps."""
        index_of = {made.name: index for index, made in enumerate(generations)}
        for name, _, partition, _, to in moves:
            self._folded[index_of[name]][partition] = to


@dataclass(frozen=True, slots=True)
class Claim:
    """An owner's claim on partitions of the live generations.

    Attributes:
        epoch: higher than the epoch of any earlier claim. A batch is written only while the checkpoints carry it.
        position: how far the partitions were folded at the claim.
    """

    epoch: int
    generations: list[Generation]
    position: Position


def claim(engine: Engine, app: str, declared: Sequence[DeclaredProjection], partitions: Iterable[int]) -> Claim:
    """Put a new epoch on these partitions of the live generations: it fences their previous owner.

    Raises:
        Fenced: a cut-over came between; claim again.
        SchemaError: a projection has no live generation; it must be built first.
    """
    return outlast_contention(partial(_claim, engine, app, declared, sorted(partitions)))


def _claim(engine: Engine, app: str, declared: Sequence[DeclaredProjection], owned: Sequence[int]) -> Claim:
    with engine.begin() as connection:
        # the row's lock makes two simultaneous claims take one epoch after the other
        connection.execute(update(stream).where(stream.c.app == app).values(epoch=stream.c.epoch + 1))
        epoch = int(connection.scalar(select(stream.c.epoch).where(stream.c.app == app)) or 0)
        generations: dict[str, Generation] = {}
        for declaration in sorted(declared, key=attrgetter("name")):
            live = live_generation(connection, declaration)
            if live is None:
                raise SchemaError(f"projection {declaration.name} version {declaration.version} has not been built")
            generations[live.name] = live
            lock_checkpoints(connection, live.name, live.number, owned)
            claimed = connection.execute(
                update(checkpoint)
                .where(
                    checkpoint.c.projection == live.name,
                    checkpoint.c.generation == live.number,
                    checkpoint.c.partition.in_(owned),
                    checkpoint.c.epoch != RETIRED_EPOCH,
                )
                .values(epoch=epoch)
            )
            if claimed.rowcount != len(owned):
                # the claim has waited for a cut-over, which has committed since the live generation was looked up
                raise Fenced(f"{declaration.name} has a new generation since the claim began")
        in_order = [generations[declaration.name] for declaration in declared]
        mark_keepers(connection, declared, in_order)
        folded = [positions(connection, live) for live in in_order]
        own = [{partition: sequences[partition] for partition in owned} for sequences in folded]
        return Claim(epoch, in_order, Position(own))


def reached(connection: Connection, partition: int, names: Sequence[str] = ()) -> dict[str, int]:
    """Return how far the live projections have folded a partition: stream sequence by projection.

    Args:
        names: only these projections; all projections if empty.
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


def read_epochs(engine: Engine, made: Sequence[Generation], partitions: Collection[int]) -> set[int]:
    """Return the epochs of the checkpoints of some generations."""
    with reads(engine).connect() as connection:
        found: set[int] = set()
        for generation in made:
            query = select(checkpoint.c.epoch).where(
                checkpoint.c.projection == generation.name,
                checkpoint.c.generation == generation.number,
                checkpoint.c.partition.in_(sorted(partitions)),
            )
            found.update(connection.scalars(query.distinct()))
        return found


def resume(engine: Engine, name: str) -> bool:
    """Have the owners of a projection's partitions start again from the database, where they have paused it.

    Returns:
        whether the projection is live.
    """
    with engine.begin() as connection:
        live = numbers(connection, name, "live", lock=True)
        for number in live:
            lock_checkpoints(connection, name, number)
            own = (checkpoint.c.projection == name) & (checkpoint.c.generation == number)
            connection.execute(update(checkpoint).where(own).values(epoch=FENCE))
        return bool(live)
