"""Policies as they are declared and specified, without a kernel."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from aggregates import (
    After,
    Aggregate,
    At,
    Cancel,
    DeclarationError,
    InvalidMessage,
    Meta,
    Policy,
    Reactions,
    Send,
    applies,
    event,
    handles,
    policy,
    reacts,
)
from aggregates.context import uuid7
from aggregates.policies import Reacting
from aggregates.reacting import derive_command_id
from kernel import App, Effect
from tests.shops import (
    Confirm,
    Confirmed,
    Expire,
    Fulfilment,
    Mails,
    Order,
    Orders,
    Paid,
    Payment,
    Place,
    Placed,
    Refuse,
    Request,
)


def test_a_scenario_says_what_is_sent_set_and_cancelled() -> None:
    placed = policy(Fulfilment).when(Placed(500, 60.0), id="o-1")
    placed.sends(Send(Payment, "pay-o-1", Request("o-1", 500)))
    placed.sets(After(timedelta(minutes=1), Send(Order, "o-1", Expire()), key="o-1"))
    placed.cancels()
    policy(Fulfilment).when(Paid("o-1")).sends(Send(Order, "o-1", Confirm())).cancels("o-1")
    policy(Fulfilment).when(Confirmed()).does_nothing()


def test_a_scenario_knows_the_timers_that_are_pending() -> None:
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    placed = policy(Fulfilment).given(Placed(500, 60.0), id="o-1", at=noon)
    assert placed.pending() == {"o-1": noon + timedelta(minutes=1)}
    assert placed.when(Paid("o-1")).pending() == {}


def test_a_scenario_says_what_follows_from_a_rejection() -> None:
    request = Send(Payment, "pay-o-1", Request("o-1", 5_000))
    placed = policy(Fulfilment).when(Placed(5_000, 60.0), id="o-1")
    placed.when_rejected(request, "too much").sends(Send(Order, "o-1", Refuse("too much")))
    with pytest.raises(AssertionError, match="does not send"):
        placed.when_rejected(Send(Order, "o-1", Confirm())).sends()


@pytest.mark.parametrize(
    "assertion",
    [
        lambda when: when.sends(),
        lambda when: when.sends(Send(Payment, "other", Request("o-1", 500))),
        lambda when: when.sets(),
        lambda when: when.cancels("o-1"),
        lambda when: when.does_nothing(),
    ],
)
def test_a_scenario_fails_where_a_policy_does_something_else(assertion: Callable[[Any], Any]) -> None:
    with pytest.raises(AssertionError):
        assertion(policy(Fulfilment).when(Placed(500, 60.0), id="o-1"))


def test_a_scenario_finds_a_command_that_its_aggregate_does_not_handle() -> None:
    class Lost(Policy, of=Order):
        @reacts
        def placed(self, event: Placed, meta: Meta) -> Reactions:
            return Send(Payment, "p", Confirm())

    with pytest.raises(AssertionError, match="sends Confirm to Payment, which has no handler"):
        policy(Lost).when(Placed(1, 1.0)).sends(Send(Payment, "p", Confirm()))


# ids


def test_the_id_of_a_command_follows_from_event_policy_and_place() -> None:
    event_id = uuid7()
    first = derive_command_id(event_id, "Fulfilment", "0")
    assert first == derive_command_id(event_id, "Fulfilment", "0")
    others = {
        derive_command_id(uuid7(), "Fulfilment", "0"),
        derive_command_id(event_id, "Other", "0"),
        derive_command_id(event_id, "Fulfilment", "1"),
        derive_command_id(event_id, "Fulfilment", "0.0"),
    }
    assert len(others) == 4
    assert first not in others
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-8[0-9a-f]{3}-[0-9a-f]{12}", first)


def test_ids_of_commands_grow_with_the_time_of_the_event_or_of_the_timer() -> None:
    event_id = uuid7()
    now = datetime.now(UTC)
    ids = [
        derive_command_id(event_id, "P", "0", now - timedelta(seconds=10)),
        derive_command_id(event_id, "P", "0"),
        derive_command_id(event_id, "P", "0", now + timedelta(seconds=10)),
    ]
    assert ids == sorted(ids)


# what can't work


def _declare(*given: type[Reacting] | Reacting) -> str:
    effects = [
        each for each in given if isinstance(each, Effect) or (isinstance(each, type) and issubclass(each, Effect))
    ]
    policies: list[Any] = [each for each in given if each not in effects]
    with pytest.raises(DeclarationError) as caught:
        App("shop", aggregates=[Order, Payment], projections=[Orders], policies=policies, effects=effects)
    return str(caught.value)


@event
class Foreign:
    pass


class Elsewhere(Aggregate):
    @applies
    def foreign(self, event: Foreign) -> None:
        pass


def test_a_policy_that_cannot_work_is_refused_with_a_remedy() -> None:
    class Nowhere(Policy):
        @reacts
        def placed(self, event: Placed) -> Reactions:
            return None

    assert "of=SomeAggregate" in _declare(Nowhere)

    class Unlisted(Policy, of=Elsewhere):
        @reacts
        def foreign(self, event: Foreign) -> Reactions:
            return None

    assert "not among the app's aggregates" in _declare(Unlisted)

    class Idle(Policy, of=(Order, Payment)):
        @reacts
        def placed(self, event: Placed) -> Reactions:
            return None

    assert "reacts to no event of Payment" in _declare(Idle)

    class Waits(Policy, of=Order):
        @reacts
        async def placed(self, event: Placed) -> Reactions:
            return None

    assert "can't be async" in _declare(Waits)

    class Twice(Policy, of=Order):
        @reacts
        def placed(self, event: Placed) -> Reactions:
            return None

        @reacts
        def placed_too(self, event: Placed | Confirmed) -> Reactions:
            return None

    assert "already reacts to Placed" in _declare(Twice)

    class Alien(Policy, of=Order):
        @reacts
        def foreign(self, event: Foreign) -> Reactions:
            return None

    assert "Foreign is no event of Order" in _declare(Alien)

    class Wrong(Policy, of=Order):
        @handles
        def place(self, command: Place) -> Placed:
            return Placed(1, 1.0)

    assert "mark it with @reacts" in _declare(Wrong)

    class Sometime(Policy, of=Order, start="yesterday"):  # type: ignore[arg-type]
        @reacts
        def placed(self, event: Placed) -> Reactions:
            return None

    assert '"now" or "beginning"' in _declare(Sometime)

    class Taken(Policy, of=Order, name="Orders"):
        @reacts
        def placed(self, event: Placed) -> Reactions:
            return None

    assert "named Orders" in _declare(Taken)
    with pytest.raises(DeclarationError, match="no keyword version"):

        class Versioned(Policy, of=Order, version=2):  # type: ignore[call-arg]
            pass


def test_an_effect_that_cannot_work_is_refused_with_a_remedy() -> None:
    class Blocks(Effect, of=Order):
        @reacts
        def placed(self, event: Placed) -> None:
            pass

    assert "write `async def`" in _declare(Blocks)

    class Never(Effect, of=Order, timeout=0, concurrency=0):
        @reacts
        async def placed(self, event: Placed) -> None:
            pass

    assert "timeout=0" in (problems := _declare(Never))
    assert "concurrency=0" in problems

    class Needs(Mails, of=Order):
        def __init__(self, server: str) -> None:
            super().__init__()

    assert "give the app an object of it" in _declare(Needs)


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (17, "which is no Send"),
        ([Send(Order, "o", "text")], "is not a command"),
        (After(5, Send(Order, "o", Confirm())), "is not a timedelta"),  # type: ignore[arg-type]
        (At(datetime(2026, 1, 1), Send(Order, "o", Confirm())), "with a time zone"),
        (After(timedelta(1), Confirm()), "write Send"),  # type: ignore[arg-type]
        (["text"], "which is no Send"),
    ],
)
def test_what_a_policy_must_not_return_is_said(returned: Any, problem: str) -> None:
    class Odd(Policy, of=Order):
        @reacts
        def placed(self, event: Placed) -> Reactions:
            return returned  # type: ignore[no-any-return]

    with pytest.raises(InvalidMessage, match=problem):
        policy(Odd).when(Placed(1, 1.0)).does_nothing()


def test_a_timer_at_a_moment_is_due_then_in_whatever_zone() -> None:
    moment = datetime(2026, 5, 1, 12, tzinfo=timezone(timedelta(hours=2)))

    class Dated(Policy, of=Order):
        @reacts
        def placed(self, event: Placed, meta: Meta) -> Reactions:
            return [At(moment, Send(Order, meta.aggregate_id, Expire()), key="k"), Cancel("other")]

    happened = policy(Dated).when(Placed(1, 1.0), id="o")
    happened.sets(At(moment.astimezone(UTC), Send(Order, "o", Expire()), key="k")).cancels("other")
