"""What all policies and effects of a worker share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Engine

from kernel.app import App
from kernel.log.base import EventLog
from kernel.reactions.work import Send
from kernel.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReactorContext:
    """What all policies and effects of a worker share.

    Attributes:
        send: sends a command in its wire form.
        now: returns the Unix time.
        threads: the thread that works with the database.
    """

    app: App
    log: EventLog
    engine: Engine
    settings: Settings
    send: Send
    now: Callable[[], float]
    threads: ThreadPoolExecutor

    async def run(self, work: Callable[[], T]) -> T:
        """Run a function that uses the database in the thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)
