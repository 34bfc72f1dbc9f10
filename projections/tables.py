"""The kernel's own tables, as the code uses them. `migrations/` creates them."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData()

database = Table("eskernel_database", metadata, Column("id", String(36), primary_key=True))
"""The id of this database, made once: see `projections.identity`."""

stream = Table(
    "eskernel_stream",
    metadata,
    Column("app", String(64), primary_key=True),
    Column("created", String(40), nullable=False),
    Column("partitions", Integer, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("anchor", BigInteger),
    Column("digest", String(64)),
)
"""The stream that this database was folded from, so that a different stream is noticed, and the newest epoch. `anchor`
is the stream sequence of a folded commit, and `digest` says what the commit is: see `projections.origin`."""

projection = Table(
    "eskernel_projection",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("created", String(40), nullable=False),
    Column("layout", Integer, nullable=False),
    Column("retired", String(40)),
    Column("code", String(64)),
)
"""Every generation of a projection. `state` is `building`; `ready` (built, and not shown yet); `live` (readers see it);
or `retired` (readers saw it, until the time `retired`); `freezing` or `frozen` (as of a moment, under a view of its
own). While it is built, `code` is the fingerprint of the program
that builds it."""

generation_table = Table(
    "eskernel_table",
    metadata,
    Column("projection", String(128), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("schema", Text, primary_key=True),
    Column("view", Text, primary_key=True),
    Column("physical", Text, nullable=False),
)
"""The tables of every generation, also of projections that the program no longer knows. `schema` is that of the view,
empty for the connection's own."""

checkpoint = Table(
    "eskernel_checkpoint",
    metadata,
    Column("projection", String(128), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False),
)
"""How far a generation has folded each partition, and the epoch of the owner that may write."""

sequence = Table(
    "eskernel_sequence",
    metadata,
    Column("projection", String(128), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("aggregate_id", Text, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
)
"""The sequence of the last folded event, for aggregates that have no row to keep it in."""

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
"""Events that a projection could not fold, and the later events of the same aggregates. `attempts` counts failed folds;
`next_attempt` is the Unix time of the next automatic attempt, if one is planned."""

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
"""Dead letters that a person skipped: event, time, person and reason. The kernel never deletes these rows."""

reaction = Table(
    "eskernel_reaction",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("began", BigInteger, nullable=False),
    Column("created", String(40), nullable=False),
)
"""Every policy and effect that has run on this database, and the stream sequence after which it began. Its checkpoints
and dead letters are those of generation 0 under its name: no projection has such a generation."""

timer = Table(
    "eskernel_timer",
    metadata,
    Column("policy", String(128), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("partition", Integer, nullable=False),
    Column("stream_sequence", BigInteger, nullable=False),
    Column("place", Integer, nullable=False),
    Column("due", BigInteger),
    Column("attempt", BigInteger, index=True),
    Column("attempts", Integer, nullable=False),
    Column("error", Text, nullable=False),
    Column("owed", Text),
)
"""The timers of policies. `stream_sequence` and `place` say where the event is that set it, and where in that: a later
one of the same name takes its place. `due` and `attempt` are Unix times in microseconds; `attempt` is when it is fired,
later than `due` after failures. A timer that was cancelled or fired has neither, until all checkpoints have passed it.
`owed` is the command, as JSON."""

rejection = Table(
    "eskernel_rejection",
    metadata,
    Column("policy", String(128), primary_key=True),
    Column("event_id", String(128), primary_key=True),
    Column("place", String(64), primary_key=True),
    Column("partition", Integer, nullable=False),
    Column("stream_sequence", BigInteger, nullable=False),
    Column("aggregate", String(128), nullable=False),
    Column("aggregate_id", Text, nullable=False),
    Column("command", Text, nullable=False),
    Column("command_id", String(64), nullable=False),
    Column("reason", Text, nullable=False),
    Column("rejected", String(40), nullable=False, index=True),
)
"""Commands of policies that an aggregate has rejected: for `aggregate` and `aggregate_id`. They are not sent again."""
