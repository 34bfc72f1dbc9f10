"""Who takes part in an app: the workers and their programs, and which of them projects what.

The worker that holds a partition projects it, for each projection whose version its program declares. Where the holder
declares another version, as in a rolling deployment, the workers that do declare this one share such partitions among
themselves: each computes the same shares. So every generation is kept up to date by a program that knows it.

The shares only save work, as leases do: for a moment two workers may both believe that a partition is theirs. Then the
fence lets one of them write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

from kernel.app import App

WORKER, FOLLOWER = "w", "f"
"""First part of a member's key in the bucket. A follower only projects: it prepares a deployment."""


@dataclass(frozen=True, slots=True)
class Program:
    """What a program declares.

    Attributes:
        digest: differs wherever two programs declare other aggregates, commands, events or projections.
        versions: of its projections, by name; None where the program has not said so, since it is an older eskernel.
    """

    digest: str = ""
    versions: Mapping[str, int] | None = None

    def declares(self, name: str, version: int) -> bool:
        """Return whether it declares this version of a projection. One that has not said so is taken to."""
        return self.versions is None or self.versions.get(name) == version


@dataclass(frozen=True, slots=True)
class Member:
    """A process that takes part.

    Attributes:
        held: partitions whose commands it takes.
        follows: it takes no commands, and only projects.
    """

    worker: str
    program: Program
    held: frozenset[int] = frozenset()
    follows: bool = False


@dataclass(frozen=True, slots=True)
class Members:
    """The content of the leases' bucket.

    Attributes:
        workers: names of the workers, sorted.
        held: partitions that a worker holds.
        others: the members apart from the one that has read them, as far as they say which program they run.
    """

    workers: tuple[str, ...]
    held: frozenset[int]
    others: tuple[Member, ...] = ()


def program_of(app: App) -> Program:
    """Return what an app declares."""
    versions = {declared.name: declared.version for declared in app.projections}
    said = [
        (name, sorted(declared.commands), sorted((event.name, event.version) for event in declared.events.values()))
        for name, declared in sorted(app.types.items())
    ]
    digest = blake2b(repr((said, sorted(versions.items()))).encode(), digest_size=8).hexdigest()
    return Program(digest, versions)


def describe(member: Member) -> dict[str, Any]:
    """Return what a member's key says about its program and its partitions."""
    held = {"held": sorted(member.held)}
    if member.program.versions is None:
        return held
    return held | {"program": {"digest": member.program.digest, "versions": dict(member.program.versions)}}


def read_member(key: str, value: bytes) -> Member | None:
    """Return the member that a key of the bucket describes, or None if another program has written the key."""
    kind, _, worker = key.partition(".")
    try:
        said = orjson.loads(value)
        held = frozenset(map(int, said.get("held", ())))
        if (program := said.get("program")) is None:
            return Member(worker, Program(), held, kind == FOLLOWER)
        versions = {str(name): int(version) for name, version in program["versions"].items()}
        return Member(worker, Program(str(program["digest"]), versions), held, kind == FOLLOWER)
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError):
        return None


def is_mixed(me: Member, others: Sequence[Member]) -> bool:
    """Return whether members run different programs: a deployment goes on."""
    return any(other.program.digest not in ("", me.program.digest) for other in others)


def shares_of(me: Member, others: Sequence[Member], partitions: int) -> dict[str, frozenset[int]]:
    """Return the partitions that a member projects, for each projection where they are not those that it holds."""
    shares = {}
    for name, version in (me.program.versions or {}).items():
        workers = [member for member in others if not member.follows]
        if not me.follows and all(worker.program.declares(name, version) for worker in workers):
            continue
        shares[name] = _share(me, [*others, me], name, version, partitions)
    return shares


def _share(me: Member, members: Sequence[Member], name: str, version: int, partitions: int) -> frozenset[int]:
    knowing = [member for member in members if member.program.declares(name, version)]
    # a follower has done its work as soon as a worker runs the same program
    chosen = [member for member in knowing if not member.follows] or knowing
    if me not in chosen:
        return frozenset()
    holders = {partition: member for member in members for partition in member.held}
    share = set()
    for partition in range(partitions):
        holder = holders.get(partition)
        if holder is None or holder not in chosen:
            holder = max(chosen, key=lambda member: _weight(member, name, partition))
        if holder is me:
            share.add(partition)
    return frozenset(share)


def _weight(member: Member, name: str, partition: int) -> bytes:
    return blake2b(f"{member.worker} {name} {partition}".encode(), digest_size=8).digest()
