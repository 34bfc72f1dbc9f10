"""The rows about live actors."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import orjson

from benchmarks.report import Row

MOST_BYTES, MOST_GROWTH, MOST_HOLD_MS = 4_096, 32, 10.0
SHORT, LONG = 200_000, 1_000_000


async def measure(million: bool) -> list[Row]:
    """Measure 100,000 live actors, and memory over a long series of new activations."""
    live = await _run("residency", "0")
    print(f"  100,000 live actors: {live['actor_bytes']} bytes each over {live['state_bytes']} of state", flush=True)
    cycles = await _run("residency", str(LONG if million else SHORT))
    print(f"  {cycles['activations']:,} activations: {cycles['growth_bytes_per_activation']} bytes each", flush=True)
    sweeps = await _run("sweeping")
    print(f"  sweeps over 100,000 live actors: the event loop is held {sweeps['longest_ms']} ms at most", flush=True)
    return [
        Row(
            "residents: 100,000 live actors, longest that a sweep holds the event loop (processor time)",
            "ms",
            sweeps["longest_ms"],
            aim="<= 10 ms",
            met=sweeps["longest_ms"] <= MOST_HOLD_MS,
            durability="nothing to lose: made again from the log",
            extra=sweeps,
        ),
        Row(
            "residents: 100,000 live actors, memory of each over its own state",
            "bytes",
            live["actor_bytes"],
            aim="<= 4 KiB",
            met=live["actor_bytes"] <= MOST_BYTES,
            durability="nothing to lose: made again from the log",
            extra=live,
        ),
        Row(
            f"residents: {cycles['activations']:,} activations with 10,000 live, growth of memory for each",
            "bytes",
            cycles["growth_bytes_per_activation"],
            aim=f"flat (<= {MOST_GROWTH} bytes)",
            met=cycles["growth_bytes_per_activation"] <= MOST_GROWTH,
            durability="nothing to lose: made again from the log",
            extra=cycles,
        ),
    ]


async def _run(module: str, *arguments: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"benchmarks.{module}",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"the measurement ended with {process.returncode}")
    found: dict[str, Any] = orjson.loads(output)
    return found
