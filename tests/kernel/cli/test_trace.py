"""`eskernel trace`: an id leads to commands, events, projections, and what followed."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernel import Client, load_app
from kernel.runtime.running import find_running
from tests.conftest import run
from tests.kernel.cli.test_cli import Shell
from tests.kernel.cli.test_cli_dead_letters import APP, until, waiting


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Payments to the tills a, b and c: that to b is caused by the one to a, and that to c by b's event.

    The projection fails at the payment to c, and at those that follow there.
    """
    shell = Shell(tmp_path_factory.mktemp("trace"))
    (shell.folder / "traced_tills.py").write_text(APP.replace('App("tills"', 'App("traced"'))
    (shell.folder / "broken").touch()
    shell.start("traced_tills:app")
    try:
        run(pay(shell.folder))
        until(lambda: [parked["events"] for parked in waiting(shell)] == [2])
        yield shell
    finally:
        assert shell.stop() == 0


async def pay(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        app = load_app("traced_tills:app")
    till = app.types["Till"].cls
    make = app.types["Till"].commands["Pay"]
    async with await Client.connect(app, data=folder / ".eskernel") as client:

        async def send(aggregate_id: str, cents: int, command_id: str, cause: str | None = None) -> None:
            await client.execute(
                till, aggregate_id, make(cents), command_id=command_id, correlation_id="order 7", causation_id=cause
            )

        await send("a", 1, "pay-a")
        await send("b", 2, "pay-b", "pay-a")
        stored = await client.log.read_subject(client.log.subjects.address("Till", "b").subject)
        await send("c", 13, "pay-c", json.loads(stored[0].payload)[0]["id"])
        await send("c", 3, "tip-c")
        receipt = await client.execute(till, "d", make(4), command_id="alone")
        await client.query("select 1", after=receipt)


def found(shell: Shell, *arguments: str) -> list[dict[str, Any]]:
    answer = json.loads(shell("trace", *arguments, "--json"))
    commands: list[dict[str, Any]] = answer["commands"]
    return commands


def test_a_command_leads_to_its_events_their_projections_and_what_they_caused(shell: Shell) -> None:
    answer = json.loads(shell("trace", "pay-a", "--json"))
    assert (answer["id"], answer["is"]) == ("pay-a", ["causation", "command"])
    first, second, third = answer["commands"]
    assert [command["depth"] for command in answer["commands"]] == [0, 1, 3]
    assert (first["aggregate"], first["aggregate_id"], first["caused_by"]) == ("Till", "a", None)
    (event,) = first["events"]
    assert {"type": "Paid", "version": 1, "sequence": 1, "stream_sequence": 1}.items() <= event.items()
    (projected,) = event["projections"]
    assert (projected["projection"], projected["state"], projected["version"]) == ("Sums", "included", 1)
    assert second["caused_by"] == {"command_id": "pay-a", "event_id": None}
    assert third["caused_by"] == {"command_id": "pay-b", "event_id": second["events"][0]["event_id"]}
    assert third["correlation_id"] == "order 7"


def test_the_tree_says_where_an_event_is_stuck(shell: Shell) -> None:
    said = shell("trace", "pay-b")
    assert said.startswith("pay-b is the id of a command\ncommand pay-b  Till b  20")
    assert "\n  correlation order 7\n  caused by pay-a\n  event 1  Paid version 1  stream sequence 2  20" in said
    assert "\n    Sums version 1: included\n    command pay-c  Till c  20" in said
    assert "\n        Sums version 1: parked since event 1: ValueError: unlucky" in said
    assert "All with the same correlation: eskernel trace 'order 7'\n" in said
    (tip,) = found(shell, "tip-c")
    assert tip["events"][0]["projections"][0]["state"] == "parked"
    assert tip["events"][0]["projections"][0]["error"].startswith("event 1: ")


def test_events_and_correlations_are_found_by_their_ids(shell: Shell) -> None:
    (event,) = found(shell, "pay-b")[0]["events"]
    assert [command["command_id"] for command in found(shell, event["event_id"])] == ["pay-b", "pay-c"]
    assert "is the id of an event and a cause" in shell("trace", event["event_id"])
    assert [command["command_id"] for command in found(shell, "order 7")] == ["pay-a", "pay-b", "pay-c", "tip-c"]
    assert [command["depth"] for command in found(shell, "order 7")] == [0, 1, 3, 0]


def test_the_search_is_limited_to_an_aggregate_or_a_time(shell: Shell) -> None:
    assert [command["command_id"] for command in found(shell, "order 7", "--aggregate", "Till/c")] == ["pay-c", "tip-c"]
    assert "the history of Till/d has the id 'order 7'" in shell("trace", "order 7", "--aggregate", "Till/d", code=1)
    assert len(found(shell, "order 7", "--since", "2001-01-01")) == 4
    assert "in the log has the id 'nothing'" in shell("trace", "nothing", code=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("",), "ID is empty"),
        (("x", "--since", "yesterday"), "'yesterday' is not an ISO 8601 time"),
        (("x", "--aggregate", "Till"), "give it as TYPE/ID"),
        (("x", "--aggregate", "Tale/a"), "traced has no aggregate 'Tale'; it has Till"),
        (("x", "--aggregate", "Till/a", "--since", "2001-01-01"), "leave --since away"),
    ],
)
def test_what_is_mistyped_is_refused_with_what_would_be_right(
    shell: Shell, arguments: tuple[str, ...], says: str
) -> None:
    assert says in shell("trace", *arguments, code=2)


def test_what_readers_do_not_see_yet_or_what_was_skipped_is_said(shell: Shell, tmp_path: Path) -> None:
    copy, database = tmp_path / "copy.db", f"sqlite:///{tmp_path / 'copy.db'}"
    with (
        sqlite3.connect(shell.folder / ".eskernel" / "traced" / "projections.db") as original,
        sqlite3.connect(copy) as target,
    ):
        original.backup(target)
    shell("dead-letters", "skip", "Till", "c", "--reason", "never paid", "--who", "eve", "--database", database)

    def change(statement: str) -> None:
        with sqlite3.connect(copy) as connection:
            assert connection.execute(statement).rowcount

    def state(command: str, *options: str) -> str:
        projected: dict[str, Any] = found(shell, command, *(options or ("--database", database)))[0]["events"][0]
        return str(projected["projections"][0]["state"])

    assert (state("pay-c"), state("tip-c")) == ("skipped", "parked")
    change("update eskernel_dead_letter set attempts = 0")
    assert state("tip-c") == "waiting"
    change("update eskernel_checkpoint set sequence = 0")
    assert "Sums version 1: not yet included, the partition is at 0" in shell("trace", "alone", "--database", database)
    change("update eskernel_projection set state = 'building'")
    assert "Sums: not built" in shell("trace", "alone", "--database", database)
    elsewhere = "--app", "traced_tills:app", "--nats", find_running(shell.folder / ".eskernel", "traced").nats
    assert state("alone", *elsewhere) == "unknown"
    assert "Sums: not looked up; give --database" in shell("trace", "alone", *elsewhere)


def test_help_teaches_with_examples(shell: Shell) -> None:
    said = shell("trace", "--help")
    assert 'eskernel trace "payment 4711" --since 2026-01-31' in said
    assert "Exit codes" in said
