"""Rows under a key of their own hold what a plain fold in stream order gives, whoever folds them."""

from __future__ import annotations

import asyncio
from datetime import date
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, select
from sqlalchemy.dialects import sqlite

from aggregates.commit import decode
from kernel.projector.blaming import blame
from kernel.projector.rebuild import Rebuild
from kernel.projector.repairing import repair_aggregate
from kernel.projector.sampling import TablePatrol, verify_sample
from kernel.projector.verification import Verification
from projections import Fenced, SchemaError, dead_letters
from projections.checkpoints import reached
from projections.exclusions import plan_of
from projections.keyed import RowsWait
from projections.retrying import retry_all
from projections.tables import checkpoint, dead_letter, projection
from tests.conftest import ReadSide
from tests.keyed import APP, PARTITIONS, Latest, Log, Noted, OrderView, Paid, Worker, prepare

ORDERS = ["1", "2", 'a "b"', "ç/.*"]
DAYS = [date(2026, 1, 31), date(2026, 2, 1)]
PLAN = APP.plan(sqlite.dialect())
Act = tuple[str, Any]

events = st.builds(
    Noted, st.sampled_from(["one", "two", "end", "bad", "whose"]), st.lists(st.sampled_from(ORDERS), max_size=3),
    st.sampled_from(DAYS),
) | st.builds(Paid, st.sampled_from(ORDERS), st.integers(1, 9), st.sampled_from(DAYS))  # fmt: skip
appended = st.tuples(st.sampled_from(["a", "b"]), events)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("project"), st.tuples(st.integers(0, 1), st.integers(1, 4))),
        st.tuples(st.just("hand over"), st.tuples(st.integers(0, 1), st.sets(st.integers(0, PARTITIONS - 1)))),
    ),
    max_size=12,
)


def plainly_folded(log: Log) -> dict[str, Any]:
    """Fold one event after the other."""
    orders: dict[str, tuple[str, int]] = {}
    days: dict[tuple[date, str], str] = {}
    parked: set[str] = set()
    letters = []
    for stored in log.stored:
        address = log.log.subjects.parse(stored.subject)
        for event in [PLAN.routers[0].event_of(address.aggregate, envelope) for envelope in decode(stored.payload)]:
            kind = "note" if isinstance(event, Noted) else "payment"
            days[event.day, kind] = event.text if isinstance(event, Noted) else event.order
            if isinstance(event, Noted) and event.text == "whose":
                letters.append((address.aggregate, address.id, stored.sequence))
                continue
            for order in dict.fromkeys(event.orders if isinstance(event, Noted) else [event.order]):
                if isinstance(event, Noted) and event.text == "bad":
                    parked.add(order)
                story, cents = orders.get(order, ("", 0))
                if order in parked:
                    letters.append(("Orders", order, stored.sequence))
                elif isinstance(event, Paid):
                    orders[order] = f"{story} {event.cents}", cents + event.cents
                elif event.text == "end":
                    orders.pop(order, None)
                else:
                    orders[order] = f"{story} {event.text}", cents
    return {"orders": orders, "days": days, "letters": sorted(letters)}


LIVE = select(projection.c.name.label("projection"), projection.c.generation).where(projection.c.state == "live")


def found(side: ReadSide) -> dict[str, Any]:
    with side.engine.connect() as connection:
        columns = dead_letter.c.aggregate, dead_letter.c.aggregate_id, dead_letter.c.stream_sequence
        live = {row.projection: row.generation for row in connection.execute(LIVE)}
        rows = connection.execute(select(dead_letter.c.projection, dead_letter.c.generation, *columns))
        letters = sorted(tuple(row[2:]) for row in rows if live[row[0]] == row[1])
    return {
        "orders": {row.order: (row.story, row.cents) for row in side.rows(OrderView)},
        "days": {(row.day, row.kind): row.of for row in side.rows(Latest)},
        "letters": letters,
    }


@pytest.fixture
def side(engine: Engine) -> ReadSide:
    return prepare(engine)


def empty(side: ReadSide) -> None:
    with side.engine.begin() as connection:
        connection.execute(checkpoint.update().values(sequence=0))
        connection.execute(delete(dead_letter))
        for made in side.generations:
            for table in made.tables.values():
                connection.execute(delete(table))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(script=st.lists(appended, min_size=1, max_size=14), acts=steps, split=st.sets(st.integers(0, PARTITIONS - 1)))
