"""Token buckets, lanes and the governor, on a simulated clock."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel import App
from kernel.errors import LimitsError, SettingsError
from kernel.governance.governor import Governor, Signals
from kernel.governance.limits import Overrides, override, parse
from kernel.governance.rates import BAD_SPELL, MARGIN_S, QUEUE_S, Keyed, Lane, TokenBucket
from kernel.settings.governance import Limit, Rates
from tests.apps import Note, Notebook, notebooks

RATE = st.floats(0.01, 1e6)
BURST = st.none() | st.floats(1, 1e6)
WAITS = st.lists(st.floats(0, 10), min_size=1, max_size=60)


def take(bucket: TokenBucket, n: float, now: float) -> float:
    """Take `n` tokens and return 0.0; or take none and return the seconds to wait, as the governor does."""
    if wait := bucket.wait(n, now):
        return bucket.refuse(n, wait)
    bucket.spend(n)
    return 0.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


# buckets


@given(RATE, BURST, WAITS)
def test_a_bucket_never_gives_more_than_its_burst_and_its_rate(
    rate: float, burst: float | None, waits: list[float]
) -> None:
    bucket = TokenBucket(rate, burst, 0.0)
    holds, now, taken = bucket.burst, 0.0, 0
    for wait in waits:
        now += wait
        taken += sum(take(bucket, 1, now) == 0.0 for _ in range(20))
        assert taken <= holds + rate * (now + 2 * MARGIN_S) + 1e-3


@given(st.floats(0.01, 1e5), BURST, st.floats(0, 1e6), st.integers(1, 50))
def test_a_caller_that_waits_as_long_as_asked_is_let_in(
    rate: float, burst: float | None, now: float, others: int
) -> None:
    """This holds for many refused callers too, as long as the waiting times stay below a limit."""
    bucket = TokenBucket(rate, burst, now)
    bucket.spend(bucket.available(now))
    waits = [take(bucket, 1, now) for _ in range(others)]
    assert all(0 < wait <= max(QUEUE_S, 1 / rate + 2 * MARGIN_S) for wait in waits)
    for wait in [pause for place, pause in enumerate(waits) if place == 0 or pause < QUEUE_S]:
        assert take(bucket, 1, now + wait) == 0.0


def test_callers_refused_together_get_different_waiting_times() -> None:
    bucket = TokenBucket(10, 1, 0.0)
    assert take(bucket, 1, 0.0) == 0.0
    assert [round(take(bucket, 1, 0.0), 3) for _ in range(4)] == [0.1, 0.2, 0.3, 0.4]
    # callers that never come back are forgotten at the rate at which they would have been let in
    assert take(bucket, 1, 0.5) == 0.0
    assert round(take(bucket, 1, 0.5), 3) == 0.1


def test_a_bucket_can_be_changed_and_is_full_after_no_limit() -> None:
    bucket = TokenBucket(None, None, 0.0)
    assert take(bucket, 1e9, 0.0) == 0.0
    assert bucket.available(0.0) == math.inf
    bucket.set(5, 10, 1.0)
    assert bucket.available(1.0) == 10
    bucket.spend(10)
    bucket.set(100, 200, 1.0)
    assert bucket.available(1.0) == 0
    assert bucket.available(2.0) == 100
    bucket.set(5, 10, 2.0)
    assert bucket.available(2.0) == 10


@pytest.mark.setting("rates.rebuild.burst", on="")
def test_more_than_the_burst_is_let_through_once_and_paid_back() -> None:
    bucket = TokenBucket(10, 10, 0.0)
    assert take(bucket, 30, 0.0) == 0.0
    assert round(take(bucket, 1, 0.0), 3) == 2.1


def test_keys_have_a_bucket_each_and_the_least_recently_used_is_forgotten() -> None:
    keyed = Keyed(1, 1, most=3)
    for key in "abc":
        assert take(keyed.get(key, 0.0), 1, 0.0) == 0.0
        assert take(keyed.get(key, 0.0), 1, 0.0) > 0.0
    keyed.get("a", 0.0)
    keyed.get("d", 0.0)
    assert len(keyed) == 3
    assert take(keyed.get("a", 0.0), 1, 0.0) > 0.0
    assert take(keyed.get("b", 0.0), 1, 0.0) == 0.0
    keyed.set(100, 1, 0.0)
    assert take(keyed.get("a", 0.01), 1, 0.01) == 0.0


# lanes


def tick(lane: Lane, seconds: int, done: float, distress: str = "", start: float = 0.0) -> float:
    for second in range(seconds):
        lane.tick(done, distress, 1.0, start + second)
    return start + seconds


def test_one_bad_second_is_no_bad_spell() -> None:
    lane = Lane(Rates(), Limit())
    tick(lane, 10, 1_000)
    for _ in range(10):
        tick(lane, BAD_SPELL - 1, 1_000, "late")
        tick(lane, 1, 1_000)
    assert lane.present is None


def test_distress_lowers_multiplicatively_from_the_recent_throughput_to_the_minimum() -> None:
    lane = Lane(Rates(decrease=0.5, minimum=100), Limit())
    tick(lane, 10, 1_000)
    tick(lane, BAD_SPELL, 0, "late")
    assert lane.present == 500
    assert lane.why == "late"
    tick(lane, 1, 0, "later")
    assert (lane.present, lane.why) == (250, "later")
    tick(lane, 100, 0, "later")
    assert lane.present == 100
    assert lane.bucket.rate == 100


@given(
    st.floats(0, 1e6), st.floats(0.01, 1e5), st.none() | st.floats(0.1, 1e6), st.floats(0.01, 1), st.integers(2, 100),
    st.floats(0.05, 0.95), st.booleans(),
)  # fmt: skip
def test_the_lane_is_back_within_the_stated_time_however_long_the_spell_was(
    usual: float, minimum: float, limit: float | None, increase: float, spell: int, decrease: float, busy: bool
) -> None:
    lane = Lane(Rates(minimum=minimum, increase=increase, decrease=decrease), Limit(rate=limit))
    now = tick(lane, 12, usual)
    now = tick(lane, spell, 0, "slow", now)
    lowered = lane.present
    assert lowered is not None
    assert lane.rate is not None

    def go_on(seconds: int) -> None:
        for _ in range(seconds):
            # the recovery takes as long whether nothing is done meanwhile or everything that is let in
            tick(lane, 1, (lane.present or 0) if busy else 0, start=now)

    seconds = math.ceil(1 / increase + 1e-9)
    go_on(seconds)
    assert lane.present is None or lane.present >= min(usual, limit or math.inf) * (1 - 1e-9)
    go_on(math.ceil(2 / increase + 1e-9) - seconds)
    assert lane.present == limit
    assert lane.why == ""


def test_it_comes_back_additively() -> None:
    lane = Lane(Rates(increase=0.1, minimum=10), Limit())
    tick(lane, 10, 1_000)
    tick(lane, 40, 0, "slow")
    assert lane.present == 10
    rates = []
    for _ in range(5):
        tick(lane, 1, 0)
        rates.append(lane.present)
    assert rates == [110, 210, 310, 410, 510]


def test_a_lane_that_must_not_adapt_keeps_its_limit() -> None:
    lane = Lane(Rates(adaptive=False), Limit(rate=10))
    tick(lane, 50, 5, "slow")
    assert lane.present == 10


def test_the_configured_limit_holds_below_the_minimum_and_above_the_adaptive_rate() -> None:
    lane = Lane(Rates(minimum=50), Limit(rate=5))
    tick(lane, 20, 5, "slow")
    assert lane.present == 5
    lane = Lane(Rates(minimum=50), Limit(rate=1_000, burst=5_000))
    tick(lane, 10, 100)
    tick(lane, 50, 100, "slow")
    assert lane.present == 50
    assert lane.bucket.burst == 50, "the burst shrinks with the rate"


# the governor


def governor(app: App, clock: Clock | None = None, **rates: Any) -> Governor:
    return Governor(app, Rates.model_validate(rates), clock or Clock())


def lowered(made: Governor) -> set[str]:
    return {name for name, lane in made.lanes.items() if lane.rate is not None}


LIVE = {"live", "rebuild"}


@pytest.mark.parametrize(
    ("signals", "lanes"),
    [
        ({"loop_lag": 0.6}, {"commands", *LIVE}),
        ({"append_latency": 1.1}, {"commands"}),
        ({"append_errors": 0.2}, {"commands"}),
        ({"commit_latency": 3.1}, LIVE),
        ({"batch_errors": 0.2}, LIVE),
        ({"backlog": 1}, {"rebuild"}),
        ({"backlog": 2}, {"commands", "rebuild"}),
        ({"backlog": 2, "projecting": False}, {"rebuild"}),
        ({"loop_lag": 0.4, "append_latency": 0.9, "append_errors": 0.1, "commit_latency": 2.9}, set()),
    ],
)
@pytest.mark.setting("rates.error_rate", on="")
def test_each_signal_slows_its_lanes_and_says_why(signals: dict[str, Any], lanes: set[str]) -> None:
    clock = Clock()
    made = governor(notebooks("a"), clock)
    for _ in range(3):
        clock.now += 1
        made.tick(Signals(**signals))
    assert lowered(made) == lanes
    assert {name for name, lane in made.show()["lanes"].items() if lane["why"]} == lanes
    assert made.limiting == ("commands" in lanes)
    clock.now += 1
    for _ in range(60):
        clock.now += 1
        made.tick(Signals())
    assert lowered(made) == set()
    assert not made.limiting


def test_live_projection_is_slowed_only_when_rebuilds_have_given_way() -> None:
    clock = Clock()
    made = governor(notebooks("a"), clock, decrease=0.5, minimum=50)
    for _ in range(10):
        clock.now += 1
        made.live.spend(1_000)
        made.rebuild.spend(10_000)
        made.tick(Signals())
    rates = []
    for _ in range(12):
        clock.now += 1
        made.live.spend(1_000)
        made.tick(Signals(commit_latency=9))
        rates.append((made.lanes["rebuild"].present, made.lanes["live"].present))
    lowest = next(place for place, (rebuild, _) in enumerate(rates) if rebuild == 50)
    assert rates[lowest - 1] == (pytest.approx(78.125), None)
    assert rates[lowest + 1] == (50, 500)


def test_nothing_is_asked_where_nothing_is_limited() -> None:
    assert not governor(notebooks("a")).limiting
    assert governor(notebooks("a"), commands={"rate": 1}).limiting
    assert governor(notebooks("a"), per_aggregate={"Notebook": {"rate": 1}}).limiting
    assert not governor(notebooks("a"), live={"rate": 1}, per_aggregate={"Notebook": {}}).limiting


def test_a_command_meets_the_limit_that_lasts_longest_and_takes_nothing_from_the_others() -> None:
    clock = Clock()
    app = App("a", aggregates=[Notebook], rate_key=lambda _aggregate, aggregate_id, _command: aggregate_id)
    made = governor(app, clock, commands={"rate": 5, "burst": 3}, per_key={"rate": 1, "burst": 1})
    assert made.admit("Notebook", "x", Note("a")) is None
    refusal = made.admit("Notebook", "x", Note("a"))
    assert refusal is not None
    assert (refusal.limit, refusal.message) == ("per_key", "rates.per_key x: 1/s")
    assert refusal.retry_after == pytest.approx(1.0, abs=1e-3)
    assert made.admit("Notebook", "y", Note("a")) is None
    assert made.admit("Notebook", "z", Note("a")) is None
    refusal = made.admit("Notebook", "u", Note("a"))
    assert refusal is not None
    assert (refusal.limit, refusal.message) == ("commands", "rates.commands: 5/s")
    clock.now += refusal.retry_after
    assert made.admit("Notebook", "u", Note("a")) is None


def test_without_a_key_function_a_command_counts_for_its_tenant() -> None:
    made = governor(App("a", aggregates=[Notebook]), per_key={"rate": 1, "burst": 1})
    assert made.admit("Notebook", "x", Note("a"), "acme") is None
    refusal = made.admit("Notebook", "y", Note("a"), "acme")
    assert refusal is not None
    assert (refusal.limit, refusal.message) == ("per_key", "rates.per_key acme: 1/s")
    assert made.admit("Notebook", "y", Note("a"), "other") is None
    assert all(made.admit("Notebook", "x", Note("a")) is None for _ in range(5))


def test_a_key_function_that_fails_counts_as_no_key_and_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    def failing(_aggregate: str, aggregate_id: str, _command: object) -> str | None:
        if aggregate_id == "keyless":
            return None
        raise ZeroDivisionError("boom")

    made = governor(App("a", aggregates=[Notebook], rate_key=failing), per_key={"rate": 1})
    with caplog.at_level(logging.ERROR, "eskernel"):
        assert all(made.admit("Notebook", "x", Note("a")) is None for _ in range(5))
        assert all(made.admit("Notebook", "keyless", Note("a")) is None for _ in range(5))
    assert [record.getMessage().startswith("rate_key failed") for record in caplog.records] == [True]


def test_a_worker_takes_the_share_of_its_partitions_except_for_rebuilds() -> None:
    clock = Clock()
    made = governor(notebooks("a"), clock, commands={"rate": 100, "burst": 40}, live={"rate": 8}, rebuild={"rate": 6})
    clock.now += 1
    made.tick(Signals(), 0.25)
    buckets = {name: (lane.bucket.rate, lane.bucket.burst) for name, lane in made.lanes.items()}
    assert buckets == {"commands": (25, 10), "live": (2, 2), "rebuild": (6, 6)}
    made.tick(Signals(), 0.0)
    assert made.lanes["commands"].present == 25, "without partitions nothing comes anyway"


# limits at run time


def test_limits_are_written_as_people_write_them() -> None:
    assert parse(["commands=500", "rates.live.burst=2e3", "per_aggregate.Account=1.5", "rebuild=none"]) == {
        "commands.rate": 500, "live.burst": 2000, "per_aggregate.Account.rate": 1.5, "rebuild.rate": None,
    }  # fmt: skip
    with pytest.raises(LimitsError, match="'commands' is not a limit; write it as"):
        parse(["live=1", "commands", "rebuild=fast"])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"comands.rate": 5}, "there are commands, per_key, live, rebuild and per_aggregate"),
        ({"commands.speed": 5}, "there is no limit"),
        ({"per_aggregate.rate": 5}, "there is no limit"),
        ({"minimum.rate": 5}, "there is no limit"),
        ({"commands.rate": 0}, "commands.rate: .*greater than 0"),
        ({"commands.rate": math.nan}, "greater than 0"),
        ({"commands.rate": math.inf}, "finite"),
        ({"commands.rate": "5"}, "not a number"),
        ({"commands.rate": True}, "not a number"),
        ({"live.burst": 0.5}, "greater than or equal to 1"),
        ({"per_aggregate.Book.rate": 5}, "has no aggregate 'Book'; it has Notebook"),
    ],
)
def test_limits_that_cannot_be_are_refused_whole(values: dict[str, Any], says: str) -> None:
    made = governor(notebooks("a"), rebuild={"rate": 7})
    with pytest.raises(LimitsError, match=says):
        override(Rates(), values, notebooks("a"))
    with pytest.raises(LimitsError, match=says):
        made.adopt(Overrides(1.0, {"live.rate": 5, **values}))
    assert made.lanes["live"].present is None
    assert made.overrides.at == 0


def test_limits_of_the_settings_that_do_not_fit_the_app_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"rates\.per_aggregate\.Book: a has no aggregate 'Book'"):
        governor(notebooks("a"), per_aggregate={"Book": {"rate": 5}})


def test_of_two_changes_the_later_one_counts_whichever_comes_first() -> None:
    made = governor(notebooks("a"), commands={"rate": 7})
    made.adopt(Overrides(2.0, {"commands.rate": 5, "commands.burst": 9, "per_aggregate.Notebook.rate": 3}))
    made.adopt(Overrides(1.0, {"commands.rate": 50}))
    assert made.show()["lanes"]["commands"]["rate"] == 5
    assert made.show()["fixed"]["per_aggregate.Notebook"] == {"rate": 3, "burst": None}
    made.adopt(Overrides(3.0, {"commands.rate": None}))
    assert not made.limiting, "what is no longer among them is as in the settings"
    made.adopt(Overrides(4.0, {}))
    assert made.show()["lanes"]["commands"]["rate"] == 7


@pytest.mark.parametrize("payload", [b"{", b"[]", b'{"overides":{}}', b'{"overrides":{"commands.rate":"x"},"at":9}',
                                     b'{"overrides":{"x.rate":1},"at":9}', b"\xff\xfe"])  # fmt: skip
def test_a_worker_refuses_what_it_does_not_understand(payload: bytes) -> None:
    made = governor(notebooks("a"))
    assert set(made.answer(payload)) == {"error"}
    assert made.overrides.at == 0


def test_a_check_changes_nothing() -> None:
    made = governor(notebooks("a"))
    assert "limits" in made.answer(b'{"overrides":{"commands.rate":5},"at":9,"check":true}')
    assert not made.limiting
    made.answer(b'{"overrides":{"commands.rate":5},"at":9}')
    assert made.limiting
