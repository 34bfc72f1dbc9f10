"""A folded commit, by which the log is recognised."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add its columns. They stay empty until the service has started."""
    op.add_column("eskernel_stream", sa.Column("anchor", sa.BigInteger))
    op.add_column("eskernel_stream", sa.Column("digest", sa.String(64)))
