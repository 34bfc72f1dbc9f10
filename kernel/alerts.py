"""Alerts: what an app's callbacks are told about its service."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Alert:
    """A change that somebody may want to know of.

    Attributes:
        subject: what changed: a projection, a component of the health report, `publishing`.
        before, after: levels: `ok`, `warn`, `critical` of a backlog; `ok`, `failing` of a component; `low`, `medium`,
            `high`, `critical` of the pressure.
        detail: what is known, for people.
        time: of the change, in Unix time.
        worker: which worker tells; each tells of its own partitions.
        projection, partitions: whose backlog it is.
        behind, age: of these partitions: commits behind, and seconds since the oldest of them was appended.
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
"""A callback, sync or async. It runs in a thread of its own, an async one on that thread's own loop."""
