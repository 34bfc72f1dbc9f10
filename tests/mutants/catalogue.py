"""The mutants: for each promise of the kernel, the line that keeps it, broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """A deliberate bug.

    Attributes:
        promise: what it breaks.
        file: where it is, from the project's folder.
        old: text that is there exactly once.
        new: what stands there instead.
        tests: pytest's names of the tests of which one must fail.
    """

    name: str
    promise: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


UNIT = "tests/projections/test_unit_of_work.py"
LOG = "tests/kernel/log/test_log_contract.py"
COMMANDS = "tests/kernel/commands/test_commands.py"
REPLIES = "tests/kernel/commands/test_replies.py"
LETTERS = "tests/kernel/projector/test_dead_letters.py"
SERVICE = "tests/kernel/test_service.py"
WAITING = "tests/projections/test_waiting.py"
CONTENTION = "tests/projections/test_contention.py"
UNKNOWN = "tests/kernel/projector/test_unknown.py"
ROLLING = "tests/kernel/projector/test_rolling.py"
SNAPSHOTS = "tests/kernel/actors/test_snapshots.py"
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
        "whoever takes over fences the one before",
        "projections/checkpoints.py",
        "values(epoch=stream.c.epoch + 1)",
        "values(epoch=stream.c.epoch)",
        (f"{UNIT}::test_a_claim_fences_the_partitions_that_it_names_and_no_others",),
    ),
    Mutant(
        "retired-not-fenced",
        "after a cut-over nobody writes to the old copy",
        "projections/generations.py",
        "connection.execute(update(checkpoint).where(where).values(epoch=RETIRED_EPOCH))",
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
        "if sequences[partition] >= sequence or index in self.paused",
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
    # appending
    Mutant(
        "expected-not-sent",
        "of two appends behind the same commit one is refused",
        "kernel/log/appender.py",
        r"""headers = b"NATS/1.0\r\n%b\r\n" % append.links""",
        r"""headers = b"NATS/1.0\r\n\r\n" """,
        (f"{LOG}::test_an_append_with_a_stale_expected_sequence_conflicts_and_tells_the_actual_one",),
    ),
    Mutant(
        "expected-not-sent-in-batches",
        "of two appends behind the same commit one is refused",
        "kernel/log/appender.py",
        "                append.links,\n",
        '                b"Nobody-Reads-This: 1\\r\\n",\n',
        (f"{LOG}::test_a_conflict_inside_an_atomic_batch_leaves_the_others_in_one_piece",),
    ),
    Mutant(
        "batch-conflict-hits-all",
        "a conflict refuses the guilty commit only",
        "kernel/log/appender.py",
        """                if not append.future.done() and self._fits(append):
                    self._send_one(append, time.perf_counter(), frames)
""",
        """                append.fail(Conflict(append.subject, append.expected, None))
