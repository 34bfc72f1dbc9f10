"""What a program's projections lack is built beside everything else: commands never wait for it.

One process at a time builds; the others wait for it and find it done. A build that was cut short goes on from its own
checkpoints. Readers see the version before until the new one is complete, caught up and verified.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from sqlalchemy import Engine

from kernel.app import App
from kernel.errors import LogError
from kernel.governance.pace import Pace, unpaced
from kernel.log.base import EventLog
from kernel.projector.rebuild import Course, Rebuild, Rebuilt, clean_up
from kernel.projector.replay import RebuildProgress
from kernel.settings import Settings
from kernel.telemetry.metrics import BUILD_LEFT
from projections import generations
from projections.database import is_infrastructure, reads
from projections.declaration import DeclaredProjection
from projections.errors import Fenced, NotReproducible
from projections.following import Missing, expired, find_missing, live_version

logger = logging.getLogger("eskernel.projector")

AT_START = 10_000
"""Commits of a log up to which what is missing is built before commands are taken."""
LOCK = "build"
STALLED_S = 60.0
"""A build of which nothing gets done for so long is reported."""
TELL_S = 10.0
"""Between two lines of the log about a build."""
START_PATIENCE_S = 10.0
"""So long a start waits for another process that builds what a short log leads to. Longer builds are not waited for."""
AGAIN_S = 5.0
"""After a failure that may pass. After others, nothing is tried before the next start."""
CONTEST = 40
"""Tries to take a generation that another worker keeps up to date."""
Alone = Callable[[str, float, float], AbstractAsyncContextManager[None]]
Paced = Callable[[], AbstractAsyncContextManager[Pace]]


@dataclass(frozen=True, slots=True)
class BuildStatus:
    """What is known of a build.

    Attributes:
        projections: what is built.
        phase: what is done now: waiting, building, verifying, or failed.
        done, total: commits of the log.
        rate: commits per second since this phase began.
        eta: seconds until this phase is done, at this rate; None while that is unknown.
        error: why it has failed, or what keeps it waiting.
        moved: when something got done last, by `time.monotonic()`.
    """

    projections: tuple[str, ...]
    phase: str = "waiting"
    done: int = 0
    total: int = 0
    rate: float = 0.0
    eta: float | None = None
    error: str = ""
    moved: float = 0.0

    @property
    def stalled(self) -> float:
        """Seconds for which nothing got done."""
        return time.monotonic() - self.moved if self.phase in ("building", "verifying") else 0.0

    def describe(self) -> str:
        """Return a sentence for people."""
        what = f"{', '.join(self.projections)}: {self.phase}"
        if self.phase in ("building", "verifying") and self.total:
            what += f", {self.done:,} of {self.total:,} commits"
            if self.eta is not None:
                what += f" ({self.rate:,.0f}/s, about {self.eta:,.0f} s left)"
        return f"{what}: {self.error}" if self.error else what


async def build_missing(
    app: App,
    log: EventLog,
    engine: Engine,
    progress: Callable[[RebuildProgress], None] = lambda _: None,
    pace: Pace | None = None,
    settings: Settings | None = None,
    *,
    show: bool = True,
    quick: bool = False,
) -> list[Rebuilt]:
    """Build what the database lacks for a program, and go on with what the same program has begun.

    Args:
        show: have readers see it. Otherwise it is made ready for a later program to show.
        quick: only show what is built already and up to date.

    Raises:
        DeclarationError, LogError, NotReproducible, SchemaError, TooManyFailures, sqlalchemy.exc.DBAPIError: as
            `Rebuild.run` does.
    """
    settings = settings or Settings()
    missing = await asyncio.to_thread(_find, app, engine)
    make = partial(Rebuild, app, log, engine, progress=progress, pace=pace, limits=settings.dead_letters)
    built: list[Rebuilt] = []
    if show:
        last = (await log.info()).last if quick else 0
        for made in missing.show:
            if not quick or last - await asyncio.to_thread(_least, engine, made) <= AT_START:
                built += await show_kept(make, made)
    if quick:
        return built
    course = Course(verify=settings.deployment.verify, show=show, contested=True)
    rest = [declared for declared in missing.build if declared.name not in missing.resumable]
    for group in await asyncio.to_thread(_together, engine, missing):
        existing = {declared.name: missing.resumable[declared.name] for declared in group}
        logger.info("going on with the build of %s", ", ".join(existing))
        try:
            built += await make(projections=group, course=replace(course, existing=existing)).run()
        except (Fenced, NotReproducible) as error:
            # what was folded before the interruption is in doubt
            logger.warning("the unfinished build of %s can't be gone on with, and begins again: %s", group, error)
            rest += group
    if rest:
        built += await make(projections=rest, course=course).run()
    return built


def _find(app: App, engine: Engine) -> Missing:
    with reads(engine).connect() as connection:
        return find_missing(connection, app.projections, list(app.types.values()))


def _together(engine: Engine, missing: Missing) -> list[list[DeclaredProjection]]:
    """Return the projections whose unfinished generations stand at the same places: one pass over the log does."""
    groups: dict[tuple[tuple[int, int], ...], list[DeclaredProjection]] = {}
    with reads(engine).connect() as connection:
        for declared in missing.build:
            if (number := missing.resumable.get(declared.name)) is not None:
                made = generations.Generation(declared, number, {})
                places = tuple(sorted(generations.positions(connection, made).items()))
                groups.setdefault(places, []).append(declared)
    return list(groups.values())


def _least(engine: Engine, made: generations.Generation) -> int:
    with reads(engine).connect() as connection:
        return min(generations.positions(connection, made).values(), default=0)


async def show_kept(make: Callable[..., Rebuild], made: generations.Generation) -> list[Rebuilt]:
    """Have readers see a generation that is complete: take it from its owner, catch up, cut over.

    Args:
        make: makes a rebuild from `projections` and `course`.

    Raises:
        Fenced: its owner takes it back again and again.
        LogError, SchemaError, sqlalchemy.exc.DBAPIError: as `Rebuild.run` does.
    """
    course = Course(existing={made.name: made.number}, finished=True)
    for _ in range(CONTEST):
        try:
            return await make(projections=[made.projection], course=course).run()
        except Fenced:
            # its owner took it back meanwhile
            await asyncio.sleep(0.05)
    return await make(projections=[made.projection], course=course).run()


def _at_once() -> AbstractAsyncContextManager[Pace]:
    return nullcontext(unpaced())


class Deployment:
    """Brings the database to what a program declares, in the background of its worker.

    Args:
        alone: waits for a lock that one process at a time holds; it takes the lock's name, a pause between two tries,
            and for how many seconds it tries; then it raises `TimeoutError`.
        paced: gives the pace at which the log may be read.
        built: called when readers see something new.
        show: have readers see it.

    Attributes:
        status: of the build; None while nothing is missing.
        behind: projections of which readers see a newer version than the program declares, with that version.
        failure: why nothing more is tried before the next start.
    """

    def __init__(
        self,
        app: App,
        log: EventLog,
        engine: Engine,
        settings: Settings,
        alone: Alone,
        paced: Paced,
        built: Callable[[], None],
        *,
        show: bool = True,
    ) -> None:
        self._app, self._log, self._engine, self._settings = app, log, engine, settings
        self._alone, self._paced, self._built, self._show_it = alone, paced, built, show
        self.status: BuildStatus | None = None
        self.behind: dict[str, int] = {}
        self.failure: Exception | None = None
        self._began = self._told = 0.0
        self._declared_before: set[tuple[str, int]] = set()
        self._task: asyncio.Task[None] | None = None

    async def begin(self, *, short: bool = True) -> None:
        """Build what is missing at once if the log is short, and in the background otherwise.

        Args:
            short: otherwise everything is left to the background.

        Raises:
            DeclarationError, LogError, NotReproducible, SchemaError, TooManyFailures, sqlalchemy.exc.DBAPIError: what
                stands in the way of a short build.
        """
        if await self._look() and short:
            short = (await self._log.info()).commits <= AT_START
            try:
                # another process may be at a build that takes hours
                await self._build(_at_once, 0.05, START_PATIENCE_S if short else 0.0, quick=not short)
            except TimeoutError as error:
                logger.info("%s", error)
        for name, version in self.behind.items():
            logger.warning(
                "readers see version %d of %s, and this program declares %d: its own tables are kept beside them if "
                "there are any. `eskernel projections rollback %s` shows them again",
                version, name, self._app.projection(name).version, name,
            )  # fmt: skip
        if self.status is not None:
            logger.info("%s; commands are taken meanwhile", self.status.describe())

    def start(self) -> None:
        """Build what is left in a task of its own."""
        if self.status is not None:
            self._task = asyncio.create_task(self._run())

    async def wait(self) -> None:
        """Wait until everything is built, or has failed."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def close(self) -> None:
        """Leave the build where it is: the next start goes on with it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _look(self) -> bool:
        """Return whether anything is missing."""
        found = await asyncio.to_thread(_find, self._app, self._engine)
        self.behind = found.behind
        names = [declared.name for declared in found.build]
        if self._show_it:
            names += [made.name for made in found.show]
        if not names:
            self.status = None
        elif self.status is None or set(names) != set(self.status.projections):
            self.status = BuildStatus(tuple(names), moved=time.monotonic())
        return bool(names)

    async def _run(self) -> None:
        while True:
            try:
                if not await self._look():
                    BUILD_LEFT.set(0)
                    return
                await self._build(self._paced)
            except Exception as error:
                passes = isinstance(error, LogError | Fenced | OSError) or is_infrastructure(error)
                self._fail(error, passes)
                if not passes:
                    self.failure = error
                    if self._show_it:
                        await self._wait_for_others()
                    return
                await asyncio.sleep(AGAIN_S)

    async def _wait_for_others(self) -> None:
        """After a failure: look now and then whether a person, or another process, has built what is missing."""
        while True:
            await asyncio.sleep(AGAIN_S)
            try:
                missing = await asyncio.to_thread(_find, self._app, self._engine)
            except Exception as error:
                if not is_infrastructure(error):
                    raise
                continue
            if not missing.build and not missing.show:
                self.failure = self.status = None
                BUILD_LEFT.set(0)
                logger.info("nothing is to be built any more: another process has done it")
                self._built()
                return

    async def _build(
        self, paced: Paced, pause: float = 1.0, patience: float = math.inf, *, quick: bool = False
    ) -> None:
        # the lock first: who waits for it has nothing to ask the workers about their pace
        async with self._alone(LOCK, pause, patience), paced() as pace:
            # another process may have done it meanwhile
            if await self._look():
                self._began = time.monotonic()
                for rebuilt in await build_missing(
                    self._app,
                    self._log,
                    self._engine,
                    self._note,
                    pace,
                    self._settings,
                    show=self._show_it,
                    quick=quick,
                ):
                    logger.info(
                        "%s version %d: generation %d %s, %d events in %.1f s, up to sequence %d",
                        rebuilt.projection, rebuilt.version, rebuilt.generation,
                        "is live" if self._show_it else "is ready", rebuilt.events, rebuilt.seconds, rebuilt.sequence,
                    )  # fmt: skip
                await asyncio.to_thread(self._remove_old)
        await self._look()
        self._built()

    def _remove_old(self) -> None:
        for declared in self._app.projections:
            clean_up(self._engine, declared)

    def _note(self, progress: RebuildProgress) -> None:
        status, now = self.status, time.monotonic()
        if status is None:
            return
        if progress.phase != status.phase:
            self._began = now
            if progress.phase == "verifying":
                logger.info("%s: built; folding the log a second time, to compare", ", ".join(status.projections))
        took = max(now - self._began, 1e-9)
        rate = progress.done / took if progress.phase == status.phase else 0.0
        eta = (progress.total - progress.done) / rate if rate else None
        self.status = replace(
            status, phase=progress.phase, done=progress.done, total=progress.total, rate=rate, eta=eta, error="",
            moved=now,
        )  # fmt: skip
        BUILD_LEFT.set(progress.total - progress.done)
        if now - self._told >= TELL_S:
            self._told = now
            logger.info("%s", self.status.describe())

    def _fail(self, error: Exception, passes: bool) -> None:
        if self.status is not None:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.status = replace(self.status, phase="waiting" if passes else "failed", error=text)
            level = logging.WARNING if passes else logging.ERROR
            logger.log(level, "%s", self.status.describe(), exc_info=None if passes else error)

    async def check(self) -> str:
        """Say how far the build is. Raises `RuntimeError` if it has failed, or nothing gets done."""
        try:
            await asyncio.to_thread(self._read_behind)
        except Exception as error:
            if not is_infrastructure(error):  # the database has a check of its own
                raise
        status = self.status
        if status is None:
            return "nothing to build"
        if status.phase == "failed":
            raise RuntimeError(status.describe())
        if status.stalled > STALLED_S:
            raise RuntimeError(f"{status.describe()}: nothing was done for {status.stalled:.0f} s")
        return status.describe()

    def report(self) -> dict[str, Any]:
        """Return the status as JSON data."""
        status, build = self.status, None
        if status is not None:
            build = asdict(status) | {"stalled": status.stalled, "told": status.describe()}
        declares = {declared.name: declared.version for declared in self._app.projections}
        return {"declares": declares, "build": build, "behind": dict(self.behind)}

    async def drop_expired(self, declared_elsewhere: Collection[tuple[str, int]]) -> None:
        """Drop generations that readers left longer ago than `deployment.retention`, unless a program follows them.

        Args:
            declared_elsewhere: projections and versions that other members declare.
        """
        # a worker that is being restarted is missing for a moment
        declared, self._declared_before = set(declared_elsewhere) | self._declared_before, set(declared_elsewhere)
        await asyncio.to_thread(self._drop_expired, declared)

    def _drop_expired(self, followed: set[tuple[str, int]]) -> None:
        followed |= {(declared.name, declared.version) for declared in self._app.projections}
        for declared in self._app.projections:
            with reads(self._engine).connect() as connection:
                old: Sequence[int] = expired(connection, declared.name, self._settings.deployment.retention, followed)
            for number in clean_up(self._engine, declared, among=old):
                logger.info("generation %d of %s is dropped: readers left it long ago", number, declared.name)
        self._read_behind()

    def _read_behind(self) -> None:
        if not self._app.projections:
            return
        with reads(self._engine).connect() as connection:
            self.behind = {
                declared.name: version
                for declared in self._app.projections
                if (version := live_version(connection, declared.name)) > declared.version
            }
