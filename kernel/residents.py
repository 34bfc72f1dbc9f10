"""Which aggregates are live, in what order they were used, and when they go."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterable

from thespian.actors import ActorAddress

from kernel.actors import Actors
from kernel.mailbox import Passivate
from kernel.metrics import ACTIVATIONS, LIVE, PASSIVATIONS
from kernel.subjects import Address

SWEEP_SLICE = 500
"""Actors passivated at once: a sweep never holds the event loop for long."""


class Resident:
    """A live aggregate: its actor, and what keeps it here.

    Attributes:
        busy: commands without an answer, and folded batches not yet written; only at 0 may it go.
        commands: those of them that are commands.
        has_rows: whether the actor holds the rows as they are stored.
    """

    __slots__ = ("actor", "address", "busy", "commands", "has_rows", "used")

    def __init__(self, address: Address, actor: ActorAddress) -> None:
        self.address = address
        self.actor = actor
        self.busy = self.commands = 0
        self.has_rows = False
        self.used = 0.0


class Residents:
    """The live aggregates of a worker, least recently used first.

    A passivated aggregate's actor is kept, empty, for the next one of its partition: Thespian never forgets the
    address of an actor that has exited, so reuse is what keeps memory flat.

    Args:
        limit: how many aggregates may be live; more are there only while they are busy.
        idle: seconds without use after which an aggregate goes.
    """

    def __init__(self, actors: Actors, limit: int, idle: float) -> None:
        self._actors = actors
        self.limit = limit
        self.idle = idle
        self._live: OrderedDict[str, Resident] = OrderedDict()
        self._empty: dict[int, list[ActorAddress]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._live)

    def find(self, subject: str) -> Resident | None:
        """Return the resident if the aggregate is live."""
        return self._live.get(subject)

    def wake(self, addresses: Iterable[Address]) -> list[Resident]:
        """Return residents for these aggregates, activating those that are not live, and note their use."""
        now = time.monotonic()
        live = self._live
        found: list[Resident] = []
        new: dict[int, list[int]] = {}
        for address in addresses:
            resident = live.get(address.subject)
            if resident is None:
                empty = self._empty[address.partition]
                resident = Resident(address, empty.pop() if empty else None)
                live[address.subject] = resident
                if resident.actor is None:
                    new.setdefault(address.partition, []).append(len(found))
                ACTIVATIONS.inc()
            else:
                live.move_to_end(address.subject)
            resident.used = now
            found.append(resident)
        for partition, places in new.items():
            for place, actor in zip(places, self._actors.spawn(partition, len(places)), strict=True):
                found[place].actor = actor
        LIVE.set(len(live))
        return found

    def sweep(self) -> int:
        """Passivate what is idle, or over the limit, and not busy; at most `SWEEP_SLICE`. Return how many went."""
        oldest = time.monotonic() - self.idle
        excess = len(self._live) - self.limit
        going: list[Resident] = []
        for looked, resident in enumerate(self._live.values()):
            idle = resident.used < oldest
            if (not idle and len(going) >= excess) or len(going) == SWEEP_SLICE or looked == 4 * SWEEP_SLICE:
                break
            if resident.busy == 0:
                going.append(resident)
                PASSIVATIONS.labels(reason="idle" if idle else "limit").inc()
        if going:
            passivate = Passivate()
            self._actors.send([(resident.actor, passivate) for resident in going])
            for resident in going:
                del self._live[resident.address.subject]
                self._empty[resident.address.partition].append(resident.actor)
            LIVE.set(len(self._live))
        return len(going)

    def all(self) -> list[Resident]:
        """Return every resident."""
        return list(self._live.values())
