"""Keeping a folded commit in the database, by which the log is recognised at the next start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from kernel.app import App
from kernel.errors import LogError
from kernel.log import JetStreamLog
from projections.database import is_infrastructure
from projections.origin import keep_anchor, read_origin

EVERY_S = 30.0
"""A log that is restored from a backup of the last so many seconds, and then goes on, may not be noticed."""


class Anchor:
    """The anchor of one worker's database: the commit up to which the projections have come.

    Args:
        away: says whether the database is known not to answer: then nothing is asked of it.
    """

    def __init__(self, app: App, engine: Engine, log: JetStreamLog, away: Callable[[], bool]) -> None:
        self._app, self._engine, self._log, self._away = app, engine, log, away

    async def move(self) -> None:
        """Keep the last folded commit, unless the log or the database does not answer: then the older one stays."""
        if self._away():
            return
        try:
            origin = await asyncio.to_thread(read_origin, self._engine, self._app.name)
            if origin is None or not origin.furthest:
                return
            if origin.furthest > origin.anchor and (digest := await self._log.digest(origin.furthest)):
                await asyncio.to_thread(keep_anchor, self._engine, self._app.name, origin.furthest, digest)
        except LogError:
            pass  # the log's own check shows it
        except SQLAlchemyError as error:
            if not is_infrastructure(error):
                raise

    async def leave(self, timeout: float) -> None:
        """Keep the last commit that this worker has folded, if that takes no longer than `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self.move()
        except TimeoutError:
            pass
