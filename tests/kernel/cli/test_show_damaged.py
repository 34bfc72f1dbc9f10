"""`eskernel show` of a history that can't be read to its end: it says where, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from aggregates.commit import timestamp
from kernel.transport.dial import connect
from tests.commands import eskernel
from tests.conftest import open_log, run

Show = Callable[..., str]

APP = 'import examples.bank\nfrom kernel import App\napp = App("{}", aggregates=[examples.bank.Account])\n'


def commit(*sequences: int, **fields: object) -> bytes:
    """Return a commit of deposits of 5 with these numbers."""
    deposited = {"id": "1", "type": "Deposited", "time": timestamp(), "data": {"cents": 5}}
    return json.dumps([deposited | {"sequence": sequence} | fields for sequence in sequences]).encode()


async def store(url: str, app: str, commits: Sequence[bytes]) -> int:
    """Store the history of the account `a`; return the stream sequence of its last commit."""
    connection = await connect(url, name="damage")
    try:
        log = await open_log(connection, app)
        last = 0
        for payload in commits:
            last = await log.append(log.subjects.address("Account", "a").subject, last, payload)
        await log.close()
        return last
    finally:
        await connection.close()


@pytest.fixture
def show(nats_url: str, app_name: str, tmp_path: Path) -> Show:
    """Run `eskernel show Account a` on a history of these commits."""
    (tmp_path / "damaged.py").write_text(APP.format(app_name))

    def show(*options: str, code: int) -> str:
        given = ("--nats", nats_url, "--app", "damaged:app", *options)
        done = eskernel("show", "Account", "a", *given, folder=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr

    return show


@pytest.mark.parametrize(
    ("commits", "says"),
    [
        ([commit(2), commit(3)], "at stream sequence 1: event 2 is stored where event 1 should be"),
        ([commit(1), commit(2), commit(4)], "at stream sequence 3: event 4 is stored where event 3 should be"),
        ([commit(1), commit(2), commit(2)], "at stream sequence 3: event 2 is stored where event 3 should be"),
        ([commit(1), commit(2), commit(3, 5)], "at stream sequence 3: event 5 is stored where event 4 should be"),
        ([commit(1), b"\xff no commit"], "at stream sequence 2: not a commit"),
        ([b"[]", commit(1)], "at stream sequence 1: not a commit"),
    ],
    ids=["first missing", "gap", "twice", "gap inside a commit", "no commit", "no commit first"],
)
def test_a_damaged_history_is_shown_as_far_as_it_is_sound(
    show: Show, nats_url: str, app_name: str, commits: list[bytes], says: str
) -> None:
    run(store(nats_url, app_name, commits))
    said = show(code=1)
    assert f"error: Account 'a': the history is damaged {says}" in said
    assert said.endswith("Restore the log from a backup: docs/backup.md\n")
    if "--at" not in said:
        assert "nothing before it is left" in said
        show("--at", "1", code=1)  # never "had no events"
        return
    sound = said.partition("--at ")[2].partition(".")[0]
    assert f"balance = {5 * int(sound)}\n" in show("--at", sound, code=0)
    assert "--at" in show("--at", str(int(sound) + 1), code=1)


def test_an_event_that_this_program_cannot_read_is_no_damage(show: Show, nats_url: str, app_name: str) -> None:
    run(store(nats_url, app_name, [commit(1), commit(2, data={"cents": "much"})]))
    said = show(code=1)
    assert "Account 'a': event 2, at stream sequence 2, is none that this program can read: " in said
    assert "Expected `int`" in said
    assert "--app" in said
    assert "balance = 5\n" in show("--at", "1", code=0)


def test_only_what_can_be_shown_is_advised_for_an_event_of_a_newer_program(
    show: Show, nats_url: str, app_name: str
) -> None:
    run(store(nats_url, app_name, [commit(1, type="Closed")]))
    said = show(code=1)
    assert "Account 'a': " in said
    assert "Closed" in said
    assert "--at" not in said


def test_events_are_counted_from_1(show: Show) -> None:
    assert "--at 0" in show("--at", "0", code=2)


def test_a_clock_that_is_behind_is_no_damage(show: Show, nats_url: str, app_name: str) -> None:
    """Events after the first one that is too late are not shown, whatever time they have."""
    times = ["2026-01-31T00:01:00Z", "2026-01-31T00:03:00Z", "2026-01-31T00:01:30Z"]
    run(store(nats_url, app_name, [commit(number, time=time) for number, time in enumerate(times, 1)]))
    assert "version 1\n" in show("--at", "2026-01-31T00:02", code=0)
    assert "version 3\n" in show("--at", "2026-01-31T00:03", code=0)
    assert "from version 1 to 3" in show("--diff", "2026-01-31T00:02", "2026-01-31T00:03", code=0)
