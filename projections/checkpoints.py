"""Checkpoints: how far each generation has folded each partition, and which epoch may write."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from sqlalchemy import Connection, Engine, func, select, update

from projections.contention import outlast_contention
from projections.database import reads
from projections.declaration import DeclaredProjection
from projections.errors import Fenced
from projections.following import followed
from projections.generations import (
    FENCE,
    PAUSED,
    Generation,
    generation,
    lock_checkpoints,
    numbers,
    positions,
)
from projections.heads import mark_keepers
from projections.tables import checkpoint, projection, stream

ABSENT = -1
"""Number of a generation that stands for one that is not built: no generation of the database has it."""
Move = tuple[str, int, int, int, int]
"""A step of a checkpoint: projection, generation, partition, sequence before, sequence after."""


class Position:
    """How far each generation has folded each partition.

    Args:
        folded: stream sequence by partition, for each projection in the plan's order. A partition that is not among
            those of a projection is somebody else's.
        keyed: projections whose partitions are those of their rows' own keys. They have read the whole log up to there.

    Attributes:
        owned: the partitions of any projection.
        paused: projections that stay where they are.
        lowest, highest: lowest and highest sequence at the claim, of projections that are not paused.
    """

    def __init__(self, folded: Sequence[dict[int, int]], keyed: frozenset[int] = frozenset()) -> None:
        self._keyed = keyed
        self._folded = [dict(sequences) for sequences in folded]
        self.owned = frozenset().union(*self._folded)
        self._elsewhere = {
            partition: frozenset(index for index, places in enumerate(self._folded) if partition not in places)
            for partition in self.owned
        }
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
        return min((sequences[partition] for sequences in self._active if partition in sequences), default=0)

    def of(self, projection: int) -> Mapping[int, int]:
        """Return how far a projection has folded, by partition."""
        return self._folded[projection]

    def folded(self, partition: int, sequence: int) -> frozenset[int]:
        """Return the projections that have folded this stream sequence already, or leave it to somebody else."""
        return frozenset(
            index
            for index, sequences in enumerate(self._folded)
            if sequences.get(partition, sequence) >= sequence or index in self.paused
        )

    def elsewhere(self, partition: int) -> frozenset[int]:
        """Return the projections that leave a partition to somebody else."""
        return self._elsewhere[partition]

    def touch(self, partition: int) -> None:
        """Note that the batch contains a commit of this partition."""
        self._touched.add(partition)

    def moves(self, generations: Sequence[Generation], to: int) -> list[Move]:
        """Return the steps of the touched partitions, and of all partitions of rows with a key of their own.

        Any event may belong to any such row: who waits for an event waits until all of these have passed it.
        """
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
            if old < to
            and index not in self.paused
            and (touched is None or partition in touched or index in self._keyed)
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
        generations: in the declared order; one without tables where the projection is `absent`.
        position: how far the partitions were folded at the claim.
        absent: projections of which nothing was claimed: they are not built, or a person has paused them.
    """

    epoch: int
    generations: list[Generation]
    position: Position
    absent: frozenset[int] = frozenset()


def claim(
    engine: Engine,
    app: str,
    declared: Sequence[DeclaredProjection],
    partitions: Iterable[int],
    shares: Mapping[str, Collection[int]] | None = None,
) -> Claim:
    """Put a new epoch on these partitions of the generations that this program follows: it fences the previous owner.

    Args:
        partitions: those of each projection.
        shares: those of some projections instead, by name.

    Raises:
        Fenced: a cut-over came between; claim again.
    """
    owned = {each.name: sorted((shares or {}).get(each.name, partitions)) for each in declared}
    return outlast_contention(partial(_claim, engine, app, declared, owned))


