"""Apps that the tests run: the bank under another name, and an app whose projections can be made to fail."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, Rejected, applies, command, event, handles
from examples.bank import Account, Balances
from kernel import App
from projections import Recorded, Rows, Sql, Tallies, Tally, Transaction


def bank(name: str) -> App:
    return App(name, aggregates=[Account], projections=[Balances])


@event
class Noted:
    text: str
    number: int


@command
class Note:
    text: str
    number: int = 1


@command
class NoteTwice:
    text: str


@command
class Explode:
    pass


@event
class Weighed:
    grams: float


@command
class Weigh:
    grams: str

    def __post_init__(self) -> None:
        if self.grams == "heavy":
            raise KeyError("how heavy?")


class Notebook(Aggregate):
    total: int = 0

    @handles
    def note(self, command: Note) -> Noted:
        if command.text == "":
            raise Rejected("nothing to note")
        return Noted(command.text, command.number)

    @handles
    def twice(self, command: NoteTwice) -> list[Noted]:
        return [Noted(command.text, 1), Noted(command.text, 2)]

    @handles
    def weigh(self, command: Weigh) -> Weighed:
        return Weighed(float(command.grams))

    @handles
    def explode(self, command: Explode) -> None:
        raise ZeroDivisionError("boom")

    @applies
    def noted(self, event: Noted) -> None:
        self.total += event.number

    @applies
    def weighed(self, event: Weighed) -> None:
        pass


class Base(DeclarativeBase):
    pass


class Page(Base):
    __tablename__ = "pages"
    notebook: Mapped[str] = mapped_column(primary_key=True)
    notes: Mapped[int] = mapped_column(default=0)
    total: Mapped[int] = mapped_column(default=0)
    last: Mapped[str | None]


class Word(Base):
    __tablename__ = "words"
    word: Mapped[str] = mapped_column(primary_key=True)
    times: Mapped[int] = mapped_column(default=0)
    number: Mapped[int] = mapped_column(default=0)


class Line(Base):
    __tablename__ = "lines"
    notebook: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Pages(Rows[Page], of=Notebook):
    @applies
    def noted(self, row: Page, event: Noted) -> None:
        if event.text == "poison row":
            raise ValueError("no such page")
        if event.text == "zero row":
            raise ValueError("no such page: \0")
        row.notes += 1
        row.total += event.number
        row.last = event.text


class Words(Tallies[Word], of=Notebook):
    @applies
    def noted(self, tally: Tally[Word], event: Noted) -> None:
        tally[event.text].times += 1
        if event.text == "heavy word":
            tally[event.text].number += 2**62
        if event.text == "poison tally":
            raise ValueError("no such word")


class Lines(Sql, of=Notebook):
    tables = (Line,)

    @applies
    def noted(self, tx: Transaction, events: Sequence[Recorded[Noted]]) -> None:
        tx.execute(
            insert(tx.table(Line)),
            [{"notebook": e.meta.aggregate_id, "sequence": e.meta.sequence, "text": e.event.text} for e in events],
        )
        if any(e.event.text == "poison sql" for e in events):
            raise ValueError("no such line")


def notebooks(name: str) -> App:
    return App(name, aggregates=[Notebook], projections=[Pages, Words, Lines])
