"""No promise rests on `assert`: `python -O` removes these statements."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRODUCT = ("aggregates", "projections", "kernel", "migrations")
MAY_ASSERT = {
    # only what can't happen, so that a type checker knows it too
    "aggregates/declaration.py",
    "aggregates/reacting.py",
    "kernel/cli/dead_letters.py",
    "kernel/commands/gateway.py",
    "kernel/governance/governor.py",
    "kernel/monitoring/http.py",
    "kernel/projector/blaming.py",
    "kernel/projector/row_history.py",
    "kernel/reactions/work.py",
    "kernel/transport/limits.py",
    "kernel/workers/supervisor.py",
    "projections/fold.py",
    "projections/naming.py",
    "projections/schema.py",
    "projections/unit_of_work.py",
}
WRONG_EXPECTATIONS = """
from aggregates import Aggregate, event, command, handles, applies, scenario
from examples.bank import Account, Balance, Balances, Deposit, Deposited, Withdraw, Withdrawn
from aggregates import Policy, Reactions, Send, policy, reacts
from projections import projected

class Gifts(Policy, of=Account):
    @reacts
    def withdrawn(self, event: Withdrawn) -> Reactions:
        return Send(Account, "fund", Deposit(event.cents))


class Careless(Account):
    @handles
    def deposit(self, command: Deposit) -> Deposited:
        self.balance += command.cents
        return Deposited(command.cents)

rich = scenario(Account).given(Deposited(500))
rows = projected(Balances).given("a", Deposited(500))
wrong = {
    "then": lambda: rich.when(Withdraw(300)).then(Withdrawn(999)),
    "then, nothing": lambda: rich.when(Withdraw(300)).then(),
    "rejects, another reason": lambda: rich.when(Withdraw(700)).rejects("because"),
    "rejects, what is accepted": lambda: rich.when(Withdraw(7)).rejects(),
    "a handler that changes state": lambda: scenario(Careless).when(Deposit(5)).then(Deposited(5)),
    "another row": lambda: rows.then(Balance(account="a", cents=1)),
    "no row": lambda: rows.then(),
    "a further row": lambda: rows.then(Balance(account="a", cents=500), Balance(account="b")),
    "sends, another command": lambda: policy(Gifts).when(Withdrawn(5)).sends(Send(Account, "fund", Deposit(6))),
    "sends, nothing": lambda: policy(Gifts).when(Withdrawn(5)).sends(),
    "does nothing, what sends": lambda: policy(Gifts).when(Withdrawn(5)).does_nothing(),
    "fails, what succeeds": lambda: rows.fails("anything"),
}
unnoticed = []
for name, specify in wrong.items():
    try:
        specify()
        unnoticed.append(name)
    except AssertionError:
        pass
print(__debug__, unnoticed)
"""


def test_only_these_modules_contain_assert() -> None:
    found = {
        str(path.relative_to(ROOT))
        for package in PRODUCT
        for path in (ROOT / package).rglob("*.py")
        if any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text())))
    }
    assert sorted(found - MAY_ASSERT) == []


def test_a_wrong_expectation_fails_under_optimised_python() -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-c", WRONG_EXPECTATIONS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "False []\n", done.stderr
