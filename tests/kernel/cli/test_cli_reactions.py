"""The verbs of policies, effects and timers, and of their dead letters, beside a running service."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.cli.test_cli import Shell, eskernel


def _until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def test_policies_effects_and_timers_are_seen_and_steered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REACTING_FOLDER", str(tmp_path))
    shell = Shell(tmp_path)
    shell.start("tests.reacting_app:app")

    def read(*words: str) -> Any:
        return json.loads(shell(*words, "--json"))

    try:
        shell("send", "Order", "o1", "Place", "cents=500", "--command-id", "visit-1")
        shell("send", "Order", "dear", "Place", "cents=5000")
        shell("send", "Order", "bad", "Place", "cents=13")
        # timers
        (timer, _) = _until(lambda: len(found := read("timers", "list")) == 2 and found)
        assert (timer["policy"], timer["key"], timer["command"], timer["id"]) == ("Fulfilment", "o1", "Expire", "o1")
        assert "Fulfilment  o1  Expire for Order o1" in shell("timers", "list", "Fulfilment")
        assert "1 of 1 timers cancelled" in shell("timers", "cancel", "Fulfilment", "dear")
        assert "not pending: never" in shell("timers", "cancel", "Fulfilment", "never", code=1)
        assert "no policy 'Nothing'; it knows Fulfilment" in shell("timers", "list", "Nothing", code=1)
        assert "no timer is pending" in shell("timers", "list", "--failed")
        # what was rejected, and what failed
        (row,) = _until(lambda: read("policies", "rejected"))
        assert (row["command"], row["aggregate_id"], row["reason"]) == ("Request", "pay-dear", "too much")
        assert "Request for Payment pay-dear: too much" in shell("policies", "rejected", "Fulfilment")
        (parked,) = _until(lambda: read("dead-letters", "list", "--projection", "Fulfilment"))
        assert (parked["aggregate_id"], parked["events"], parked["reaction"]) == ("bad", 1, True)
        tried = eskernel("dead-letters", "retry", "Order", "bad", folder=shell.folder, COLUMNS="120")
        assert "1 still wait: Request for Payment pay-bad: failed: ValueError: unlucky" in tried.stdout
        assert tried.returncode == 1
        assert "Placed" in shell("dead-letters", "show", "Order", "bad")
        assert "skipped event 1; 0 still wait" in shell("dead-letters", "skip", "Order", "bad", "--reason", "a test")
        assert "no dead letters" in shell("dead-letters", "list")
        # where they stand
        (standing,) = read("policies", "list")
        assert (standing["name"], standing["timers"], standing["rejected"], standing["paused"]) == (
            "Fulfilment", 1, 1, False,
        )  # fmt: skip
        assert "Fulfilment" in shell("policies", "list")
        assert "policy Fulfilment: running, 0 behind" in shell("status")
        assert "effect Fails: running" in shell("status")
        # the tree of what led to what
        trace = shell("trace", "visit-1")
        assert trace.index("Placed") < trace.index("Requested")
        # an effect: its mail server is away, and its mails are sent again
        _until((tmp_path / "mails").exists)
        assert (tmp_path / "mails").read_text().split() == ["dear"]
        (tmp_path / "away").touch()
        shell("send", "Payment", "pay-o1", "Pay")
        (parked,) = _until(lambda: read("dead-letters", "list", "--projection", "Fails"))
        assert parked["aggregate_id"] == "o1"
        (tmp_path / "away").unlink()
        assert "no longer parked" in shell("dead-letters", "retry", "--all")
        assert (tmp_path / "mails").read_text().split() == ["dear", "o1"]
        assert "handles again what has happened from stream sequence 1 on" in shell(
            "effects", "replay", "Fails", "--from", "1"
        )
        _until(lambda: len((tmp_path / "mails").read_text().split()) == 4)
        # pauses
        assert "Fulfilment is paused" in shell("policies", "pause", "Fulfilment")
        _until(lambda: "policy Fulfilment: paused" in shell("status"))
        assert read("policies", "list")[0]["paused"]
        shell("send", "Order", "o2", "Place")
        assert "Fulfilment goes on" in shell("policies", "resume", "Fulfilment")
        _until(lambda: eskernel("show", "Payment", "pay-o2", folder=shell.folder).returncode == 0)
        assert "the database knows no effect 'Fulfilment'; it knows Fails" in shell(
            "effects", "pause", "Fulfilment", code=1
        )
        assert "the app declares Fails" in shell("effects", "drop", "Fails", code=1)
    finally:
        assert shell.stop() == 0