def _claim(
    engine: Engine, app: str, declared: Sequence[DeclaredProjection], owned: Mapping[str, Sequence[int]]
) -> Claim:
    with engine.begin() as connection:
        # the row's lock makes two simultaneous claims take one epoch after the other
        connection.execute(update(stream).where(stream.c.app == app).values(epoch=stream.c.epoch + 1))
        epoch = int(connection.scalar(select(stream.c.epoch).where(stream.c.app == app)) or 0)
        generations: dict[str, Generation] = {}
        absent: set[int] = set()
        index_of = {declaration.name: index for index, declaration in enumerate(declared)}
        for declaration in sorted(declared, key=attrgetter("name")):
            made = followed(connection, declaration)
            if made is None:
                absent.add(index_of[declaration.name])
                generations[declaration.name] = generation(declaration, ABSENT)
                continue
            generations[made.name] = made
            partitions = owned[made.name]
            epochs = lock_checkpoints(connection, made.name, made.number, partitions)
            if _number(followed(connection, declaration)) != made.number or len(epochs) != len(partitions):
                # the claim has waited for a cut-over, which has committed since the generation was looked up
                raise Fenced(f"{declaration.name} has a new generation since the claim began")
            if PAUSED in epochs.values():
                absent.add(index_of[declaration.name])
                continue
            own = (checkpoint.c.projection == made.name) & (checkpoint.c.generation == made.number)
            connection.execute(
                update(checkpoint).where(own, checkpoint.c.partition.in_(partitions)).values(epoch=epoch)
            )
        in_order = [generations[declaration.name] for declaration in declared]
        there = [made for index, made in enumerate(in_order) if index not in absent]
        mark_keepers(connection, declared, there)
        own_places: list[dict[int, int]] = []
        for index, made in enumerate(in_order):
            folded = {} if index in absent else positions(connection, made)
            own_places.append({partition: folded[partition] for partition in owned[made.name] if folded})
        keyed = frozenset(index for index, declaration in enumerate(declared) if declaration.keyed)
        return Claim(epoch, in_order, Position(own_places, keyed), frozenset(absent))


def _number(made: Generation | None) -> int:
    return ABSENT if made is None else made.number


def reached(
    connection: Connection, partition: int, names: Sequence[str] = (), keyed: Collection[str] = ()
) -> dict[str, int]:
    """Return how far the live projections have folded a partition: stream sequence by projection.

    Args:
        names: only these projections; all projections if empty.
        keyed: those whose rows have a key of their own: an event of any partition may be in any row.
    """
    own = checkpoint.c.partition == partition
    query = (
        select(checkpoint.c.projection, func.min(checkpoint.c.sequence).label("sequence"))
        .join(
            projection,
            (projection.c.name == checkpoint.c.projection) & (projection.c.generation == checkpoint.c.generation),
        )
        .where(projection.c.state == "live", own | checkpoint.c.projection.in_(keyed) if keyed else own)
        .group_by(checkpoint.c.projection)
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


def is_followed(engine: Engine, declared: DeclaredProjection) -> bool:
    """Return whether there is a generation of a projection for this program to keep up to date."""
    with reads(engine).connect() as connection:
        return followed(connection, declared) is not None


def resume(engine: Engine, name: str) -> bool:
    """Have the owners of a projection's partitions start again from the database, where it is paused.

    Returns:
        whether the projection is live.
    """
    return _set_live_epochs(engine, name, FENCE)


def pause(engine: Engine, name: str) -> bool:
    """Have nobody fold a projection until `resume`, or until a new generation takes its place.

    Returns:
        whether the projection is live.
    """
    return _set_live_epochs(engine, name, PAUSED)


def _set_live_epochs(engine: Engine, name: str, epoch: int) -> bool:
    with engine.begin() as connection:
        live = numbers(connection, name, "live", lock=True)
        for number in live:
            lock_checkpoints(connection, name, number)
            own = (checkpoint.c.projection == name) & (checkpoint.c.generation == number)
            connection.execute(update(checkpoint).where(own).values(epoch=epoch))
        return bool(live)
