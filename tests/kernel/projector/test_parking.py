"""What the log says of parked aggregates: each of a few, and the number of many."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from kernel.projector.grouping import Commits
from kernel.projector.parking import EVERY_S, SUM_S, WHOLE, ParkingLog
from projections.errors import HandlerFailed
from tests.apps import notebooks


def failures(count: int, error: str = "ValueError: bad") -> list[HandlerFailed]:
    return [HandlerFailed(0, ("Notebook", f"n{number}"), 1, error, "handler") for number in range(count)]


def nothing() -> Iterator[tuple[tuple[str, str], Commits]]:
    return iter(())


def test_many_parked_aggregates_are_a_few_lines_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    log = ParkingLog("for", notebooks("parking").projections, lambda: now)
    with caplog.at_level(logging.ERROR):
        log.write(failures(2_000), nothing)
        assert len(caplog.records) == WHOLE + 1
        assert f"{2_000 - WHOLE} aggregates more" in caplog.messages[-1]
        log.write(failures(500), nothing)
        assert len(caplog.records) == WHOLE + 1, "the next sum has to wait"
        now += SUM_S
        log.sum_up()
        assert "500 aggregates more" in caplog.messages[-1]
        log.sum_up(at_once=True)
        assert len(caplog.records) == WHOLE + 2, "nothing is counted twice"


def test_a_cause_has_lines_of_its_own_again_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    log = ParkingLog("for", notebooks("parking").projections, lambda: now)
    log.write(failures(WHOLE + 1), nothing)
    now += EVERY_S
    with caplog.at_level(logging.ERROR):
        log.write(failures(1), nothing)
        other = HandlerFailed(1, ("Notebook", "n"), 7, "SequenceError", "sequence")
        log.write([other], nothing)
    assert "n0" in caplog.messages[-2]
    assert "event 7" in caplog.messages[-1]
