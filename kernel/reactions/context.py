"""What all policies and effects of a worker share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

from sqlalchemy import Engine

from kernel.app import App
from kernel.log.base import EventLog
from kernel.log.repeats import Repeats
from kernel.reactions.work import Send
from kernel.settings import Settings
from projections.database import is_infrastructure

logger = logging.getLogger("eskernel.reactions")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReactorContext:
    """What all policies and effects of a worker share.

    Attributes:
        send: sends a command in its wire form.
        now: returns the Unix time.
        threads: what works with the database.
        repeats: decides which of repeated log lines are written.
    """

    app: App
    log: EventLog
    engine: Engine
    settings: Settings
    send: Send
    now: Callable[[], float]
    threads: Executor
    repeats: Repeats = field(default_factory=Repeats)

    async def run(self, work: Callable[[], T]) -> T:
        """Run a function that uses the database in the thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    async def write(self, work: Callable[[], None]) -> None:
        """Run a function that writes, again and again while it is the database that fails.

        To give up would mean to do again what is done, and an effect is not undone.
        """
        failures = 0
        while True:
            try:
                return await self.run(work)
            except Exception as error:
                if not is_infrastructure(error):
                    raise
                if (more := self.repeats.due("database")) is not None:
                    what = str(error).partition("\n")[0]
                    logger.warning("policies and effects wait for the database: %s%s", what, more)
            pauses = self.settings.consumer.backoff
            await asyncio.sleep(pauses[min(failures, len(pauses) - 1)])
            failures += 1
