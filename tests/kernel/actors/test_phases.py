"""The phases of an aggregate's actor, without an actor system: what it waits for, and that each wait ends."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from aggregates.cell import Cell
from aggregates.declaration import declare
from aggregates.state_codec import decode_state
from kernel.actors.aggregate import AggregateActor, Phase
from kernel.actors.mailbox import Appended, Decide, Leave, Loaded, Passivate, Request, Searched
from kernel.errors import Conflict, PayloadTooLarge, Unavailable
from kernel.log.subjects import Address
from kernel.protocol import CommandRequest
from tests.apps import Note, Notebook, Noted

ALICE = Address("books.evt.1.Notebook.alice", 1, "Notebook", "alice")
BOB = Address("books.evt.1.Notebook.bob", 1, "Notebook", "bob")
DECLARED = declare(Notebook)


class Desk:
    """The asyncio side, which only notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answers: list[tuple[str, str]] = []
        self.bugs: list[str] = []
        self.fails = self.lost = False

    def now(self) -> datetime:
        return datetime.now(UTC)

    def holds(self, _partition: int) -> bool:
        return not self.lost

    def load(self, address: Address) -> None:
        self.asked.append(("load", address.id))

    def search(self, address: Address, _request: Request) -> None:
        self.asked.append(("search", address.id))

    def snapshot(self, address: Address, cell: Cell[Any], commit: bytes) -> None:
        pass

    def append(self, address: Address, _cell: Cell[Any], _version: int, decisions: list[Any]) -> None:
        self.asked.append((f"append {len(decisions)}", address.id))

    def succeed(self, _address: Address, request: Request, version: int, _sequence: int, _duplicate: bool) -> None:
        self.answer(request, f"version {version}")

    def fail(self, _address: Address, request: Request, type: str, _message: str) -> None:
        self.answer(request, type)

    def answer(self, request: Request, outcome: str) -> None:
        if self.fails:
            raise RuntimeError("an answer that can't be sent")
        self.answers.append((request.sent.command_id, outcome))

    def refuse_version(self, _address: Address, request: Request, version: int) -> None:
        self.answer(request, f"conflict at {version}")

    def report_bug(self, problem: str) -> None:
        self.bugs.append(problem)


class Stage:
    def __init__(self) -> None:
        self.desk = Desk()
        self.actor = type("Actor", (AggregateActor,), {"gateway": self.desk})()

    def send(self, message: Any) -> None:
        self.actor.receiveMessage(message, None)

    def decide(self, *command_ids: str, address: Address = ALICE) -> None:
        requests = [
            Request(CommandRequest("Notebook", address.id, "Note", {}, command_id), Note("a"), b"reply")
            for command_id in command_ids
        ]
        self.send(Decide(address, requests))

    def decide_if(self, **versions: int) -> None:
        """Decide commands by id, each if the aggregate has a version."""
        self.send(
            Decide(
                ALICE,
                [
                    Request(CommandRequest("Notebook", "alice", "Note", {}, name, if_version=version), Note("a"), b"")
                    for name, version in versions.items()
                ],
            )
        )

    def load(self, address: Address = ALICE) -> None:
        self.send(Loaded(Cell(DECLARED, address.id)))


def loaded() -> Stage:
    stage = Stage()
    stage.decide("first")
    stage.load()
    stage.send(Appended(1))
    assert stage.desk.answers == [("first", "version 1")]
    assert stage.actor.phase is Phase.READY
    stage.desk.asked.clear()
    stage.desk.answers.clear()
    return stage


def test_commands_wait_while_the_state_is_loaded_and_are_then_decided_together() -> None:
    stage = Stage()
    stage.decide("a")
    assert stage.actor.phase is Phase.LOADING
    stage.decide("b", "c")
    stage.load()
    assert stage.actor.phase is Phase.APPENDING
    assert stage.desk.asked == [("load", "alice"), ("append 3", "alice")]
    assert stage.desk.answers == []
    stage.send(Appended(7))
    assert stage.actor.phase is Phase.READY
    assert stage.desk.answers == [("a", "version 1"), ("b", "version 2"), ("c", "version 3")]


def test_a_state_that_became_stale_while_a_commit_was_appended_is_loaded_again() -> None:
    stage = loaded()
    stage.decide("a")
    stage.send(Leave())
    assert stage.actor.phase is Phase.APPENDING
    stage.send(Appended(8))
    assert stage.desk.answers == [("a", "version 2")]
    assert stage.actor.cell is None
    stage.decide("b")
    assert stage.desk.asked[-1] == ("load", "alice")


def test_a_state_that_became_stale_while_it_was_loaded_is_loaded_once_more() -> None:
    stage = Stage()
    stage.decide("a")
    stage.send(Leave())
    assert stage.desk.answers == [("a", "unavailable")]
    stage.decide("b")
    stage.load()
    assert stage.desk.asked == [("load", "alice"), ("load", "alice")]


def test_nothing_is_decided_for_a_partition_that_is_lost() -> None:
    stage = loaded()
    stage.desk.lost = True
    stage.decide("a")
    assert stage.desk.answers == [("a", "unavailable")]
    assert (stage.actor.phase, stage.actor.cell) == (Phase.READY, None)


