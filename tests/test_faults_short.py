"""The fault harness: its checker notices each kind of damage, and a short run of it holds."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import checker, ending, evidence, owed, rules
from tests.faults.checker import History, check, verdict_of
from tests.faults.driver import Options, Run
from tests.faults.report import describe, table
from tests.faults.rules import Attempt, Garbage, Letter, Message, Tables
from tests.faults.schedule import BY_TURNS, SHORT, Kind, plan, short_plan

PARTITIONS = 64
RUBBISH = b"\x00rubbish"


class Story:
    """A small history without violations: two tanks, one of them parked for one projection, and garbage."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.attempts: list[Attempt] = []
        self.versions: dict[str, int] = {}
        self.levels: dict[str, int] = {}
        self.command("c1", "a", "Fill", amount=60, note="red 1")
        self.command("c2", "a", "Burst", amounts=[30, -20], notes=["red 2", "blue 2"])
        self.refusal("c3", "a", "Fill", "level is 70", amount=40, note="red 3")
        self.command("c4", "b/ü", "Mark", note="blue 4")
        self.command("c5", "b/ü", "Mark", note="poison-Levels 5")
        self.command("c6", "b/ü", "Fill", amount=1, note="green 6")
        self.command("c7", "b/ü", "Fill", amount=2, note="green 7")
        self.attempts.append(Attempt("c8", "a", "Fill", {"amount": 1, "note": "red 8"}, 7.5, 8.5))
        rubbish = Message(len(self.messages) + 1, "app.evt.x", RUBBISH, 9.0)
        self.messages.append(rubbish)
        self.tables = Tables(
            levels=[("a", 70, 3, "blue 2"), ("b/ü", 0, 1, "blue 4")],
            colours=[("red", 2, 90), ("blue", 2, -20), ("green", 2, 3), ("poison-Levels", 1, 0)],
            entries=[
                ("a", 1, "Filled", 60, "red 1"),
                ("a", 2, "Filled", 30, "red 2"),
                ("a", 3, "Drained", 20, "blue 2"),
                ("b/ü", 1, "Marked", 0, "blue 4"),
                ("b/ü", 2, "Marked", 0, "poison-Levels 5"),
                ("b/ü", 3, "Filled", 1, "green 6"),
                ("b/ü", 4, "Filled", 2, "green 7"),
            ],
            letters=[
                Letter("Levels", rules.partition_of("b/ü", PARTITIONS), "Tank", "b/ü", m.sequence, n, m.payload)
                for n, m in enumerate(self.messages[3:6], 2)
            ]
            + [Letter("", 0, "", rubbish.subject, rubbish.sequence, 0, rubbish.payload)],
        )

    def command(self, command_id: str, tank: str, name: str, **data: Any) -> None:
        """A command that took effect at the second of its place in the stream."""
        attempt = Attempt(command_id, tank, name, data, outcome="acknowledged")
        events = []
        for kind, amount, note in rules.expected_events(attempt):
            self.versions[tank] = self.versions.get(tank, 0) + 1
            self.levels[tank] = self.levels.get(tank, 0) + {"Filled": amount, "Drained": -amount, "Marked": 0}[kind]
            fields = (
                {"note": note} if kind == "Marked" else {"amount": amount, "level": self.levels[tank], "note": note}
            )
            events.append({"type": kind, "sequence": self.versions[tank], "data": fields, "commandid": command_id})
        sequence, place = len(self.messages) + 1, rules.partition_of(tank, PARTITIONS)
        subject = f"app.evt.{place}.Tank.{'b%2F%C3%BC' if tank == 'b/ü' else tank}"
        self.messages.append(Message(sequence, subject, json.dumps(events).encode(), float(sequence)))
        attempt.version, attempt.sequence, attempt.partition = self.versions[tank], sequence, place
        attempt.sent, attempt.answered = sequence - 0.5, sequence + 0.5
        self.attempts.append(attempt)

    def refusal(self, command_id: str, tank: str, name: str, reason: str, **data: Any) -> None:
        now = len(self.messages) + 0.7
        self.attempts.append(Attempt(command_id, tank, name, data, now, now + 0.1, "refused", reason=reason))

    def rewrite(self, place: int, change: Callable[[list[dict[str, Any]]], Any]) -> None:
        """Change the events of one commit."""
        message = self.messages[place]
        events = json.loads(message.payload)
        change(events)
        self.messages[place] = dataclasses.replace(message, payload=json.dumps(events).encode())

    def append(self, place: int, **changes: Any) -> None:
        """Append a commit like an earlier one."""
        sequence = len(self.messages) + 1
        self.messages.append(dataclasses.replace(self.messages[place], sequence=sequence))
        self.rewrite(sequence - 1, lambda events: events[0].update(changes))

    def check(self) -> list[str]:
        garbage = [Garbage("app.evt.x", RUBBISH, 7)]
        history = History("app", PARTITIONS, len(self.messages), self.messages, self.attempts, garbage, self.tables)
        return [str(violation) for violation in check(history)]


