"""Mutants of what is written to the projections' tables, and when."""

from __future__ import annotations

from tests.mutants.catalogue.mutant import Mutant

UNIT = "tests/projections/test_unit_of_work.py"
LETTERS = "tests/kernel/projector/test_dead_letters.py"
SERVICE = "tests/kernel/test_service.py"
OWN = "tests/test_mutants_caught.py"

MUTANTS = [
    # one transaction, fenced
    Mutant(
        "fence-epoch-sqlite",
        "who has an older epoch writes nothing",
        "projections/bookkeeping.py",
        "AND sequence = given.value->>3 AND epoch = :epoch",
        "AND sequence = given.value->>3 AND (epoch = :epoch OR 1)",
        (f"{UNIT}::test_a_write_of_another_epoch_is_fenced_and_leaves_nothing",),
    ),
    Mutant(
        "fence-epoch-postgresql",
        "who has an older epoch writes nothing",
        "projections/bookkeeping.py",
        "AND sequence = CAST(given->>3 AS bigint) AND epoch = :epoch",
        "AND sequence = CAST(given->>3 AS bigint) AND (epoch = :epoch OR true)",
        (f"{UNIT}::test_a_write_of_another_epoch_is_fenced_and_leaves_nothing",),
    ),
    Mutant(
        "fence-ignored",
        "a checkpoint that did not move stops the write",
        "projections/unit_of_work.py",
        "if moved != len(write.moves):",
        "if moved > len(write.moves):",
        (f"{UNIT}::test_one_moved_checkpoint_of_several_fences_the_whole_write",),
    ),
    Mutant(
        "claim-keeps-epoch",
        "a takeover fences the owner before",
        "projections/checkpoints.py",
        "values(epoch=stream.c.epoch + 1)",
        "values(epoch=stream.c.epoch)",
        (f"{UNIT}::test_a_claim_fences_the_partitions_that_it_names_and_no_others",),
    ),
    Mutant(
        "retired-not-fenced",
        "after a cut-over no worker writes to the old copy",
        "projections/generations.py",
        "connection.execute(update(checkpoint).where(where).values(epoch=FENCE))",
        "pass",
        (f"{UNIT}::test_a_retired_generation_is_fenced",),
    ),
    Mutant(
        "checkpoint-apart",
        "rows and checkpoint in one transaction",
        "projections/unit_of_work.py",
        """            with self.engine.begin() as connection:
                return self.apply(connection, write)
""",
        """            with self.engine.begin() as connection:
                self.apply(connection, Write(write.moves))
            write.moves = []
            with self.engine.begin() as connection:
                return self.apply(connection, write)
""",
        (f"{UNIT}::test_a_table_that_is_gone_leaves_neither_rows_nor_checkpoints",),
    ),
    Mutant(
        "stale-folded-again",
        "a projection sees each event once",
        "projections/checkpoints.py",
        "if sequences.get(partition, sequence) >= sequence or index in self.paused",
        "if sequences[partition] < 0 or index in self.paused",
        (f"{OWN}::test_a_projection_that_is_behind_the_others_is_folded_alone",),
    ),
    Mutant(
        "folded-by-some-folded-again",
        "a projection sees each event once, wherever the others are",
        "projections/fold.py",
        "projections = [index for index in self._indexes[key[0]] if index not in skip]",
        "projections = self._indexes[key[0]]",
        (f"{OWN}::test_a_projection_that_is_behind_the_others_is_folded_alone",),
    ),
    # equations
    Mutant(
        "record-not-normalised",
        "a record in memory is what a SELECT gives, wherever a batch ends",
        "projections/steps.py",
        """folded.rows[index][aggregate_id] = None
        elif settle is not None:""",
        """folded.rows[index][aggregate_id] = None
        elif settle is None and row is None:""",
        ("tests/projections/test_column_types.py::test_a_batch_may_end_anywhere",),
    ),
    Mutant(
        "upserts-before-deletes",
        "a unique value may be handed on within a batch",
        "projections/bulk.py",
        "self.replaces = not codec.counting and _has_other_unique(table)",
        "self.replaces = False",
        ("tests/projections/test_blame.py::test_a_unique_value_is_handed_on_within_a_batch",),
    ),
    Mutant(
        "blame-only-for-inserts",
        "a statement of an Sql handler that is refused parks the aggregate to blame, and no other",
        "projections/blame.py",
        "elif calls := self._write.calls.get(index):\n            self._call(index, calls, set())",
        "elif calls := self._write.calls.get(index):\n            self._writer.call(self._connection, index, calls)",
        ("tests/projections/test_blame.py::test_refused_statements_park_the_aggregates_to_blame_and_no_others",),
    ),
    Mutant(
        "handlers-out-of-order",
        "Sql handlers get events in stream order",
        "projections/unit_of_work.py",
        "write.calls[index] = sorted(calls, key=_in_stream_order)",
        "write.calls[index] = sorted(calls, key=_handler)",
        ("tests/projections/test_blame.py::test_handlers_of_several_classes_get_events_in_stream_order",),
    ),
    # dead letters
    Mutant(
        "refused-write-not-parked",
        "what a statement refuses waits alone",
        "kernel/projector/session.py",
        "        for failure in parked:\n            self._plan.park(failure)\n",
        "",
        (f"{SERVICE}::test_a_poisoned_aggregate_waits_alone_and_only_for_that_projection[sqlite-poison sql]",),
    ),
    Mutant(
        "successors-dropped",
        "what comes behind a dead letter waits",
        "projections/parked.py",
        "if parked is None or envelope.sequence < parked.since:",
        "if parked is None or envelope.sequence != parked.since:",
        (f"{LETTERS}::test_a_retry_folds_what_waits_in_order_and_the_aggregate_goes_on",),
    ),
    Mutant(
        "successors-folded",
        "what comes behind a dead letter is not folded",
        "projections/parked.py",
        "return folding",
        "return list(projections)",
        (f"{LETTERS}::test_a_retry_folds_what_waits_in_order_and_the_aggregate_goes_on",),
    ),
    Mutant(
        "parked-forgotten-at-restart",
        "what waits goes on waiting after a restart",
        "projections/exclusions.py",
        "if index is not None and row.sequence > 0:",
        "if index is not None and row.sequence < 0:",
        (f"{SERVICE}::test_parked_aggregates_stay_parked_over_a_restart[sqlite]",),
    ),
    # what surrounds the tables
    Mutant(
        "view-writable",
        "the view of a projection can't be written",
        "projections/views.py",
        "missing = [name for name in _TRIGGERS if name not in there]",
        "missing = [name for name in _TRIGGERS if name in there]",
        ("tests/projections/test_views.py::test_the_view_cannot_be_written",),
    ),
    Mutant(
        "view-read-in-a-handler",
        "a handler sees the generation that it writes",
        "projections/projection.py",
        "if name in self._views:",
        "if name in ():",
        ("tests/projections/test_views.py::test_a_handler_that_uses_the_view_instead_of_its_table_is_refused",),
    ),
    Mutant(
        "cut-over-waits-long",
        "an open reader delays only the cut-over",
        "kernel/projector/cut_over.py",
        "LOCK_MS = 200",
        "LOCK_MS = 60_000",
        ("tests/kernel/projector/test_cut_over.py::test_an_open_reader_delays_only_the_cut_over",),
    ),
    Mutant(
        "changed-model-accepted",
        "a model that was changed without a new version is refused",
        "projections/schema.py",
        "if different := differences(connection, made, trial):",
        "if different := differences(connection, made, made):",
        ("tests/projections/test_schema.py::test_a_model_that_was_changed_without_a_new_version_is_refused",),
    ),
    Mutant(
        "bad-build-shown",
        "a build that fails at many aggregates changes nothing for readers",
        "kernel/projector/rebuild.py",
        "                await self._check_failures()\n",
        "                pass\n",
        ("tests/kernel/projector/test_rebuild.py::test_a_build_that_fails_at_many_aggregates_changes_nothing",),
    ),
]
