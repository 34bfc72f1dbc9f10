"""Mutants of the web API."""

from __future__ import annotations

from tests.mutants.catalogue.mutant import Mutant

WEB = "tests/web/test_commands.py"

MUTANTS = [
    Mutant(
        "if-match-ignored",
        "a lost update is refused",
        "kernel/web/requests.py",
        'options["if_version"] = int(found[1])',
        "pass",
        (f"{WEB}::test_a_lost_update_is_refused_with_the_present_version_and_appends_nothing",),
    ),
    Mutant(
        "idempotency-key-ignored",
        "a command that is sent again with its key takes effect once",
        "kernel/web/requests.py",
        """options["command_id"] = idempotency_key.removeprefix('"').removesuffix('"')""",
        """options["command_id"] = __import__("uuid").uuid4().hex""",
        (f"{WEB}::test_a_command_that_is_sent_again_with_its_key_takes_effect_once",),
    ),
    Mutant(
        "second-own-write-forgotten",
        "a read includes the own writes that it names",
        "kernel/web/requests.py",
        'for position in given.split(","):',
        'for position in given.split(",")[:1]:',
        (f"{WEB}::test_a_read_waits_for_each_of_the_own_writes_that_it_names",),
    ),
    Mutant(
        "faults-told",
        "what the application's code says in a fault is for its log",
        "kernel/web/problems.py",
        'detail = "the reason is in the log of the server"',
        "pass",
        ("tests/web/test_problems.py::test_a_fault_of_the_application_is_told_to_its_log_only",),
    ),
    Mutant(
        "forms-taken",
        "a form of a foreign page sends no command",
        "kernel/web/requests.py",
        'if kind != "application/json":',
        'if kind == "text/html":',
        (f"{WEB}::test_an_error_is_a_problem_with_the_status_that_fits",),
    ),
    Mutant(
        "unexposed-reachable",
        "only what is exposed can be reached",
        "kernel/web/routes.py",
        "if command in exposed:",
        "if command in known:",
        (f"{WEB}::test_only_what_is_exposed_can_be_reached",),
    ),
    Mutant(
        "path-as-decoded",
        "any id can be addressed",
        "kernel/web/problems.py",
        'if b"%2f" not in raw.lower():',
        "if True:",
        (f"{WEB}::test_any_id_can_be_addressed",),
    ),
]
