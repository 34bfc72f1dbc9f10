"""`eskernel check --log`: what is in the log, and this program can't read, is found before a deployment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aggregates import Aggregate, applies, event
from aggregates.commit import Decision, encode, timestamp
from aggregates.declaration import declare
from examples.bank import Account, Deposited, Withdrawn
from examples.bank import app as bank
from kernel import App
from kernel.cli.check_log import LogReport, check_log
from kernel.log import MemoryLog
from tests.commands import ROOT, eskernel


@event
class Opened:
    name: str


class Branch(Aggregate):
    name: str = ""

    @applies
    def opened(self, event: Opened) -> None:
        self.name = event.name


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog("bank", 8)


async def append(log: MemoryLog, cls: type[Aggregate], aggregate_id: str, *events: object, last: int = 0) -> int:
    declared = declare(cls)
    encoded = [declared.event_types[type(happened)].encode(happened) for happened in events]
    payload = encode("/bank", aggregate_id, [Decision("", encoded)], 0, timestamp())
    return await log.append(log.subjects.address(declared.name, aggregate_id).subject, last, payload)


async def report(log: MemoryLog, app: App = bank, sample: int | None = None) -> LogReport:
    steps: list[tuple[int, int]] = []
    found = await check_log(app, log, "bank", sample, lambda done, total: steps.append((done, total)))
    assert all(done <= total for done, total in steps)
    return found


async def test_events_that_decode_are_counted(log: MemoryLog) -> None:
    for number in range(5):
        await append(log, Account, f"a{number}", Deposited(5), Withdrawn(2))
    found = await report(log)
    assert (found.commits, found.total, found.events, found.problems) == (5, 5, 10, [])
    assert found.decoded == {"Account.Deposited 1": 5, "Account.Withdrawn 1": 5}


async def test_an_empty_log_has_nothing_to_decode(log: MemoryLog) -> None:
    assert (await report(log)).events == 0


async def test_each_reason_is_named_with_its_count_and_its_first_place(log: MemoryLog) -> None:
    await append(log, Account, "fine", Deposited(1))
    for name in ("x", "y"):
        await append(log, Branch, name, Opened(name))
    subject = log.subjects.address("Account", "odd").subject

    def stored(**fields: object) -> bytes:
        envelope = {"id": "1", "type": "Deposited", "time": timestamp(), "sequence": 1, "data": {"cents": 1}}
        return json.dumps([envelope | fields]).encode()

    last = 0
    for payload in (
        stored(data={"cents": "much"}),
        stored(data={"cents": "more"}),
        stored(type="Closed"),
        stored(dataversion=2),
        b"{",
    ):
        last = await log.append(subject, last, payload)
    found = await report(log)
    assert [(p.kind, p.aggregate, p.event, p.version, p.count, p.sequence, p.aggregate_id) for p in found.problems] == [
        ("unknown aggregate", "Branch", "Opened", 1, 2, 2, "x"),
        ("undecodable", "Account", "Deposited", 1, 2, 4, "odd"),
        ("unknown event", "Account", "Closed", 1, 1, 6, "odd"),
        ("undecodable", "Account", "Deposited", 2, 1, 7, "odd"),
        ("not a commit", "", "", 0, 1, 8, subject),
    ]
    errors = [problem.error for problem in found.problems]
    assert "declares no such aggregate" in errors[0]
    assert "Expected `int`" in errors[1]
    assert "Deposited, Withdrawn" in errors[2]
    assert "too old" in errors[3]
    assert found.events == found.decoded["Account.Deposited 1"] + sum(problem.count for problem in found.problems)


@pytest.mark.parametrize("sample", [1, 3, 20, 45, 99, 100, 1_000])
async def test_a_sample_is_spread_over_the_log_up_to_its_end(log: MemoryLog, sample: int) -> None:
    for number in range(99):
        await append(log, Account, f"a{number}", Deposited(1))
    await append(log, Branch, "newest", Opened("newest"))
    found = await report(log, sample=sample)
    assert (found.commits, found.total) == (min(sample, 100), 100)
    assert [problem.aggregate_id for problem in found.problems] == ["newest"]


def test_the_command_checks_a_log_whether_its_service_runs_or_not(tmp_path: Path) -> None:
    older = "from examples.bank import *\nfrom kernel import App\n"
    (tmp_path / "older.py").write_text(
        f"{older}@event\nclass Deposited:\n    pounds: int\n"
        "class Account(Aggregate):\n    @applies\n    def deposited(self, event: Deposited) -> None: ...\n"
        'app = App("bank", aggregates=[Account])\n'
    )
    assert eskernel("check", "older:app", folder=tmp_path).returncode == 0
    nothing = eskernel("check", "examples.bank:app", "--log", folder=tmp_path)
    assert (nothing.returncode, "has no log of 'bank'" in nothing.stderr) == (3, True)
    with (tmp_path / "out").open("wb") as out:
        service = subprocess.Popen(
            [sys.executable, "-m", "kernel.cli", "run", "examples.bank:app"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while b"stop it with" not in (tmp_path / "out").read_bytes():
            assert service.poll() is None and time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.02)
        assert eskernel("send", "Account", "anna", "Deposit", "cents=5", folder=tmp_path).returncode == 0
        running = eskernel("check", "examples.bank:app", "--log", folder=tmp_path)
        assert (running.returncode, running.stderr) == (0, "")
        assert "1 event in 1 commit; all decode with this program" in running.stdout
    finally:
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
    stopped = eskernel("check", "examples.bank:app", "--log", "--sample", "5", "--json", folder=tmp_path)
    assert (stopped.returncode, json.loads(stopped.stdout)["log"]["events"]) == (0, 1)
    refused = eskernel("check", "older:app", "--log", folder=tmp_path)
    assert refused.returncode == 1
    assert "undecodable: Account Deposited version 1, 1 event, first at sequence 1 (anna)" in refused.stdout
    assert "pounds" in refused.stdout