def test_after_a_conflict_everything_is_decided_again_on_the_new_state() -> None:
    stage = loaded()
    stage.decide("a")
    stage.decide("b")
    stage.send(Appended(Conflict(ALICE.subject, 1, 2)))
    assert stage.actor.phase is Phase.LOADING
    stage.load()
    assert stage.desk.asked[-1] == ("append 2", "alice")


def test_of_commands_for_one_version_that_are_decided_together_one_takes_effect() -> None:
    stage = loaded()
    stage.decide_if(a=1, b=1, c=2, d=0)
    assert stage.desk.asked == [("append 2", "alice")]
    assert stage.desk.answers == []  # a refusal rests on what is being appended
    stage.send(Appended(8))
    assert stage.desk.answers == [
        ("a", "version 2"), ("b", "conflict at 2"), ("c", "version 3"), ("d", "conflict at 3")
    ]  # fmt: skip


def test_a_command_for_a_version_is_decided_again_where_another_writer_was_first() -> None:
    stage = loaded()
    stage.decide_if(a=1)
    stage.send(Appended(Conflict(ALICE.subject, 1, 2)))
    stage.send(Loaded(cell_of(2)))
    assert stage.desk.answers == [("a", "conflict at 2")]


def test_a_version_that_is_not_known_yet_has_the_state_loaded_again_once() -> None:
    stage = loaded()
    stage.decide_if(a=1, b=3, c=9)
    stage.send(Appended(8))
    assert stage.desk.asked[1:] == [("load", "alice")]
    stage.send(Loaded(cell_of(3)))
    assert stage.desk.asked[1:] == [("load", "alice"), ("append 1", "alice")]
    stage.send(Appended(10))
    assert stage.desk.asked[3:] == []
    assert stage.desk.answers == [("a", "version 2"), ("b", "version 4"), ("c", "conflict at 4")]


def test_a_state_that_was_just_loaded_is_not_loaded_again_for_a_version() -> None:
    stage = Stage()
    stage.decide_if(a=5)
    stage.send(Loaded(cell_of(3)))
    assert (stage.desk.asked, stage.desk.answers) == ([("load", "alice")], [("a", "conflict at 3")])


def test_a_repeated_command_gets_its_first_receipt_whatever_version_it_is_for() -> None:
    stage = loaded()
    stage.decide_if(first=0)
    assert stage.desk.answers == [("first", "version 1")]


def test_the_state_that_a_repeated_command_returns_is_in_the_log() -> None:
    stage = loaded()
    repeat = Request(CommandRequest("Notebook", "alice", "Note", {}, "first", returning="state"), Note("a"), b"reply")
    stage.send(Decide(ALICE, [stage_request("new"), repeat]))
    assert stage.desk.answers == []
    stage.send(Appended(8))
    assert stage.desk.answers == [("new", "version 2"), ("first", "version 1")]
    assert repeat.returned is not None
    assert repeat.returned.state
    assert decode_state(Notebook, repeat.returned.state).total == 2


def cell_of(version: int) -> Cell[Any]:
    cell = Cell(DECLARED, "alice")
    cell.evolve([DECLARED.event_types[Noted].encode(Noted("x", 1)) for _ in range(version)])
    cell.position = version
    return cell


def test_commands_whose_commit_is_too_large_are_decided_one_by_one() -> None:
    stage = loaded()
    stage.decide("a", "b")
    stage.send(Appended(PayloadTooLarge("too large")))
    stage.load()
    assert stage.desk.asked[-1] == ("append 1", "alice")
    stage.send(Appended(PayloadTooLarge("too large")))
    assert stage.desk.answers == [("a", "too-large")]


def test_a_command_id_that_may_be_in_the_history_is_searched_before_anything_is_decided() -> None:
    stage = loaded()
    for number in range(20):
        stage.decide(f"c{number}")
        stage.send(Appended(number + 2))
    stage.desk.answers.clear()
    stage.decide("first", "new")
    assert stage.actor.phase is Phase.SEARCHING
    stage.send(Searched(stage_request("first"), (1, 1)))
    assert stage.desk.answers == [("first", "version 1")]
    assert stage.actor.phase is Phase.APPENDING


def stage_request(command_id: str) -> Request:
    return Request(CommandRequest("Notebook", "alice", "Note", {}, command_id), Note("a"), b"reply")


def test_an_answer_that_fails_does_not_leave_the_aggregate_waiting() -> None:
    for result in (9, Unavailable("away")):
        stage = loaded()
        stage.decide("a")
        stage.desk.fails = True
        stage.send(Appended(result))
        assert len(stage.desk.bugs) == 1
        stage.desk.fails = False
        stage.decide("b")
        assert stage.desk.asked[-1] in (("append 1", "alice"), ("load", "alice"))


def test_a_shell_carries_nothing_from_one_aggregate_to_the_next() -> None:
    stage = loaded()
    stage.decide("a", "b")
    stage.send(Appended(PayloadTooLarge("too large")))
    stage.desk.fails = True
    stage.send(Passivate())
    stage.desk.fails = False
    fresh = AggregateActor()
    assert vars(stage.actor) == vars(fresh)
    stage.decide("c", address=BOB)
    assert stage.desk.asked[-1] == ("load", "bob")
