"""Retries of dead letters, what was skipped, sequences, and the layout of a generation's tables."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add them."""
    op.add_column("eskernel_projection", sa.Column("layout", sa.Integer, nullable=False, server_default="1"))
    op.add_column("eskernel_dead_letter", sa.Column("attempts", sa.Integer, nullable=False, server_default="1"))
    op.add_column("eskernel_dead_letter", sa.Column("next_attempt", sa.Float, nullable=True))
    op.create_table(
        "eskernel_sequence",
        sa.Column("projection", sa.String(128), primary_key=True),
        sa.Column("generation", sa.Integer, primary_key=True),
        sa.Column("aggregate_id", sa.Text, primary_key=True),
        sa.Column("sequence", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "eskernel_skipped_letter",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("projection", sa.String(128), nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("aggregate", sa.String(128), nullable=False),
        sa.Column("aggregate_id", sa.Text, nullable=False),
        sa.Column("stream_sequence", sa.BigInteger, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("failed", sa.String(40), nullable=False),
        sa.Column("skipped", sa.String(40), nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
