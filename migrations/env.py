"""Alembic's entry: runs the migrations on the connection that `migrations.upgrade` hands over."""

from alembic import context

from migrations import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"], version_table=VERSION_TABLE, transactional_ddl=False
)
context.run_migrations()