def test_a_history_in_which_all_holds_is_found_to_hold() -> None:
    assert Story().check() == []


def _lose_message(story: Story) -> None:
    del story.messages[1]


def _swap_order(story: Story) -> None:
    first, second = story.messages[0], story.messages[1]
    story.messages[:2] = [dataclasses.replace(second, sequence=1), dataclasses.replace(first, sequence=2)]


def _lose_acknowledged(story: Story) -> None:
    story.attempts.append(Attempt("lost", "a", "Mark", {"note": "red"}, outcome="acknowledged", version=9, sequence=9))


def _double_command(story: Story) -> None:
    story.append(0, sequence=4)


def _repeat_event(story: Story) -> None:
    story.append(1)


def _skip_event(story: Story) -> None:
    story.append(0, sequence=5)


def _double_unknown(story: Story) -> None:
    story.attempts[0].outcome = "unknown"
    story.append(0, sequence=4)


def _refused_in_the_log(story: Story) -> None:
    story.attempts[0].outcome, story.attempts[0].reason = "refused", "level is 0"


def _break_limit(story: Story) -> None:
    story.rewrite(0, lambda events: events[0]["data"].update(amount=160))


def _stale_level(story: Story) -> None:
    story.rewrite(0, lambda events: events[0]["data"].update(level=61))


def _other_amount(story: Story) -> None:
    story.rewrite(5, lambda events: events[0]["data"].update(amount=1))


def _wrong_version(story: Story) -> None:
    story.attempts[1].version = 2


def _duplicate_with_another_version(story: Story) -> None:
    story.attempts.append(dataclasses.replace(story.attempts[0], version=2))


def _wrong_sequence(story: Story) -> None:
    story.attempts[0].sequence += 1


def _stranger(story: Story) -> None:
    story.append(0, sequence=4, commandid="unsent")


def _refused_on_a_stale_level(story: Story) -> None:
    story.attempts[2].reason = "level is 90"


def _refused_without_reason(story: Story) -> None:
    story.attempts[2].data["amount"] = 30


def _half_a_burst(story: Story) -> None:
    story.rewrite(1, lambda events: events.pop())


def _wrong_partition(story: Story) -> None:
    story.messages[0] = dataclasses.replace(story.messages[0], subject="app.evt.0.Tank.a")


def _spoilt_commit(story: Story) -> None:
    story.messages[0] = dataclasses.replace(story.messages[0], payload=b"[{]")


def _change_row(table: str, row: int, **changes: int) -> Callable[[Story], None]:
    def damage(story: Story) -> None:
        rows = getattr(story.tables, table)
        values = list(rows[row])
        values[changes["column"]] += 1
        rows[row] = tuple(values)

    return damage


def _lose_row(table: str, row: int) -> Callable[[Story], None]:
    return lambda story: getattr(story.tables, table).pop(row) and None


def _double_row(table: str) -> Callable[[Story], None]:
    return lambda story: getattr(story.tables, table).append(getattr(story.tables, table)[0])


def _stray_row(story: Story) -> None:
    story.tables.levels.append(("stray", 0, 1, "red"))


def _fold_the_poison(story: Story) -> None:
    story.tables.levels[1] = ("b/ü", 0, 2, "poison-Levels 5")


def _lose_letter(place: int) -> Callable[[Story], None]:
    return lambda story: story.tables.letters.pop(place) and None


def _double_letter(story: Story) -> None:
    story.tables.letters.insert(2, story.tables.letters[1])


