"""What all sessions of a projector share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Engine

from kernel.actors.residents import Residents
from kernel.app import App
from kernel.governance.pace import Pace
from kernel.log.base import EventLog
from kernel.projector.committer import Committer
from kernel.projector.parking import ParkingLog
from kernel.projector.pausing import Pauses
from kernel.projector.progress import ReadProgress
from kernel.projector.unknown import UnknownAggregates
from kernel.settings import Settings
from kernel.telemetry.tracing import Tracer
from projections.fold import Plan

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ProjectorContext:
    """What all sessions of a projector share.

    Attributes:
        residents: the live aggregates, whose actors fold.
        plan: the app's projections, compiled for folding.
        progress: what is read, in hand, and written.
        unknown: counts what is passed over, since the app does not declare the aggregate.
        parkings: writes what was parked to the log.
        pauses: the projections at which too many aggregates fail.
        readers: the thread that reads from the database.
        interrupted: set while the session at work is to end.
        running: called whenever the session has caught up.
    """

    app: App
    log: EventLog
    engine: Engine
    residents: Residents
    plan: Plan
    settings: Settings
    pace: Pace
    tracing: Tracer
    committer: Committer
    progress: ReadProgress
    unknown: UnknownAggregates
    parkings: ParkingLog
    pauses: Pauses
    readers: Executor
    interrupted: asyncio.Event
    running: Callable[[], None]

    async def read(self, work: Callable[[], T]) -> T:
        """Run a function that reads from the database in the thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, work)
