"""Generations beside the live one: when each left the view, and which code builds it."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add its columns. They stay empty for the generations that are there."""
    op.add_column("eskernel_projection", sa.Column("retired", sa.String(40)))
    op.add_column("eskernel_projection", sa.Column("code", sa.String(64)))
