"""Back to a version of a projection that readers saw before: its tables are still there, and are shown again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import DBAPIError

from kernel.app import App
from kernel.governance.pace import Pace, unpaced
from kernel.log.base import EventLog
from kernel.projector.cut_over import is_locked, limit_locks
from kernel.projector.deployment import show_kept
from kernel.projector.rebuild import Rebuild
from kernel.projector.replay import RebuildProgress
from projections import generations, views
from projections.database import reads
from projections.errors import SchemaError
from projections.following import STATES, fence_all
from projections.tables import checkpoint, projection

PATIENCE_S = 10.0
"""How long a version may take that another program keeps up to date, to be where the live one is."""
PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class RolledBack:
    """What a rollback did.

    Attributes:
        version, generation: that readers see now.
        before: version that they saw before.
        sequence: stream sequence up to which what they see was folded.
    """

    projection: str
    version: int
    generation: int
    before: int
    sequence: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Kept:
    version: int
    number: int


async def roll_back(
    app: App,
    log: EventLog,
    engine: Engine,
    name: str,
    version: int | None = None,
    progress: Callable[[RebuildProgress], None] = lambda _: None,
    pace: Pace | None = None,
) -> RolledBack:
    """Have readers see the version of a projection again that they saw before, at the place where they are.

    Where the app declares that version, what its tables lack is folded first. Otherwise a running program must keep
    them up to date. Twice in a row leads back to where it began.

    Args:
        version: the version to show; by default the one that readers saw last.

    Raises:
        SchemaError: there are no such tables any more, or nobody keeps them up to date; what to do.
        Fenced, LogError, sqlalchemy.exc.DBAPIError: nothing has changed for readers.
    """
    started = time.perf_counter()
    live, kept = await asyncio.to_thread(_find, engine, name, version)
    declared = next((known for known in app.projections if known.name == name), None)
    if declared is not None and declared.version == kept.version:
        made = generations.generation(declared, kept.number)
        make = partial(Rebuild, app, log, engine, progress=progress, pace=pace or unpaced())
        (rebuilt,) = await show_kept(make, made)
        sequence = rebuilt.sequence
    else:
        sequence = await asyncio.to_thread(_show_followed, engine, name, live, kept)
    return RolledBack(name, kept.version, kept.number, live.version, sequence, time.perf_counter() - started)


def _find(engine: Engine, name: str, version: int | None) -> tuple[_Kept, _Kept]:
    """Return the generation that readers see, and the one that they are to see."""
    with reads(engine).connect() as connection:
        rows = connection.execute(select(projection).where(projection.c.name == name)).all()
    live = next((_Kept(row.version, row.generation) for row in rows if row.state == "live"), None)
    if live is None:
        raise SchemaError(f"the database has no projection {name!r} that readers see")
    kept = [row for row in rows if row.state in ("retired", "ready") and row.layout == generations.LAYOUT]
    if version is None:
        # what readers have never seen is shown when somebody names it; a rebuild leaves tables of the same version
        seen = [row for row in kept if row.state == "retired"]
        chosen = [row for row in seen if row.version != live.version] or seen
    else:
        chosen = [row for row in kept if row.version == version]
    if not chosen:
        there = ", ".join(sorted({str(row.version) for row in kept})) or "none"
        wanted = "an earlier version" if version is None else f"version {version}"
        raise SchemaError(
            f"{wanted} of {name} is no longer there (kept beside version {live.version}: {there}); to have it again, "
            f"run `eskernel rebuild {name}` with the program that declares it"
        )
    last = max(chosen, key=lambda row: (row.retired or "", row.generation))
    # of several generations of this version, the one that programs keep up to date
    own = [row for row in kept if row.version == last.version]
    followed = min(own, key=lambda row: (STATES.index(row.state), -row.generation))
    return live, _Kept(followed.version, followed.generation)


def _show_followed(engine: Engine, name: str, live: _Kept, kept: _Kept) -> int:
    """Show a generation that another program keeps up to date, at the very place where the live one is."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with engine.begin() as connection:
                limit_locks(connection)
                behind, sequence = _behind(connection, name, live, kept)
                if not behind:
                    _show(connection, name, kept)
                    return sequence
                # its owners stop for a moment, in which what follows them arrives where they are
                fence_all(connection, name, live.number)
        except DBAPIError as error:
            if not is_locked(error) or time.monotonic() > deadline:
                raise
        else:
            if time.monotonic() > deadline:
                raise SchemaError(
                    f"version {kept.version} of {name} is {behind} stream sequences behind, and no running program "
                    "keeps it up to date; roll back with the program that declares it (--app package.module:app), or "
                    "start one. Nothing has changed"
                )
        time.sleep(PAUSE_S)


def _behind(connection: Connection, name: str, live: _Kept, kept: _Kept) -> tuple[int, int]:
    """Return by how much the kept generation is behind the live one, and where the live one is."""
    places = {}
    for each in sorted((live, kept), key=lambda each: each.number):
        generations.lock_checkpoints(connection, name, each.number)
        rows = connection.execute(
            select(checkpoint.c.partition, checkpoint.c.sequence).where(
                checkpoint.c.projection == name, checkpoint.c.generation == each.number
            )
        )
        places[each.number] = {row.partition: row.sequence for row in rows}
    there = places[kept.number]
    behind = max((at - there.get(partition, 0) for partition, at in places[live.number].items()), default=0)
    return max(0, behind), max(places[live.number].values(), default=0)


def _show(connection: Connection, name: str, kept: _Kept) -> None:
    tables = generations.stored_tables(connection, name, kept.number)
    generations.retire_live(connection, name)
    views.lock(connection, generations.all_views(connection, name, tables))
    generations.show_tables(connection, name, kept.number, tables)
