"""The fault harness on a cluster: a short run of it holds, and its gaps are measured rightly."""

from __future__ import annotations

import os
import random
from itertools import islice

import pytest

from tests.faults.cluster_faults import ClusterFault, ClusterKind, Gap, endless_plan
from tests.faults.cluster_run import SERVICES, ClusterRun, gap_lines
from tests.faults.gaps import Receipts
from tests.faults.report import describe


def test_the_longest_gap_is_the_one_that_touches_the_span() -> None:
    receipts = Receipts([0.0, 5.0, 6.0, 8.0, 9.0, 19.0])
    assert receipts.longest(5.5, 8.5) == 2.0
    assert receipts.longest(3.0, 8.5) == 5.0
    assert receipts.longest(6.5, 12.0) == 10.0
    assert receipts.longest(20.0, 24.0) == 5.0
    assert Receipts().longest(1.0, 4.0) == 3.0


def test_gaps_are_compared_where_a_fault_stops_a_bare_loop_too() -> None:
    lines = gap_lines([Gap(ClusterKind.LEADER_KILL, 3.0, 2.0), Gap(ClusterKind.WORKER_FREEZE, 4.0, 0.1)])
    assert "3.00 s without a receipt, bare nats-py 2.00 s, ratio 1.50" in lines[0]
    assert "ratio" not in lines[1]
    assert lines[2].startswith("longest of the server faults: 3.00 s")


def test_a_cluster_schedule_follows_from_its_seed_and_has_every_fault() -> None:
    def first(seed: int, count: int) -> list[ClusterFault]:
        return list(islice(endless_plan(seed), count))

    assert first(7, 40) == first(7, 40) != first(8, 40)
    assert {fault.kind for fault in first(7, len(ClusterKind))} == set(ClusterKind)
    assert sorted(fault.kind for fault in endless_plan(3, short=True)) == sorted(ClusterKind)


@pytest.mark.timeout(300)
async def test_two_services_hold_on_a_cluster_through_each_kind_of_fault(postgres_url: str) -> None:
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    print(f"TEST_SEED={seed}")
    run = ClusterRun(seed, 600.0, postgres_url, print, short=True)
    result = await run.run()
    print("\n".join(describe(result)))
    assert result.ok, result.violations
    assert result.faults == dict.fromkeys(map(str, ClusterKind), 1)
    assert result.commands["acknowledged"] and len(result.gaps) == len(ClusterKind) + 1
    assert len(run.services) == SERVICES and not any(service.all_processes() for service in run.services)
