"""Mutants of commands, the aggregates that decide them, and what the service does for others."""

from __future__ import annotations

from tests.mutants.catalogue.mutant import Mutant

COMMANDS = "tests/kernel/commands/test_commands.py"
OPTIONS = "tests/kernel/commands/test_options.py"
PHASES = "tests/kernel/actors/test_phases.py"
REPLIES = "tests/kernel/commands/test_replies.py"
SNAPSHOTS = "tests/kernel/actors/test_snapshots.py"
READ_AHEAD = "tests/kernel/actors/test_read_ahead.py"

MUTANTS = [
    # commands
    Mutant(
        "dedupe-removed",
        "a repeated command takes effect once",
        "kernel/actors/aggregate.py",
        """            known = cell.commands.get(sent.command_id)
            if known is not None:
                if decisions and sent.returning == "state":
                    self.stash = requests[place:]  # the state rests on events that are not in the log yet
                    break
                self._repeat(request, known)
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
        "version-not-looked-at",
        "a command for a version takes effect at that version only",
        "kernel/actors/aggregate.py",
        "if sent.if_version is not None and sent.if_version != cell.version:",
        "if False:",
        (f"{OPTIONS}::test_a_command_takes_effect_only_at_the_version_that_it_is_for",),
    ),
    Mutant(
        "version-refused-before-it-is-stored",
        "a refusal rests on what is in the log",
        "kernel/actors/aggregate.py",
        """                if decisions:
                    verdicts.append(outdated)""",
        """                if False:
                    verdicts.append(outdated)""",
        (f"{PHASES}::test_of_commands_for_one_version_that_are_decided_together_one_takes_effect",),
    ),
    Mutant(
        "version-of-others-not-looked-for",
        "a version that another program has appended is one to be for",
        "kernel/actors/aggregate.py",
        "if sent.if_version > cell.version and not request.fresh:",
        "if False:",
        (f"{OPTIONS}::test_a_version_that_another_program_has_appended_is_found",),
    ),
    Mutant(
        "returned-state-not-in-the-log",
        "the state that a repeated command returns is in the log",
        "kernel/actors/aggregate.py",
        'if decisions and sent.returning == "state":',
        "if False:",
        (f"{PHASES}::test_the_state_that_a_repeated_command_returns_is_in_the_log",),
    ),
    Mutant(
        "metadata-of-the-first-event",
        "metadata belong to the events of their own command",
        "aggregates/commit.py",
        "        envelope.metadata = found\n",
        "        envelopes[0].metadata = found\n",
        (f"{OPTIONS}::test_metadata_of_some_commands_of_a_commit_are_those_of_their_events",),
    ),
    Mutant(
        "imported-commands-overtake",
        "of many commands none overtakes one of its aggregate",
        "kernel/transport/importing.py",
        "        if lane is not None:\n            lane.append(slot)\n            return\n",
        "",
        (
            "tests/kernel/transport/test_importing.py::"
            "test_outcomes_come_in_order_and_no_command_overtakes_one_of_its_aggregate",
        ),
    ),
    Mutant(
        "busy-evicted",
        "an aggregate with something under way stays",
        "kernel/actors/residents.py",
        "if resident.busy:\n                busy.append(resident)",
        "if resident.busy < 0:\n                busy.append(resident)",
        ("tests/kernel/actors/test_passivation.py::test_a_busy_aggregate_never_goes",),
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
        "read-ahead-trusted",
        "what was read ahead is compared with the log's leader",
        "kernel/log/jetstream.py",
        "            return [*known, *await self._read_back(subject, last, known[-1].sequence)]\n",
        "            return list(known)\n",
        (f"{READ_AHEAD}::test_what_another_worker_appended_since_is_loaded_as_well",),
    ),
    Mutant(
        "read-ahead-given-twice",
        "an aggregate that was loaded meanwhile is not loaded from what was read ahead",
        "kernel/actors/read_ahead.py",
        "            self._loaded.add(subject)\n",
        "            pass\n",
        (f"{READ_AHEAD}::test_an_aggregate_that_was_loaded_while_it_was_read_is_left_out",),
    ),
    Mutant(
        "read-ahead-floods",
        "commands don't wait behind what is read ahead",
        "kernel/actors/read_ahead.py",
        "self._log.read(max(0, last - COMMITS), gentle=True)",
        "self._log.read(max(0, last - COMMITS))",
        (f"{READ_AHEAD}::test_a_command_does_not_wait_behind_all_that_is_read_ahead",),
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
        "slow HTTP connections keep no other client from the pages",
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
]