""",
        (f"{LOG}::test_a_conflict_inside_an_atomic_batch_leaves_the_others_in_one_piece",),
    ),
    Mutant(
        "refusal-before-commit",
        "a refusal rests on what is in the log",
        "kernel/actors/aggregate.py",
        """                if decisions:
                    # it rests""",
        """                if False:
                    # it rests""",
        ("tests/kernel/commands/test_commands.py::test_a_refusal_waits_until_what_it_rests_on_is_stored",),
    ),
    Mutant(
        "ack-before-commit",
        "a receipt means that the commit is in the log",
        "kernel/actors/aggregate.py",
        """            self.phase, self.verdicts = _APPENDING, verdicts
            self.gateway.append(""",
        """            for verdict in verdicts:
                cell.remember(verdict.request.sent.command_id, verdict.version, cell.position + 1)
                self._answer(verdict, cell.position + 1)
            self.phase, self.verdicts = _APPENDING, ()
            self.gateway.append(""",
        (f"{OWN}::test_a_command_is_answered_when_its_append_is_acknowledged_and_not_before",),
    ),
    Mutant(
        "uncertain-taken-as-stored",
        "an append whose answer is lost is read back",
        "kernel/log/settling.py",
        "task = asyncio.get_running_loop().create_task(self._settle(append, why))",
        "append.future.set_result(append.expected + 1)\n                continue",
        (f"{LOG}::test_appends_that_got_lost_on_the_way_are_sent_again",),
    ),
    Mutant(
        "uncertain-sent-again-unread",
        "an append whose answer is lost is read back",
        "kernel/log/settling.py",
        "task = asyncio.get_running_loop().create_task(self._settle(append, why))",
        "append.attempts = 0\n                self._sender.send_again(append)\n                continue",
        (f"{LOG}::test_appends_whose_answers_are_lost_settle_as_what_they_became",),
    ),
    Mutant(
        "uncertain-told-unavailable",
        "an append whose answer is lost is read back",
        "kernel/log/settling.py",
        "task = asyncio.get_running_loop().create_task(self._settle(append, why))",
        "append.fail(LogError(why))\n                continue",
        (f"{LOG}::test_appends_whose_answers_are_lost_settle_as_what_they_became",),
    ),
    Mutant(
        "resent-conflict-certain",
        "a conflict of an append that was sent twice is looked into",
        "kernel/log/appender.py",
        " or (error.err_code == _WRONG_LAST_SEQUENCE and append.attempts > 1)",
        "",
        (f"{OWN}::test_a_conflict_of_an_append_that_was_sent_twice_is_looked_into",),
    ),
    Mutant(
        "other-log-appended-to",
        "nothing is acknowledged on a log that was replaced",
        "kernel/log/appender.py",
        "        self._verified = False\n",
        "",
        (
            "tests/failure_modes/test_failure_modes_log.py::"
            "test_a_stream_restored_from_an_older_backup_stops_the_service_before_it_acknowledges_anything",
        ),
    ),
    # what is folded is what is stored
    Mutant(
        "folded-as-decided",
        "what is folded is what is stored",
        "aggregates/encoding.py",
        "return EncodedEvent(name, version, data, read)",
        "return EncodedEvent(name, version, data, event)",
        ("tests/aggregates/test_encoding.py",),
    ),
    Mutant(
        "encoded-after-fold",
        "an applier changes nothing of what is stored",
        "aggregates/commit.py",
        "orjson.Fragment(event.data)",
        "event.event",
        (
            "tests/aggregates/test_encoding.py::"
            "test_an_applier_that_keeps_an_events_list_changes_nothing_of_what_is_stored",
        ),
    ),
    Mutant(
        "not-read-back",
        "an event that would come back as another value is refused",
        "aggregates/encoding.py",
        "if read != event and (problem := difference(event, read, name)):",
        'if problem := "":',
        ("tests/aggregates/test_encoding.py",),
    ),
    Mutant(
        "tallies-unsorted",
        "writers of the same keys lock them in one order",
        "projections/unit_of_work.py",
        "write.tallies[index] = bulk.in_order(rows)",
        "write.tallies[index] = rows",
        (f"{CONTENTION}::test_writers_of_the_same_keys_do_not_deadlock",),
    ),
    Mutant(
        "deadlock-waits",
        "a deadlock is tried again at once",
        "projections/contention.py",
        "            if not is_contention(error):",
        "            if error:",
        (f"{CONTENTION}::test_a_deadlock_is_tried_again_and_parks_nothing",),
    ),
    # equations
    Mutant(
        "record-not-normalised",
        "a record in memory is what a SELECT gives, wherever a batch ends",
        "projections/fold.py",
        "elif settle is not None:",
        "elif settle is None and row is None:",
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
        "write.calls[index] = sorted(calls, key=itemgetter(0, 1, 2))",
        "write.calls[index] = sorted(calls, key=itemgetter(2, 0, 1))",
        ("tests/projections/test_blame.py::test_handlers_of_several_classes_get_events_in_stream_order",),
    ),
    # commands
    Mutant(
        "dedupe-removed",
        "a repeated command takes effect once",
        "kernel/actors/aggregate.py",
        """            known = cell.commands.get(sent.command_id)
            if known is not None:
                self.gateway.succeed(self.address, request, known[0], known[1], True)
                continue
            if not request.searched and sent.command_id in cell.seen:
""",
        """            if False:
""",
        (f"{COMMANDS}::test_a_command_repeated_with_its_id_gets_its_first_receipt",),
    ),
    Mutant(
        "dedupe-forgets",
        "a repeated command takes effect once, however late",
        "kernel/actors/aggregate.py",
        "if not request.searched and sent.command_id in cell.seen:",
        "if False:",
        (f"{COMMANDS}::test_a_repeated_command_is_found_however_long_ago_it_was",),
    ),
    Mutant(
        "dedupe-not-within-a-commit",
        "a command that comes twice at once takes effect once",
        "kernel/actors/aggregate.py",
        " or _holds(verdicts, sent.command_id)",
        "",
        (f"{COMMANDS}::test_a_command_that_arrives_twice_at_once_takes_effect_once",),
    ),
    Mutant(
        "uncertain-conflict-not-searched",
        "what may lie below another's commit is looked for",
        "kernel/actors/aggregate.py",
        "request.searched = False",
        "request.searched = True",
        (f"{COMMANDS}::test_an_append_that_may_lie_below_somebody_elses_is_looked_for",),
    ),
    Mutant(
        "busy-evicted",
        "an aggregate with something under way stays",
        "kernel/actors/residents.py",
        "if resident.busy:\n                busy.append(resident)",
        "if resident.busy < 0:\n                busy.append(resident)",
        ("tests/kernel/actors/test_passivation.py::test_a_busy_aggregate_never_goes",),
    ),
    # leases
    Mutant(
        "deadline-after-renewal",
        "a lease is counted on no longer than the bucket keeps it",
        "kernel/partitions/leases.py",
        """        self._held[partition] = Lease(revision, before + self.ttl * _MARGIN)
        return True

    async def members""",
        """        self._held[partition] = Lease(revision, clock() + self.ttl * _MARGIN)
        return True

    async def members""",
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
        """        try:
            async with asyncio.timeout(HAND_OVER_S):
                await self._projector.released()
""",
        """        await self._leases.release(partitions)
        try:
            async with asyncio.timeout(HAND_OVER_S):
                await self._projector.released()
""",
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
        "while self._owned - self._wanted:",
        "while False:",
        (f"{OWN}::test_a_lease_is_given_back_when_the_projection_has_let_go_and_not_before",),
    ),
    # dead letters
    Mutant(
        "refused-write-not-parked",
        "what a statement refuses waits alone",
        "kernel/projector/session.py",
        "        for failure in parked:\n            self._plan.park(failure)\n",
        "        for failure in parked:\n",
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
        "projections/unit_of_work.py",
        "if index is not None and row.sequence > 0:",
        "if index is not None and row.sequence < 0:",
        (f"{SERVICE}::test_parked_aggregates_stay_parked_over_a_restart[sqlite]",),
    ),
    Mutant(
        "second-retry-sees-a-gap",
        "a retry follows what was folded since the last one",
        "projections/dead_letters.py",
        "alone.keeps = all(",
        "alone.keeps = True or all(",
        (f"{LETTERS}::test_a_second_retry_follows_what_was_folded_between_the_two",),
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
        "log_resumed(await context.read(lambda: fold_postponed(writer, partitions)))",
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
            "tests/aggregates/test_declarations.py::test_an_aggregates_name_is_that_of_its_class_or_the_one_that_is_given",
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
        "dict.fromkeys(bare, 0) | kept",
        "kept",
        (f"{LETTERS}::test_an_aggregate_whose_beginning_is_missing_is_parked",),
    ),
    Mutant(
        "retry-unfenced",
        "the owner of the partition notices a retry",
        "projections/dead_letters.py",
        "_fence(connection, made, rows[0].partition)",
        "pass",
        (f"{LETTERS}::test_the_owner_of_the_partition_meets_the_fence_after_a_change",),
    ),
    Mutant(
        "skip-unfenced",
        "the owner of the partition notices a skip",
        "projections/dead_letters.py",
        "_fence(connection, made, row.partition)",
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
        "a database that is away or takes no writes parks nobody",
        "projections/database.py",
        "    if state:\n",
        "    if state:\n        return False\n    if state:\n",
        (f"{OWN}::test_a_database_that_takes_no_writes_is_not_blamed_on_an_aggregate",),
    ),
    Mutant(
        "infrastructure-parks-sqlite",
        "a database that is away or takes no writes parks nobody",
        "projections/database.py",
        "    if state:\n",
        "    if not state:\n        return False\n    if state:\n",
        (f"{OWN}::test_a_database_that_takes_no_writes_is_not_blamed_on_an_aggregate",),
    ),
    # the log itself, and copies of what was folded from it
    Mutant(
        "cut-over-misses-the-rest",
        "a rebuild misses nothing that the live copy had",
        "kernel/projector/rebuild.py",
        "while self._at < furthest:",
        "while False:",
        (f"{OWN}::test_at_a_cut_over_the_new_copy_has_what_the_old_one_had",),
    ),
    Mutant(
        "truncated-log-accepted",
        "a truncated log is noticed",
        "projections/origin.py",
        "if self.furthest > last:",
        "if self.furthest > last + 1_000_000:",
        (f"{SERVICE}::test_a_truncated_log_is_noticed_at_start[sqlite]",),
    ),
    Mutant(
        "truncation-believed-at-once",
        "a log is called truncated only after it was asked again",
        "kernel/log/certainty.py",
        "if time.monotonic() - began >= (min(patience, ALONE_S) if isinstance(error, _Gone) else patience):",
        "if patience:",
        (
            "tests/failure_modes/test_backups.py::test_a_log_that_seems_truncated_for_a_moment_stops_nothing",
            "tests/failure_modes/test_backups.py::"
            "test_a_log_that_seems_truncated_for_a_moment_at_a_start_is_asked_again",
        ),
    ),
    Mutant(
        "another-log-accepted",
        "a log is recognised by what is in it",
        "projections/origin.py",
        "if self.digest == digest:",
        "if self.digest:",
        ("tests/failure_modes/test_backups.py::test_a_log_restored_from_an_older_backup_that_went_on_is_refused",),
    ),
    Mutant(
        "history-gap-accepted",
        "an aggregate's events are numbered without gaps",
        "aggregates/cell.py",
        "if envelope.sequence != self.version + 1:",
        "if envelope.sequence <= self.version:",
        ("tests/aggregates/test_properties_domain.py::test_a_gap_or_a_repeat_anywhere_is_a_sequence_error",),
    ),
    Mutant(
        "read-your-writes-unwaited",
        "a query after a receipt includes it",
        "kernel/client.py",
        "if at < receipt.sequence}",
        "if at < 0}",
        (f"{SERVICE}::test_a_query_after_a_receipt_says_how_far_the_projection_got[sqlite]",),
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
        "kernel/client.py",
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
        "if different := differences(connection, live, trial):",
        "if different := differences(connection, live, live):",
        ("tests/projections/test_schema.py::test_a_model_that_was_changed_without_a_new_version_is_refused",),
    ),
    # the service as deputy
    Mutant(
        "reply-subject-unchecked",
        "the service publishes only to inboxes, whatever reply subject a sender names",
        "kernel/commands/admission.py",
        "if reply and not self._allows(reply):",
        "if False:",
        (f"{REPLIES}::test_the_service_is_nobodys_deputy",),
    ),
    Mutant(
        "reply-subject-of-requests-unchecked",
        "requests for the status and the limits are answered at inboxes only",
        "kernel/commands/replies.py",
        "if reply and not self.allows(reply):",
        "if False:",
        (f"{REPLIES}::test_the_service_is_nobodys_deputy",),
    ),
    Mutant(
        "own-inbox-answered-to",
        "the service answers nowhere where it reads for itself",
        "kernel/transport/inboxes.py",
        "            and not reply.startswith(self._refused)\n",
        "",
        ("tests/kernel/transport/test_inboxes.py::test_only_inboxes_are_answered_to",),
    ),
    Mutant(
        "leases-inbox-shared",
        "what the service reads for itself comes to its own inboxes",
        "kernel/assembly.py",
        'role="service",\n        name=f"eskernel {base.app.name} leases"',
        'role="client",\n        name=f"eskernel {base.app.name} leases"',
        ("tests/kernel/test_permissions.py::test_what_must_work_works_and_what_must_not_is_refused",),
    ),
    Mutant(
        "slow-connections-kept",
        "slow HTTP connections keep the pages from nobody",
        "kernel/monitoring/doors.py",
        "            waiting.abort()\n",
        "            pass\n",
        ("tests/kernel/monitoring/test_doors.py::test_slow_connections_do_not_keep_the_pages_from_others",),
    ),
    Mutant(
        "correlation-unbounded",
        "what is stored with each event is bounded",
        "kernel/commands/admission.py",
        "if oversized := find_oversized(sent, payload):",
        "if (oversized := find_oversized(sent, payload)) and False:",
        (f"{COMMANDS}::test_what_is_stored_with_each_event_is_bounded",),
    ),
    # cold aggregates
    Mutant(
        "snapshot-of-other-code",
        "a snapshot is used only with the code that made it",
        "aggregates/snapshot.py",
        "(found.format, found.code, found.aggregate_id) != (FORMAT, self.code, aggregate_id)",
        "(found.format, found.aggregate_id) != (FORMAT, aggregate_id)",
        (f"{SNAPSHOTS}::test_a_snapshot_of_other_code_is_never_loaded",),
    ),
    Mutant(
        "snapshot-unchecked",
        "a snapshot is used only if its last commit is in the log",
        "kernel/actors/histories.py",
        "and restored.is_of(stored[0].payload)\n",
        "and bool(stored)\n",
        (f"{SNAPSHOTS}::test_a_snapshot_that_does_not_fit_the_log_is_not_used",),
    ),
    Mutant(
        "snapshot-forgets-ids",
        "a command takes effect once, also if a snapshot knows its id only roughly",
        "aggregates/seen.py",
        "return command_id <= self.horizon or ",
        "return ",
        (f"{SNAPSHOTS}::test_ids_older_than_the_snapshot_knows_are_searched_for_once",),
    ),
    Mutant(
        "history-searched",
        "a history is read without a search",
        "kernel/log/jetstream.py",
        "found, below = await follow(self._gets, subject, last, after)",
        "found, below = [last.stored], last.stored.sequence",
        ("tests/kernel/log/test_chain.py::test_commits_spread_over_a_log_are_read_without_a_search",),
    ),
    Mutant(
        "replica-trusted",
        "a replica that is behind its leader is asked again",
        "kernel/log/jetstream.py",
        "if found and found[-1].sequence >= below:",
        "if not waiting or (found and found[-1].sequence >= below):",
        ("tests/kernel/log/test_chain.py::test_a_replica_that_is_behind_is_asked_again",),
    ),
]
