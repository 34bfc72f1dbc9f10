"""Mutants of leases, readiness, and programs of different age that run together."""

from __future__ import annotations

from tests.mutants.catalogue.mutant import Mutant

UNIT = "tests/projections/test_unit_of_work.py"
LETTERS = "tests/kernel/projector/test_dead_letters.py"
SERVICE = "tests/kernel/test_service.py"
WAITING = "tests/projections/test_waiting.py"
UNKNOWN = "tests/kernel/projector/test_unknown.py"
ROLLING = "tests/kernel/projector/test_rolling.py"
OWN = "tests/test_mutants_caught.py"

KEYED = "tests/kernel/projector/test_keyed_rows.py"

MUTANTS = [
    # rows under a key of their own
    Mutant(
        "keyed-row-of-two-owners",
        "a row under a key is folded by the owner of its key's partition alone",
        "kernel/projector/grouping.py",
        "return places.get(row(name, key).partition, sequence) < sequence",
        "return places.get(row(name, key).partition, 0) < sequence",
        (f"{KEYED}::test_each_row_is_folded_by_its_owner_alone_and_in_stream_order[sqlite]",),
    ),
    Mutant(
        "keyed-row-by-aggregate",
        "a row under a key is folded in stream order across aggregates",
        "projections/keyed.py",
        "if text in self._mixed:",
        "if False:",
        (f"{KEYED}::test_each_row_is_folded_by_its_owner_alone_and_in_stream_order[sqlite]",),
    ),
    Mutant(
        "keyed-checkpoint-stays",
        "the checkpoints of rows under a key pass every batch that was read",
        "projections/checkpoints.py",
        "or index in self._keyed)",
        ")",
        (f"{KEYED}::test_every_partition_is_passed_by_each_batch[sqlite]",),
    ),
    Mutant(
        "keyed-receipt-of-one-partition",
        "a query after a receipt waits for the rows of all partitions",
        "projections/checkpoints.py",
        "own | checkpoint.c.projection.in_(keyed) if keyed else own)",
        "own)",
        (f"{KEYED}::test_every_partition_is_passed_by_each_batch[sqlite]",),
    ),
    Mutant(
        "keyed-skip-forgotten",
        "an event that a person has skipped gets into no row",
        "projections/keyed.py",
        "if event is None or (skipped and (router.index, envelope.sequence) in skipped):",
        "if event is None:",
        (f"{KEYED}::test_a_skipped_event_whose_key_failed_is_in_no_row_of_a_rebuild[sqlite]",),
    ),
    # leases
    Mutant(
        "deadline-after-renewal",
        "a lease is counted on no longer than the bucket keeps it",
        "kernel/partitions/leases.py",
        """        self._held[partition] = Lease(revision, before + self.ttl * _MARGIN)
        return True

    @property
    def _kind""",
        """        self._held[partition] = Lease(revision, clock() + self.ttl * _MARGIN)
        return True

    @property
    def _kind""",
        ("tests/kernel/partitions/test_leases.py::test_the_deadline_counts_from_before_the_request",),
    ),
    Mutant(
        "deadline-after-taking",
        "a lease is counted on no longer than the bucket keeps it",
        "kernel/partitions/leases.py",
        """then the key expires
        self._held[partition] = Lease(revision, before + self.ttl * _MARGIN)""",
        """then the key expires
        self._held[partition] = Lease(revision, clock() + self.ttl * _MARGIN)""",
        (f"{OWN}::test_the_deadline_of_a_lease_just_taken_counts_from_before_the_request",),
    ),
    Mutant(
        "lapsed-lease-held",
        "a lease that has run out is not held",
        "kernel/partitions/leases.py",
        "return lease is not None and lease.deadline > clock()",
        "return lease is not None",
        ("tests/kernel/workers/test_workers.py::test_a_thawed_worker_refuses_commands_and_can_write_nothing[sqlite]",),
    ),
    Mutant(
        "decides-without-lease",
        "who does not hold the lease decides nothing",
        "kernel/actors/aggregate.py",
        "if not self.gateway.holds(self.address.partition):",
        "if False:",
        ("tests/kernel/workers/test_workers.py::test_a_thawed_worker_refuses_commands_and_can_write_nothing[sqlite]",),
    ),
    Mutant(
        "state-kept-when-lost",
        "a partition that comes back is decided on what others wrote",
        "kernel/actors/aggregate.py",
        """            elif kind is Leave:
                self._leave()
""",
        """            elif kind is Leave:
                pass
""",
        (f"{OWN}::test_what_was_known_of_a_partition_is_forgotten_when_it_is_lost",),
    ),
    Mutant(
        "lease-deleted-before-projection-let-go",
        "others find everything written when a partition is free",
        "kernel/partitions/ownership.py",
        "        await self._released(self._projector.released())\n",
        "        await self._leases.release(partitions)\n        await self._released(self._projector.released())\n",
        (f"{OWN}::test_a_lease_is_given_back_when_the_projection_has_let_go_and_not_before",),
    ),
    Mutant(
        "lease-deleted-before-commands-answered",
        "commands under way are answered before a partition is free",
        "kernel/partitions/ownership.py",
        "if not await self._admission.revoke(partitions, HAND_OVER_S):",
        "if not await self._admission.revoke(partitions, 0.0):",
        (f"{OWN}::test_a_lease_is_given_back_when_its_commands_are_answered_and_not_before",),
    ),
    Mutant(
        "projection-lets-go-at-once",
        "others find everything written when a partition is free",
        "kernel/projector/live.py",
        "while self._owned.all - self._wanted.all:",
        "while False:",
        (f"{OWN}::test_a_lease_is_given_back_when_the_projection_has_let_go_and_not_before",),
    ),
    # readiness
    Mutant(
        "readiness-by-state",
        "work that waits while none gets done is not ready, whatever the state is said to be",
        "kernel/monitoring/progress.py",
        "if stalled > STALLED_S:",
        "if stalled > STALLED_S and state != RUNNING:",
        (
            "tests/kernel/monitoring/test_readiness.py::"
            "test_commits_that_wait_while_nothing_is_written_are_not_ready_whatever_the_state_is",
        ),
    ),
    Mutant(
        "oversized-command-sent",
        "a command too large for the server costs its sender nothing but a refusal",
        "kernel/transport/sender.py",
        "if len(payload) > CERTAIN and not self._connection.fits(subject, payload):",
        "if False:",
        (
            "tests/kernel/transport/test_limits.py::"
            "test_a_command_too_large_for_the_server_is_refused_before_it_is_sent",
        ),
    ),
    Mutant(
        "oversized-replayed",
        "what a server refused is not sent to it again",
        "kernel/transport/connection.py",
        "self._largest_sent = 0\n        self._drop_oversized()",
        "self._largest_sent = 0",
        (
            "tests/kernel/transport/test_limits.py::"
            "test_commands_queued_while_disconnected_are_not_replayed_to_a_server_that_takes_less",
        ),
    ),
    # programs of different age
    Mutant(
        "newer-events-park",
        "an event of a newer program is no failure",
        "projections/fold.py",
        "Parked(envelope.sequence, str(error), waits=True)",
        "Parked(envelope.sequence, str(error))",
        (f"{WAITING}::test_an_aggregate_waits_and_goes_on_with_the_program_that_can_read_it",),
    ),
    Mutant(
        "events-before-a-newer-one-lost",
        "what comes before an event of a newer program is folded",
        "projections/fold.py",
        "return min(last, waiting[index].since - 1) if index in waiting else last",
        "return 0 if index in waiting else last",
        (
            f"{WAITING}::test_an_aggregate_waits_and_goes_on_with_the_program_that_can_read_it",
            f"{UNIT}::test_an_event_of_a_newer_program_waits_without_a_failure",
        ),
    ),
    Mutant(
        "waiting-folded-on-by-anybody",
        "only the owner of a partition folds on what waited",
        "projections/waiting.py",
        "if set(epochs.values()) != {writer.epoch}:",
        "if not epochs:",
        (f"{WAITING}::test_a_partition_of_another_owner_is_not_folded_on",),
    ),
    Mutant(
        "waiting-for-ever",
        "what waited goes on with the program that can read it",
        "kernel/projector/session.py",
        "log_resumed(await context.read(lambda: fold_postponed(writer, owned, claimed.position)))",
        "log_resumed([])",
        (f"{ROLLING}::test_an_older_program_waits_with_what_it_cannot_read_and_a_newer_one_goes_on[sqlite]",),
    ),
    Mutant(
        "renamed-class-begins-anew",
        "a class that seems renamed is refused at start",
        "kernel/projector/unknown.py",
        "if not unknown or not unused:",
        "if unknown is not unused:",
        (f"{UNKNOWN}::test_every_declared_aggregate_without_events_is_named",),
    ),
    Mutant(
        "unknown-aggregates-quarantined",
        "aggregates that the app does not declare are passed over",
        "kernel/projector/grouping.py",
        "or address.aggregate not in self._types:",
        "or not self._types:",
        (f"{UNKNOWN}::test_a_program_that_is_rolled_back_passes_over_the_aggregates_that_it_does_not_know[sqlite]",),
    ),
    Mutant(
        "name-inherited",
        "each aggregate class has a name of its own",
        "aggregates/aggregate.py",
        "setattr(cls, _NAME, cls.__name__ if",
        "setattr(cls, _NAME, getattr(cls, _NAME, cls.__name__) if",
        (
            "tests/aggregates/test_declarations_app.py::test_an_aggregates_name_is_that_of_its_class_or_the_one_that_is_given",
        ),
    ),
    Mutant(
        "gap-unnoticed-after-sleep",
        "a gap is noticed however long the aggregate slept",
        "projections/fold.py",
        "                    last = max(last or 0, rows[index].eskernel_sequence)",
        "                    max(last or 0, rows[index].eskernel_sequence)",
        (f"{LETTERS}::test_a_gap_or_a_repeat_is_noticed_however_long_the_aggregate_slept",),
    ),
    Mutant(
        "gap-unnoticed-without-row",
        "a gap is noticed where no row tells of it",
        "projections/fold.py",
        "keeper not in skip and keeper not in waiting:\n                last = kept",
        "keeper not in skip and keeper not in waiting:\n                pass",
        (f"{LETTERS}::test_a_gap_is_noticed_where_there_is_no_row_to_tell",),
    ),
    Mutant(
        "head-not-checked",
        "an aggregate's first event is number 1",
        "projections/unit_of_work.py",
        "dict.fromkeys(ids.values(), 0) | kept if complete",
        "kept if complete",
        (f"{LETTERS}::test_an_aggregate_whose_beginning_is_missing_is_parked",),
    ),
    Mutant(
        "retry-unfenced",
        "the owner of the partition notices a retry",
        "projections/dead_letters.py",
        "fence(connection, made, [rows[0].partition])",
        "pass",
        (f"{LETTERS}::test_the_owner_of_the_partition_meets_the_fence_after_a_change",),
    ),
    Mutant(
        "skip-unfenced",
        "the owner of the partition notices a skip",
        "projections/dead_letters.py",
        "fence(connection, made, [row.partition])",
        "pass",
        (f"{LETTERS}::test_the_owner_of_the_partition_meets_the_fence_after_a_change",),
    ),
    Mutant(
        "skip-leaves-gap",
        "the event behind a skipped one follows it",
        "projections/dead_letters.py",
        "aggregate_id, row.sequence)",
        "aggregate_id, 0)",
        (f"{LETTERS}::test_after_skipping_everything_the_next_event_is_no_gap",),
    ),
    Mutant(
        "garbage-stops-projection",
        "bytes that are no commit stop no projection",
        "kernel/projector/grouping.py",
        "except (InvalidMessage, InvalidId) as error:",
        "except InvalidId as error:",
        (f"{SERVICE}::test_garbage_on_the_stream_is_kept_aside_and_stops_nothing[sqlite]",),
    ),
    Mutant(
        "garbage-lost",
        "bytes that are no commit are kept",
        "kernel/projector/session.py",
        "write.letters += self._garbage",
        "pass",
        (f"{SERVICE}::test_garbage_on_the_stream_is_kept_aside_and_stops_nothing[sqlite]",),
    ),
    Mutant(
        "infrastructure-parks-postgresql",
        "a database that can't be reached or written parks no aggregate",
        "projections/database.py",
        "    if state:\n",
        "    if state:\n        return False\n    if state:\n",
        (f"{OWN}::test_a_disk_that_was_full_is_not_blamed_on_an_aggregate",),
    ),
    Mutant(
        "infrastructure-parks-sqlite",
        "a database that can't be reached or written parks no aggregate",
        "projections/database.py",
        "    if state:\n",
        "    if not state:\n        return False\n    if state:\n",
        (f"{OWN}::test_a_disk_that_was_full_is_not_blamed_on_an_aggregate",),
    ),
]
