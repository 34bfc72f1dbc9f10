"""Alembic's autogenerate, in an application that has tables of its own beside projections."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, String, Table

import migrations
from projections import alembic_filter
from projections.declaration import DeclaredProjection
from projections.naming import table_of
from projections.tables import generation_table
from tests.projections.test_schema import build, projection_of


def metadata_of(declared: DeclaredProjection) -> MetaData:
    return table_of(declared.models[0]).metadata


def context_of(connection: sa.Connection, *projections: DeclaredProjection) -> MigrationContext:
    return MigrationContext.configure(connection, opts={"include_object": alembic_filter(projections, connection)})


def differences(engine: Engine, *projections: DeclaredProjection, seen: bool = True) -> list[Any]:
    """Return what autogenerate finds."""
    with engine.connect() as connection:
        context = context_of(connection, *projections) if seen else MigrationContext.configure(connection)
        found: list[Any] = compare_metadata(context, metadata_of(projections[0]))
        return found


def test_autogenerate_leaves_tables_generations_and_views_alone(engine: Engine) -> None:
    migrations.upgrade(engine)
    old, pages, left = (
        projection_of(version=1),
        projection_of(Column("more", Integer), version=2),
        projection_of(name="Left", table="left_over"),
    )
    build(engine, old, left)
    build(engine, pages)  # beside the generation before; and the app no longer declares Left
    assert differences(engine, pages, seen=False) != []
    assert differences(engine, pages) == []


def test_autogenerate_compares_tables_of_ones_own(engine: Engine) -> None:
    migrations.upgrade(engine)
    pages = projection_of()
    build(engine, pages)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE forgotten (id INTEGER PRIMARY KEY)")
    Table("covers", metadata_of(pages), Column("id", Integer, primary_key=True), Column("page", String(9)))
    found = differences(engine, pages)
    assert sorted((kind, table.name) for kind, table in found) == [
        ("add_table", "covers"),
        ("remove_table", "forgotten"),
    ]


def test_autogenerate_works_before_the_first_start_of_the_service(engine: Engine) -> None:
    assert differences(engine, projection_of()) == []


ENV = """
from alembic import context
from projections import alembic_filter

given = context.config.attributes
with given["engine"].connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=given["metadata"],
        include_object=alembic_filter(given["projections"], connection),
    )
    with context.begin_transaction():
        context.run_migrations()
"""


def test_a_revision_that_autogenerate_wrote_is_applied_and_committed(engine: Engine, tmp_path: Path) -> None:
    """Alembic leaves a transaction that was open when it was configured to its owner, who would not commit it."""
    migrations.upgrade(engine)
    pages = projection_of()
    build(engine, pages)
    Table("covers", metadata_of(pages), Column("id", Integer, primary_key=True))
    config = Config(tmp_path / "alembic.ini", stdout=io.StringIO())
    config.set_main_option("script_location", str(tmp_path / "alembic"))
    config.attributes.update(engine=engine, metadata=metadata_of(pages), projections=[pages])
    command.init(config, str(tmp_path / "alembic"))
    (tmp_path / "alembic" / "env.py").write_text(ENV)
    command.revision(config, "covers", autogenerate=True)
    (written,) = (tmp_path / "alembic" / "versions").glob("*.py")
    assert written.read_text().count("op.create_table(") == written.read_text().count("op.drop_table(") == 1
    command.upgrade(config, "head")
    command.check(config)
    with engine.connect() as connection:
        assert sa.inspect(connection).has_table("covers")
        assert generation_table.name in sa.inspect(connection).get_table_names()
