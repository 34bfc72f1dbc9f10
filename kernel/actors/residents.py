"""Which aggregates are live, in what order they were used, and when they go."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable
from itertools import islice

from thespian.actors import ActorAddress

from kernel.actors.mailbox import Passivate
from kernel.actors.system import Actors
from kernel.log.subjects import Address
from kernel.telemetry.metrics import ACTIVATIONS, LIVE, MEMORY, PASSIVATIONS

CHUNK = 50
"""Aggregates looked at, and passivated, between looks at the clock."""
SWEEP_S, MEASURE_S = 0.003, 0.002
"""Passivating, and measuring, give way to the event loop after so long."""


class Resident:
    """A live aggregate: its actor, and what keeps it here.

    Attributes:
        busy: commands without an answer, and folded batches not yet written; only at 0 may it go.
        commands: those of them that are commands.
        has_rows: whether the actor holds the rows as they are stored.
        size: bytes of its state and rows when they were last measured; -1 before.
    """

    __slots__ = ("actor", "address", "busy", "commands", "has_rows", "size", "used")

    def __init__(self, address: Address, actor: ActorAddress) -> None:
        self.address = address
        self.actor = actor
        self.busy = self.commands = 0
        self.has_rows = False
        self.used = 0.0
        self.size = -1


class _Sizes:
    """What was measured of one aggregate type: those not measured yet are taken to be like the others."""

    __slots__ = ("bytes", "live", "measured")

    def __init__(self) -> None:
        self.live = self.measured = self.bytes = 0

    @property
    def mean(self) -> float:
        return self.bytes / self.measured if self.measured else 0.0

    @property
    def total(self) -> float:
        return self.mean * self.live


class Residents:
    """The live aggregates of a worker, least recently used first.

    A passivated aggregate's actor is kept, empty, for the next one of its partition: Thespian never forgets the
    address of an actor that has exited, so reuse is what keeps memory flat.

    Args:
        limit: how many aggregates may be live; more are there only while they are busy.
        idle: seconds without use after which an aggregate goes.
        budget: bytes that their states and rows may take, as far as they are measured; 0 is no limit.
    """

    def __init__(self, actors: Actors, limit: int, idle: float, budget: int = 0) -> None:
        self.actors = actors
        self.limit = limit
        self.idle = idle
        self.budget = budget
        self._live: OrderedDict[str, Resident] = OrderedDict()
        self._empty: dict[int, list[ActorAddress]] = defaultdict(list)
        # used since they were measured, the longest ago first
        self._changed: dict[str, Resident] = {}
        self._sizes: dict[str, _Sizes] = defaultdict(_Sizes)

    def __len__(self) -> int:
        return len(self._live)

    def find(self, subject: str) -> Resident | None:
        """Return the resident if the aggregate is live."""
        return self._live.get(subject)

    @property
    def memory(self) -> int:
        """Bytes that the live aggregates' states and rows take: as measured, and those not measured yet like others."""
        return round(sum(sizes.total for sizes in self._sizes.values()))

    def wake(self, addresses: Iterable[Address]) -> list[Resident]:
        """Return residents for these aggregates, activating aggregates that are not live, and note their use."""
        now = time.monotonic()
        live, changed = self._live, self._changed
        found: list[Resident] = []
        new: dict[int, list[int]] = {}
        for address in addresses:
            resident = live.get(address.subject)
            if resident is None:
                empty = self._empty[address.partition]
                resident = Resident(address, empty.pop() if empty else None)
                live[address.subject] = resident
                self._sizes[address.aggregate].live += 1
                if resident.actor is None:
                    new.setdefault(address.partition, []).append(len(found))
                ACTIVATIONS.inc()
            else:
                live.move_to_end(address.subject)
            changed[address.subject] = resident
            resident.used = now
            found.append(resident)
        for partition, places in new.items():
            for place, actor in zip(places, self.actors.spawn(partition, len(places)), strict=True):
                found[place].actor = actor
        LIVE.set(len(live))
        return found

    def measure(self) -> int:
        """Measure aggregates that were used since they last were, for at most `MEASURE_S`; return how many."""
        until = time.perf_counter() + MEASURE_S
        done = 0
        for _ in range(len(self._changed)):
            subject = next(iter(self._changed))
            resident = self._changed.pop(subject)
            sizes = self._sizes[resident.address.aggregate]
            if resident.size < 0:
                sizes.measured += 1
                resident.size = 0
            size = self.actors.size_of(resident.actor)
            sizes.bytes += size - resident.size
            resident.size = size
            if resident.busy:
                self._changed[subject] = resident  # it changes still
            done += 1
            if time.perf_counter() >= until:
                break
        MEMORY.set(self.memory)
        return done

    def sweep(self) -> int:
        """Passivate what is idle, or beyond a limit, and not busy, for at most `SWEEP_S`; return how many went."""
        until = time.perf_counter() + SWEEP_S
        gone = looked = 0
        while looked <= len(self._live) and time.perf_counter() < until:
            going = self._next_to_go()
            if going is None:
                break
            self._passivate(going)
            gone += len(going)
            looked += CHUNK
        if gone:
            LIVE.set(len(self._live))
            MEMORY.set(self.memory)
        return gone

    async def passivate(self) -> None:
        """Measure what was used, and passivate all that should go, giving way to the event loop between slices."""
        self.measure()
        await asyncio.sleep(0)
        while self.sweep():  # noqa: ASYNC110 - gives way between slices
            await asyncio.sleep(0)

    def _next_to_go(self) -> list[Resident] | None:
        """Return the next few that go, None if there are none; what is busy is in use: to the end of the line."""
        oldest = time.monotonic() - self.idle
        excess = len(self._live) - self.limit
        surplus = self.memory - self.budget if self.budget else 0.0
        going: list[Resident] = []
        busy: list[Resident] = []
        reasons: Counter[str] = Counter()
        for resident in islice(self._live.values(), CHUNK):
            if resident.used < oldest:
                reason = "idle"
            elif len(going) < excess:
                reason = "limit"
            elif surplus > 0:
                reason = "memory"
            else:
                break
            if resident.busy:
                busy.append(resident)
                continue
            going.append(resident)
            reasons[reason] += 1
            surplus -= resident.size if resident.size >= 0 else self._sizes[resident.address.aggregate].mean
        for resident in busy:
            resident.used = time.monotonic()
            self._live.move_to_end(resident.address.subject)
        for reason, count in reasons.items():
            PASSIVATIONS.labels(reason=reason).inc(count)
        return going if going or busy else None

    def _passivate(self, going: list[Resident]) -> None:
        passivate = Passivate()
        self.actors.send([(resident.actor, passivate) for resident in going])
        for resident in going:
            subject, aggregate = resident.address.subject, resident.address.aggregate
            del self._live[subject]
            self._changed.pop(subject, None)
            self._empty[resident.address.partition].append(resident.actor)
            sizes = self._sizes[aggregate]
            sizes.live -= 1
            if resident.size >= 0:
                sizes.measured -= 1
                sizes.bytes -= resident.size

    def all(self) -> list[Resident]:
        """Return every resident."""
        return list(self._live.values())
