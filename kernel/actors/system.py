"""The actor system of one worker: Thespian, a parent for each partition, and a router."""

from __future__ import annotations

from typing import Any

from thespian.actors import Actor, ActorAddress, ActorSystem, PoisonMessage
from thespian.system.simpleSystemBase import ActorSystemBase

from kernel.actors.aggregate import AggregateActor
from kernel.actors.mailbox import Gateway
from kernel.actors.sizing import size_of


def _nothing() -> None:
    pass


class Spawn:
    """Create shells; their addresses go into `into`."""

    __slots__ = ("count", "into")

    def __init__(self, count: int, into: list[ActorAddress]) -> None:
        self.count = count
        self.into = into


class PartitionActor(Actor):  # type: ignore[misc]
    """Parent of the aggregates of one partition."""

    gateway: Gateway
    kind: type[AggregateActor]

    def receiveMessage(self, message: Any, sender: ActorAddress) -> None:  # noqa: N802, ARG002 - Thespian's name
        """Create children; report children that failed."""
        if isinstance(message, Spawn):
            message.into.extend(self.createActor(self.kind) for _ in range(message.count))
        elif isinstance(message, PoisonMessage):
            self.gateway.report_bug(f"poisoned: {message.details}")


class RouterActor(Actor):  # type: ignore[misc]
    """Sends a list of messages: one entry into the actor system for a whole batch."""

    gateway: Gateway

    def receiveMessage(self, message: Any, sender: ActorAddress) -> None:  # noqa: N802, ARG002 - Thespian's name
        """Pass on each message to its actor."""
        if type(message) is list:
            send = self.send
            for receiver, one in message:
                send(receiver, one)
        elif isinstance(message, PoisonMessage):
            self.gateway.report_bug(f"poisoned: {message.details}")


class Actors:
    """The actor system of one worker: a router, and a parent for each partition.

    Args:
        gateway: the asyncio side.
    """

    def __init__(self, gateway: Gateway) -> None:
        # classes of our own for this system: the gateway reaches actors without a message for each
        self._aggregate = type("AggregateActor", (AggregateActor,), {"gateway": gateway})
        self._partition = type("PartitionActor", (PartitionActor,), {"gateway": gateway, "kind": self._aggregate})
        router = type("RouterActor", (RouterActor,), {"gateway": gateway})
        self._system = ActorSystem("simpleSystemBase", logDefs=False, transientUnique=True)
        base: ActorSystemBase = self._system._systemBase
        # before each message it would look for expired wakeups; our actors never ask for one
        base._realizeWakeups = _nothing
        self._router: ActorAddress = self._system.createActor(router)
        self._parents: dict[int, ActorAddress] = {}

    def __len__(self) -> int:
        """Return how many addresses Thespian has given out: it forgets none."""
        return len(self._system._systemBase.actorRegistry)

    def spawn(self, partition: int, count: int) -> list[ActorAddress]:
        """Create shells under a partition's parent."""
        if partition not in self._parents:
            self._parents[partition] = self._system.createActor(self._partition)
        made: list[ActorAddress] = []
        self._system.tell(self._parents[partition], Spawn(count, made))
        return made

    def send(self, messages: list[tuple[ActorAddress, Any]]) -> None:
        """Deliver the messages, and everything that follows from them, before returning."""
        self._system.tell(self._router, messages)

    def size_of(self, actor: ActorAddress) -> int:
        """Return about how many bytes an aggregate's state and rows take in memory."""
        # Thespian offers no way to its instances; a message to each would cost more
        shell = self._system._systemBase.actorRegistry[actor.actorAddressString].instance
        cell = shell.cell
        # not what the cell was declared with: that is the type's
        state = (cell.state, cell.commands, cell.seen) if cell is not None else ()
        return size_of([*state, *(shell.rows or ())])

    def close(self) -> None:
        """Shut the actor system down."""
        self._system.shutdown()
