"""Testing an application: the whole app in this process, on a log and a database in memory.

    async with running(app) as kernel:
        receipt = await kernel.execute(Account, "alice", Deposit(500))
        rows = await kernel.query("select cents from balances", after=receipt)

With eskernel installed, pytest has a fixture `running` that is this function.
"""

from kernel.runtime.clock import MovableClock
from kernel.testing.app import Running, RunningApp, running

__all__ = ["MovableClock", "Running", "RunningApp", "running"]