def test_two_owners_that_hand_over_fold_what_a_plain_fold_gives(
    side: ReadSide, script: list[Any], acts: list[Act], split: set[int]
) -> None:
    empty(side)
    log = Log()
    for aggregate_id, happened in script:
        log.append(aggregate_id, happened)
    shares = [split, set(range(PARTITIONS)) - split]
    workers = [Worker(side.engine, log, sorted(share)) for share in shares]
    for kind, (who, what) in acts:
        if kind == "project":
            workers[who].project(what)
            continue
        moved = shares[who] & what
        if not moved:
            continue
        shares[who] -= moved
        shares[1 - who] |= moved
        workers[1 - who].claim(sorted(shares[1 - who]))
        at, places = workers[who].at, workers[who].position.of(0)
        if at < len(log.stored) and any(places[partition] <= at for partition in moved):
            with pytest.raises(Fenced):
                workers[who].project(1)  # the former owner does not know yet
        workers[who].claim(sorted(shares[who]))
    for worker in workers:
        worker.project()
    assert found(side) == plainly_folded(log)


def rebuild(side: ReadSide, log: Log) -> None:
    asyncio.run(Rebuild(APP, log.log, side.engine, APP.projections).run())


STORY = (
    ("a", Noted("one", ["1", "2"])),
    ("p", Paid("1", 5)),
    ("a", Noted("bad", ["2", "3"])),
    ("b", Noted("whose", ["4"], DAYS[1])),
    ("p", Paid("2", 7, DAYS[1])),
    ("b", Noted("two", ["1"])),
    ("b", Noted("end", ["1"])),
    ("q", Paid("1", 9)),
)


@pytest.fixture
def log() -> Log:
    made = Log()
    for aggregate_id, happened in STORY:
        made.append(aggregate_id, happened)
    return made


def test_a_rebuild_gives_the_same_and_a_verification_agrees(side: ReadSide, log: Log) -> None:
    Worker(side.engine, log).project()
    live = found(side)
    assert live == plainly_folded(log)
    verified = asyncio.run(Verification(APP, log.log, side.engine, APP.projections).run())
    assert [(each.projection, each.differing, each.parked) for each in verified] == [("Orders", 0, []), ("Days", 0, [])]
    rebuild(side, log)
    assert found(side) == live
    log.append("q", Paid("1", 3))
    Worker(side.engine, log).project()
    assert found(side) == plainly_folded(log)


def test_a_verification_finds_a_row_that_is_not_what_the_log_says(side: ReadSide, log: Log) -> None:
    worker = Worker(side.engine, log)
    worker.project()
    with side.engine.begin() as connection:
        (table,) = worker.generations[0].tables.values()
        connection.execute(table.update().values(cents=1).where(table.c.order == "1"))
    orders, days = asyncio.run(Verification(APP, log.log, side.engine, APP.projections).run())
    assert (orders.differing, days.differing) == (1, 0)
    (difference,) = orders.tables[0].examples
    assert difference.key == {"order": "1"}


def test_every_partition_is_passed_by_each_batch(side: ReadSide, log: Log) -> None:
    worker = Worker(side.engine, log)
    worker.project(1)
    with side.engine.connect() as connection:
        for partition in range(PARTITIONS):
            assert reached(connection, partition, keyed=["Orders", "Days"]) == {"Orders": 1, "Days": 1}
    Worker(side.engine, log, [0]).project()
    with side.engine.connect() as connection:
        assert reached(connection, 0, keyed=["Orders", "Days"]) == {"Orders": 1, "Days": 1}
        assert reached(connection, 0) == {"Orders": len(STORY), "Days": len(STORY)}


