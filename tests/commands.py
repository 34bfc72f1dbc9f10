"""A Python that has imported the kernel, and forks a process for each command.

Each command is a process of its own, as on a command line, without the two seconds of a processor that its imports
take. It is for commands whose output is of interest. Tests of processes start real ones: of signals, of services, of
imports, of streams that are closed.

Run as a program, this file is that Python. It imports neither tests nor apps; each command imports its app itself.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (
    *(f"kernel.cli.{module}" for module in ("run", "config", "send", "query", "rebuild", "prepare", "projections")),
    *(
        f"kernel.cli.{module}"
        for module in (
            "dead_letters",
            "reactions",
            "snapshots",
            "limits",
            "backlog",
            "jobs",
            "status",
            "rehearse",
            "blame",
            "show",
            "trace",
            "prepare",
        )
    ),
    *("kernel", "kernel.client", "kernel.preflight", "kernel.projector.rebuild", "kernel.cli.check_log"),
    *("migrations", "projections.database_check", "alembic.autogenerate", "aiohttp", "rich.progress"),
    "kernel.telemetry.opentelemetry",
    *("sqlalchemy.orm", "sqlalchemy.dialects.sqlite", "sqlalchemy.dialects.postgresql", "psycopg", "nkeys"),
)
ANEW = "kernel.cli"
"""What each command imports again, with its submodules: some of it looks at the environment when it is imported."""
FIXED = ("PYTHON", "LC_", "LANG")
"""How the names of variables begin that Python reads at its start only."""
VARIABLE = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
"""The exceptions, which a command obeys."""
MESSAGE_BYTES = 1 << 20


class Command:
    """A command that was started."""

    def __init__(self, answers: socket.socket) -> None:
        self._answers = answers
        self.pid = self._answer()

    def wait(self) -> int:
        """Wait for its end; return its exit code as `subprocess` does."""
        try:
            return self._answer()
        except BaseException:  # such as the end of the test's time
            os.kill(self.pid, signal.SIGKILL)
            raise
        finally:
            self._answers.close()

    def stop(self) -> int:
        """Send SIGTERM, and wait."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def _answer(self) -> int:
        answer = self._answers.recv(MESSAGE_BYTES)
        assert answer, "the process that forks commands has ended"
        return int(answer)


class Commands:
    """Starts commands by the Python that has imported the kernel."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # a width that no command is given: output that has it shows what was read too early
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "73"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            )  # fmt: skip

    def start(self, argv: list[str], folder: Path, environment: Mapping[str, str], out: int, err: int) -> Command:
        """Start a command as a shell in a folder would.

        Args:
            argv: `eskernel`, `python -m MODULE` or `python FILE`, with arguments.
            environment: the whole environment of the command.
            out, err: descriptors of files for its output and its errors.
        """
        for name in environment.keys() | self._environment.keys():
            same = environment.get(name) == self._environment.get(name)
            assert same or name in VARIABLE or not name.startswith(FIXED), f"{name} needs a process of its own"
        request = {"argv": argv, "folder": str(folder), "environment": dict(environment)}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._requests, [json.dumps(request).encode()], [out, err, theirs.fileno()])
        return Command(ours)

    def run(self, argv: list[str], folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, like `subprocess.run(..., capture_output=True, text=True)`."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            code = self.start(argv, folder, environment, out.fileno(), err.fileno()).wait()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(argv, code, out.read(), err.read())

    def close(self) -> None:
        """End that Python, and whatever command still runs."""
        self._requests.close()
        self._process.wait(30)


@lru_cache(maxsize=1)
def shared() -> Commands:
    """Return the one of this process."""
    commands = Commands()
    atexit.register(commands.close)
    return commands


def eskernel(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m kernel.cli` in a folder.

    Args:
        variables: further variables of its environment.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return shared().run(["python", "-m", "kernel.cli", *arguments], folder, environment)


# the process that forks


class _Forks:
    """Forks for each request.

    Args:
        requests: where they come from, each with the descriptors for output, errors, and answers.
    """

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._selector = selectors.DefaultSelector()
        self._selector.register(requests, selectors.EVENT_READ)
        self._running: dict[int, tuple[int, socket.socket]] = {}

    def serve(self) -> dict[str, Any] | None:
        """Serve until nothing asks any more. In the process of a command, return what was asked for."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._requests:
                    self._send_end(key.fd)
                    continue
                message, descriptors, _, _ = socket.recv_fds(self._requests, MESSAGE_BYTES, 3)
                if not message:
                    for pid, _ in self._running.values():
                        os.kill(pid, signal.SIGTERM)
                    return None
                out, err, answers = descriptors
                pid = os.fork()
                if pid == 0:
                    os.close(answers)
                    self._close()
                    return {**json.loads(message), "out": out, "err": err}
                os.close(out)
                os.close(err)
                self._send_start(pid, socket.socket(fileno=answers))

    def _send_start(self, pid: int, answers: socket.socket) -> None:
        watched = os.pidfd_open(pid)
        self._running[watched] = pid, answers
        self._selector.register(watched, selectors.EVENT_READ)
        answers.send(b"%d" % pid)

    def _send_end(self, watched: int) -> None:
        self._selector.unregister(watched)
        os.close(watched)
        pid, answers = self._running.pop(watched)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            answers.send(b"%d" % code)
        except BrokenPipeError:
            pass  # its test is over
        answers.close()

    def _close(self) -> None:
        self._selector.close()
        self._requests.close()
        for watched, (_, answers) in self._running.items():
            os.close(watched)
            answers.close()


def _import() -> list[str]:
    """Import what commands need; return the path of imports without `PYTHONPATH`."""
    path = sys.path[len(_python_path(os.environ)) :]
    for module in IMPORTED:
        import_module(module)
    for module in [name for name in sys.modules if name == ANEW or name.startswith(f"{ANEW}.")]:
        del sys.modules[module]
    del sys.modules["kernel"].cli  # type: ignore[attr-defined]
    assert not any(name.partition(".")[0] in ("tests", "examples") for name in sys.modules)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing after a fork"  # noqa: PTH208
    gc.collect()
    gc.freeze()
    return path


def _python_path(environment: Mapping[str, str]) -> list[str]:
    return [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _become(path: list[str], argv: list[str], folder: str, environment: dict[str, str], out: int, err: int) -> None:
    """Turn this process into the one that a shell would have started."""
    for descriptor, stream in ((out, 1), (err, 2)):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    sys.path[:] = [*_python_path(environment), *path]
    sys.excepthook = _show_without_us
    sys.modules["__main__"] = types.ModuleType("__main__")
    _execute(*argv)


def _execute(program: str, *arguments: str) -> None:
    import runpy

    if program == "eskernel":
        sys.argv = [program, *arguments]
        import_module("kernel.cli").main()
    elif program == "python" and arguments[0] == "-m":
        sys.argv = ["-m", *arguments[2:]]
        sys.path.insert(0, str(Path.cwd()))
        runpy._run_module_as_main(arguments[1])  # type: ignore[attr-defined]
    elif program == "python":
        sys.argv = [*arguments]
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        raise SystemExit(f"{program}: the tests do not know this program")


def _show_without_us(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this process
    found = _import()
    asked = _Forks(socket.socket(fileno=int(sys.argv[1]))).serve()
    if asked is not None:
        _become(found, **asked)
