"""The bar of work on the whole log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kernel.cli.common import errors

if TYPE_CHECKING:
    from kernel.projector.replay import RebuildProgress

SHOWN_S = 0.1
"""A bar moves at most so often."""


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Callable[[RebuildProgress], None]]:
    """Show a bar with rate and remaining time on standard error; yield what moves it.

    Args:
        what: named before the bar.
        quiet: show nothing.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=errors,
        disable=quiet,
    ) as bar:
        task = bar.add_task(what, total=None, rate="")

        def show(step: RebuildProgress) -> None:
            rate = f"{step.events / max(step.seconds, 1e-9):,.0f} events/s"
            said = what if step.phase == "building" else f"{what}, {step.phase}"
            bar.update(task, description=said, completed=step.done, total=step.total, rate=rate)

        yield show


@contextmanager
def commits_bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error while commits are read; yield what moves it: commits read, and those to read.

    Args:
        what: named before the bar.
        quiet: show nothing.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=errors, disable=quiet or not errors.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        shown = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal shown
            if done == total or time.monotonic() - shown > SHOWN_S:
                shown = time.monotonic()
                bar.update(task, completed=done, total=total)

        yield show
