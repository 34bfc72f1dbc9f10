"""Mutants of the log, what is stored in it, and copies that were folded from it."""

from __future__ import annotations

from tests.mutants.catalogue.mutant import Mutant

LOG = "tests/kernel/log/test_log_contract.py"
SERVICE = "tests/kernel/test_service.py"
CONTENTION = "tests/projections/test_contention.py"
OWN = "tests/test_mutants_caught.py"
JETSTREAM = "tests/kernel/log/test_log_jetstream.py"
OUTAGES = "tests/kernel/log/test_log_outages.py"

MUTANTS = [
    # appending
    Mutant(
        "expected-not-sent",
        "of two appends behind the same commit one is refused",
        "kernel/log/appender.py",
        r"""headers = b"NATS/1.0\r\n%b\r\n" % append.headers""",
        r"""headers = b"NATS/1.0\r\n\r\n" """,
        (f"{LOG}::test_an_append_with_a_stale_expected_sequence_conflicts_and_tells_the_actual_one",),
    ),
    Mutant(
        "expected-not-sent-in-batches",
        "of two appends behind the same commit one is refused",
        "kernel/log/appender.py",
        "                append.headers,\n",
        '                b"Nobody-Reads-This: 1\\r\\n",\n',
        (f"{JETSTREAM}::test_a_conflict_inside_an_atomic_batch_leaves_the_others_in_one_piece",),
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
        (f"{JETSTREAM}::test_a_conflict_inside_an_atomic_batch_leaves_the_others_in_one_piece",),
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
        (f"{OUTAGES}::test_appends_that_got_lost_on_the_way_are_sent_again",),
    ),
    Mutant(
        "uncertain-sent-again-unread",
        "an append whose answer is lost is read back",
        "kernel/log/settling.py",
        "task = asyncio.get_running_loop().create_task(self._settle(append, why))",
        "append.attempts = 0\n                self._sender.send_again(append)\n                continue",
        (f"{OUTAGES}::test_appends_whose_answers_are_lost_settle_as_what_they_became",),
    ),
    Mutant(
        "uncertain-told-unavailable",
        "an append whose answer is lost is read back",
        "kernel/log/settling.py",
        "task = asyncio.get_running_loop().create_task(self._settle(append, why))",
        "append.fail(LogError(why))\n                continue",
        (f"{OUTAGES}::test_appends_whose_answers_are_lost_settle_as_what_they_became",),
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
    # the log itself, and copies of what was folded from it
    Mutant(
        "cut-over-misses-the-rest",
        "a rebuild misses nothing that the live copy had",
        "kernel/projector/rebuild.py",
        "            await replay.fill_within(connection, reader, furthest)\n",
        "",
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
]
