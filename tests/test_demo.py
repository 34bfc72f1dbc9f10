"""`make demo` ends by itself, with every number equal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.flights.source import Facts, rows

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(300)
def test_the_demo_deploys_a_version_and_reproduces_every_number(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.flights.demo", "--days", "9"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all equal" in done.stdout
    assert "version 2 is built, verified and shown" in done.stdout
    assert "back to version 1 in" in done.stdout
    assert "and 0 were refused" in done.stdout
    kept = (tmp_path / ".demo" / "flights-without-tail-number.csv").read_text().splitlines()
    assert len(kept) - 1 == sum(row["tailnum"] in ("", "NA") for row in rows(1, 9))


def test_the_comparison_notices_a_single_wrong_number(tmp_path: Path) -> None:
    from examples.flights.compare import expected

    january = list(rows(1))
    first = expected(january)
    assert first == expected(january)
    changed = [{**row, "distance": str(int(row["distance"]) + (n == 7))} for n, row in enumerate(january)]
    assert first != expected(changed)


def test_the_year_has_the_known_facts() -> None:
    facts = Facts()
    for row in rows():
        facts.count(row)
    assert (facts.flights, len(facts.tails), len(facts.without_tail)) == (336_776, 4_043, 2_512)
    assert (facts.never_departed, facts.without_arrival, facts.without_air_time) == (8_255, 458, 717)


@pytest.mark.timeout(300)
def test_the_shops_demo_finds_everything_as_it_should_be(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.shop.demo", "--orders", "20"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all OK" in done.stdout
    assert "orders by state: {'confirmed': 8, 'expired': 4, 'shipped': 8}" in done.stdout
    assert "a lost update was refused: 412" in done.stdout
    assert "WRONG" not in done.stdout
