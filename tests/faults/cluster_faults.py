"""The faults of a cluster: which ones a seed chooses, injecting them, and healing."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import aiohttp
import nats
import nats.errors

from tests.faults.checker import Violation
from tests.faults.clients import Load
from tests.faults.gaps import BARE, Probes
from tests.faults.places import Service
from tests.servers import Server

PROGRESS: Final = 20
"""Commands that must take effect before the service counts as working again."""
PROGRESS_S: Final = 60.0
HEALTHY_S: Final = 60.0
"""Seconds in which servers that were started again must have caught up."""
STOP_S: Final = 60.0


class ClusterKind(StrEnum):
    """The kinds of faults."""

    LEADER_KILL = "stream's leader killed"
    QUORUM_LOSS = "quorum lost"
    SERVER_FREEZE = "server frozen"
    WORKER_FREEZE = "worker frozen beyond its lease"
    SERVERS_ROLLED = "servers restarted in turn"
    WORKERS_ROLLED = "workers restarted in turn"


OF_SERVERS: Final = [
    ClusterKind.LEADER_KILL,
    ClusterKind.QUORUM_LOSS,
    ClusterKind.SERVER_FREEZE,
    ClusterKind.SERVERS_ROLLED,
]
"""The faults that stop a bare loop of nats-py too."""
_LENGTHS: Final = {
    ClusterKind.LEADER_KILL: (0.0, 3.0),
    ClusterKind.QUORUM_LOSS: (1.0, 5.0),
    ClusterKind.SERVER_FREEZE: (1.0, 8.0),
    ClusterKind.WORKER_FREEZE: (4.0, 7.0),
}


@dataclass(frozen=True, slots=True)
class ClusterFault:
    """One fault.

    Attributes:
        seconds: how long it lasts, for faults that last.
        choice: selects the variant, such as which server.
    """

    kind: ClusterKind
    seconds: float
    choice: int

    def __str__(self) -> str:
        return f"{self.kind} {self.seconds:.1f}s ({self.choice})"


def endless_plan(seed: int, short: bool = False) -> Iterator[ClusterFault]:
    """Yield faults that follow from a seed: each kind once, in any order, then any.

    Args:
        short: faults that last do so for the shortest time, and there is each kind once only.
    """
    chance = random.Random(seed)
    kinds = list(ClusterKind)
    chance.shuffle(kinds)
    while True:
        for kind in kinds:
            least, most = _LENGTHS.get(kind, (0.0, 0.0))
            seconds = least if short else round(chance.uniform(least, most), 2)
            yield ClusterFault(kind, seconds, chance.randrange(1 << 16))
        if short:
            return
        kinds = chance.choices([*ClusterKind, *OF_SERVERS], k=4)


@dataclass(frozen=True, slots=True)
class Gap:
    """The longest times without a receipt around one fault, in seconds."""

    kind: ClusterKind
    service: float
    bare: float


class ClusterFaults:
    """Injects faults, one after the other; the next one comes when everything works again.

    Args:
        rolled: how many workers a restart in turn takes at most.

    Attributes:
        done: faults by kind. kills: SIGKILLs by victim.
        gaps: what each fault led to.
    """

    def __init__(
        self,
        app: str,
        members: list[Server],
        services: list[Service],
        load: Load,
        probes: Probes,
        report: Callable[[str], None],
        *,
        rolled: int = 99,
    ) -> None:
        self.app, self.members, self.services, self.load, self.probes = app, members, services, load, probes
        self.done: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.violations: list[Violation] = []
        self.notes: list[str] = []
        self.gaps: list[Gap] = []
        self._report, self._rolled = report, rolled

    async def run(self, schedule: Iterator[ClusterFault], seconds: float) -> None:
        """Inject the faults of a schedule until this much time is over, or the schedule ends."""
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        for fault in schedule:
            if clock() > end:
                return
            await self._align_leaders()
            self._report(str(fault))
            self.done[fault.kind] += 1
            start = clock()
            await self._inject(fault)
            await self.wait_until_healthy(str(fault))
            await self.settle(str(fault))
            gap = Gap(
                fault.kind,
                self.probes.service.longest(start, clock()),
                self.probes.bare.longest(start, clock()),
            )
            self._report(f"    longest gap {gap.service:.2f} s, of the bare loop {gap.bare:.2f} s")
            self.gaps.append(gap)

    async def settle(self, after: str) -> None:
        """Wait until commands take effect again, and bare messages are stored."""
        commands, bare = self.load.acknowledged + PROGRESS, len(self.probes.bare.times) + PROGRESS
        for what, there in (
            ("commands", lambda: self.load.acknowledged >= commands),
            ("bare messages", lambda: len(self.probes.bare.times) >= bare),
        ):
            if not await _reached(there, PROGRESS_S):
                self.violations.append(Violation("f", f"no {PROGRESS} {what} in {PROGRESS_S:g} s after: {after}"))

    async def wait_until_healthy(self, after: str) -> None:
        """Wait until each server has caught up with the others, and the services run."""
        for member in self.members:
            if not await _true(lambda member=member: _healthy(member), HEALTHY_S):
                self.violations.append(
                    Violation("f", f"{member.directory.name} is not healthy {HEALTHY_S:g} s after: {after}")
                )

        for service in self.services:
            await self._wait_until_running(service, after)

    async def _wait_until_running(self, service: Service, after: str) -> None:
        if not await _reached(lambda: service.is_running, PROGRESS_S):
            self.violations.append(Violation("f", f"a service did not run {PROGRESS_S:g} s after: {after}"))

    async def _inject(self, fault: ClusterFault) -> None:
        match fault.kind:
            case ClusterKind.LEADER_KILL:
                await self._kill_leader(fault)
            case ClusterKind.QUORUM_LOSS:
                lost = random.Random(fault.choice).sample(self.members, 2)
                await asyncio.gather(*(member.stop(_how(fault)) for member in lost))
                if _how(fault) == signal.SIGKILL:
                    self.kills["server"] += len(lost)
                await asyncio.sleep(fault.seconds)
                for member in lost:
                    await member.start()
            case ClusterKind.SERVER_FREEZE:
                await self._freeze_server(fault)
            case ClusterKind.WORKER_FREEZE:
                await self._freeze_worker(fault)
            case ClusterKind.SERVERS_ROLLED:
                for member in self.members:
                    await member.stop()
                    await member.start()
                    await self.wait_until_healthy(str(fault))
            case ClusterKind.WORKERS_ROLLED:
                for service in self.services[: self._rolled]:
                    await self._restart(service)

    async def _kill_leader(self, fault: ClusterFault) -> None:
        leader = await self._leader(self.app)
        if leader is None:
            self.notes.append("no leader to kill")
            return
        await leader.kill()
        self.kills["server"] += 1
        self.injected[f"{leader.directory.name} killed as leader"] += 1
        await asyncio.sleep(fault.seconds)
        await leader.start()

    async def _freeze_server(self, fault: ClusterFault) -> None:
        leader = await self._leader(self.app)
        frozen = leader if leader is not None and fault.choice % 2 else self.members[fault.choice // 2 % 3]
        self.injected["leader frozen" if frozen is leader else "follower frozen"] += 1
        assert frozen.process is not None
        frozen.process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            frozen.process.send_signal(signal.SIGCONT)

    async def _freeze_worker(self, fault: ClusterFault) -> None:
        process = self.services[fault.choice % len(self.services)].process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            process.send_signal(signal.SIGCONT)

    async def _restart(self, service: Service) -> None:
        code = await service.terminate(STOP_S)
        if code is None:
            self.violations.append(Violation("e", f"SIGTERM did not end the service within {STOP_S:g} s"))
        elif code != 0:
            self.notes.append(f"stopped with exit code {code}: {service.last_line()}")
        if left := await service.none_left(5.0):
            self.violations.append(Violation("e", f"processes outlived a stop: {left}"))
        service.start()
        await self._wait_until_running(service, "a restart")

    async def _align_leaders(self) -> None:
        """Let the server that leads the app's stream lead the bare one too, so that a fault meets both."""

        async def together() -> bool:
            wanted = await self._leader(self.app)
            if wanted is None:
                return False
            if await self._leader(BARE) is wanted:
                return True
            body = {"placement": {"preferred": wanted.directory.name}}
            await self._ask(f"STREAM.LEADER.STEPDOWN.{BARE}", body)
            return False

        if not await _true(together, 10.0):
            self.notes.append("the streams have different leaders")

    async def _leader(self, stream: str) -> Server | None:
        found = (await self._ask(f"STREAM.INFO.{stream}", {})).get("cluster", {}).get("leader")
        return next((member for member in self.members if member.directory.name == found), None)

    async def _ask(self, subject: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer of JetStream's API, or nothing."""
        urls = [member.url for member in self.members]
        try:
            client = await nats.connect(urls, allow_reconnect=False, connect_timeout=5)
        except (nats.errors.Error, OSError):
            return {}
        try:
            answer = await client.request(f"$JS.API.{subject}", json.dumps(body).encode(), timeout=2)
            found: dict[str, Any] = json.loads(answer.data)
            return found
        except (nats.errors.Error, OSError):
            return {}
        finally:
            await client.close()


def _how(fault: ClusterFault) -> signal.Signals:
    return signal.SIGKILL if fault.choice % 2 else signal.SIGTERM


async def _healthy(member: Server) -> bool:
    try:
        return (await member.monitored("healthz")).get("status") == "ok"
    except (aiohttp.ClientError, OSError, ValueError):
        return False


async def _true(condition: Callable[[], Awaitable[bool]], seconds: float) -> bool:
    """Wait until a condition holds; return whether it came to hold."""
    deadline = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


async def _reached(condition: Callable[[], bool], seconds: float) -> bool:
    async def now() -> bool:
        return condition()

    return await _true(now, seconds)
