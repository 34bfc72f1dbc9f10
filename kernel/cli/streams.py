"""Standard output that may be closed, full, or a pipe whose reader has left.

A command whose output can't be written ends, as other Unix programs do. A service goes on: only people
read its lines.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, Final

from kernel.cli.exit_codes import FAILED

READER_LEFT: Final = 128 + 13
"""Exit code of a program that ends because nothing reads its output any more: what SIGPIPE would lead to."""


class _Output(io.FileIO):
    """Standard output. Once a write has failed, everything is discarded."""

    outlives_reader = False

    def __init__(self) -> None:
        super().__init__(1, "w", closefd=False)
        self._failed = False

    def write(self, data: Any) -> int:
        if self._failed:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self._failed = True
            if _Output.outlives_reader:
                return len(data)
            if error.errno == errno.EPIPE:
                raise SystemExit(READER_LEFT) from None
            _complain(f"error: standard output can't be written: {error.strerror}\n")
            raise SystemExit(FAILED) from None


def _complain(line: str) -> None:
    try:
        sys.stderr.write(line)
        sys.stderr.flush()
    except OSError:
        pass


def prepare() -> None:
    """Make the standard streams of this process such that writing to them is safe, whatever they are."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # a file or a connection that is opened later would get this number, and be taken for the stream
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    encoding = sys.stdout.encoding if sys.stdout is not None else "utf-8"
    output = _Output()
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(output), encoding=encoding, errors="backslashreplace", line_buffering=output.isatty()
    )


def outlive_reader() -> None:
    """Go on without standard output if it can't be written."""
    _Output.outlives_reader = True


def finish() -> None:
    """Write what is still buffered.

    Raises:
        SystemExit: it can't be written.
    """
    sys.stdout.flush()
    try:
        sys.stderr.flush()
    except OSError:
        pass
