"""Aggregates that the log has events of, and that the program does not declare."""

from __future__ import annotations

import logging
from typing import Any

from aggregates import DeclarationError
from kernel.app import App
from kernel.log.base import EventLog

logger = logging.getLogger("eskernel.projector")


class UnknownAggregates:
    """Counts the commits that projections pass over since the program does not declare their aggregate.

    There are good reasons for such commits: the program was rolled back, or an aggregate was removed. So they are
    neither errors nor quarantined, but each aggregate is warned of once.

    Args:
        app: what it has retired is neither counted nor warned of.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._commits: dict[str, int] = {}
        self._counted_to = 0

    async def survey(self, log: EventLog) -> None:
        """Count what the log has. Raises the errors of `find_unknown`."""
        last = (await log.info()).last
        for name, count in sorted((await find_unknown(self._app, log)).items()):
            self._add(name, count)
        self._counted_to = last

    def note(self, aggregate: str, sequence: int) -> None:
        """Count a commit that is passed over, and that the survey has not counted.

        Args:
            sequence: stream sequence of the commit.
        """
        if sequence > self._counted_to and _is_unknown(self._app, aggregate):
            self._add(aggregate, 1)

    def report(self) -> list[dict[str, Any]]:
        """Return the name and the number of commits of each unknown aggregate, as JSON data."""
        return [{"aggregate": name, "commits": count} for name, count in sorted(self._commits.items())]

    def _add(self, aggregate: str, commits: int) -> None:
        if aggregate not in self._commits:
            self._commits[aggregate] = 0
            logger.warning(
                "the log has events of %s, which %r does not declare; they are passed over, until a program that "
                "declares it projects them. If it is gone for good, name it in App(..., retired=[%r])",
                aggregate, self._app.name, aggregate,
            )  # fmt: skip
        self._commits[aggregate] += commits


async def find_unknown(app: App, log: EventLog) -> dict[str, int]:
    """Return the number of commits of each aggregate that the app neither declares nor has retired.

    Raises:
        DeclarationError: there are such aggregates, and the app declares an aggregate of which the log has nothing: it
            looks as if a class had been renamed.
        Unavailable: the log did not answer.
    """
    counted = await log.count_commits(app.types)
    unknown = {name: count.commits for name, count in counted.items() if _is_unknown(app, name)}
    unused = [declared for name, declared in app.types.items() if name not in counted]
    if not unknown or not unused:
        return unknown
    listed = ", ".join(f"{name} ({count} commit{'s' * (count != 1)})" for name, count in sorted(unknown.items()))
    raise DeclarationError(
        [
            f"the log has events of {listed}, which {app.name!r} does not declare, and none of {declared.name}. If the "
            f"class was renamed, give it the name that is in the log: `class {declared.cls.__name__}(Aggregate, "
            f"name={min(unknown)!r})`. If the app no longer has such an aggregate, say so: "
            f"`App(..., retired={sorted(unknown)!r})`"
            for declared in unused
        ]
    )


def _is_unknown(app: App, aggregate: str) -> bool:
    return aggregate not in app.types and aggregate not in app.retired
