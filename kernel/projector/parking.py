"""What the log says of an event that could not be folded."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Literal

from kernel.log.base import Stored
from kernel.log.subjects import Subjects
from kernel.projector.grouping import Commits
from kernel.telemetry.logging import about
from projections.dead_letters import Retried
from projections.declaration import DeclaredProjection
from projections.errors import HandlerFailed
from projections.parked import Letter

logger = logging.getLogger("eskernel.projector")


def log_parked(
    when: Literal["for", "while building"],
    failure: HandlerFailed,
    projections: Sequence[DeclaredProjection],
    batch: Iterable[tuple[tuple[str, str], Commits]],
) -> None:
    """Write an error line with the ids of the event, and of the command that led to it.

    Args:
        batch: commits by aggregate type and id, among which the event is found.
    """
    name = projections[failure.projection].name if failure.projection >= 0 else "every projection"
    commits = [commit for key, own in batch if key == failure.aggregate for commit in own]
    event = next((event for _, events in commits for event in events if event.sequence == failure.sequence), None)
    fields = about(
        *failure.aggregate,
        projection=name,
        reason=failure.kind,
        sequence=failure.sequence or None,
        command_id=event and event.commandid,
        correlation_id=event and event.correlation_id,
        causation_id=event and event.causation_id,
        traceparent=event and event.traceparent,
    )
    # of the app's own code the traceback helps; of the database's it is long, and holds what was written
    cause = failure.__cause__ if failure.kind == "handler" else None
    logger.error("parked %s %s: %s", when, name, failure, exc_info=cause, extra=fields)


def log_resumed(done: Sequence[Retried]) -> None:
    """Write what became of the aggregates that had waited for this program."""
    if going_on := sum(not resumed.left for resumed in done):
        logger.info("%d aggregates that waited for this program go on", going_on)
    for resumed in done:
        if resumed.left and not resumed.newer:
            logger.error(
                "parked for %s: %s %s, which had waited for this program, with %d events: %s",
                resumed.projection, resumed.aggregate, resumed.aggregate_id, resumed.left, resumed.error,
                extra=about(resumed.aggregate, resumed.aggregate_id, projection=resumed.projection),
            )  # fmt: skip


def stored_commit(letter: Letter, commits: Sequence[Stored], subjects: Subjects) -> tuple[int, bytes]:
    """Return the partition and the bytes of the commit that a dead letter is from.

    Args:
        commits: among which it is, in stream order.
    """
    place = bisect_left(commits, letter.stream_sequence, key=attrgetter("sequence"))
    return subjects.address(*letter.aggregate).partition, commits[place].payload
