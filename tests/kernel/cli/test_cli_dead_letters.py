"""`eskernel dead-letters` and `run --workers`, as an operator uses them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kernel.runtime.running import find_running
from tests.conftest import run
from tests.failing import api
from tests.kernel.cli.test_cli import Shell

APP = """
from pathlib import Path
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from aggregates import Aggregate, applies, command, event, handles
from kernel import App
from projections import Rows

@event
class Paid:
    cents: int

@command
class Pay:
    cents: int

class Till(Aggregate):
    @handles
    def pay(self, command: Pay) -> Paid:
        return Paid(command.cents)

    @applies
    def paid(self, event: Paid) -> None:
        pass

class Base(DeclarativeBase):
    pass

class Sum(Base):
    __tablename__ = "sums"
    till: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int] = mapped_column(default=0)

class Sums(Rows[Sum], of=Till):
    @applies
    def paid(self, row: Sum, event: Paid) -> None:
        if event.cents == 13 and Path("broken").exists():
            raise ValueError("unlucky")
        if event.cents == 14 and Path("slow").exists():
            raise TimeoutError("waited in vain")
        row.cents += event.cents

app = App("tills", aggregates=[Till], projections=[Sums])
"""


def until(condition: Callable[[], Any], timeout: float = 20) -> Any:
    deadline = time.monotonic() + timeout
    while not (held := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return held


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    (tmp_path / "tills.py").write_text(APP)
    made = Shell(tmp_path)
    yield made
    if made.service is not None and made.service.poll() is None:
        made.service.kill()
        made.service.wait()


def waiting(shell: Shell) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(shell("dead-letters", "list", "--json"))
    return found


def test_dead_letters_are_listed_shown_exported_skipped_and_folded_again(shell: Shell) -> None:
    (shell.folder / "broken").touch()
    shell.start("tills:app")
    for cents in (1, 13, 100, 13, 1000):
        shell("send", "Till", "a", "Pay", f"cents={cents}")
    shell("send", "Till", "b", "Pay", "cents=7")
    until(lambda: [parked["events"] for parked in waiting(shell)] == [4])
    output = shell("dead-letters", "list")
    assert all(text in output for text in ("Sums", "Till", "unlucky"))
    shown = shell("dead-letters", "show", "Till", "a")
    assert "4 events wait" in shown
    assert '{"cents":13}' in shown
    lines = [json.loads(line) for line in shell("dead-letters", "export").splitlines()]
    assert [line["event"]["data"]["cents"] for line in lines] == [13, 100, 13, 1000]
    assert "unlucky" in shell("dead-letters", "retry", "Till", "a", code=1) + shell("dead-letters", "list")
    assert "--reason" in shell("dead-letters", "skip", "Till", "a", code=2)
    assert "3 still wait" in shell("dead-letters", "skip", "Till", "a", "--reason", "never paid", "--who", "eve")
    assert "by eve: never paid" in shell("dead-letters", "list", "--skipped")
    (shell.folder / "broken").unlink()
    assert "no longer parked" in shell("dead-letters", "retry", "--all")
    assert waiting(shell) == []
    shell("send", "Till", "a", "Pay", "cents=10000")
    found = until(
        lambda: (
            (rows := json.loads(shell("query", "select * from sums order by till", "--json")))
            and rows[0]["cents"] == 11114
            and rows
        )
    )
    assert found == [{"till": "a", "cents": 11114}, {"till": "b", "cents": 7}]
    assert "there are no dead letters" in shell("dead-letters", "retry", "Till", "a", code=1)
    assert shell.stop() == 0


def test_the_service_itself_retries_a_transient_failure(shell: Shell) -> None:
    (shell.folder / "slow").touch()
    shell.start("tills:app", "--retry-after", "0.2")
    for cents in (1, 14, 100):
        shell("send", "Till", "a", "Pay", f"cents={cents}")
    (parked,) = until(lambda: [parked for parked in waiting(shell) if parked["attempts"] >= 2])
    assert parked["next_attempt"] is not None
    (shell.folder / "slow").unlink()
    until(lambda: waiting(shell) == [])
    assert json.loads(shell("query", "select * from sums", "--json")) == [{"till": "a", "cents": 115}]
    assert shell.stop() == 0


def test_after_the_last_attempt_a_dead_letter_waits_for_an_operator(shell: Shell) -> None:
    (shell.folder / "slow").touch()
    shell.start("tills:app", "--retry-after", "0.05", "--retries", "3")
    shell("send", "Till", "a", "Pay", "cents=14")
    (parked,) = until(lambda: [parked for parked in waiting(shell) if parked["next_attempt"] is None])
    assert parked["attempts"] == 4
    assert shell.stop() == 0


# several workers


def workers_of(shell: Shell) -> list[psutil.Process]:
    assert shell.service is not None
    children = psutil.Process(shell.service.pid).children()
    return [child for child in children if "kernel.workers.worker" in " ".join(child.cmdline())]


def status(shell: Shell) -> dict[str, Any]:
    """Return the report of `status`, empty while the service is not ready."""
    try:
        report: dict[str, Any] = json.loads(shell("status", "--json"))
    except AssertionError:
        return {}
    return report


def test_workers_share_the_partitions_and_die_and_come_back(shell: Shell) -> None:
    shell.start("tills:app", "--workers", "2")
    report = until(lambda: status(shell))
    assert [len(worker["partitions"]) for worker in report["workers"]] == [32, 32]
    for n in range(6):
        shell("send", "Till", f"t{n}", "Pay", "cents=1")
    victim, other = workers_of(shell)
    victim.kill()
    shell("send", "Till", "t0", "Pay", "cents=1")
    until(lambda: len(workers_of(shell)) == 2 and len(status(shell).get("workers", [])) == 2)
    assert other.is_running()
    until(lambda: json.loads(shell("query", "select sum(cents) as n from sums", "--json")) == [{"n": 7}])
    assert "starting it again" in shell.log.read_text()
    assert shell.stop() == 0
    assert not other.is_running()


def test_workers_never_outlive_their_parent(shell: Shell) -> None:
    shell.start("tills:app", "--workers", "2")
    assert shell.service is not None
    family = psutil.Process(shell.service.pid).children(recursive=True)
    os.kill(family[-1].pid, signal.SIGSTOP)  # not even a frozen worker
    shell.service.kill()
    shell.service.wait()
    _, alive = psutil.wait_procs(family, 15)
    assert alive == []
    shell.start("tills:app", "--workers", "2")
    assert until(lambda: status(shell))["ready"]
    assert shell.stop() == 0


def test_workers_that_cannot_start_say_why_at_once(shell: Shell) -> None:
    output = shell("run", "tills:app", "--workers", "2", "--nats", "nats://127.0.0.1:1", code=3)
    assert "can't connect to NATS" in output


def test_every_command_explains_its_options(shell: Shell) -> None:
    for command in ("list", "show", "retry", "skip", "export"):
        assert "--data" in shell("dead-letters", command, "--help")


def test_workers_whose_stream_is_deleted_exit_as_one_worker_does(shell: Shell) -> None:
    shell.start("tills:app", "--workers", "2")
    running = until(lambda: status(shell)) and find_running(shell.folder / ".eskernel")

    async def delete() -> None:
        async with api(running.nats) as call:
            await call(f"STREAM.DELETE.{running.app}")

    run(delete())
    assert shell.service is not None
    assert shell.service.wait(20) == 1
    assert "is gone from the server" in shell.log.read_text()


def test_a_row_with_a_key_of_its_own_is_listed_shown_skipped_and_folded_again(shell: Shell) -> None:
    key = "class Sums(Rows[Sum], of=(Till,)):\n    def key(self, event: Paid) -> str:\n        return 'all'\n"
    (shell.folder / "tills.py").write_text(APP.replace("class Sums(Rows[Sum], of=Till):\n", key))
    (shell.folder / "broken").touch()
    shell.start("tills:app")
    for till, cents in (("a", 1), ("b", 13), ("a", 100)):
        shell("send", "Till", till, "Pay", f"cents={cents}")
    until(lambda: [parked["events"] for parked in waiting(shell)] == [2])
    assert "Sums        Sums       all          @2        2  ValueError: unlucky" in shell("dead-letters", "list")
    shown = shell("dead-letters", "show", "Sums", "all")
    assert '1  Paid {"cents":13}' in shown
    assert '2  Paid {"cents":100}' in shown
    shell("dead-letters", "retry", "Sums", "all", code=1)
    assert "skipped event 1; 1 still wait" in shell("dead-letters", "skip", "Sums", "all", "--reason", "bad luck")
    assert "1 folded, no longer parked" in shell("dead-letters", "retry", "Sums", "all")
    assert "101" in shell("query", "select cents from sums")