def test_a_row_whose_handler_failed_waits_alone_and_goes_on_in_order(
    side: ReadSide, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    Worker(side.engine, log).project()
    parked = {(row.aggregate, row.aggregate_id): row for row in dead_letters.waiting(side.engine, "Orders")}
    assert set(parked) == {("Orders", "2"), ("Orders", "3"), ("Order", "b")}
    assert parked["Orders", "2"].events == 2
    shown = dead_letters.letters(side.engine, "Orders", "Orders", "2")
    assert [(letter.sequence, letter.event and letter.event["type"]) for letter in shown] == [(2, "Noted"), (2, "Paid")]
    declared = APP.projection("Orders")
    handler = next(each for each in declared.handlers if Noted in each.events)
    monkeypatch.setattr(handler, "function", lambda _self, row, event: setattr(row, "story", row.story + " mended"))
    plan = APP.plan(side.engine.dialect)
    stale = Worker(side.engine, log)
    log.append("p", Paid("2", 1))
    done = retry_all(side.engine, plan, dead_letters.waiting(side.engine, "Orders"))
    assert {(one.aggregate, one.aggregate_id): (one.folded, one.left) for one in done} == {
        ("Orders", "2"): (2, 0),
        ("Orders", "3"): (1, 0),
        ("Order", "b"): (0, 1),
    }
    with pytest.raises(Fenced):
        stale.project()
    Worker(side.engine, log).project()
    rows = {row.order: row.story for row in side.rows(OrderView)}
    assert rows["2"] == " one mended 7 1"
    assert rows["3"] == " mended"


def test_a_skipped_event_of_a_row_is_left_out_for_good(side: ReadSide, log: Log) -> None:
    Worker(side.engine, log).project()
    own = plan_of(APP.plan(side.engine.dialect), "Orders")
    letter = dead_letters.skip(side.engine, own, "Orders", "2", "me", "no order")
    assert letter.sequence == 2
    retry_all(side.engine, own, dead_letters.waiting(side.engine, "Orders"))
    assert {row.order: row.story for row in side.rows(OrderView)}["2"] == " one 7"
    rebuild(side, log)
    assert {row.order: row.story for row in side.rows(OrderView)}["2"] == " one 7"


def test_an_event_whose_key_fails_is_in_no_row_until_a_rebuild_with_a_mended_key(
    side: ReadSide, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [failure for owner in ([0, 1], [2, 3]) for failure in Worker(side.engine, log, owner).project()]
    (left_out,) = [failure for failure in failures if failure.aggregate == ("Order", "b")]
    assert "its key: LookupError: whose is it?" in left_out.error
    assert "eskernel rebuild Orders" in left_out.error
    assert found(side) == plainly_folded(log)
    key = APP.projection("Orders").key
    assert key is not None
    monkeypatch.setattr(key, "function", lambda _self, event: getattr(event, "orders", None) or event.order)
    rebuild(side, log)
    assert [row.aggregate for row in dead_letters.waiting(side.engine, "Orders")] == ["Orders", "Orders"]
    assert {row.order: row.story for row in side.rows(OrderView)}["4"] == " whose"


def test_a_skipped_event_whose_key_failed_is_in_no_row_of_a_rebuild(
    side: ReadSide, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    Worker(side.engine, log).project()
    own = plan_of(APP.plan(side.engine.dialect), "Orders")
    dead_letters.skip(side.engine, own, "Order", "b", "me", "nobody's")
    key = APP.projection("Orders").key
    assert key is not None
    monkeypatch.setattr(key, "function", lambda _self, event: getattr(event, "orders", None) or event.order)
    before = {row.order: row.story for row in side.rows(OrderView)}
    rebuild(side, log)
    assert {row.order: row.story for row in side.rows(OrderView)} == before


def test_blame_shows_the_events_of_all_types_that_have_made_a_row(side: ReadSide, log: Log) -> None:
    Worker(side.engine, log).project()
    made = asyncio.run(blame(APP, log.log, side.engine, "order_views", ["2"]))
    assert [(step.aggregate, step.row, bool(step.error)) for step in made] == [
        (("Order", "a"), {"order": "2", "story": " one", "cents": 0}, False),
        (("Order", "a"), None, True),
    ]
    paid = asyncio.run(blame(APP, log.log, side.engine, "latest", ["2026-02-01", "payment"]))
    assert [(step.aggregate, step.changed["of"]) for step in paid] == [(("Payment", "p"), (None, "2"))]


def test_what_has_no_sense_for_them_is_refused_with_a_remedy(side: ReadSide, log: Log) -> None:
    with pytest.raises(SchemaError, match="rows with a key of their own.*`eskernel rebuild Orders`"):
        asyncio.run(repair_aggregate(APP, log.log, side.engine, "Order", "a", "Orders"))
    with pytest.raises(SchemaError, match="rows with a key of their own.*verify it as a whole"):
        asyncio.run(verify_sample(APP, log.log, side.engine, APP.projection("Orders"), 5))
    asyncio.run(TablePatrol(APP, log.log, side.engine, 5).compare_rows())


def test_an_event_of_a_newer_program_lets_all_rows_wait(side: ReadSide, log: Log) -> None:
    worker = Worker(side.engine, log)
    worker.project()
    newer = log.append("a", Noted("one", ["1"]))
    log.stored[-1] = newer._replace(payload=newer.payload.replace(b'"dataversion":1', b'"dataversion":2'))
    with pytest.raises(RowsWait, match="Order a, event 3") as wait:
        worker.project()
    assert wait.value.projection == 0
    with pytest.raises(SchemaError, match="Orders can only be built by a newer program: Order a, event 3"):
        rebuild(side, log)


def test_each_row_is_folded_by_its_owner_alone_and_in_stream_order(side: ReadSide) -> None:
    log = Log()
    for aggregate_id, happened in (
        ("a", Noted("one", ["1", "2", "3"])),
        ("p", Paid("1", 5)),
        ("a", Noted("two", ["1"])),
    ):
        log.append(aggregate_id, happened)
    owners = [Worker(side.engine, log, [0, 2]), Worker(side.engine, log, [1, 3])]
    assert [failure for owner in owners for failure in owner.project()] == []
    assert found(side) == plainly_folded(log)
    assert {row.order: row.story for row in side.rows(OrderView)}["1"] == " one 5 two"
