"""What the embedded nats-server writes: its log, and its store on a disk that can be full."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

LOG_BYTES, LOG_FILES = 10_000_000, 5
"""Size at which the server begins another log file, and how many files are kept."""
TRACES_BYTES = 1_000_000
LEAST_ROOM = 4 << 20
"""A disk with less free bytes is full: the server may have been refused a block."""
PROBE_BYTES = 1 << 20
_REFUSED = (b"no space left on device", b"quota exceeded", b"critical write error", b"will be disabled")
"""What the server logs when the disk refuses a commit. It then refuses all commits until it is started again."""


class ServerLog:
    """The log of the server, which it writes and rotates itself, and the file of its standard error.

    Attributes:
        path: the present log file. Older ones have the time in their names.
        traces: what the server writes before it has read its configuration, and when it crashes.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "nats.log"
        self.traces = directory / "nats.err"
        self._began = {self.path: 0, self.traces: 0}
        self._read = 0

    def begin(self) -> IO[bytes]:
        """Note where the log of this start begins, and open the file for standard error."""
        if _size(self.traces) > TRACES_BYTES:
            self.traces.unlink()
        self._began = {path: _size(path) for path in self._began}
        self._read = self._began[self.path]
        return self.traces.open("ab")

    def tail(self) -> str:
        """Return the last lines that were written since the start, for people."""
        lines = [line for path in (self.path, self.traces) for line in self._since(path).splitlines()]
        return " | ".join(lines[-3:]) or "its log is empty"

    def _since(self, path: Path) -> str:
        began = self._began[path]
        return _read(path, began if _size(path) >= began else 0).decode(errors="replace")

    def finds_a_full_disk(self) -> bool:
        """Return whether the server has logged since the last call that the disk refuses commits."""
        size = _size(self.path)
        if size == self._read:
            return False
        found = _read(self.path, self._read if size > self._read else 0).lower()
        self._read = size
        return any(words in found for words in _REFUSED)


class StoreDisk:
    """The disk with the server's store. After it was full there may be room again."""

    def __init__(self, store: Path) -> None:
        self._store = store

    def is_short(self) -> bool:
        """Return whether there is too little room for the next commits."""
        try:
            found = os.statvfs(self._store)
        except OSError:
            return False
        return found.f_bavail * found.f_frsize < LEAST_ROOM

    def takes_writes(self) -> bool:
        """Return whether a file can be written. A quota is found out so, too."""
        if self.is_short():
            return False
        trial = self._store / "eskernel-trial"
        try:
            with trial.open("wb") as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            return False
        finally:
            trial.unlink(missing_ok=True)
        return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(LOG_BYTES)
    except OSError:
        return b""
