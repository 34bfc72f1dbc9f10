"""How a process that serves for long treats its garbage collector. For the command line: a library leaves it alone."""

from __future__ import annotations

import gc

THRESHOLDS = (200_000, 20, 100)


def settle_memory() -> None:
    """Take everything that is in memory now for permanent, and look for cycles seldom.

    A full collection with 100,000 live aggregates would hold up the event loop for tens of milliseconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
