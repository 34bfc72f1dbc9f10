"""The command line, as people and scripts use it."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.bank import Account, Deposit
from examples.bank import app as bank
from kernel import Client
from tests.commands import ROOT, eskernel
from tests.conftest import run


class Shell:
    """Runs `eskernel` in a separate folder, in which the bank's service is running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "service.log"
        self.service: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        if not arguments or arguments[0].startswith("-"):
            arguments = ("examples.bank:app", *arguments)
        with self.log.open("wb") as log:
            self.service = subprocess.Popen(
                [sys.executable, "-m", "kernel.cli", "run", *arguments],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 30
        while b"stop it with" not in self.log.read_bytes():
            assert self.service.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def stop(self) -> int:
        assert self.service is not None
        self.service.send_signal(signal.SIGTERM)
        return self.service.wait(30)

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run a command; return its standard output, or its standard error where it is expected to fail."""
        done = eskernel(*arguments, folder=self.folder, COLUMNS="120")
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def out(self, *arguments: str, code: int) -> str:
        """Run a command whose standard output counts, whatever its exit code."""
        done = eskernel(*arguments, folder=self.folder, COLUMNS="120")
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    shell = Shell(tmp_path_factory.mktemp("shell"))
    shell.start()
    yield shell
    assert shell.stop() == 0


def test_a_command_prints_its_receipt(shell: Shell) -> None:
    assert "Account anna is at version 1" in shell("send", "Account", "anna", "Deposit", "cents=500")
    receipt = json.loads(shell("send", "Account", "anna", "Deposit", "--fields-json", '{"cents": 1}', "--json"))
    assert receipt["version"] == 2


def test_what_is_said_of_a_command_is_shown_with_its_events(shell: Shell) -> None:
    said = ["--actor", "ada", "--tenant", "acme", "--metadata", "ip=::1", "--occurred-at", "2013-01-31T12:00"]
    shell("send", "Account", "gina", "Deposit", "cents=5", "--command-id", "gina-1", "--if-version", "0", *said)
    assert "version 1, and not 0" in shell("send", "Account", "gina", "Deposit", "cents=5", "--if-version=0", code=1)
    assert "is not NAME=TEXT" in shell("send", "Account", "gina", "Deposit", "cents=5", "--metadata", "ip", code=2)
    assert "by ada, for acme, of 2013-01-31T12:00:00Z, ip=::1" in shell("show", "Account", "gina", "--history")
    assert "by ada, for acme" in shell("trace", "gina-1", "--aggregate", "Account/gina")
    (event,) = json.loads(shell("show", "Account", "gina", "--history", "--json"))["events"]
    assert (event["actor"], event["tenant"], event["metadata"]) == ("ada", "acme", {"ip": "::1"})
    deadline = time.monotonic() + 10
    while not json.loads(shell("query", "--json", "select * from balances where account = 'gina'")):
        assert time.monotonic() < deadline
    assert "command gina-1, by ada, for acme" in shell("blame", "balances", "gina")


def test_a_rejection_exits_with_1_and_the_reason(shell: Shell) -> None:
    assert "balance is 0" in shell("send", "Account", "bert", "Withdraw", "cents=700", code=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("Account", "a", "Withdraw", "cents=much"), "cents"),
        (("Account", "a", "Withdraw", "cent=1"), "it has cents"),
        (("Account", "a", "Withdraw"), "cents"),
        (("Account", "a", "Rob", "cents=1"), "Deposit, Withdraw"),
        (("Acount", "a", "Deposit", "cents=1"), "Account"),
        (("Account", "", "Deposit", "cents=1"), "empty"),
        (("Account", "a", "Deposit", "--fields-json", "{"), "not JSON"),
    ],
)
def test_a_mistyped_command_exits_with_2_and_says_what_there_is(
    shell: Shell, arguments: tuple[str, ...], says: str
) -> None:
    assert says in shell("send", *arguments, code=2)


def test_queries_print_tables_json_and_csv(shell: Shell) -> None:
    receipt = json.loads(shell("send", "Account", "carl", "Deposit", "cents=70", "--json"))
    assert receipt["version"] == 1
    sql = "select * from balances where account = 'carl'"
    deadline = time.monotonic() + 10
    while json.loads(shell("query", "--json", sql)) != [{"account": "carl", "cents": 70}]:
        assert time.monotonic() < deadline
    assert "carl" in shell("query", sql)
    assert list(csv.reader(io.StringIO(shell("query", "--csv", sql)))) == [["account", "cents"], ["carl", "70"]]


def test_queries_cannot_write(shell: Shell) -> None:
    shell("query", "delete from eskernel_checkpoint", code=1)


def test_show_prints_state_and_history_also_as_of_then(shell: Shell) -> None:
    for cents in (100, 20, 3):
        shell("send", "Account", "dora", "Deposit", f"cents={cents}")
    assert "balance = 123" in shell("show", "Account", "dora")
    assert "balance = 120" in shell("show", "Account", "dora", "--at", "2")
    history = json.loads(shell("show", "Account", "dora", "--history", "--json"))
    assert [event["data"]["cents"] for event in history["events"]] == [100, 20, 3]
    second = history["events"][1]["time"]
    assert "balance = 120" in shell("show", "Account", "dora", "--at", second)
    assert "had no events" in shell("show", "Account", "dora", "--at", "2001-01-01", code=1)
    assert "has no events" in shell("show", "Account", "unknown", code=1)


def test_rebuild_says_what_it_did(shell: Shell) -> None:
    shell("send", "Account", "emma", "Deposit", "cents=5")
    assert "Balances: generation" in shell("rebuild", "Balances")
    assert json.loads(shell("rebuild", "--all", "--json"))[0]["projection"] == "Balances"
    assert "Balances" in shell("rebuild", "Balanced", code=2)


def test_another_database_than_the_services_is_not_rebuilt(shell: Shell, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    with (
        sqlite3.connect(shell.folder / ".eskernel" / "bank" / "projections.db") as original,
        sqlite3.connect(copy) as target,
    ):
        original.backup(target)
    refusal = shell("rebuild", "Balances", "--database", f"sqlite:///{copy}", code=1)
    assert "give all of them the same database" in refusal


def test_status_reports_health_and_position(shell: Shell) -> None:
    report = json.loads(shell("status", "--json"))
    assert report["ready"]
    (worker,) = report["workers"]
    assert worker["partitions"] == list(range(64))
    assert {job["name"] for job in worker["jobs"]} >= {"passivate", "detect_backlog", "probe", "renew_leases"}
    output = shell("status")
    assert "bank is ready" in output
    assert "partitions 0-63" in output


def test_backlog_reports_every_projection_and_publishing(shell: Shell) -> None:
    report = json.loads(shell("backlog", "--json"))
    assert report["level"] == "ok"
    (projection,) = report["projections"]
    assert (projection["projection"], projection["level"], projection["behind"]) == ("Balances", "ok", 0)
    assert [each["level"] for each in report["publishing"]] == ["low"]
    output = shell("backlog")
    assert "Balances" in output
    assert "pressure low" in output


def test_jobs_are_shown_with_their_last_and_next_runs(shell: Shell) -> None:
    (worker,) = json.loads(shell("jobs", "--json"))
    jobs = {job["name"]: job for job in worker["jobs"]}
    assert {"passivate", "detect_backlog", "measure_pressure", "probe", "renew_leases"} <= set(jobs)
    renewing = jobs["renew_leases"]
    assert renewing["interval"] == 1.0
    assert renewing["next_run"] > renewing["last"] > "20"
    assert renewing["error"] == ""
    assert "renew_leases" in shell("jobs")


def test_a_second_service_on_the_same_data_is_refused(shell: Shell) -> None:
    assert "--data" in shell("run", "examples.bank:app", code=3)


def test_without_a_service_commands_say_how_to_start_one(tmp_path: Path) -> None:
    assert "eskernel run" in Shell(tmp_path)("status", code=3)


def test_every_command_explains_its_use(shell: Shell) -> None:
    for command in ("run", "check", "send", "query", "show", "rebuild", "status", "backlog", "jobs"):
        assert "Exit codes" in shell(command, "--help")
        assert command in shell("--help")


def test_check_lists_declarations_and_all_problems(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    assert "Deposited" in shell("check", "examples.bank:app")
    (tmp_path / "broken.py").write_text(
        "from aggregates import Aggregate, command, event, handles\n"
        "from kernel import App\n"
        "@event\nclass Done:\n    n: int\n"
        "@command\nclass Do:\n    n: int\n"
        "class Job(Aggregate):\n"
        "    count: int\n"
        "    @handles\n"
        "    def do(self, command: Do) -> Done:\n"
        "        return Done(command.n)\n"
        "app = App('broken', aggregates=[Job])\n"
    )
    problems = shell("check", "broken:app", code=2)
    assert "Job.count has no default" in problems
    assert "no method of Job applies" in problems
    assert "can't import" in shell("check", "nowhere:app", code=2)


def test_sigterm_drains_and_the_next_start_goes_on(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.start()
    shell("send", "Account", "fred", "Deposit", "cents=9")
    assert shell.stop() == 0
    assert "stopped" in shell.log.read_text()
    shell.start("--sync")
    assert "survive a power cut" in shell.log.read_text().replace("\n", " ")
    assert "version 2" in shell("send", "Account", "fred", "Withdraw", "cents=9")
    assert shell.stop() == 0


def test_show_names_what_changed_between_two_events_and_by_which(shell: Shell) -> None:
    for cents in (100, 50, 7):
        shell("send", "Account", "sofia", "Deposit", f"cents={cents}")
    said = shell("show", "Account", "sofia", "--diff", "1", "3")
    assert "Account sofia, from version 1 to 3" in said
    assert "  balance: 100 -> 157\n" in said
    assert 'Deposited {"cents":50}\n          balance: 100 -> 150' in said
    assert 'Deposited {"cents":100}' not in said
    found = json.loads(shell("show", "Account", "sofia", "--diff", "0", "2", "--json"))
    assert (found["from"], found["to"]) == (0, 2)
    assert found["changed"] == {"balance": {"before": 0, "after": 150}}
    assert [event["changed"] for event in found["events"]] == [
        {"balance": {"before": 0, "after": 100}}, {"balance": {"before": 100, "after": 150}},
    ]  # fmt: skip
    moment = found["events"][1]["time"]
    said = shell("show", "Account", "sofia", "--diff", moment, "3")
    assert "from version 2 to 3" in said
    assert "nothing changed" in shell("show", "Account", "sofia", "--diff", "3", "3")
    assert "leave --at and --history away" in shell("show", "Account", "sofia", "--diff", "1", "2", "--history", code=2)


async def deposit_often(folder: Path, account: str, count: int) -> None:
    async with await Client.connect(bank, data=folder / ".eskernel") as client:
        await asyncio.gather(*(client.execute(Account, account, Deposit(1)) for _ in range(count)))


def test_a_long_history_is_printed_in_pages(shell: Shell) -> None:
    run(deposit_often(shell.folder, "tina", 130))

    def page(*options: str) -> tuple[list[int], str]:
        lines = shell("show", "Account", "tina", *options).splitlines()
        assert lines[:2] == ["Account tina, version 130", "  balance = 130"]
        events = [line for line in lines[2:] if "Deposited" in line]
        return [int(line.split()[0]) for line in events], "".join(lines[2 + len(events) :]).strip()

    assert page("--history") == ([*range(31, 131)], "30 earlier events: --before 31")
    assert page("--history", "--before", "31") == ([*range(1, 31)], "100 later events: --after 30")
    assert page("--after", "129") == ([130], "129 earlier events: --before 130")
    assert page("--after", "1", "--limit", "2") == ([2, 3], "1 earlier event: --before 2; 127 later events: --after 3")
    assert page("--after", "3", "--before", "6") == (
        [4, 5],
        "3 earlier events: --before 4; 125 later events: --after 5",
    )
    assert page("--limit", "130") == ([*range(1, 131)], "")
    assert page("--after", "130") == ([], "none of the events 1 to 130 is there")
    assert page("--before", "1") == ([], "none of the events 1 to 130 is there")
    said = shell("show", "Account", "tina", "--at", "40", "--history", "--limit", "1")
    assert "version 40\n" in said
    assert said.endswith("  39 earlier events: --before 40\n")

    def sequences(*options: str) -> list[int]:
        shown = json.loads(shell("show", "Account", "tina", "--json", *options))
        return [event["sequence"] for event in shown["events"]]

    assert sequences("--history") == [*range(1, 131)]
    assert sequences("--after", "128") == [129, 130]
    assert sequences("--before", "4", "--limit", "2") == [2, 3]
    assert "events" not in json.loads(shell("show", "Account", "tina", "--json"))
    assert "leave --at and --history away" in shell(
        "show", "Account", "tina", "--diff", "1", "2", "--limit", "1", code=2
    )
