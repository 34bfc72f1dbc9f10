"""The kernel's own tables. `migrations/` creates them; this is how the code sees them."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData()

stream = Table(
    "eskernel_stream",
    metadata,
    Column("app", String(64), primary_key=True),
    Column("created", String(40), nullable=False),
    Column("partitions", Integer, nullable=False),
    Column("epoch", BigInteger, nullable=False),
)
"""Which stream this database was folded from, so that it never follows another one unnoticed, and the epoch of the
service that owns its projections."""

projection = Table(
    "eskernel_projection",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("created", String(40), nullable=False),
    Column("layout", Integer, nullable=False),
)
"""Every copy of a projection's tables. state: building, live, retired."""

checkpoint = Table(
    "eskernel_checkpoint",
    metadata,
    Column("projection", String(128), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False),
)
"""How far a generation has folded each partition, and the epoch of the owner that may go on."""

sequence = Table(
    "eskernel_sequence",
    metadata,
    Column("projection", String(128), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("aggregate_id", Text, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
)
"""The last event folded of aggregates that have no row to keep it in."""

dead_letter = Table(
    "eskernel_dead_letter",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("projection", String(128), nullable=False, index=True),
    Column("generation", Integer, nullable=False),
    Column("partition", Integer, nullable=False),
    Column("aggregate", String(128), nullable=False),
    Column("aggregate_id", Text, nullable=False),
    Column("stream_sequence", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("error", Text, nullable=False),
    Column("failed", String(40), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_attempt", Float),
)
"""Events that a projection could not fold, and those that had to wait behind them. attempts: how often its fold has
failed; next_attempt: Unix time of the next automatic one, if there is to be one."""

skipped_letter = Table(
    "eskernel_skipped_letter",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("projection", String(128), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("partition", Integer, nullable=False),
    Column("aggregate", String(128), nullable=False),
    Column("aggregate_id", Text, nullable=False),
    Column("stream_sequence", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("error", Text, nullable=False),
    Column("failed", String(40), nullable=False),
    Column("skipped", String(40), nullable=False),
    Column("who", Text, nullable=False),
    Column("reason", Text, nullable=False),
)
"""Dead letters that somebody decided to leave out: which, when, who, and why. Nothing deletes these rows."""
