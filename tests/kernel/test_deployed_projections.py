"""A service starts on a database that another version of its app has left."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, String, Table
from sqlalchemy.orm import DeclarativeBase

from kernel import Client, Service
from kernel.app import App
from kernel.errors import NotDeclared, QueryTimeout
from projections import Rows, SchemaError, applies
from tests.apps import Line, Lines, Note, Notebook, Noted, Pages, Words, notebooks
from tests.conftest import settings_for


def service_of(app: App, nats_url: str, database: str, tmp_path: Path) -> Service:
    return Service(app, settings_for(tmp_path / "data", nats=nats_url, database=database))


async def test_a_query_does_not_wait_for_a_projection_that_the_app_no_longer_has(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = notebooks(app_name)
    async with service_of(app, nats_url, database_url, tmp_path):
        pass
    smaller = App(app_name, aggregates=[Notebook], projections=[Pages, Words])
    with caplog.at_level(logging.WARNING, "eskernel.service"):
        async with (
            service_of(smaller, nats_url, database_url, tmp_path),
            await Client.connect(smaller, nats=nats_url, database=database_url) as client,
        ):
            after = await client.execute(Notebook, "a", Note("x"))
            assert await client.query("select notes from pages", after=after, timeout=10) == [{"notes": 1}]
            assert await client.query("select notes from pages", after=after, projections=["Words"]) == [{"notes": 1}]
            with pytest.raises(NotDeclared, match="no projection 'Lines'"):
                await client.query("select 1", after=after, projections=["Lines"])
            async with await Client.connect(app, nats=nats_url, database=database_url) as newer:
                with pytest.raises(QueryTimeout, match="Lines at 0"):
                    await newer.query("select 1", after=after, timeout=0.1)
    assert "has the projection Lines, which the app does not declare: its views lines are not kept" in caplog.text
    # the app that has it goes on where it stood
    async with (
        service_of(app, nats_url, database_url, tmp_path),
        await Client.connect(app, nats=nats_url, database=database_url) as client,
    ):
        found = await client.query("select count(*) as n from lines", after=after)
        assert found == [{"n": 1}]


async def test_a_projection_that_is_not_built_yet_is_waited_for(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    app = App(app_name, aggregates=[Notebook], projections=[Pages])
    async with (
        service_of(app, nats_url, database_url, tmp_path),
        await Client.connect(notebooks(app_name), nats=nats_url, database=database_url) as client,
    ):
        after = await client.execute(Notebook, "a", Note("x"))
        with pytest.raises(QueryTimeout, match="Words is not built"):
            await client.query("select 1", after=after, timeout=0.1)


async def test_a_start_with_a_changed_model_is_refused_and_changes_nothing(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    app = App(app_name, aggregates=[Notebook], projections=[Lines, Pages])
    async with service_of(app, nats_url, database_url, tmp_path):
        pass

    class Base(DeclarativeBase):
        pass

    class Other(Base):
        __table__ = Table(
            "pages", Base.metadata, Column("notebook", String, primary_key=True), Column("notes", Integer, default=0)
        )

    class Changed(Rows[Other], of=Notebook, name="Pages"):
        @applies
        def noted(self, row: Other, event: Noted) -> None:
            row.notes += 1

    Changed.noted.__annotations__["row"] = Other
    changed = App(app_name, aggregates=[Notebook], projections=[Lines, Changed])
    with pytest.raises(SchemaError, match=r"Pages was changed.*still 1: .*the column total is no longer declared"):
        await service_of(changed, nats_url, database_url, tmp_path).start()
    async with (
        service_of(app, nats_url, database_url, tmp_path),
        await Client.connect(app, nats=nats_url, database=database_url) as client,
    ):
        after = await client.execute(Notebook, "a", Note("x"))
        assert await client.query("select total from pages", after=after) == [{"total": 1}]


async def test_a_start_with_a_renamed_projection_is_refused(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    app = App(app_name, aggregates=[Notebook], projections=[Lines])
    async with service_of(app, nats_url, database_url, tmp_path):
        pass

    class Rules(Lines, of=Notebook):
        tables = (Line,)

    renamed = App(app_name, aggregates=[Notebook], projections=[Rules])
    with pytest.raises(SchemaError, match=r"Rules fills the table lines.*keep the stored name with name='Lines'"):
        await service_of(renamed, nats_url, database_url, tmp_path).start()
