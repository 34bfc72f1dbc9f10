"""A Python that has the kernel imported and forks a process for each command: a page has dozens of them.

Each command is a process of its own, as on a command line, without the second that importing everything takes.
`python -m tests.docs.warm` reads requests as JSON lines and answers each with one.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


class Warm:
    """The client of that Python.

    Args:
        environment: of every command.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, argv: list[str], folder: Path, output: Path, environment: dict[str, str]) -> int:
        """Run a command to its end; return its exit code. It prints into `output`.out and `output`.err."""
        pid = self.start(argv, folder, output, environment)
        return self.wait(pid)

    def start(self, argv: list[str], folder: Path, output: Path, environment: dict[str, str]) -> int:
        """Start a command; return its process id."""
        return self._ask(argv=argv, folder=str(folder), output=str(output), environment=environment)

    def wait(self, pid: int) -> int:
        """Wait for the end of a command that was started; return its exit code."""
        return self._ask(wait=pid)

    def stop(self, pid: int) -> int:
        """Send SIGTERM, and wait."""
        os.kill(pid, signal.SIGTERM)
        return self.wait(pid)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def _ask(self, **request: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _serve() -> None:
    for module in ("run", "config", "send", "query", "rebuild", "dead_letters", "limits", "backlog", "jobs", "status"):
        __import__(f"kernel.cli.{module}")
    __import__("migrations")
    __import__("sqlalchemy.dialects.sqlite")
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    running = set()
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            running.discard(request["wait"])
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            _become(**request)
        else:
            running.add(answer)
        print(answer, file=answers, flush=True)
    for pid in running:  # the tests were broken off
        os.kill(pid, signal.SIGTERM)


def _become(argv: list[str], folder: str, output: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code: Any = 0
    try:
        _execute(argv)
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _execute(argv: list[str]) -> None:
    program, *rest = argv
    if program == "eskernel":
        from kernel.cli import main

        sys.argv = argv
        main()
    elif program == "python" and rest[0] == "-m":
        sys.argv = rest[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    elif program == "python":
        sys.argv = rest
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_path(rest[0], run_name="__main__")
    else:
        raise SystemExit(f"{program}: the tests of the documents do not know this program")


if __name__ == "__main__":
    _serve()
