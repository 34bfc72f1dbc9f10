"""Which tables a generation has, and which views show them."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the list of tables. It is filled for older generations at the next start."""
    op.create_table(
        "eskernel_table",
        sa.Column("projection", sa.String(128), primary_key=True),
        sa.Column("generation", sa.Integer, primary_key=True),
        sa.Column("schema", sa.Text, primary_key=True),
        sa.Column("view", sa.Text, primary_key=True),
        sa.Column("physical", sa.Text, nullable=False),
    )
