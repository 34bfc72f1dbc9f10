"""Appends whose outcome is uncertain: the log is read back to find out what happened to each."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Protocol

from kernel.errors import Conflict, LogError, Unavailable, UnknownOutcome
from kernel.log.base import Appending, Stored
from kernel.log.direct_get import BEFORE
from kernel.log.repeats import Repeats

logger = logging.getLogger("eskernel.log")

FIRST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_OFFLINE_PAUSE_S = 0.02, 4.0, 0.5


def pause_after(attempts: int) -> float:
    """Return the pause in seconds after so many attempts in vain; at random, so that not all come back at once."""
    longest = min(FIRST_PAUSE_S * 2.0 ** min(attempts, 16), LONGEST_PAUSE_S)
    return longest * random.uniform(0.5, 1.0)


class Append:
    """One commit on its way.

    Attributes:
        expected: stream sequence of the subject's last commit, as its author knows it.
        links: how far the commits before that one are from each other.
        future: gets the commit's stream sequence, or why there is none.
        started, sent: when it was asked for, and when it last went out, by the performance counter.
        attempts: how often it went out.
        uncertain: an attempt may have taken effect; otherwise every attempt was refused.
    """

    __slots__ = ("attempts", "expected", "future", "links", "payload", "sent", "started", "subject", "uncertain")

    def __init__(self, subject: str, expected: int, payload: bytes, links: bytes, future: Appending) -> None:
        self.subject = subject
        self.expected = expected
        self.links = links
        self.payload = payload
        self.future = future
        self.started = time.perf_counter()
        self.sent = 0.0
        self.attempts = 0
        self.uncertain = False

    @property
    def headers(self) -> bytes:
        """The headers that say where the commits before this one are. The server compares the first."""
        if self.links:
            return b"Nats-Expected-Last-Subject-Sequence: %d\r\n%b: %b\r\n" % (self.expected, BEFORE, self.links)
        return b"Nats-Expected-Last-Subject-Sequence: %d\r\n" % self.expected

    def fail(self, error: Exception) -> None:
        """End with an error, unless it has ended."""
        if not self.future.done():
            self.future.set_exception(error)


class Sender(Protocol):
    """What the settler needs of the appender."""

    @property
    def is_open(self) -> bool:
        """Whether commits may go out."""

    def send_again(self, append: Append) -> None:
        """Send a commit once more."""

    def note_settled(self, sequence: int) -> None:
        """Note that a commit was found in the log, or another one in its place."""


class Settler:
    """Finds out what happened to appends whose answers were lost.

    Each is read back: it is in the log; or another commit is in its place; or neither, and then it is sent again,
    which its expected sequence makes safe. The pauses grow with each attempt. An append that cannot be settled within
    the deadline ends as unknown.

    Args:
        last: reads a subject's last commit from the leader.
        deadline: seconds from the first attempt.

    Attributes:
        read_backs: how often the log was read.
    """

    def __init__(
        self, sender: Sender, last: Callable[[str], Coroutine[None, None, Stored | None]], deadline: float
    ) -> None:
        self._sender, self._last, self._deadline = sender, last, deadline
        self._under_way: dict[asyncio.Task[None], Append] = {}
        self._repeats = Repeats()
        self.read_backs = 0

    @property
    def oldest(self) -> float:
        """When the oldest of the appends that are being settled was asked for; infinite if there is none."""
        return min((append.started for append in self._under_way.values()), default=float("inf"))

    def settle(self, appends: Iterable[Append], why: str) -> None:
        """Find out about these, in the background.

        Args:
            why: why their outcome is uncertain, for the error of one that stays so.
        """
        for append in appends:
            if not append.future.done():
                append.uncertain = True
                task = asyncio.get_running_loop().create_task(self._settle(append, why))
                self._under_way[task] = append
                task.add_done_callback(self._under_way.pop)

    def try_again(self, append: Append) -> None:
        """Send an append again that was refused for a reason that passes, after a pause, in the background."""
        task = asyncio.get_running_loop().create_task(self._try_again(append))
        self._under_way[task] = append
        task.add_done_callback(self._under_way.pop)

    async def _try_again(self, append: Append) -> None:
        await asyncio.sleep(pause_after(append.attempts))
        if append.future.done():
            return
        if self._sender.is_open:
            self._sender.send_again(append)
        else:
            append.fail(Unavailable(f"{append.subject}: the log can't be reached"))

    async def _settle(self, append: Append, why: str) -> None:
        give_up = append.started + self._deadline
        pause = FIRST_PAUSE_S
        if append.attempts > 1:
            # what it was sent again for has not passed
            await asyncio.sleep(min(pause_after(append.attempts), max(0.0, give_up - time.perf_counter())))
        while not append.future.done():
            longest = LONGEST_PAUSE_S
            if not self._sender.is_open:
                why, longest = "the log can't be reached", LONGEST_OFFLINE_PAUSE_S
            elif (problem := await self._read_back(append, give_up)) is None:
                return
            else:
                why = problem or why
            if time.perf_counter() >= give_up:
                append.fail(UnknownOutcome(f"{append.subject}: {why}; it may or may not have happened"))
            else:
                await asyncio.sleep(pause)
                pause = min(pause * 2, longest)

    async def _read_back(self, append: Append, give_up: float) -> str | None:
        """Look once. Return None where that settles it, else what stood in the way, which may be nothing."""
        self.read_backs += 1
        try:
            last = await self._last(append.subject)
        except LogError as error:
            return str(error)
        except Exception as error:
            if (more := self._repeats.due(type(error).__name__)) is not None:
                logger.exception("the log could not be read back; trying again%s", more)
            return f"{type(error).__name__}: {error}"
        found = last.sequence if last is not None else 0
        if append.future.done():
            return None
        if last is not None and last.payload == append.payload:
            self._sender.note_settled(found)
            append.future.set_result(found)
        elif found != append.expected:
            self._sender.note_settled(0)
            append.fail(Conflict(append.subject, append.expected, found, True))
        elif time.perf_counter() < give_up and self._sender.is_open:
            self._sender.send_again(append)
        else:
            return ""
        return None

    def close(self) -> None:
        """Give up: what is not settled ends as unknown."""
        for task, append in list(self._under_way.items()):
            task.cancel()
            append.fail(closed())


def closed() -> UnknownOutcome:
    """Return the error of an append that was under way when the log was closed."""
    return UnknownOutcome("the log was closed before it answered")
