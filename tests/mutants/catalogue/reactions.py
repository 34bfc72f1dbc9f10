"""Mutants of policies, timers and effects."""

from __future__ import annotations

from tests.mutants.catalogue.mutant import Mutant

POLICIES = "tests/kernel/reactions/test_policies.py"
TIMERS = "tests/kernel/reactions/test_timers.py"
EFFECTS = "tests/kernel/reactions/test_effects.py"

MUTANTS = [
    Mutant(
        "command-id-not-derived",
        "the id of a policy's command follows from the event",
        "kernel/reactions/requests.py",
        '"command_id": derive_command_id(envelope.id, policy, due.place, due.moment),',
        '"command_id": __import__("uuid").uuid4().hex,',
        (f"{POLICIES}::test_what_was_sent_before_a_crash_takes_effect_once[sqlite]",),
    ),
    Mutant(
        "checkpoint-before-answers",
        "a checkpoint passes an event when it has an outcome",
        "kernel/reactions/session.py",
        "list(takewhile(lambda mark: not mark.left, self._marks[partition]))",
        "list(self._marks[partition])",
        (f"{EFFECTS}::test_a_checkpoint_waits_for_what_is_under_way[sqlite]",),
    ),
    Mutant(
        "timer-fired-without-being-removed",
        "a timer that was fired is over",
        "kernel/reactions/timers.py",
        "connection.execute(update(timer).where(own).values(due=None, attempt=None, owed=None))",
        "pass",
        (f"{TIMERS}::test_a_rejected_timer_is_recorded_and_over[sqlite]",),
    ),
    Mutant(
        "timer-early",
        "a timer is not fired before its time",
        "kernel/reactions/firing.py",
        "return int(self._context.now() * MICROS)",
        "return int((self._context.now() + 0.2) * MICROS)",
        (f"{TIMERS}::test_a_timer_is_fired_once_and_not_early[sqlite]",),
    ),
    Mutant(
        "reactions-run-by-rebuild",
        "a rebuild never runs a policy or an effect",
        "kernel/projector/cut_over.py",
        "    limit_locks(connection)\n    furthest = 0\n",
        "    limit_locks(connection)\n    furthest = 0\n"
        "    again = 'UPDATE eskernel_checkpoint SET sequence = 0, epoch = -2 WHERE generation = 0'\n"
        "    connection.exec_driver_sql(again)\n",
        (f"{EFFECTS}::test_each_event_has_its_effect_and_a_rebuild_has_none[sqlite]",),
    ),
    Mutant(
        "later-timer-overtaken",
        "of two changes to a timer that of the later event wins",
        "kernel/reactions/store.py",
        "(eskernel_timer.stream_sequence, eskernel_timer.place) < (excluded.stream_sequence, excluded.place)",
        "true",
        (f"{TIMERS}::test_of_changes_to_a_timer_that_of_the_latest_event_wins_in_whatever_order_they_come",),
    ),
    Mutant(
        "rejection-decided-anew",
        "a command of a policy that was rejected is not sent again",
        "kernel/reactions/work.py",
        "why = task.rejected.get(due.place) or await self.deliver(request)",
        "why = await self.deliver(request)",
        (f"{POLICIES}::test_a_rejection_is_recorded_and_handled_and_stays[sqlite]",),
    ),
    Mutant(
        "parked-overtaken",
        "later events of a parked aggregate wait behind it",
        "kernel/reactions/session.py",
        "        if task.key in self._parking.parked:\n            outcome",
        "        if False:\n            outcome",
        (f"{POLICIES}::test_what_fails_parks_its_aggregate_alone_and_in_order[sqlite]",),
    ),
    Mutant(
        "loop-unnoticed",
        "a loop of policies is noticed",
        "kernel/reactions/work.py",
        "if task.envelope.depth >= self._depth:",
        "if False:",
        (f"{POLICIES}::test_a_loop_of_policies_is_noticed[sqlite]",),
    ),
    Mutant(
        "reaction-not-fenced",
        "an owner that was fenced moves no checkpoint of a policy",
        "kernel/reactions/store.py",
        "            if moved != len(done.moves):\n",
        "            if False:\n",
        (f"{POLICIES}::test_an_owner_that_was_fenced_writes_nothing[sqlite]",),
    ),
    Mutant(
        "copy-not-waited-for",
        "a command is not told rejected while an earlier copy of it takes effect",
        "kernel/transport/sender.py",
        "if copies and (receipt := await _find_receipt(copies)) is not None:",
        "if False and (receipt := await _find_receipt(copies)) is not None:",
        ("tests/kernel/transport/test_sender.py::test_a_command_is_not_rejected_while_an_earlier_copy_takes_effect",),
    ),
]
