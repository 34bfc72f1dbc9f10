"""Policies and effects: where each began, the timers that policies have set, and the commands that were rejected."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Create their tables."""
    op.create_table(
        "eskernel_reaction",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("began", sa.BigInteger, nullable=False),
        sa.Column("created", sa.String(40), nullable=False),
    )
    op.create_table(
        "eskernel_timer",
        sa.Column("policy", sa.String(128), primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("stream_sequence", sa.BigInteger, nullable=False),
        sa.Column("place", sa.Integer, nullable=False),
        sa.Column("due", sa.BigInteger),
        sa.Column("attempt", sa.BigInteger),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("owed", sa.Text),
    )
    op.create_index("ix_eskernel_timer_attempt", "eskernel_timer", ["attempt"])
    op.create_table(
        "eskernel_rejection",
        sa.Column("policy", sa.String(128), primary_key=True),
        sa.Column("event_id", sa.String(128), primary_key=True),
        sa.Column("place", sa.String(64), primary_key=True),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("stream_sequence", sa.BigInteger, nullable=False),
        sa.Column("aggregate", sa.String(128), nullable=False),
        sa.Column("aggregate_id", sa.Text, nullable=False),
        sa.Column("command", sa.Text, nullable=False),
        sa.Column("command_id", sa.String(64), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("rejected", sa.String(40), nullable=False),
    )
    op.create_index("ix_eskernel_rejection_rejected", "eskernel_rejection", ["rejected"])
