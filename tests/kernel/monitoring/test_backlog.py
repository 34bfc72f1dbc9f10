"""Levels of backlog and pressure do not flap; waiting commits are counted exactly."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel.log.base import CommitBatch, Stored
from kernel.log.subjects import Address
from kernel.monitoring.backlog import Alarm, BacklogMeter, Level, Rate
from kernel.monitoring.pressure import Pressure, PressureGauge
from kernel.projector.grouping import Group
from kernel.projector.progress import ReadProgress
from kernel.settings import Backlog as Thresholds
from projections.checkpoints import Position

AT = Thresholds(
    count_warn=100, count_critical=1000, age_warn=10, age_critical=60, hysteresis=0.5, min_duration=3, interval=1
)


def levels(measured: list[tuple[float, float]], thresholds: Thresholds = AT, step: float = 1.0) -> list[Level]:
    alarm = Alarm(thresholds)
    found = []
    for number, (count, age) in enumerate(measured):
        alarm.update(count, age, number * step)
        found.append(alarm.level)
    return found


def test_a_count_or_an_age_beyond_its_threshold_for_long_enough_is_reported() -> None:
    assert levels([(150, 0)] * 5) == [Level.OK] * 3 + [Level.WARN] * 2
    assert levels([(1, 15)] * 5) == [Level.OK] * 3 + [Level.WARN] * 2
    assert levels([(1, 61)] * 5) == [Level.OK] * 3 + [Level.CRITICAL] * 2
    assert levels([(1000, 0)] * 5) == [Level.OK] * 3 + [Level.CRITICAL] * 2


def test_an_excess_shorter_than_the_least_duration_is_not_reported() -> None:
    assert set(levels([(5000, 100), (5000, 100), (5000, 100), (0, 0)] * 5)) == {Level.OK}


@pytest.mark.setting("backlog.hysteresis", on="")
def test_a_level_is_left_only_below_its_share_of_the_threshold() -> None:
    assert levels([(150, 0)] * 4 + [(60, 0)] * 10)[-1] == Level.WARN
    assert levels([(150, 0)] * 4 + [(49, 0)] * 4)[-1] == Level.OK
    assert levels([(1000, 0)] * 4 + [(600, 0)] * 10)[-1] == Level.CRITICAL
    assert levels([(1000, 0)] * 4 + [(400, 0)] * 4)[-1] == Level.WARN


def test_nothing_waiting_is_never_behind_however_old_the_last_event_is() -> None:
    assert set(levels([(0, 1e9)] * 100)) == {Level.OK}


measurements = st.lists(st.tuples(st.floats(0, 3000), st.floats(0, 200)), min_size=1, max_size=60)
steps = st.floats(0.1, 5)


@given(measurements, steps)
def test_two_changes_are_never_nearer_than_the_least_duration(measured: list[tuple[float, float]], step: float) -> None:
    found = levels(measured, step=step)
    for level in (Level.WARN, Level.CRITICAL):
        reached = [current >= level for current in found]
        changes = [number * step for number in range(1, len(found)) if reached[number] != reached[number - 1]]
        assert all(later - earlier >= AT.min_duration for earlier, later in pairwise(changes))


@given(measurements, steps)
def test_a_change_has_its_reason_in_every_measurement_of_the_least_duration(
    measured: list[tuple[float, float]], step: float
) -> None:
    found = levels(measured, step=step)
    for number in range(1, len(found)):
        if found[number] == found[number - 1]:
            continue
        since = max((n for n in range(number) if number * step - n * step >= AT.min_duration), default=0)
        window = [(count, age if count else 0) for count, age in measured[since : number + 1]]
        rising = found[number] > found[number - 1]
        level = found[number] if rising else found[number - 1]
        count_at, age_at = (100, 10) if level == Level.WARN else (1000, 60)
        if rising:
            assert all(count >= count_at or age >= age_at for count, age in window)
        else:
            assert all(count < count_at / 2 and age < age_at / 2 for count, age in window)


@given(measurements)
def test_a_level_holds_while_measurements_swing_between_its_share_and_its_threshold(
    measured: list[tuple[float, float]],
) -> None:
    swinging = [(50 + count / 3000 * 900, 0.0) for count, _ in measured]
    assert set(levels([(150, 0)] * 4 + swinging)[4:]) == {Level.WARN}


def test_partitions_that_change_together_are_reported_together() -> None:
    backlog = BacklogMeter(AT, ["Pages", "Words"])
    changes = []
    for now in range(5):
        for partition in range(64):
            backlog.feed("Pages", partition, 200, 1, now)
        changes += backlog.finish(range(64), 0, now)
    (change,) = changes
    assert (change.projection, change.before, change.after) == ("Pages", Level.OK, Level.WARN)
    assert change.partitions == list(range(64))
    assert change.behind == 64 * 200
    assert backlog.worst == Level.WARN
    assert backlog.projections["Words"].behind == 0


def test_a_partition_that_is_another_workers_now_is_not_ours_to_alarm_about() -> None:
    backlog = BacklogMeter(AT, ["Pages"])
    for now in range(5):
        backlog.feed("Pages", 7, 5000, 1, now)
        backlog.finish(range(64), 0, now)
    (change,) = backlog.finish([], 0, 6)
    assert (change.after, change.partitions) == (Level.OK, [7])
    assert backlog.worst == Level.OK


def test_alarms_of_what_has_caught_up_are_forgotten() -> None:
    backlog = BacklogMeter(AT, ["Pages"])
    for now in range(20):
        if now < 5:
            backlog.feed("Pages", 7, 5000, 1, now)
        backlog.finish(range(64), 0, now)
    assert backlog._alarms == {"Pages": {}}


def test_time_to_drain_follows_the_present_rate_and_is_infinite_at_a_standstill() -> None:
    backlog = BacklogMeter(AT, ["Pages"])
    for now in range(60):
        backlog.feed("Pages", 1, 5000, 1, now)
        backlog.finish(range(64), now * 100, now)
    assert backlog.projections["Pages"].drain == pytest.approx(50, rel=0.05)
    for now in range(60, 80):
        backlog.feed("Pages", 1, 5000, 1, now)
        backlog.finish(range(64), 5900, now)
    assert math.isinf(backlog.projections["Pages"].drain)
    assert backlog.report()["projections"][0]["drain"] is None
    backlog.finish(range(64), 5900, 81)
    assert backlog.projections["Pages"].drain == 0


def test_the_rate_forgets_the_past() -> None:
    rate = Rate()
    done = 0
    for now in range(200):
        done += 1000 if now < 100 else 10
        rate.update(done, now)
    assert rate.per_second == pytest.approx(10, rel=0.01)


# counting what waits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def group(partition: int, sequences: list[int], skip: frozenset[int] = frozenset()) -> Group:
    address = Address(f"app.evt.{partition}.A.{partition}", partition, "A", str(partition))
    return Group(address, skip, False, [(sequence, []) for sequence in sequences])


def batch(first: int, last: int, pending: int, oldest: float) -> CommitBatch:
    return CommitBatch([Stored(sequence, "", b"") for sequence in range(first, last + 1)], pending, oldest)


def started(*folded: dict[int, int]) -> tuple[ReadProgress, Clock]:
    clock = Clock()
    progress = ReadProgress(4, clock)
    progress.begin(Position(folded or ({0: 0, 1: 0, 2: 0, 3: 0},)), frozenset(range(4)))
    return progress, clock


def waiting(progress: ReadProgress, projections: int = 1) -> dict[tuple[int, int], tuple[float, float]]:
    return {
        (projection, partition): (count, age)
        for projection, partition, count, age in progress.waiting(projections, frozenset(range(4)))
    }


def test_commits_in_hand_are_counted_by_partition_until_they_are_written() -> None:
    progress, clock = started()
    hand = progress.read([group(0, [1, 2]), group(2, [3])], batch(1, 3, 0, 990.0))
    assert waiting(progress) == {(0, 0): (2, 10.0), (0, 2): (1, 10.0)}
    clock.now += 5
    assert waiting(progress)[0, 0] == (2, 15.0)
    progress.written(hand)
    assert waiting(progress) == {}
    assert progress.done == 3


def test_an_idle_system_is_not_behind_however_long_it_is_idle() -> None:
    progress, clock = started()
    progress.written(progress.read([group(0, [1])], batch(1, 1, 0, 990.0)))
    for _ in range(10):
        clock.now += 1000
        progress.note_end(1)
        assert waiting(progress) == {}
        assert progress.behind == 0


def test_the_age_of_what_comes_after_an_idle_time_begins_when_it_comes() -> None:
    progress, clock = started()
    progress.written(progress.read([group(0, [1])], batch(1, 1, 0, 990.0)))
    clock.now += 1000
    progress.note_end(1)
    clock.now += 2
    progress.note_end(5)
    assert {age for _, age in waiting(progress).values()} == {2.0}


def test_unread_commits_are_apportioned_like_the_read_ones_and_their_sum_is_exact() -> None:
    progress, _ = started()
    progress.written(progress.read([group(0, [1, 2, 3]), group(1, [4])], batch(1, 4, 100, 990.0)))
    found = waiting(progress)
    assert {place: count for place, (count, _) in found.items()} == {(0, 0): 75.0, (0, 1): 25.0}
    assert progress.behind == 100


def test_a_session_that_ends_leaves_what_it_had_in_hand_behind() -> None:
    progress, clock = started()
    progress.read([group(0, [1])], batch(1, 1, 11, 990.0))
    progress.read([group(0, [2])], batch(2, 2, 10, 995.0))
    clock.now += 30
    progress.note_end(20)
    assert sum(count for count, _ in waiting(progress).values()) == 20
    progress.begin(Position(({0: 0, 1: 0, 2: 0, 3: 0},)), frozenset(range(4)))
    assert sum(count for count, _ in waiting(progress).values()) == pytest.approx(20)
    assert {age for _, age in waiting(progress).values()} == {40.0}


def test_a_projection_whose_checkpoint_lies_further_back_is_behind_by_more() -> None:
    ahead, back = dict.fromkeys(range(4), 60), dict.fromkeys(range(4), 0)
    progress, _ = started(ahead, back)
    progress.note_end(100)
    found = waiting(progress, 2)
    assert sum(count for (projection, _), (count, _) in found.items() if projection == 0) == pytest.approx(40)
    assert sum(count for (projection, _), (count, _) in found.items() if projection == 1) == pytest.approx(100)
    progress.read([group(0, list(range(1, 101)), frozenset({0}))], batch(1, 100, 0, 990.0))
    assert waiting(progress, 2) == {(1, 0): (100, 10.0)}


@given(st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.booleans()), max_size=20))
def test_whatever_is_read_and_written_nothing_is_counted_twice_or_lost(
    story: list[tuple[list[int], bool]],
) -> None:
    progress, clock = started()
    total = sum(len(partitions) for partitions, _ in story)
    progress.note_end(total)
    read = written = 0
    hands: list[Any] = []
    for partitions, writes in story:
        clock.now += 1
        groups = [group(partition, [read + 1] * partitions.count(partition)) for partition in set(partitions)]
        last = read + len(partitions)
        hands.append((progress.read(groups, batch(read + 1, last, total - last, clock.now)), len(partitions)))
        read = last
        while hands and writes:
            hand, count = hands.pop(0)
            progress.written(hand)
            written += count
        assert sum(count for count, _ in waiting(progress).values()) == pytest.approx(total - written)
        assert progress.behind == total - written


# pressure


def pressure(**measured: Any) -> Pressure:
    gauge = PressureGauge(max_in_flight=4000, max_pending=10_000, max_latency=5.0, hysteresis=0.5, min_duration=3)
    given: dict[str, Any] = {"queued": 0, "in_flight": 0, "pending": 0, "latency": 0.0, "refusal": ""} | measured
    for now in range(5):
        gauge.update(**given, now=now)
    return gauge.level


def test_the_pressure_follows_the_quantity_nearest_to_its_limit() -> None:
    assert pressure() == Pressure.LOW
    assert pressure(in_flight=1999) == Pressure.LOW
    assert pressure(in_flight=2000) == Pressure.MEDIUM
    assert pressure(in_flight=2000, queued=1000) == Pressure.HIGH
    assert pressure(pending=9000) == Pressure.CRITICAL
    assert pressure(latency=4.0) == Pressure.HIGH
    assert pressure(refusal="the log is full") == Pressure.CRITICAL
