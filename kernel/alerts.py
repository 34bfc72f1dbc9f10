"""Alerts: the service passes them to the app's callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Alert:
    """A change of the backlog, of the health of a component, or of the pressure on publishing.

    Attributes:
        kind: kind of the change.
        subject: name of the projection, name of the component, or `publishing`.
        before, after: level before and after the change: `ok`, `warn` or `critical` for a backlog; `ok` or `failing`
            for a component; `low`, `medium`, `high` or `critical` for the pressure.
        detail: explanation for people.
        worker: name of the worker that sends the alert. A worker reports the backlog of its own partitions only.
        projection: projection that is behind.
        partitions: partitions whose level changed.
        behind: number of commits that these partitions are behind.
        age: seconds since the oldest of these commits was appended.
        time: Unix time of the change.
    """

    kind: Literal["backlog", "health", "pressure"]
    subject: str
    before: str
    after: str
    detail: str
    worker: str = ""
    projection: str = ""
    partitions: tuple[int, ...] = ()
    behind: int = 0
    age: float = 0.0
    time: float = field(default_factory=time.time)


OnAlert = Callable[[Alert], Any]
"""A callback, sync or async. Each callback has its own thread; an async one runs on an event loop of that thread."""
