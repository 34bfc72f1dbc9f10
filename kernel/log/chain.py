"""Reading one subject's commits from the newest to the oldest: each says where those before it are.

A search by subject has the server look through every block of the stream over which the subject is spread. Asking for
commits by their sequences costs it a fraction of that. The server keeps with each commit the header that its append had
to have, so that streams of older versions can be read in this way too, one commit in a round trip. Some commits have a
header of ours, which names many at once (`Cell.links`).
"""

from __future__ import annotations

from kernel.log.base import Stored
from kernel.log.direct_get import DirectGets, Link

DENSE = 8
"""Where a subject has one of so many commits of the stream, or more, a search is cheaper than a long chain."""
STRETCH = 16
"""Commits after which the density is looked at."""


async def follow(gets: DirectGets, subject: str, last: Link, after: int) -> tuple[list[Stored], int]:
    """Return the subject's commits as far back as the chain can be followed, in order.

    Returns:
        the commits; and the sequence below which others must be searched for, 0 if these are all that come after
        `after`.

    Raises:
        Unavailable: the stream did not answer.
    """
    found = {last.stored.sequence: last.stored}
    lowest, newest, count = last, last.stored.sequence, 0
    while (before := lowest.before()) is not None:
        wanted = [sequence for sequence in before if sequence > after]
        if not wanted:
            return [found[sequence] for sequence in sorted(found)], 0
        links = await gets.by_sequence(subject, wanted)
        if links is None:  # one is missing, or the stream is a copy in which they have other sequences
            return [last.stored], last.stored.sequence
        for link in links:
            found[link.stored.sequence] = link.stored
        lowest = min(links, key=_sequence)
        count += len(links)
        if count >= STRETCH:
            if newest - lowest.stored.sequence < count * DENSE:
                break
            newest, count = lowest.stored.sequence, 0
    return [found[sequence] for sequence in sorted(found)], lowest.stored.sequence


def _sequence(link: Link) -> int:
    return link.stored.sequence
