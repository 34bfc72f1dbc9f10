"""Being sure before a stream is called truncated or replaced: the service stops because of it.

The new leader of a replicated stream can answer before it has applied everything that its predecessor has acknowledged,
and a server that has just started can lack the stream for a moment. Both pass within moments, and a lost log does not.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from kernel.errors import Replaced

logger = logging.getLogger("eskernel.log")
T = TypeVar("T")
ALONE_S, REPLICATED_S = 0.5, 10.0
"""A doubt about the log is believed when it has lasted for so many seconds: of a stream on one server, on several."""
RESTORE = (
    "restore the newer log from a backup (docs/backup.md). If there is none, keep the database as it is, and name a "
    "new one in database.url: it is built from the log"
)
"""What to do about a log that lacks what was projected. Nothing is lost by it: also not what only the tables have."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 0.5


class _Gone(Replaced):
    """The stream does not exist. The cluster knows that, and not only the stream's leader: it is certain sooner."""


def gone(why: str) -> Replaced:
    """Return the error that a stream does not exist."""
    return _Gone(f"{why}; {RESTORE}")


def patience(replicas: int) -> float:
    """Return for how many seconds a doubt about a stream must last before it is believed."""
    return REPLICATED_S if replicas > 1 else ALONE_S


async def make_sure(
    look: Callable[[], Awaitable[T]], patience: float, doubts: tuple[type[Exception], ...] = (Replaced,)
) -> T:
    """Look at the stream, again and again while it seems to be another one or to lack its end.

    Args:
        look: looks at the stream, as its leader has it. What the stream must have is found out before, not in here:
            it grows meanwhile.
        patience: seconds for which a doubt must last.
        doubts: errors of `look` that are believed only then. Every other error is raised at once.

    Returns:
        what `look` returned.

    Raises:
        Replaced: the doubt has lasted, or one of the other `doubts`.
    """
    began, pause = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            found = await look()
        except doubts as error:
            if time.monotonic() - began >= (min(patience, ALONE_S) if isinstance(error, _Gone) else patience):
                raise
            if pause == FIRST_PAUSE_S:
                logger.info("the log is looked at again, to be sure: %s", error)
        else:
            return found
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def digest_of(message: dict[str, Any]) -> str:
    """Return a digest of a stored commit, from the answer of JetStream's API.

    It is the same in every copy of the stream: in one that was restored from a snapshot, moved, or mirrored. Events
    have ids and times, so no commit of another log has it.
    """
    digest = hashlib.sha256(message["subject"].encode() + b"\n")
    digest.update(base64.b64decode(message.get("data", "")))
    return digest.hexdigest()
