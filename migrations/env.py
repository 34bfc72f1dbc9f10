"""Alembic's entry: runs the migrations on the connection that `migrations.upgrade` hands over."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],  # `migrations` may be the user's own package here
    transactional_ddl=False,
)
context.run_migrations()
