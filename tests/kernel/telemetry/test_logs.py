"""The log lines of a running service: their content and their form."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kernel import Client
from kernel.errors import CommandError
from kernel.log.repeats import Repeats
from kernel.runtime.nats_server import end_with_parent
from kernel.settings import Settings
from kernel.telemetry.logging import _Lines, about
from tests.apps import Explode, Note, Notebook, notebooks

DAY = "2026-01-31T00:00:00+00:00"
ROOT = Path(__file__).parents[3]


class Run:
    """`eskernel run` in a separate process, with its standard error in a file."""

    def __init__(self, directory: Path, nats: str, app: str, *arguments: str) -> None:
        self.out, self.errors = directory / "out", directory / "errors"
        with self.out.open("wb") as out, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "kernel.cli", "run", "tests.logging_app:app"),
                    *("--nats", nats, "--data", str(directory / "data"), *arguments),
                ],
                cwd=ROOT,
                env={**os.environ, "LOGGING_APP": app, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "default"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                preexec_fn=end_with_parent(signal.SIGKILL),  # noqa: PLW1509
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 40
        while b"stop it with" not in self.out.read_bytes():
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.02)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def lines(self) -> list[dict[str, Any]]:
        """Return every line of standard error; each must be one JSON object."""
        found = [json.loads(line) for line in self.errors.read_text().splitlines()]
        assert all(isinstance(entry, dict) for entry in found)
        return found


@contextmanager
def run(directory: Path, nats: str, app: str, *arguments: str) -> Iterator[Run]:
    started = Run(directory, nats, app, *arguments)
    try:
        started.wait_ready()
        yield started
    finally:
        started.process.kill()
        started.process.wait()


def only(lines: list[dict[str, Any]], event: str) -> dict[str, Any]:
    (found,) = [line for line in lines if event in line["event"]]
    return found


async def fail_a_command_and_a_projection(app: str, nats: str, wait: Any, run: Run) -> None:
    async with await Client.connect(notebooks(app), nats=nats) as client:
        with pytest.raises(CommandError):
            await client.execute(
                Notebook, "n1", Explode(), command_id="c1", correlation_id="order 7", causation_id="click"
            )
        await client.execute(Notebook, "n2", Note("poison row"), command_id="c2", correlation_id="order 8")
        await wait(lambda: "parked for" in run.errors.read_text())


@pytest.mark.setting("logging.format")
async def test_every_line_is_a_json_object_with_the_ids_of_what_it_is_about(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Any
) -> None:
    with run(tmp_path, nats_url, app_name, "--log-format", "json", "--retry-after", "0.05") as service:
        await fail_a_command_and_a_projection(app_name, nats_url, wait_until, service)
        assert service.stop() == 0
        lines = service.lines()
    for line in lines:
        assert line["timestamp"].endswith("Z")
        assert "T" in line["timestamp"]
        assert line["level"] in ("info", "warning", "error")
        assert line["worker"] == 0
        assert line.get("app") == app_name or line["logger"] in ("shop.stock", "sqlalchemy.engine")
    failed = only(lines, "Explode failed")
    assert failed["event"] == "Notebook n1: Explode failed: ZeroDivisionError: boom"
    assert {name: failed[name] for name in failed if name not in ("timestamp", "exception", "event")} == {
        "level": "warning", "logger": "eskernel.commands", "app": app_name, "worker": 0, "outcome": "failed",
        "aggregate": "Notebook", "aggregate_id": "n1", "command": "Explode", "command_id": "c1",
        "correlation_id": "order 7", "causation_id": "click",
    }  # fmt: skip
    assert failed["exception"].startswith("Traceback")
    assert 'raise ZeroDivisionError("boom")' in failed["exception"]
    parked = only(lines, "parked for Pages")
    assert parked["level"] == "error"
    assert (parked["aggregate"], parked["aggregate_id"], parked["sequence"]) == ("Notebook", "n2", 1)
    assert (parked["projection"], parked["reason"]) == ("Pages", "handler")
    assert (parked["command_id"], parked["correlation_id"]) == ("c2", "order 8")
    assert 'raise ValueError("no such page")' in parked["exception"]


async def test_lines_of_the_apps_own_code_have_the_same_form_whatever_they_carry(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    with run(tmp_path, nats_url, app_name, "--log-format", "json") as service:
        lines = service.lines()
    assert only(lines, "imported")["level"] == "info"
    odd = only(lines, "3 left")
    assert (odd["logger"], odd["event_"], odd["odd"], odd["7"]) == ("shop.stock", "Sold", "<odd>", DAY)
    large = only(lines, "too large")
    assert (large["huge"], large["odd"], large["broken"]) == (2**70, "<odd>", "\udc80")
    assert only(lines, "of interest")["logger"] == "sqlalchemy.engine"
    assert not [line for line in lines if "of no interest" in line["event"]]


async def test_workers_say_who_they_are_and_why_one_did_not_start(nats_url: str, app_name: str, tmp_path: Path) -> None:
    with run(tmp_path, nats_url, app_name, "--log-format", "json", "--workers", "2", "--lease", "1") as service:
        assert service.stop() == 0
        lines = service.lines()
    assert {line["worker"] for line in lines} == {0, 1, 2}
    assert {line["app"] for line in lines if line["logger"].startswith("eskernel")} == {app_name}
    (tmp_path / "second").mkdir()
    refused = Run(tmp_path / "second", "nats://127.0.0.1:1", app_name, "--log-format", "json")
    try:
        assert refused.process.wait(60) == 3
        assert refused.lines()[-1]["level"] == "error"
        assert "127.0.0.1:1" in refused.lines()[-1]["event"]
    finally:
        refused.process.kill()


async def test_text_is_for_people_without_colours_in_a_file(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Any
) -> None:
    with run(tmp_path, nats_url, app_name) as service:
        await fail_a_command_and_a_projection(app_name, nats_url, wait_until, service)
        text = service.errors.read_text()
    assert "\x1b[" not in text
    (line,) = [line for line in text.splitlines() if "Explode failed" in line]
    assert "warning" in line
    assert "Notebook n1: Explode failed: ZeroDivisionError: boom" in line
    for field in ("aggregate_id=n1", "command_id=c1", "correlation_id='order 7'"):
        assert field in line
    assert 'raise ZeroDivisionError("boom")' in text
    assert "imported" in text
    assert "took 64 partitions" in text


@pytest.mark.setting("logging.level")
async def test_the_level_is_the_least_that_is_written(nats_url: str, app_name: str, tmp_path: Path) -> None:
    with run(tmp_path, nats_url, app_name, "--log-format", "json", "--log-level", "warning") as service:
        assert service.stop() == 0
        lines = service.lines()
    assert {line["level"] for line in lines} == {"warning"}
    assert only(lines, "3 left")


@pytest.mark.parametrize("terminal", [True, False])
def test_colours_are_for_terminals(terminal: bool) -> None:
    master, slave = os.openpty()
    reader, writer = os.pipe()
    code = (
        "from kernel.telemetry.logging import *; set_up(Logging()); "
        "logger.warning('hot', extra=about('Stove', 's1', more=None))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    target = slave if terminal else writer
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=target, check=True)
    output = os.read(master if terminal else reader, 10_000).decode()
    for descriptor in (master, slave, reader, writer):
        os.close(descriptor)
    assert "hot" in output
    assert ("\x1b[" in output) == terminal
    assert "more" not in output


def test_an_uncaught_error_is_one_line_too() -> None:
    code = "from kernel.telemetry.logging import *; set_up(Logging(format='json'), 'shop', 3); raise ValueError('no')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    line = json.loads(done.stderr)
    assert done.returncode == 1
    assert (line["level"], line["event"], line["app"], line["worker"]) == ("critical", "ValueError: no", "shop", 3)
    assert line["exception"].endswith("ValueError: no")


def test_fields_that_are_empty_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    assert Settings().logging.format == "text"
    fields = about("Account", "alice", command_id="c1", correlation_id=None, causation_id="", sequence=0)
    assert fields == {"aggregate": "Account", "aggregate_id": "alice", "command_id": "c1", "sequence": 0}
    logging.getLogger("eskernel").warning("low", extra=fields)
    assert caplog.records[-1].aggregate_id == "alice"


def test_a_warning_that_repeats_is_written_once_a_minute_with_a_count() -> None:
    now = 0.0
    handler = _Lines(as_json=False)
    handler.setStream(written := io.StringIO())
    handler._repeats = Repeats(clock=lambda: now)

    def log(level: int, text: str, *given: object, name: str = "eskernel.leases") -> None:
        record = logging.LogRecord(name, level, "", 0, text, given, None)
        handler.handle(record)
        assert record.getMessage() == text % given  # other handlers get it as it was

    for _ in range(50):
        now += 1
        log(logging.WARNING, "leases: %s; again in %.1f s", "no answer", now)
        log(logging.WARNING, "leases: %s; again in %.1f s", "refused", 2.0) if now < 2 else None
        log(logging.INFO, "took %d partitions", 3)
        log(logging.ERROR, "of the app itself", name="shop")
    now += 60
    log(logging.WARNING, "leases: %s; again in %.1f s", "no answer", 1.0)
    lines = written.getvalue().splitlines()
    assert [line for line in lines if line.startswith("leases: no answer")] == [
        "leases: no answer; again in 1.0 s",
        "leases: no answer; again in 1.0 s (49 times more in the last 109 s)",
    ]
    assert sum("refused" in line for line in lines) == 1
    assert sum("took" in line for line in lines) == sum("of the app" in line for line in lines) == 50
