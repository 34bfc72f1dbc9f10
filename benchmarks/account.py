"""The account of the example without its projection: what the rival does, and no more."""

from __future__ import annotations

from examples.bank import Account, Deposit
from kernel import App

app = App("bench", aggregates=[Account])

__all__ = ["Account", "Deposit", "app"]
