"""Commands at three times a service's capacity, and how the governor handles them, second by second.

1. The example starts a service of the bank and measures its capacity: how many commands per second it accepts when it
   is kept busy.
2. For some seconds a sender offers three times as many and ignores refusals. Meanwhile one honest client waits after a
   refusal for as long as the service asks (`retry_after`), and gets its commands through.
3. The load ends. All accepted commands are projected, and the service is as responsive as before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

from examples.bank import Account, Deposit, app
from examples.overload.flood import Flood
from examples.overload.picture import draw
from kernel import Client

WARM_UP_S, MEASURE_S = 3.0, 5.0
DRAIN_S = 60.0


@dataclass
class Second:
    """The figures of one second."""

    at: int
    phase: str
    offered: int
    accepted: int
    refused: int
    p50_ms: float
    p99_ms: float
    behind: int
    memory_mib: float
    limit: float | None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.overload", description=__doc__)
    parser.add_argument("--seconds", type=int, default=20, help="seconds of overload (20)")
    parser.add_argument("--times", type=float, default=3.0, help="offered load as a multiple of the capacity (3)")
    parser.add_argument("--picture", type=Path, help="write the time series as SVG")
    parser.add_argument("--json", type=Path, help="write the time series as JSON")
    return parser.parse_args()


@asynccontextmanager
async def _service(data: Path) -> AsyncIterator[int]:
    """Run the bank in a process of its own; yield the process id."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kernel.cli", "run", "examples.bank:app", "--data", str(data),
        "--set", "commands.pending=2000", "--set", "logging.level=error",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        while b"is running" not in await process.stdout.readline():
            if process.returncode is not None or process.stdout.at_eof():
                raise SystemExit("the service did not start")
        yield process.pid
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.communicate()


async def _status(client: Client) -> dict[str, Any]:
    answer = await client.connection.request(f"{app.name}.svc.status", b"", timeout=5)
    status: dict[str, Any] = json.loads(answer.data)
    return status


def _memory(pid: int) -> float:
    """Resident memory of a process in MiB (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _times(milliseconds: list[float]) -> tuple[float, float]:
    if len(milliseconds) < 2:
        return (milliseconds or [0.0])[0], (milliseconds or [0.0])[0]
    cuts = quantiles(milliseconds, n=100)
    return cuts[49], cuts[98]


class Recorder:
    """Records the figures second by second, and prints a line for each."""

    def __init__(self, client: Client, flood: Flood, pid: int) -> None:
        self._client, self._flood, self._pid = client, flood, pid
        self.seconds: list[Second] = []
        print("second  phase      offered  accepted   refused    p50 ms   p99 ms    behind  memory MiB  limit")

    async def record(self, phase: str) -> Second:
        """Let a second pass; return its figures."""
        await asyncio.sleep(1.0)
        status = await _status(self._client)
        answers = self._flood.collect()
        second = Second(
            len(self.seconds) + 1,
            phase,
            answers.sent,
            len(answers.accepted_ms),
            answers.refused,
            *_times(answers.accepted_ms),
            status["projection"]["behind"],
            _memory(self._pid),
            status["limits"]["lanes"]["commands"]["present"],
        )
        self.seconds.append(second)
        limit = "none" if second.limit is None else f"{second.limit:,.0f}/s"
        print(
            f"{second.at:>6}  {phase:<9}{second.offered:>9,}{second.accepted:>10,}{second.refused:>10,}"
            f"{second.p50_ms:>10.1f}{second.p99_ms:>9.1f}{second.behind:>10,}{second.memory_mib:>12.0f}  {limit}"
        )
        return second


async def _honest(client: Client, until: asyncio.Event) -> int:
    """Send commands one by one; return how many took effect. The client waits for `retry_after` after each refusal."""
    done = 0
    while not until.is_set():
        await client.execute(Account, "honest", Deposit(1), timeout=60)
        done += 1
    return done


async def _run(arguments: argparse.Namespace, data: Path) -> list[Second]:
    async with _service(data) as pid, await Client.connect(app, data=data) as client:
        flood = await Flood.start(client.connection, app.name)
        recorder = Recorder(client, flood, pid)
        await flood.keep_busy(500)
        for _ in range(int(WARM_UP_S)):
            await recorder.record("warm-up")
        measured = [await recorder.record("capacity") for _ in range(int(MEASURE_S))]
        await flood.stop()
        capacity = sorted(second.accepted for second in measured)[len(measured) // 2]
        print(f"capacity: {capacity:,} commands/s; now {arguments.times:g} times as many for {arguments.seconds} s")
        over = asyncio.Event()
        honest = asyncio.create_task(_honest(client, over))
        flood.offer(capacity * arguments.times)
        overload = [await recorder.record("overload") for _ in range(arguments.seconds)]
        await flood.stop()
        over.set()
        went_through = await honest
        deadline = time.monotonic() + DRAIN_S
        while (await recorder.record("drain")).behind and time.monotonic() < deadline:
            pass
        rows = await client.query("select sum(cents) as n from balances")
        _conclude(recorder.seconds, overload, capacity, flood, went_through, int(rows[0]["n"]))
        return recorder.seconds


def _conclude(
    seconds: list[Second], overload: list[Second], capacity: int, flood: Flood, honest: int, projected: int
) -> None:
    accepted, refused = sum(second.accepted for second in overload), sum(second.refused for second in overload)
    first, last = overload[len(overload) // 4], overload[-1]
    print(f"accepted {accepted:,} ({accepted / len(overload) / capacity:.0%} of capacity), refused {refused:,},")
    shortest, longest = flood.retry_after
    print(f"each with a time to retry after ({shortest:.2f} to {longest:.2f} s); unanswered {flood.unanswered}")
    print(f"worst p99 of the accepted: {max(second.p99_ms for second in overload):.0f} ms")
    print(f"memory: {first.memory_mib:.0f} MiB after a quarter of it, {last.memory_mib:.0f} MiB at its end")
    print(f"an honest client got {honest} commands through, one after the other")
    drained = seconds[-1].behind == 0
    print(f"drained {'after' if drained else 'NOT within'} {sum(second.phase == 'drain' for second in seconds)} s")
    expected = flood.accepted + honest
    print(
        f"commands accepted {expected:,}, projected {projected:,}: {'equal' if expected == projected else 'DIFFERENT'}"
    )
    if not drained or expected != projected or flood.unanswered:
        raise SystemExit(1)


def main() -> None:
    """Run the example in a temporary folder."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="eskernel-overload-") as data:
        seconds = asyncio.run(_run(arguments, Path(data)))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(second) for second in seconds], indent=1))
    if arguments.picture:
        arguments.picture.write_text(draw([asdict(second) for second in seconds]))


if __name__ == "__main__":
    main()
