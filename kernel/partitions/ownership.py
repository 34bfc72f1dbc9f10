"""Taking partitions and giving them back: what a worker does with its leases."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from kernel.commands.admission import Admission
from kernel.errors import LogError
from kernel.log.subjects import Subjects
from kernel.partitions.leases import Leases
from kernel.partitions.members import Members, is_mixed, shares_of
from kernel.projector.live import Projector
from kernel.reactions.reactor import Reactors
from kernel.telemetry.metrics import LEASES_LOST, MOVED, PARTITIONS
from kernel.transport.connection import ConnectionTrouble, NatsConnection, publish_frame

logger = logging.getLogger("eskernel.partitions")
LINGER_S = 1.0
"""Commands that were on their way when a subscription ended are still told that their partition is moving."""
HAND_OVER_S = 3.0
"""Commands under way and the batch being written may hold up a planned hand-over for so long."""


class Ownership:
    """The partitions of one worker, from lease to subscription.

    Partitions are assigned to the worker's parts, revoked from them in good order, or lost at once.

    Attributes:
        members: the workers, and the partitions that are held, as they were last read.
    """

    def __init__(
        self,
        connection: NatsConnection,
        subjects: Subjects,
        leases: Leases,
        admission: Admission,
        projector: Projector,
        reactors: Reactors,
    ) -> None:
        self._connection, self._subjects, self._leases = connection, subjects, leases
        self._admission, self._projector, self._reactors = admission, projector, reactors
        self._listening: dict[int, Callable[[], Any]] = {}
        self._turn = asyncio.Lock()
        self._nudges = subjects.service("leases")
        self._nudged = asyncio.Event()
        self._balancing: set[asyncio.Future[None]] = set()
        self._leaving = False
        self._exit = AsyncExitStack()
        self.members = Members((), frozenset())

    async def start(self) -> None:
        """Take what is free of our share, and say that we are here.

        Raises:
            LogError: the leases can't be had.
        """
        await self._leases.join()
        self._exit.push_async_callback(await self._connection.listen(self._nudges, self._note_nudge))
        answering = asyncio.create_task(self._answer_nudges())
        self._exit.callback(answering.cancel)
        await self._balance()
        self._nudge()

    async def renew_leases(self) -> None:
        """Renew, and let go of what was lost; then see to our share. One turn of the scheduler."""
        if self._leaving:
            return
        await self._lose(await self._leases.renew())
        if not self._turn.locked():  # a hand-over may take its time, and renewing must not wait for it
            balancing = asyncio.ensure_future(self._balance())
            self._balancing.add(balancing)
            balancing.add_done_callback(self._balancing.discard)

    async def _balance(self) -> None:
        """Give back what is too much, take what is free."""
        async with self._turn:
            if self._leaving:
                return
            try:
                self.members = members = await self._leases.members()
                if surplus := self._leases.surplus(members):
                    logger.info("giving back %d partitions: there are %d workers", len(surplus), len(members.workers))
                    await self._revoke(frozenset(surplus))
                elif got := await self._leases.acquire(members):
                    await self._assign(got)
                self._admission.deploying = self.mixed
                self._project()
            except (LogError, ConnectionTrouble, OSError) as error:
                # the next turn goes on from what there is
                logger.warning("leases: %s", error)
            PARTITIONS.set(len(self._leases.held))

    @property
    def holdings(self) -> tuple[int, int, int]:
        """How many partitions this worker holds, how many there are, and how many it should hold."""
        return len(self._leases.held), self._leases.partitions, self._leases.share(self.members)

    @property
    def mixed(self) -> bool:
        """Whether members run different programs: a deployment goes on."""
        return is_mixed(self._leases.me, self.members.others)

    async def verify(self) -> None:
        """Make sure of what is still ours; the fence was met."""
        await self._lose(await self._leases.renew())
        if not self._turn.locked():  # a hand-over waits for the projector, which waits here
            await self._balance()

    async def _assign(self, partitions: list[int]) -> None:
        MOVED.labels(direction="taken").inc(len(partitions))
        self._admission.assign(frozenset(partitions))
        for partition in partitions:
            await self._listen(partition)
        self._project()
        await self._tell_others()
        logger.info("took %d partitions, now %d of %d", len(partitions), len(self._listening), self._leases.partitions)

    async def _listen(self, partition: int) -> None:
        if partition not in self._listening:
            subject = self._subjects.commands(partition)
            # no queue group: a connection that is dead and not yet known to be would get every second command
            self._listening[partition] = await self._connection.listen(
                subject, self._admission.receive, linger=LINGER_S
            )

    def _project(self) -> None:
        held = frozenset(self._listening)
        me = replace(self._leases.me, held=held)
        self._projector.assign(held, shares_of(me, self.members.others, self._leases.partitions))
        self._reactors.assign(held)

    async def _tell_others(self) -> None:
        """Where programs differ, others project what this worker no longer does, and the other way round."""
        if self.mixed:
            await self._leases.announce()
            self._nudge()

    async def _lose(self, partitions: list[int]) -> None:
        """Stop all work for partitions that may be somebody else's by now."""
        if not partitions:
            return
        LEASES_LOST.inc(len(partitions))
        self._admission.lose(frozenset(partitions))
        await self._stop_listening(partitions)
        self._project()

    async def _revoke(self, partitions: frozenset[int]) -> None:
        """Finish what is under way, and only then let others take them: they find everything written."""
        MOVED.labels(direction="given back").inc(len(partitions))
        await self._stop_listening(partitions)
        if not self.mixed:
            self._project()
        if not await self._admission.revoke(partitions, HAND_OVER_S):
            logger.warning("handing over with commands unanswered; their senders will repeat them")
        if self.mixed:
            # perhaps only this program can read what it has decided
            await self._projector.catch_up(HAND_OVER_S)
            self._project()
        try:
            async with asyncio.timeout(HAND_OVER_S):
                await asyncio.gather(self._projector.released(), self._reactors.released())
        except TimeoutError:
            logger.warning("handing over while a batch is being written; the fence decides about it")
        await self._leases.release(partitions)
        if self.mixed:
            await self._leases.announce()
        self._nudge()

    async def _stop_listening(self, partitions: Any) -> None:
        for partition in partitions:
            if stop := self._listening.pop(partition, None):
                await stop()

    # others

    def _nudge(self) -> None:
        """Have the others look at the leases now, rather than at their next turn."""
        self._connection.send(publish_frame(self._nudges.encode(), self._leases.worker.encode()))

    def _note_nudge(self, _subject: bytes, _reply: bytes, payload: bytes, _headers: bytes | None) -> None:
        if payload != self._leases.worker.encode():
            self._nudged.set()

    async def _answer_nudges(self) -> None:
        while True:
            await self._nudged.wait()
            self._nudged.clear()
            await self._balance()

    async def leave(self) -> None:
        """Stop taking commands and give back everything; the projector must have stopped."""
        self._leaving = True
        async with self._turn:
            await self._exit.aclose()
            await self._stop_listening(list(self._listening))

    async def close(self) -> None:
        """Give back the leases."""
        async with self._turn:
            await self._leases.close()
            if self._connection.is_connected:
                self._nudge()
