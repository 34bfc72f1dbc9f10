"""Live in any batches, with passivations and restarts at any place, equals one event at a time, equals one batch.

The models are random: each has columns of random types, a column that is unique, a tally whose key is of a random type,
and a table that an `Sql` projection keeps. `ESKERNEL_SEED` chooses other models, `ESKERNEL_EXAMPLES` more histories.
"""

import asyncio
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, Integer, Numeric, String, delete, insert, select
from sqlalchemy.orm import DeclarativeBase, mapped_column

from aggregates import Aggregate, applies, command, event, handles
from aggregates.commit import decode
from kernel import App
from kernel.log import MemoryLog
from kernel.projector.verification import Verification
from projections import DROP, Drop, Recorded, Rows, Sql, Tallies, Tally, Transaction
from projections.fold import Folded
from projections.tables import checkpoint, dead_letter
from projections.tables import sequence as kept_sequences
from tests.conftest import Commit, ReadSide, batch_of, encoded, envelopes
from tests.projections.samples import SAMPLES, Sample, shown

SEED = int(os.environ.get("ESKERNEL_SEED", "0")) or random.randrange(2**32)
EXAMPLES = int(os.environ.get("ESKERNEL_EXAMPLES", "40"))
MODELS = 5
WIDTH = 5
LOSSY = {
    *("Numeric(12, 2)", "Numeric(30, 10)", "Float", "Double", "REAL", "CHAR(5)", "DateTime(timezone=True)", "INET"),
    *("Uuid(as_uuid=False)", "Enum", "Enum(native_enum=False)", "JSON", "JSON(none_as_null=True)", "JSONB"),
    *("TypeDecorator", "ARRAY(Integer)", "ARRAY(Text)"),
}
"""Types whose refusals are noticed at the event, and not only when a row is written."""


@command
class Nothing:
    pass


@event
class Put:
    column: int
    value: int


@event
class Twisted:
    column: int


@event
class Named:
    name: str | None


@event
class Counted:
    value: int
    cents: int


@event
class Gone:
    pass


@event
class Listed:
    place: int


@event
class Unlisted:
    place: int


class Thing(Aggregate):
    @handles
    def nothing(self, command: Nothing) -> None: ...

    @applies
    def any(self, event: Put | Twisted | Named | Counted | Gone | Listed | Unlisted) -> None: ...


def app_of(samples: Sequence[Sample], key: Sample) -> App:
    """Return an app whose rows have a column of each sample, and whose tally has a key of one."""

    class Base(DeclarativeBase):
        pass

    columns: dict[str, Any] = {
        f"c{place}": mapped_column(sample.type(), default=sample.values[0], nullable=True)
        for place, sample in enumerate(samples)
    }
    thing = type(
        "Row",
        (Base,),
        {
            "__tablename__": "things",
            "id": mapped_column(String, primary_key=True),
            "name": mapped_column(String(40), nullable=True, unique=True),
            **columns,
        },
    )

    class Count(Base):
        __tablename__ = "counts"
        value = mapped_column(key.type(), primary_key=True)
        times = mapped_column(Integer)
        cents = mapped_column(Numeric(12, 2))

    class Line(Base):
        __tablename__ = "lines"
        place = mapped_column(Integer, primary_key=True)
        thing = mapped_column(String)

    class Things(Rows[thing], of=Thing):  # type: ignore[valid-type]
        @applies
        def put(self, row: thing, event: Put) -> None:  # type: ignore[valid-type]
            sample = samples[event.column]
            offered = sample.values + (sample.refused if sample.name in LOSSY else ())
            setattr(row, f"c{event.column}", offered[event.value % len(offered)])

        @applies
        def twisted(self, row: thing, event: Twisted) -> None:  # type: ignore[valid-type]
            name = f"c{event.column}"
            if (value := getattr(row, name)) is not None:
                setattr(row, name, samples[event.column].twist(value))

        @applies
        def named(self, row: thing, event: Named) -> None:  # type: ignore[valid-type]
            row.name = event.name  # type: ignore[attr-defined]

        @applies
        def gone(self, row: thing, event: Gone) -> Drop:  # type: ignore[valid-type]
            return DROP

    class Counts(Tallies[Count], of=Thing):
        @applies
        def counted(self, tally: Tally[Count], event: Counted) -> None:
            values = [value for value in key.values if value is not None]
            entry = tally[values[event.value % len(values)]]
            entry.times += 1
            entry.cents += event.cents

    class Lines(Sql, of=Thing):
        tables = (Line,)

        @applies
        def listed(self, tx: Transaction, events: Sequence[Recorded[Listed]]) -> None:
            rows = [{"place": recorded.event.place, "thing": recorded.meta.aggregate_id} for recorded in events]
            tx.execute(insert(tx.table(Line)), rows)

        @applies
        def unlisted(self, tx: Transaction, events: Sequence[Recorded[Unlisted]]) -> None:
            table = tx.table(Line)
            tx.execute(delete(table).where(table.c.place.in_([recorded.event.place for recorded in events])))

    return App("things", aggregates=[Thing], projections=[Things, Counts, Lines])