def _swap_letters(story: Story) -> None:
    letters = story.tables.letters
    letters[1], letters[2] = letters[2], letters[1]


def _spoil_letter(story: Story) -> None:
    story.tables.letters[1] = story.tables.letters[1]._replace(payload=b"")


def _park_without_reason(story: Story) -> None:
    letter = story.tables.letters[0]
    story.tables.letters.append(letter._replace(projection="Entries"))


def _park_a_stranger(story: Story) -> None:
    story.tables.letters.append(story.tables.letters[0]._replace(aggregate_id="stranger"))


def _double_garbage(story: Story) -> None:
    story.tables.letters.append(story.tables.letters[-1])


def _spoil_garbage(story: Story) -> None:
    story.tables.letters[-1] = story.tables.letters[-1]._replace(payload=b"other")


def _stray_garbage(story: Story) -> None:
    story.tables.letters.append(story.tables.letters[-1]._replace(stream_sequence=1))


DAMAGES: list[tuple[Callable[[Story], None], str]] = [
    (_lose_message, "(a) the stream goes from 1 to 3"),
    (_lose_message, "(a) the stream was read up to 7, its last is 6"),
    (_swap_order, "(a) 'a': event 2 where 1 must be"),
    (_repeat_event, "(a) 'a': event 2 where 4 must be"),
    (_skip_event, "(a) 'a': event 5 where 4 must be"),
    (_wrong_partition, "is in a wrong partition"),
    (_spoilt_commit, "is no commit"),
    (_lose_acknowledged, "(b) command lost (Mark of 'a') was acknowledged and is not in the log"),
    (_double_command, "(b) command c1 (Fill of 'a') is in the log 2 times"),
    (_double_unknown, "(b) command c1 (Fill of 'a') is in the log 2 times"),
    (_refused_in_the_log, "(b) command c1 (Fill of 'a') was refused and is in the log"),
    (_break_limit, "breaks the limit"),
    (_stale_level, "decided for level 61, it is 60"),
    (_other_amount, "(b) command c7 (Fill of 'b/ü') became"),
    (_half_a_burst, "(b) command c2 (Burst of 'a') became"),
    (_wrong_version, "(b) command c2 (Burst of 'a'): the receipt says"),
    (_duplicate_with_another_version, "(b) command c1 (Fill of 'a'): the receipt says"),
    (_wrong_sequence, "(b) command c1 (Fill of 'a'): the receipt says"),
    (_stranger, "was never sent"),
    (_refused_on_a_stale_level, "which it never had in that time"),
    (_refused_without_reason, "where it is allowed"),
    (_change_row("levels", 0, column=1), "(c) levels ('a',): is"),
    (_change_row("colours", 0, column=1), "(c) colours ('red',): is"),
    (_change_row("entries", 0, column=3), "(c) entries ('a', 1): is"),
    (_lose_row("levels", 1), "(c) levels ('b/ü',): no row"),
    (_lose_row("colours", 3), "(c) colours ('poison-Levels',): no row"),
    (_lose_row("entries", 6), "(c) entries ('b/ü', 4): no row"),
    (_double_row("entries"), "(c) entries ('a', 1): 2 rows"),
    (_stray_row, "that nothing led to"),
    (_fold_the_poison, "(c) levels ('b/ü',): is"),
    (_lose_letter(0), "(d) dead letters of 'b/ü' for Levels: events [3, 4], must be [2, 3, 4]"),
    (_lose_letter(1), "(d) dead letters of 'b/ü' for Levels: events [2, 4], must be [2, 3, 4]"),
    (_lose_letter(2), "(d) dead letters of 'b/ü' for Levels: events [2, 3], must be [2, 3, 4]"),
    (_double_letter, "(d) dead letters of 'b/ü' for Levels: events [2, 3, 3, 4]"),
    (_swap_letters, "(d) dead letters of 'b/ü' for Levels: events [2, 4, 3]"),
    (_spoil_letter, "(d) dead letters of 'b/ü' for Levels: events [3] have another place or other bytes"),
    (_park_without_reason, "(d) dead letters of 'b/ü' for Entries: events [2], must be []"),
    (_park_a_stranger, "1 that nothing led to"),
    (_lose_letter(3), "(d) garbage at 7 (app.evt.x) is kept 0 times"),
    (_double_garbage, "(d) garbage at 7 (app.evt.x) is kept 2 times"),
    (_spoil_garbage, "(d) garbage at 7 (app.evt.x) is kept 0 times"),
    (_stray_garbage, "(d) kept as garbage at 1"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[f"{n}-{d.__name__}" for n, (d, _) in enumerate(DAMAGES)])
def test_each_kind_of_damage_is_noticed(damage: Callable[[Story], None], message: str) -> None:
    story = Story()
    damage(story)
    found = story.check()
    assert any(message in violation for violation in found), found


def test_a_refusal_is_right_at_any_level_that_the_tank_had_meanwhile() -> None:
    story = Story()
    patient = dataclasses.replace(story.attempts[2], command_id="c9", sent=0.5, data={"amount": 50, "note": "x"})
    story.attempts += [dataclasses.replace(patient, reason=f"level is {level}") for level in (60, 70)]
    assert story.check() == []


def test_an_acknowledgement_outweighs_the_answers_to_other_senders_of_the_command() -> None:
    attempt = Attempt("c", "a", "Mark", {})
    acknowledged, refused = (dataclasses.replace(attempt, outcome=outcome) for outcome in ("acknowledged", "refused"))
    assert verdict_of([refused, attempt, acknowledged]) == "acknowledged"
    assert verdict_of([refused, refused]) == "refused"
    assert verdict_of([refused, attempt]) == "unknown"


@pytest.mark.parametrize("module", [rules, checker, evidence, owed])
def test_the_checker_shares_no_code_with_the_product(module: Any) -> None:
    names = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    product = {"kernel", "projections", "aggregates", "migrations", "examples"}
    assert not {name.split(".")[0] for name in names} & product
    assert {name for name in names if name.startswith("tests")} <= {"tests.faults.rules", "tests.faults.owed"}


@pytest.mark.parametrize(
    ("line", "alert"),
    [
        ("12:00 [error    ] deadlock detected, parked [eskernel.projector]", True),
        ("psycopg.errors.DeadlockDetected: deadlock detected", True),
        ("12:00 [debug    ] deadlock: tried again [eskernel.projector]", False),
        ("12:00 [error    ] the snapshot of Tank a differs from its history at version 7", True),
        ("error: the log ends at 3, and had 4 commits before: it was truncated, or restored", True),
        ("12:00 [error    ] parked for Levels: Tank a, event 1: ValueError", False),
    ],
)
def test_lines_of_the_services_log_that_must_not_be_there_are_noticed(line: str, alert: bool) -> None:
    assert ending.is_alert(line) is alert


def test_a_schedule_follows_from_its_seed_and_has_every_fault() -> None:
    assert plan(7, 90) == plan(7, 90) != plan(8, 90)
    assert {fault.kind for fault in plan(7, 1)} == set(Kind)
    assert plan(7, 1)[0].kind == short_plan(7)[0].kind == Kind.POISON
    assert sorted(fault.kind for fault in short_plan(1)) == sorted([*SHORT, *BY_TURNS[0]])
    assert sorted(fault.kind for fault in short_plan(3)) == sorted([*SHORT, *BY_TURNS[1]])
    assert sorted(fault.kind for fault in short_plan(5)) == sorted([*SHORT, *BY_TURNS[2]])


@pytest.mark.timeout(180)
async def test_two_workers_hold_through_a_short_schedule(postgres_url: str) -> None:
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    print(f"TEST_SEED={seed}")
    postgres = postgres_url if seed % 2 else ""  # one database in each run; the long harness uses both
    schedule = short_plan(seed)
    # a build is not shown where poison pauses projections
    pausing = bool(seed // 4 % 2) and all(fault.kind != Kind.DEPLOY for fault in schedule)
    result = await Run(seed, schedule, Options(postgres=postgres, pausing=pausing), print).run()
    print("\n".join(describe(result)))
    assert result.ok, result.violations
    assert result.kills["worker"] and result.kills["server"] and result.letters and result.garbage
    assert {"deputy requests"} < set(result.injected) and all(result.injected.values())
    assert table([result]).count("holds") == 2
