"""Mutants of what compares the tables with the log, and repairs them."""

from __future__ import annotations

from tests.mutants.catalogue.mutant import Mutant

VERIFIED = "tests/kernel/projector/test_table_verification.py"

MUTANTS = [
    Mutant(
        "verify-overlooks-values",
        "a row with another value is found",
        "projections/comparison.py",
        "    any_differs = or_(*differ.values()) if differ else false()\n",
        "    any_differs = false()\n",
        (f"{VERIFIED}::test_each_kind_of_difference_is_named_with_its_row_and_columns",),
    ),
    Mutant(
        "verify-at-another-place",
        "both are compared at the same place of the log",
        "kernel/projector/verification.py",
        "await replay.fill(reader, last, until)",
        "await replay.fill(reader, info.last)",
        (f"{VERIFIED}::test_a_verification_under_load_compares_both_at_the_same_place",),
    ),
    Mutant(
        "verify-folds-what-is-parked",
        "parked aggregates are compared up to where they are parked",
        "projections/shadow.py",
        "        exclusions.load_parked(connection, plan, stored)\n",
        "        pass\n",
        (f"{VERIFIED}::test_parked_aggregates_are_compared_up_to_where_they_are_parked",),
    ),
    Mutant(
        "rebuild-folds-what-was-skipped",
        "a skipped event stays skipped",
        "kernel/projector/rebuild.py",
        "            load_skipped(connection, self._plan)\n",
        "",
        (f"{VERIFIED}::test_a_skipped_event_is_left_out_by_verifications_and_rebuilds",),
    ),
    Mutant(
        "repair-unfenced",
        "the service goes on from a row that was made again",
        "projections/repair.py",
        "        fence(connection, made, [partition])\n",
        "",
        (f"{VERIFIED}::test_a_repair_also_replaces_what_the_service_has_in_memory",),
    ),
    Mutant(
        "sample-blames-newer-programs",
        "a row that a newer program has folded is no difference",
        "kernel/projector/sampling.py",
        "        if any(parked.waits for parked in plan.parked.get(key, {}).values()):\n            return None",
        "        if False:\n            return None",
        ("tests/kernel/projector/test_sampling.py::test_a_row_that_a_newer_program_has_folded_is_no_difference",),
    ),
    Mutant(
        "sample-at-another-place",
        "each row is compared at its own place",
        "kernel/projector/sampling.py",
        "        commits = _commits(stored, until)\n",
        "        commits = _commits(stored, 2**63)\n",
        ("tests/kernel/projector/test_sampling.py::test_each_row_is_compared_at_its_own_place",),
    ),
]