class Worker(ReadSide):
    """A read side that keeps rows in memory between batches, as the actors do."""

    def claim(self) -> None:
        super().claim()
        self.memory: dict[tuple[str, str], tuple[list[Any], int]] = {}

    def fold(self, commits: Sequence[Commit]) -> Folded:
        folded = Folded(self.plan)
        for key, own, _ in batch_of(commits):
            if key not in self.memory:
                with self.engine.connect() as connection:
                    rows, _ = self.writer.load_rows(connection, key[0], [key[1]])
                    kept = self.writer.load_kept(connection, key[0], rows).get(key[1])
                self.memory[key] = rows[key[1]], self.plan.fold(*key, rows[key[1]], own, folded, None, kept=kept)
            else:
                rows_, last = self.memory[key]
                self.memory[key] = rows_, self.plan.fold(*key, rows_, own, folded, last)
        return folded

    def project(self, commits: Sequence[Commit]) -> list[Any]:
        failures = super().project(commits)
        for failure in failures:
            self.memory.pop(failure.aggregate, None)
        return failures

    def empty(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(checkpoint.update().values(sequence=0))
            for table in (dead_letter, kept_sequences, *(t for made in self.generations for t in made.tables.values())):
                connection.execute(delete(table))
        self.claim()

    def found(self) -> dict[str, Any]:
        """Return the content of all tables, with the types of the values."""
        with self.engine.connect() as connection:
            found: dict[str, Any] = {
                name: sorted((shown(list(row)) for row in connection.execute(select(table))), key=str)
                for made in self.generations
                for name, table in made.tables.items()
            }
            letters = connection.execute(select(dead_letter)).all()
        found["letters"] = sorted((letter.projection, letter.aggregate_id, letter.sequence) for letter in letters)
        return found


ids = st.sampled_from(["a", "b", "c"])
columns = st.integers(0, WIDTH - 1)
changes = st.one_of(
    st.builds(Put, columns, st.integers(0, 11)),
    st.builds(Twisted, columns),
    st.builds(Twisted, columns),
    st.builds(Counted, st.integers(0, 5), st.integers(-100, 100)),
    st.builds(Gone),
)
steps = st.one_of(
    st.tuples(ids, changes),
    # what is parked gives up no name, so that those who take names set no other column
    st.tuples(st.sampled_from(["n", "o", "p"]), st.sampled_from(["take the name", "list"])),
    st.tuples(st.sampled_from(["n", "o", "p"]), st.builds(Gone)),
)
breaks = st.sampled_from(["no", "no", "batch", "batch", "passivate", "restart", "die"])


def history_of(script: Sequence[tuple[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Return a legal history: a name is given up before another takes it, a place is free before it is taken."""
    holder: str | None = None
    listed = False
    history: list[tuple[str, list[Any]]] = []
    for aggregate_id, step in script:
        if step == "take the name":
            if holder not in (None, aggregate_id):
                history.append((str(holder), [Named(None)]))
            history.append((aggregate_id, [Named("the one"), Named("the one")]))
            holder = aggregate_id
        elif step == "list":
            history.append((aggregate_id, [Unlisted(1) if listed else Listed(1)]))
            listed = not listed
        else:
            if isinstance(step, Gone) and holder == aggregate_id:
                holder = None
            history.append((aggregate_id, [step]))
    return history


@pytest.fixture(params=range(MODELS))
def worker(request: pytest.FixtureRequest, engine: Engine) -> Iterator[Worker]:
    chance = random.Random(SEED + request.param)
    possible = [sample for sample in SAMPLES if sample.both or engine.dialect.name == "postgresql"]
    samples = chance.sample(possible, WIDTH)
    key = chance.choice([sample for sample in possible if not sample.name.startswith(("JSON", "ARRAY"))])
    print(f"ESKERNEL_SEED={SEED}: {', '.join(sample.name for sample in samples)}; key {key.name}")
    yield Worker(engine, app_of(samples, key))


@settings(
    max_examples=max(1, EXAMPLES // MODELS),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(script=st.lists(steps, min_size=1, max_size=14), cuts=st.lists(breaks, min_size=14, max_size=40))
def test_live_equals_reloaded_equals_rebuilt(worker: Worker, script: list[tuple[str, Any]], cuts: list[str]) -> None:
    versions: dict[str, int] = {}
    log: list[Commit] = []
    for place, (aggregate_id, events) in enumerate(history_of(script), 1):
        log.append((place, "Thing", aggregate_id, envelopes(Thing, events, versions.get(aggregate_id, 0))))
        versions[aggregate_id] = versions.get(aggregate_id, 0) + len(events)
    found = []
    for way in ("singly", "at once", "live"):
        worker.empty()
        batch: list[Commit] = []
        for place, commit in enumerate(log):
            batch.append(commit)
            cut = {"singly": "restart", "at once": "no"}.get(way, cuts[place % len(cuts)])
            if cut == "no" and place < len(log) - 1:
                continue
            if cut == "die":
                worker.freeze(batch, worker.fold(batch))
                worker.claim()
            worker.project(batch)
            batch = []
            if cut == "restart":
                worker.claim()
            elif cut == "passivate":
                worker.memory.clear()
        found.append(worker.found())
    assert found[1] == found[0]
    assert found[2] == found[0]


@settings(
    max_examples=max(1, EXAMPLES // MODELS // 5),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(script=st.lists(steps, min_size=1, max_size=14), cuts=st.lists(breaks, min_size=14, max_size=40))
def test_what_is_projected_is_verified(worker: Worker, script: list[tuple[str, Any]], cuts: list[str]) -> None:
    worker.empty()
    log = MemoryLog(worker.app.name, worker.partitions)
    last: dict[str, tuple[int, int]] = {}
    batch: list[Commit] = []
    history = history_of(script)
    for place, (aggregate_id, events) in enumerate(history):
        version, position = last.get(aggregate_id, (0, 0))
        payload = encoded(Thing, events, version)
        subject = log.subjects.address("Thing", aggregate_id).subject
        log.append(subject, position, payload)
        last[aggregate_id] = version + len(events), place + 1
        batch.append((place + 1, "Thing", aggregate_id, decode(payload)))
        if cuts[place % len(cuts)] != "no" or place == len(history) - 1:
            worker.project(batch)
            batch = []
    before = worker.found()
    verified = asyncio.run(Verification(worker.app, log, worker.engine, worker.app.projections).run())
    assert [(each.projection, each.differing, each.parked) for each in verified] == [
        ("Things", 0, []), ("Counts", 0, []), ("Lines", 0, []),
    ]  # fmt: skip
    assert worker.found() == before
