"""`eskernel projections verify`, `rebuild --aggregate` and `rehearse`, beside a running service."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.cli.test_cli import Shell

SOURCE = """
from aggregates import Aggregate, applies, command, event, handles
from kernel import App
from projections import Rows, Tallies, Tally
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


@event
class Noted:
    text: str


@command
class Note:
    text: str


class Notebook(Aggregate):
    @handles
    def note(self, command: Note) -> Noted:
        return Noted(command.text)

    @applies
    def noted(self, event: Noted) -> None: ...


class Base(DeclarativeBase): ...


class Page(Base):
    __tablename__ = "pages"
    notebook: Mapped[str] = mapped_column(primary_key=True)
    notes: Mapped[int] = mapped_column(default=0)
    last: Mapped[str | None]
    {column}


class Word(Base):
    __tablename__ = "words"
    word: Mapped[str] = mapped_column(primary_key=True)
    times: Mapped[int]


class Pages(Rows[Page], of=Notebook, version={version}):
    @applies
    def noted(self, row: Page, event: Noted) -> None:
        row.notes += 1
        {handler}


class Words(Tallies[Word], of=Notebook):
    @applies
    def noted(self, tally: Tally[Word], event: Noted) -> None:
        tally[event.text].times += 1


app = App("books", aggregates=[Notebook], projections=[Pages, Words])
"""


def write(folder: Path, handler: str = "row.last = event.text", column: str = "", version: int = 1) -> None:
    (folder / "books_app.py").write_text(SOURCE.format(handler=handler, column=column, version=version))
    # its like of the same size and the same second would be taken for this one
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Three notebooks: one with three notes, two with one."""
    shell = Shell(tmp_path_factory.mktemp("books"))
    write(shell.folder)
    shell.start("books_app:app")
    try:
        for notebook, text in (("a", "one"), ("a", "two"), ("a", "three"), ("b", "one"), ("c", "one")):
            shell("send", "Notebook", notebook, "Note", f"text={text}")
        deadline = time.monotonic() + 20
        while json.loads(shell("query", "select sum(notes) as n from pages", "--json")) != [{"n": 5}]:
            assert time.monotonic() < deadline
        yield shell
    finally:
        assert shell.stop() == 0


@pytest.fixture
def shell(books: Shell) -> Iterator[Shell]:
    """The program is the one that runs."""
    yield books
    write(books.folder)


def change(shell: Shell, statement: str) -> None:
    connection = sqlite3.connect(shell.folder / ".eskernel" / "books" / "projections.db", timeout=10)
    with connection:
        assert connection.execute(statement).rowcount == 1
    connection.close()


def test_verify_says_that_the_tables_are_what_the_log_says(shell: Shell) -> None:
    said = shell("projections", "verify")
    assert "Pages version 1 (generation 1): all 3 rows are what the log says, up to sequence 5 (5 events" in said
    assert "Words version 1 (generation 1): all 3 rows are what the log says" in said


def test_a_projection_that_is_named_twice_is_compared_once(shell: Shell) -> None:
    assert shell("projections", "verify", "Pages", "Pages").count("Pages version 1") == 1
    named = ("--projection", "Pages", "--projection", "Pages")
    assert shell("rehearse", "books_app:app", *named).count("Pages version 1") == 1


def test_verify_names_what_differs_and_exits_with_1_and_a_repair_mends_it(shell: Shell) -> None:
    change(shell, "update pages__1 set notes = 2, last = 'two' where notebook = 'a'")
    change(shell, "update pages__1 set last = 'never' where notebook = 'b'")
    said = shell.out("projections", "verify", "Pages", code=1)
    assert "Pages version 1 (generation 1): 2 rows differ" in said
    assert "pages: 2 changed of 3 rows; by column: notes 1, last 2" in said
    assert "notebook a: notes is 2, by the log 3; last is 'two', by the log 'three', since event 3" in said
    assert "notebook b: last is 'never', by the log 'one', no event gives what is stored" in said
    (pages,) = json.loads(shell.out("projections", "verify", "Pages", "--json", code=1))
    assert pages["tables"][0]["examples"][0] == {
        "what": "changed", "key": {"notebook": "a"}, "stored": {"notes": 2, "last": "two"},
        "folded": {"notes": 3, "last": "three"}, "since": 3,
    }  # fmt: skip
    assert "Notebook a is made again, up to event 3: it was not what the log says" in shell(
        "rebuild", "--aggregate", "Notebook/a"
    )
    (repaired,) = json.loads(shell("rebuild", "Pages", "--aggregate", "Notebook/b", "--json"))
    assert (repaired["changed"], repaired["sequence"]) == (True, 1)
    assert "all 3 rows are what the log says" in shell("projections", "verify", "Pages")


