"""`python -m tests.faults --seeds 20`: the harness from the command line."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import time
from pathlib import Path

import orjson

from tests.faults.driver import Options, Run
from tests.faults.ending import Result
from tests.faults.places import postgres_server
from tests.faults.report import describe, table
from tests.faults.schedule import plan


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="how many runs, on seeds that follow each other")
    parser.add_argument("--seed", type=int, help="the first seed; random otherwise")
    parser.add_argument("--seconds", type=float, default=120.0, help="about how long the faults of one run last")
    parser.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both", help="both: by turns")
    parser.add_argument("--workers", type=int, help="0 starts the service without --workers; 2 or 4 otherwise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--consumers", action="store_true", help="also wait for consumers of killed workers to go")
    parser.add_argument("--keep", action="store_true", help="keep the directories of good runs too")
    return parser.parse_args()


async def run_all(chosen: argparse.Namespace, postgres: str) -> list[Result]:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        # only once: a second signal must not interrupt the cleaning up
        asyncio.get_running_loop().add_signal_handler(number, lambda: task.cancelling() or task.cancel())
    first = random.randrange(1, 1 << 30) if chosen.seed is None else chosen.seed
    results: list[Result] = []
    for seed in range(first, first + chosen.seeds):
        kind = chosen.database if chosen.database != "both" else ["sqlite", "postgresql"][seed % 2]
        options = Options(
            workers=(4 if kind == "postgresql" and seed % 4 == 1 else 2) if chosen.workers is None else chosen.workers,
            snapshots=7 if seed % 3 == 0 else 100,
            pausing=seed % 3 == 1,
            postgres=postgres if kind == "postgresql" else "",
            consumers=chosen.consumers,
            keep=chosen.keep,
        )
        schedule = plan(seed, chosen.seconds)
        print(f"seed {seed}: {len(schedule)} faults on {kind}", flush=True)
        begin = time.monotonic()

        def report_progress(line: str, begin: float = begin) -> None:
            print(f"  {time.monotonic() - begin:6.1f}s  {line}", flush=True)

        try:
            results.append(await Run(seed, schedule, options, report_progress).run())
        except asyncio.CancelledError:
            print("interrupted", flush=True)
            break
        print("\n".join(describe(results[-1])), flush=True)
        if chosen.json is not None:
            chosen.json.write_bytes(orjson.dumps(results, option=orjson.OPT_INDENT_2))
    return results


def main() -> int:
    chosen = arguments()
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(postgres_server()) if chosen.database != "sqlite" else ""
        results = asyncio.run(run_all(chosen, postgres))
    print("\n" + table(results))
    return 0 if len(results) == chosen.seeds and all(result.ok for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
