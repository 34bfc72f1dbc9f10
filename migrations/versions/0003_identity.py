"""The identity of the database."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add its table."""
    op.create_table("eskernel_database", sa.Column("id", sa.String(36), primary_key=True))
