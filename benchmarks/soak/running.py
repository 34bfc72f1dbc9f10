"""The service that is soaked: `eskernel run` in a folder of its own. Its processes and files are removed afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from kernel.errors import NotRunning
from kernel.runtime.nats_server import end_with_parent
from kernel.runtime.running import Running, find_running

SPEC, APP = "examples.bank:app", "bank"
START_S, STOP_S = 60.0, 60.0
_TROUBLE = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|^Traceback")


class Failed(Exception):
    """The service did not start, or has ended."""


@dataclass(slots=True)
class Service:
    """A running service.

    Attributes:
        processes: by name: parent, workers, nats-server.
    """

    running: Running
    folder: Path
    output: Path
    process: asyncio.subprocess.Process
    processes: dict[str, psutil.Process]

    def check(self) -> None:
        """Make sure that it runs.

        Raises:
            Failed: it doesn't.
        """
        if self.process.returncode is not None:
            raise Failed(f"the service ended with {self.process.returncode}: {_tail(self.output)}")

    def restarted(self) -> list[str]:
        """Return the names of processes that ended since the start."""
        return [name for name, process in self.processes.items() if not process.is_running()]

    def troubles(self) -> list[str]:
        """Return the warnings, errors and tracebacks of its log."""
        return [line for line in self.output.read_text(errors="replace").splitlines() if _TROUBLE.search(line)]


@contextlib.asynccontextmanager
async def service(workers: int, max_actors: int, idle: float) -> AsyncIterator[Service]:
    """Run a service with its nats-server and its SQLite in a folder that is removed afterwards.

    Raises:
        Failed: the service did not start, or one of its processes survived the stop.
    """
    with tempfile.TemporaryDirectory(prefix="eskernel-soak-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        options = {"workers": workers, "max-actors": max_actors, "idle": f"{idle:g}", "data": folder / "data"}
        arguments = [f"--{option}={value}" for option, value in options.items()]
        output = folder / "output"
        with output.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "kernel.cli", "run", SPEC, "--log-level=warning", *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=Path(__file__).parents[2],
                # Ctrl-C must reach only this process, which then stops the service
                start_new_session=True,
                preexec_fn=end_with_parent(signal.SIGTERM),
            )  # fmt: skip
        seen: dict[str, psutil.Process] = {}
        try:
            running = await _started(process, folder / "data", output)
            seen.update(_processes(running.pid, workers))
            yield Service(running, folder, output, process, seen)
        finally:
            await _stop(process)
            left = [
                name for name, child in seen.items() if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
            ]
            for name in left:
                seen[name].kill()
        if left:
            raise Failed(f"still there after the stop: {', '.join(left)}")


async def _started(process: asyncio.subprocess.Process, data: Path, output: Path) -> Running:
    deadline = time.monotonic() + START_S
    while process.returncode is None and time.monotonic() < deadline:
        try:
            return find_running(data, APP)
        except NotRunning:
            await asyncio.sleep(0.05)
    raise Failed(f"the service did not start: {_tail(output)}")


def _processes(pid: int, workers: int) -> dict[str, psutil.Process]:
    parent = psutil.Process(pid)
    found = {"parent" if workers > 1 else "service": parent}
    for child in parent.children():
        arguments = child.cmdline()
        if "kernel.workers.worker" in arguments:
            found[f"worker {arguments[-1]}"] = child
        elif "nats-server" in child.name():
            found["nats-server"] = child
    expected = 2 if workers == 1 else workers + 2
    if len(found) != expected:
        raise Failed(f"expected {expected} processes, found {', '.join(found)}")
    return {name: found[name] for name in sorted(found, key=lambda name: (name == "nats-server", name))}


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Stop the service by draining it; kill it and its children if that takes too long."""
    if process.returncode is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    finally:
        if process.returncode is None:
            process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def _tail(output: Path) -> str:
    return " | ".join(output.read_text(errors="replace").splitlines()[-5:]) or "it said nothing"
