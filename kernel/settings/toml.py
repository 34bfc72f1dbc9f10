"""Reads a TOML file: a file, or a pipe such as `--config <(decrypt settings.toml)`."""

from __future__ import annotations

import codecs
import os
import select
import stat
import tomllib
from pathlib import Path
from typing import Any, Final

from kernel.errors import SettingsError

PIPE_TIMEOUT_S: Final = 10.0
"""A pipe through which nothing comes for so long is given up."""
_OTHER_ENCODINGS: Final = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file. A byte order mark of UTF-8 and any line ends are accepted.

    Raises:
        SettingsError: the file can't be read, or is not TOML in UTF-8; the message names it.
    """
    try:
        content = _read(path)
    except (FileNotFoundError, NotADirectoryError):
        raise SettingsError([f"{path}: no such file"]) from None
    except IsADirectoryError:
        raise SettingsError([f"{path}: a directory, not a TOML file"]) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError([f"{path}: it can't be read: {reason[0].lower()}{reason[1:]}"]) from None
    try:
        return tomllib.loads(_decode(content))
    except (ValueError, RecursionError) as error:
        raise SettingsError([f"{path}: {error}"]) from None


def _decode(content: bytes) -> str:
    for mark, encoding in _OTHER_ENCODINGS.items():
        if content.startswith(mark):
            raise ValueError(f"it is encoded in {encoding}; save it in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8; save the file in UTF-8") from None


def _read(path: Path) -> bytes:
    # a pipe without a writer must not block the start
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError
        chunks: list[bytes] = []
        while True:
            if not stat.S_ISREG(mode):
                _wait(descriptor)
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                return b"".join(chunks)
            chunks.append(chunk)
    finally:
        os.close(descriptor)


def _wait(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(PIPE_TIMEOUT_S * 1000):
        raise TimeoutError(0, f"nothing came through this pipe within {PIPE_TIMEOUT_S:g} s")
