"""A program that fails at many aggregates pauses its projection; the others go on, and nothing is parked wholesale."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import applies
from kernel import App, Client, Service
from kernel.cli import main
from kernel.log.subjects import Address
from kernel.projector.grouping import Group
from kernel.projector.pausing import WINDOW_S, Pauses
from kernel.settings import DeadLetters
from projections import Rows
from projections.errors import HandlerFailed
from tests.apps import Note, Notebook, Noted, Words, notebooks
from tests.conftest import settings_for
from tests.failing import metric, parked


class Base(DeclarativeBase):
    pass


class Count(Base):
    __tablename__ = "counts"
    notebook: Mapped[str] = mapped_column(primary_key=True)
    notes: Mapped[int] = mapped_column(default=0)


class Counts(Rows[Count], of=Notebook):
    fails = False

    @applies
    def noted(self, row: Count, event: Noted) -> None:
        row.notes += 1
        if Counts.fails:
            raise ValueError("this program is bad")


@pytest.fixture
def app(app_name: str, monkeypatch: pytest.MonkeyPatch) -> App:
    monkeypatch.setattr(Counts, "fails", True)
    return App(app_name, aggregates=[Notebook], projections=[Counts, Words])


@asynccontextmanager
async def serving(app: App, nats: str, database: str, place: Path) -> AsyncIterator[tuple[Service, Client]]:
    settings = settings_for(
        place, nats=nats, database=database, dead_letters__pause_minimum=5, dead_letters__pause_above=0.5
    )
    service = Service(app, settings)
    await service.start()
    try:
        async with await Client.connect(app, nats=nats, database=database) as client:
            yield service, client
    finally:
        await service.stop()


async def counts(client: Client) -> int:
    return int((await client.query("SELECT count(*) AS n FROM counts"))[0]["n"])


@pytest.mark.setting("dead_letters.pause_above", "dead_letters.pause_minimum")
async def test_a_bad_program_pauses_and_a_mended_one_goes_on(
    app: App,
    nats_url: str,
    database_url: str,
    tmp_path: Path,
    wait_until: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def words() -> bool:
        return (await client.query("SELECT sum(times) AS n FROM words"))[0]["n"] == 30

    async with serving(app, nats_url, database_url, tmp_path) as (service, client):
        for number in range(30):
            await client.execute(Notebook, f"n{number}", Note("a"))
        await wait_until(words)  # the other projection goes on
        assert "Counts is paused" in service.parts.projector.state
        assert metric("eskernel_projections_paused") == 1
        await service.parts.probes.probe()
        assert "Counts is paused" in str(service.health.report()["components"])
        said = [record for record in caplog.records if "is paused" in record.message and "resume" in record.message]
        assert [record.levelno for record in said] == [logging.ERROR]
        assert parked(database_url) < 5
        # an operator removes the cause without a restart
        Counts.fails = False
        resumed = await _resume(app, database_url)
        assert resumed

        async def folded() -> bool:
            return await counts(client) >= 26 and service.parts.projector.state == "running"

        await wait_until(folded)
        assert metric("eskernel_projections_paused") == 0


async def _resume(app: App, database: str) -> bool:
    from projections.checkpoints import resume
    from projections.database import open_database

    engine = open_database(database)
    try:
        return resume(engine, "Counts")
    finally:
        engine.dispose()


async def test_a_start_of_a_mended_program_goes_on_by_itself(
    app: App, nats_url: str, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    database = f"sqlite:///{tmp_path / 'projections.db'}"
    async with serving(app, nats_url, database, tmp_path) as (service, client):
        for number in range(10):
            await client.execute(Notebook, f"n{number}", Note("a"))
        await wait_until(lambda: "paused" in service.parts.projector.state)
    Counts.fails = False
    async with serving(app, nats_url, database, tmp_path) as (service, client):

        async def folded() -> bool:
            return await counts(client) >= 6

        await wait_until(folded)
        assert service.parts.projector.state == "running"


def test_resume_names_a_projection_of_the_app(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["projections", "resume", "Nothing", "--app", "examples.bank:app",
                                       "--database", f"sqlite:///{tmp_path / 'p.db'}"])  # fmt: skip
    assert result.exit_code != 0


def group(number: int) -> Group:
    return Group(Address("", 0, "Notebook", f"n{number}"), frozenset(), False, [])


def failed(number: int, *, transient: bool = False) -> HandlerFailed:
    return HandlerFailed(0, ("Notebook", f"n{number}"), 1, "ValueError: bad", "handler", transient)


@pytest.mark.parametrize(
    ("folded", "bad", "transient", "paused"),
    [(100, 11, False, True), (100, 10, False, False), (9, 9, False, False), (100, 50, True, False)],
)
def test_a_projection_pauses_above_a_share_and_a_number(folded: int, bad: int, transient: bool, paused: bool) -> None:
    pauses = Pauses(notebooks("x").projections, DeadLetters(pause_above=0.1, pause_minimum=10), lambda: 1.0)
    failures = [failed(number, transient=transient) for number in range(bad)]
    assert pauses.note([group(number) for number in range(folded)], failures) == paused
    assert pauses.paused == ({0} if paused else set())


def test_small_batches_are_counted_together_for_a_minute() -> None:
    now = 0.0
    pauses = Pauses(notebooks("x").projections, DeadLetters(pause_above=0.5, pause_minimum=10), lambda: now)
    for number in range(9):
        assert not pauses.note([group(number)], [failed(number)])
    now = WINDOW_S + 1
    assert not pauses.note([group(9)], [failed(9)])
    assert not any(pauses.note([group(number)], [failed(number)]) for number in range(10, 18))
    assert pauses.note([group(18)], [failed(18)])
