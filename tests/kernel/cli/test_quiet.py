"""What is ordinary is done quietly: starts, stops, signals, and output that nothing reads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CLI = [sys.executable, "-m", "kernel.cli"]
Start = Callable[..., subprocess.Popen[bytes]]
DEFAULT_SIGNALS = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def wait_for(process: subprocess.Popen[bytes], file: Path, text: bytes) -> None:
    deadline = time.monotonic() + 60
    while text not in file.read_bytes():
        assert process.poll() is None, file.read_text()
        assert time.monotonic() < deadline, file.read_text()
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Iterator[Start]:
    """A function that starts a command in a group of its own; its output and its errors go to files `out`, `err`."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*arguments: str, folder: str = "a") -> subprocess.Popen[bytes]:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        with (place / "out").open("wb") as out, (place / "err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-c", DEFAULT_SIGNALS, *CLI, *arguments],
                cwd=place, env=environment, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def complaints(file: Path) -> list[str]:
    """Return the lines at WARNING or above, and all lines that are no log lines."""
    found = []
    for line in file.read_text().splitlines():
        try:
            serious = json.loads(line)["level"] not in ("debug", "info")
        except json.JSONDecodeError:
            serious = True
        found += [line] if serious else []
    return found


def send(environment: dict[str, str], folder: Path, *more: str) -> None:
    for number in range(3):
        arguments = ["send", "Account", f"a{number}", "Deposit", "cents=5", *more]
        subprocess.run([*CLI, *arguments], cwd=folder, env=environment, check=True, capture_output=True)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("server", ["embedded", "external"])
def test_a_plain_start_and_stop_log_no_warning(
    start: Start,
    tmp_path: Path,
    environment: dict[str, str],
    workers: str,
    server: str,
    request: pytest.FixtureRequest,
    app_name: str,
) -> None:
    options = ["--workers", workers, "--log-format", "json", "--lease", "10"]
    if server == "external":
        options += ["--nats", request.getfixturevalue("nats_url"), "--set", f"stream.name={app_name}"]
        options += ["--set", f"stream.subject_prefix={app_name}"]
    for ending in (signal.SIGTERM, signal.SIGINT):  # the second start is one of an app that ran before
        service = start("run", "examples.bank:app", *options)
        wait_for(service, tmp_path / "a" / "out", b"stop it with")
        send(environment, tmp_path / "a")
        os.killpg(service.pid, ending)
        assert service.wait(60) == 0
        assert complaints(tmp_path / "a" / "err") == []
