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

from tests.commands import ROOT, eskernel

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


SLOW = ("the event loop", "was delayed")
"""What a service rightly says on a machine that has no time for it."""


def complaints(file: Path) -> list[str]:
    """Return the lines at WARNING or above, and all lines that are no log lines."""
    found = []
    for line in file.read_text().splitlines():
        if any(words in line for words in SLOW):
            continue
        try:
            serious = json.loads(line)["level"] not in ("debug", "info")
        except json.JSONDecodeError:
            serious = True
        found += [line] if serious else []
    return found


def send(folder: Path) -> None:
    for number in range(3):
        assert eskernel("send", "Account", f"a{number}", "Deposit", "cents=5", folder=folder).returncode == 0


# the second start is one of an app that ran before
@pytest.mark.parametrize(
    ("server", "workers", "endings"),
    [("embedded", "1", [signal.SIGINT]), ("external", "2", [signal.SIGTERM, signal.SIGINT])],
    ids=["embedded, one worker", "external, two workers"],
)
def test_a_plain_start_and_stop_log_no_warning(
    start: Start,
    tmp_path: Path,
    environment: dict[str, str],
    workers: str,
    server: str,
    endings: list[signal.Signals],
    request: pytest.FixtureRequest,
    app_name: str,
) -> None:
    options = ["--workers", workers, "--log-format", "json", "--lease", "10"]
    if server == "external":
        options += ["--nats", request.getfixturevalue("nats_url"), "--set", f"stream.name={app_name}"]
        options += ["--set", f"stream.subject_prefix={app_name}"]
    for ending in endings:
        service = start("run", "examples.bank:app", *options)
        wait_for(service, tmp_path / "a" / "out", b"stop it with")
        send(tmp_path / "a")
        os.killpg(service.pid, ending)
        assert service.wait(60) == 0
        assert complaints(tmp_path / "a" / "err") == []


@pytest.mark.parametrize("moment", ["importing", "starting", "running", "stopping"])
def test_ctrl_c_leaves_no_traceback_whenever_it_comes(start: Start, tmp_path: Path, moment: str) -> None:
    service = start("run", "examples.bank:app", "--workers", "2", "--log-format", "json")
    place = tmp_path / "a"
    if moment == "starting":
        deadline = time.monotonic() + 60
        while not (place / ".eskernel" / "bank" / "lock").exists():
            assert time.monotonic() < deadline
    elif moment != "importing":
        wait_for(service, place / "out", b"stop it with")
    else:
        maps = Path(f"/proc/{service.pid}/maps")
        deadline = time.monotonic() + 60
        while b"msgspec" not in maps.read_bytes():  # a library that is loaded long before the app
            assert time.monotonic() < deadline
    os.killpg(service.pid, signal.SIGINT)
    if moment == "stopping":
        wait_for(service, place / "out", b"stopping")
        os.killpg(service.pid, signal.SIGINT)
    # at a start the interrupt may reach the nats-server, or a worker, before the process that waits for it
    expected = {"running": (0,), "stopping": (0, 1), "starting": (0, 1, 130)}
    assert service.wait(60) in expected.get(moment, (0, 130))
    assert complaints(place / "err") == []


# output

PRINTING = (["config", "show"], ["config", "schema"], ["--help"], ["check", "examples.bank:app", "--json"])


def printed(arguments: list[str], environment: dict[str, str], folder: Path, end: str) -> tuple[int, str]:
    script = f'set -o pipefail; "$@" {end}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *CLI, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", PRINTING)
def test_output_that_nothing_reads_ends_a_command_quietly(
    arguments: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    assert printed(arguments, environment, tmp_path, "| true") == (141, "")


@pytest.mark.parametrize("arguments", PRINTING)
def test_a_full_disk_is_an_error_in_a_sentence(
    arguments: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    sentence = "error: standard output can't be written: No space left on device\n"
    assert printed(arguments, environment, tmp_path, "> /dev/full") == (1, sentence)


@pytest.mark.parametrize("closed", [">&-", "<&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize("arguments", PRINTING)
def test_a_closed_stream_is_as_if_nobody_looked(
    arguments: list[str], closed: str, environment: dict[str, str], tmp_path: Path
) -> None:
    assert printed(arguments, environment, tmp_path, closed) == (0, "")


def test_an_error_that_cannot_be_written_keeps_its_exit_code(environment: dict[str, str], tmp_path: Path) -> None:
    for end in ("2>&-", "2>/dev/full"):
        assert printed(["status"], environment, tmp_path, end) == (3, "")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_service_goes_on_without_a_reader_of_its_output(
    environment: dict[str, str], tmp_path: Path, workers: str
) -> None:
    service = subprocess.Popen(
        [*CLI, "run", "examples.bank:app", "--workers", workers],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert service.stdout is not None and service.stderr is not None
    while b"stop it with" not in service.stdout.readline():
        assert service.poll() is None
    service.stdout.close()
    service.stderr.close()
    try:
        send(tmp_path)
    finally:
        service.send_signal(signal.SIGTERM)
    assert service.wait(60) == 0


def test_a_locale_that_has_no_umlauts_does_not_stop_a_command(environment: dict[str, str], tmp_path: Path) -> None:
    narrow = {**environment, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    narrow["ESKERNEL_CONNECTION__NAME"] = "größe"
    assert printed(["config", "show"], narrow, tmp_path, "> out")[0] == 0
