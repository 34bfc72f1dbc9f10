"""Mutants of what lets versions run side by side, and of builds beside them."""

from __future__ import annotations

from tests.mutants.catalogue.mutant import Mutant

DEPLOYING = "tests/kernel/projector/test_deploying.py"
KILLED = "tests/kernel/projector/test_killed_builds.py"
ROLLING = "tests/kernel/projector/test_rolling_deployment.py"

MUTANTS = [
    Mutant(
        "shown-before-verification",
        "readers see a new version after a second fold has confirmed it",
        "kernel/projector/rebuild.py",
        "if self._course.verify and replay.at and not self._course.finished:",
        "if False:",
        (f"{DEPLOYING}::test_what_a_second_fold_does_not_confirm_is_not_shown[sqlite]",),
    ),
    Mutant(
        "retired-generation-not-followed",
        "the old program keeps its own tables up to date beside the new one's",
        "projections/following.py",
        'STATES = ("live", "ready", "retired")',
        'STATES = ("live", "ready")',
        (f"{DEPLOYING}::test_each_program_keeps_its_own_tables_right_and_readers_see_the_newer[sqlite]",),
    ),
    Mutant(
        "build-counted-not-resumed",
        "a build goes on behind what it has folded, and not further on",
        "kernel/projector/rebuild.py",
        "                epoch, start = take(connection, self._app.name, made)\n",
        "                epoch, start = take(connection, self._app.name, made)\n"
        "                start = {partition: place + 10 * (place > 0) for partition, place in start.items()}\n",
        (f"{DEPLOYING}::test_a_long_build_goes_on_behind_commands_and_over_restarts[sqlite]",),
    ),
    Mutant(
        "build-goes-on-without-its-rows",
        "a build goes on from the rows that it has written",
        "kernel/projector/replay.py",
        "Build(self._plan, self.writer, empty=not self._ahead)",
        "Build(self._plan, self.writer)",
        (f"{DEPLOYING}::test_a_long_build_goes_on_behind_commands_and_over_restarts[sqlite]",),
    ),
    Mutant(
        "build-of-other-code-resumed",
        "only the same program goes on with a build",
        "projections/following.py",
        "if code and row.code == code and",
        "if code and",
        (f"{DEPLOYING}::test_a_build_of_other_code_is_not_gone_on_with[sqlite]",),
    ),
    Mutant(
        "old-program-takes-the-view-back",
        "a program with a lower version leaves what readers see",
        "projections/following.py",
        "        if version > declared.version:\n",
        "        if False:\n",
        (f"{DEPLOYING}::test_each_program_keeps_its_own_tables_right_and_readers_see_the_newer[sqlite]",),
    ),
    Mutant(
        "rolled-back-version-shown-again",
        "a restart does not take back what a person has rolled back",
        "projections/following.py",
        'elif made.number in numbers(connection, declared.name, "ready"):',
        "else:",
        (f"{DEPLOYING}::test_a_rollback_shows_the_version_before_where_readers_are_and_back_again[sqlite]",),
    ),
    Mutant(
        "rollback-without-catching-up",
        "readers see nothing older after a rollback",
        "kernel/projector/rollback.py",
        "                if not behind:\n",
        "                if True:\n",
        (f"{DEPLOYING}::test_a_rollback_shows_the_version_before_where_readers_are_and_back_again[sqlite]",),
    ),
    Mutant(
        "unread-at-the-hand-over",
        "what only one program can read is projected by it before others get its partitions",
        "kernel/partitions/ownership.py",
        "            await self._projector.catch_up(HAND_OVER_S)\n",
        "",
        (f"{ROLLING}::test_readers_see_their_writes_at_every_moment_of_a_deployment_there_and_back",),
    ),
    Mutant(
        "shared-partitions-unshared",
        "partitions whose holder has another version are projected by those who declare this one",
        "kernel/partitions/members.py",
        "        if holder is None or holder not in chosen:\n",
        "        if holder is None:\n",
        (f"{DEPLOYING}::test_each_program_keeps_its_own_tables_right_and_readers_see_the_newer[sqlite]",),
    ),
]