@pytest.mark.parametrize(
    ("arguments", "why", "code"),
    [
        (("rebuild", "--aggregate", "Notebook"), "give it as TYPE/ID, such as Account/alice", 2),
        (("rebuild", "--aggregate", "Diary/a"), "no aggregate 'Diary'; it has Notebook", 2),
        (("rebuild", "Words", "--aggregate", "Notebook/a"), "Words is a Tallies projection", 1),
        (("projections", "verify", "Letters"), "books has no projection 'Letters'; it has Pages, Words", 2),
        (("rehearse", "books_app:app", "--expect", "nothing"), "give `same`, or columns as in changed:total,name", 2),
    ],
)
def test_wrong_use_is_explained(shell: Shell, arguments: tuple[str, ...], why: str, code: int) -> None:
    assert why in " ".join(shell(*arguments, code=code).split())


def test_a_rehearsal_of_the_same_program_finds_nothing(shell: Shell) -> None:
    said = shell("rehearse", "books_app:app", "--expect", "same")
    assert "Pages version 1 (readers see version 1): 5 events" in said
    assert "pages: all 3 rows are the same" in said
    assert "states.gz: the states of 3 aggregates up to sequence" in shell(
        "rehearse", "books_app:app", "--save-states", "states.gz"
    )
    said = shell("rehearse", "books_app:app", "--expect", "same", "--compare-states", "states.gz")
    assert "states: 3 aggregates are the same after each event, 0 differ" in said


def test_a_rehearsal_shows_what_a_new_program_would_change(shell: Shell) -> None:
    write(
        shell.folder, "row.last = event.text.upper(); row.size += len(event.text)",
        "size: Mapped[int] = mapped_column(default=0)", 2,
    )  # fmt: skip
    said = shell("rehearse", "books_app:app", "--expect", "changed:pages.last")
    assert "Pages version 2 (readers see version 1)" in said
    assert "pages: 3 changed of 3 rows; by column: last 3" in said
    assert "notebook a: last is 'three', becomes 'THREE'" in said
    assert "columns that it adds: size" in said
    assert "words: all 3 rows are the same" in said
    found = json.loads(
        shell.out("rehearse", "books_app:app", "--projection", "Pages", "--expect", "same", "--json", code=1)
    )
    assert found["problems"] == ["pages: not expected to change: last"]
    assert found["projections"][0]["tables"][0]["added"] == ["size"]
    # nothing was touched
    assert "all 3 rows are what the log says" in shell("query", "select 'all 3 rows are what the log says' as said")
    assert json.loads(shell("query", "select count(*) as n from eskernel_projection", "--json")) == [{"n": 2}]


def test_a_rehearsal_finds_aggregates_at_which_a_new_program_fails(shell: Shell) -> None:
    write(shell.folder, "row.last = {'one': 'I', 'two': 'II'}[event.text]", version=2)
    said = shell.out("rehearse", "books_app:app", code=1)
    assert "Notebook a is not folded from event 3: KeyError: 'three'" in said
    assert "the new program does not fold 1 aggregates to the end, such as Notebook a from event 3 on" in said


def test_blame_names_the_events_that_made_a_row(shell: Shell) -> None:
    found = json.loads(shell("blame", "pages", "a", "--json"))
    assert [(step["sequence"], step["changed"].get("last")) for step in found] == [
        (1, {"before": None, "after": "one"}),
        (2, {"before": "one", "after": "two"}),
        (3, {"before": "two", "after": "three"}),
    ]
    assert found[2]["changed"]["notes"] == {"before": 2, "after": 3}
    assert found[2]["command_id"] == found[2]["correlation_id"] != ""
    said = shell("blame", "pages", "a", "--column", "notes", "--last", "1")
    assert "Notebook a event 3  Noted" in said
    assert "notes 2 -> 3" in said
    assert "last" not in said


def test_blame_of_a_tally_names_events_of_all_aggregates(shell: Shell) -> None:
    found = json.loads(shell("blame", "words", "one", "--json"))
    assert [(step["aggregate_id"], step["changed"]["times"]) for step in found] == [
        ("a", {"before": 0, "after": 1}), ("b", {"before": 1, "after": 2}), ("c", {"before": 2, "after": 3}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("pages", "nobody"), "no event has changed a row nobody of pages"),
        (
            ("pages", "a", "--column", "size"),
            "no event has changed pages.size in that row; changed were last, notebook",
        ),
        (("letters", "a"), "no projection of books fills a table 'letters'; there is pages, words"),
        (("pages", "a", "b"), "the key of pages is (notebook): give 1 values"),
    ],
)
def test_blame_explains_what_it_can_not_find(shell: Shell, arguments: tuple[str, ...], why: str) -> None:
    assert why in " ".join(shell("blame", *arguments, code=1).split())


def test_a_sample_is_verified_without_reading_the_whole_log(shell: Shell) -> None:
    assert "Pages: 3 rows of pages were compared: all are what the log says" in shell(
        "projections", "verify", "--sample", "10"
    )
    change(shell, "update pages__1 set last = 'never' where notebook = 'c'")
    (found,) = json.loads(shell.out("projections", "verify", "--sample", "10", "--json", code=1))
    assert (found["projection"], found["table"]["changed"], found["table"]["columns"]) == ("Pages", 1, {"last": 1})
    assert "verify it as a whole, without --sample" in shell("projections", "verify", "Words", "--sample", "1", code=1)
    shell("rebuild", "--aggregate", "Notebook/c")
