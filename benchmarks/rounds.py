"""Measuring several ways in turns, so that a slow minute of the machine affects all of them."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

Measure = Callable[[], Awaitable[float]]
ROUNDS = 3


async def in_turns(what: str, ways: dict[str, Measure], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Measure A B C A B C ...; return every figure by way."""
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, measure in ways.items():
            gc.collect()
            # as a service does at its start, so that the collector does not scan long-lived objects again and again
            gc.freeze()
            figures[name].append(await measure())
        shown = ", ".join(f"{name} {found[-1]:,.0f}" for name, found in figures.items())
        print(f"  {what}, round {number + 1} of {rounds}: {shown}", flush=True)
    return figures


def medians(figures: dict[str, list[float]]) -> dict[str, float]:
    """Return the median by way."""
    return {name: median(found) for name, found in figures.items()}


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return {
        "p50_ms": round(ordered[len(ordered) // 2] * 1e3, 3),
        "p99_ms": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1e3, 3),
    }


def rounded(figures: dict[str, list[float]]) -> dict[str, Any]:
    """Return the figures of all rounds as they go into the report."""
    return {name: [round(figure, 1) for figure in measured] for name, measured in figures.items()}
