"""Injecting the faults of a schedule, and healing them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import psutil
from sqlalchemy.exc import DBAPIError

from tests.faults import evidence
from tests.faults.app import BROKEN_WORDS
from tests.faults.checker import Violation
from tests.faults.clients import Load
from tests.faults.places import Database, NatsServer, Service
from tests.faults.proxy import Proxy
from tests.faults.schedule import Fault, Kind
from tests.snapshots import restore_snapshot, take_snapshot

PROGRESS = 20
"""Commands that must take effect before the service counts as working again."""
PROGRESS_S = 45.0
STOP_S = 60.0
WAKE_S = 90.0
"""Seconds in which cold histories must answer; other faults may overlap with it."""
RETRIED_S = 90.0
PAUSED = " is paused, and not folded any further"
"""The words of a worker that pauses a projection instead of parking more aggregates."""


class Faults:
    """Injects a schedule.

    Attributes:
        done: faults by kind. kills: SIGKILLs by victim.
        version: of the program that runs.
        violations: the ones visible only during the run: processes that outlive their parent, a stop that doesn't
            end, a service that doesn't come back.
    """

    def __init__(
        self,
        service: Service,
        server: NatsServer,
        proxy: Proxy,
        database: Database,
        load: Load,
        report: Callable[[str], None],
    ) -> None:
        self.service, self.server, self.proxy, self.database, self.load = service, server, proxy, database, load
        self.done: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.violations: list[Violation] = []
        self.notes: list[str] = []
        self.version = 1
        self._report = report
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._lasting: set[asyncio.Task[None]] = set()

    async def run(self, schedule: list[Fault]) -> None:
        """Inject the faults in order; some overlap."""
        for fault in schedule:
            await asyncio.sleep(fault.pause)
            self._report(str(fault))
            task = asyncio.create_task(self._inject(fault))
            self._lasting.add(task)
            task.add_done_callback(self._lasting.discard)
            if fault.overlap:
                continue
            await task
            if fault.settle:
                await self._finish()
                await self.settle(str(fault.kind))
        await self._finish()

    async def _finish(self) -> None:
        while self._lasting:
            await asyncio.gather(*self._lasting)

    async def settle(self, after: str) -> None:
        """Wait until commands take effect again."""
        wanted = self.load.acknowledged + PROGRESS
        deadline = time.monotonic() + PROGRESS_S
        while self.load.acknowledged < wanted:
            if time.monotonic() > deadline:
                self.violations.append(Violation("f", f"no {PROGRESS} commands in {PROGRESS_S:g} s after: {after}"))
                return
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Stop injecting, without healing."""
        for task in list(self._lasting):
            task.cancel()
        await asyncio.gather(*self._lasting, return_exceptions=True)

    async def _inject(self, fault: Fault) -> None:
        self.done[fault.kind] += 1
        match fault.kind:
            case Kind.WORKER_KILL:
                await self._kill_workers(fault, 1)
            case Kind.WORKERS_KILL:
                await self._kill_workers(fault, 99)
            case Kind.WORKER_FREEZE | Kind.WORKER_PAUSE:
                await self._freeze_worker(fault)
            case Kind.PARENT_KILL:
                async with self._locks["service"]:
                    await self._kill_parent(fault)
            case Kind.PARENT_STOP:
                async with self._locks["service"]:
                    await self._stop_parent()
            case Kind.SERVER_KILL:
                async with self._locks["server"]:
                    await self.server.kill()
                    self.kills["server"] += 1
                    await asyncio.sleep(fault.seconds)
                    await self.server.start()
            case Kind.SERVER_FREEZE:
                async with self._locks["server"]:
                    self.server.send(signal.SIGSTOP)
                    await asyncio.sleep(fault.seconds)
                    self.server.send(signal.SIGCONT)
            case Kind.CUT | Kind.HALF_OPEN | Kind.DELAY:
                async with self._locks["network"]:
                    await self._disturb(fault)
            case Kind.DATABASE:
                async with self._locks["database"]:
                    await asyncio.to_thread(self.database.outage, fault.seconds)
            case Kind.POISON:
                self.load.poison(fault.choice)
            case Kind.GARBAGE:
                async with self._locks["stream"]:
                    await self.load.publish_garbage(fault.choice)
            case Kind.DEPUTY:
                self.injected["deputy requests"] += await self.load.send_deputies(fault.choice)
            case Kind.COLD:
                await self._kill_onto_histories(fault)
            case Kind.BACKLOG:
                async with self._locks["database"]:
                    outage = asyncio.to_thread(self.database.outage, fault.seconds)
                    _, sent = await asyncio.gather(outage, self.load.flood())
                    self.injected["bursts over shared tallies"] += sent
            case Kind.RESTORE:
                async with self._locks["service"], self._locks["server"], self._locks["stream"]:
                    await self._restore_log()
            case Kind.BAD_DEPLOY:
                async with self._locks["service"]:
                    await self._deploy_badly(fault)
            case Kind.DEPLOY:
                async with self._locks["service"]:
                    await self._deploy_version(fault)

    async def _workers(self) -> list[psutil.Process]:
        """Return the workers; wait if there is none at the moment."""
        for _ in range(100):
            if found := await asyncio.to_thread(self.service.workers_alive):
                return found
            await asyncio.sleep(0.1)
        self.notes.append("no worker was alive for 10 s")
        return []

    async def _kill_workers(self, fault: Fault, count: int) -> None:
        async with self._locks["service"]:
            workers = await self._workers()
            place = fault.choice % max(1, len(workers))
            for worker in (workers[place:] + workers[:place])[:count]:
                try:
                    worker.kill()
                    self.kills["worker"] += 1
                except psutil.NoSuchProcess:
                    continue  # it ended by itself
        await asyncio.sleep(fault.seconds)

    async def _freeze_worker(self, fault: Fault) -> None:
        async with self._locks["service"]:
            workers = await self._workers()
            if not workers:
                return
            worker = workers[fault.choice % len(workers)]
            try:
                worker.suspend()
            except psutil.NoSuchProcess:
                return
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            try:
                worker.resume()
            except psutil.NoSuchProcess:
                pass  # it was killed meanwhile, by the parent or by another fault

    async def _kill_parent(self, fault: Fault) -> None:
        await self.service.kill_parent()
        self.kills["parent"] += 1
        # a frozen worker can't notice that its parent has ended until it is resumed
        if left := await self.service.none_left(15.0):
            self.violations.append(Violation("e", f"processes outlived their killed parent by 15 s: {left}"))
        await asyncio.sleep(fault.seconds)
        self.service.start()

    async def _stop_parent(self) -> None:
        await self._stop_service()
        self.service.start()

    async def _stop_service(self) -> None:
        started = time.monotonic()
        code = await self.service.terminate(STOP_S)
        if code is None:
            self.violations.append(Violation("e", f"SIGTERM did not end the service within {STOP_S:g} s"))
        elif code != 0:
            took = time.monotonic() - started
            self.notes.append(f"stopped with exit code {code} after {took:.1f} s: {self.service.last_line()}")
        if left := await self.service.none_left(5.0):
            self.violations.append(Violation("e", f"processes outlived a stop: {left}"))

    async def _kill_onto_histories(self, fault: Fault) -> None:
        """Kill all workers, and send commands to aggregates whose long histories none has in memory then."""
        self.injected["events in long histories"] += await self.load.lengthen_histories()
        await self._kill_workers(fault, 99)
        killed = time.monotonic()
        try:
            async with asyncio.timeout(WAKE_S):
                self.injected["commands to cold histories"] += await self.load.wake(WAKE_S)
        except TimeoutError:
            self.violations.append(Violation("f", f"cold histories did not answer in {WAKE_S:g} s"))
        self.notes.append(f"cold histories answered {time.monotonic() - killed:.1f} s after a kill of all workers")

    async def _deploy_badly(self, fault: Fault) -> None:
        """Replace the program by one that fails for a tenth of the tanks, roll it back, and retry what it parked.

        Either it parks them, or so many fail that the projections are paused until the roll-back.
        """
        reader = evidence.Reader(self.database.url)
        try:
            await self._replace_program(broken=True)
            deadline = time.monotonic() + PROGRESS_S
            while not (self.service.count(PAUSED) or await self._parked(reader)) and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
            await asyncio.sleep(fault.seconds)
            if paused := self.service.count(PAUSED):
                self.injected["projections of workers paused at bad deploys"] += paused
            await self._replace_program(broken=False)
            self.injected["dead letters of bad deploys"] += await self._parked(reader)
            deadline = time.monotonic() + RETRIED_S
            while await self._parked(reader):
                if time.monotonic() > deadline:
                    left = await self._parked(reader)
                    self.violations.append(Violation("d", f"retries left {left} dead letters of a bad deploy"))
                    return
                await self.service.retry_dead_letters(RETRIED_S)
                self.injected["retries of dead letters"] += 1
        finally:
            reader.close()

    async def _deploy_version(self, fault: Fault) -> None:
        """Deploy a new version, and kill its workers at work; then go back and there again, and verify the tables."""
        if self.service.pauses:
            self.notes.append("no version was deployed: a build would not be shown where poison pauses projections")
            return
        self.version += 1
        self.service.deploy_version(self.version)
        await self._stop_parent()
        await asyncio.sleep(fault.seconds)
        for worker in await asyncio.to_thread(self.service.workers_alive):
            try:
                worker.kill()
                self.kills["worker"] += 1
            except psutil.NoSuchProcess:
                continue
        reader = evidence.Reader(self.database.url)
        try:
            if not await self._until_shown(reader, self.version):
                return
            await self.settle("a deployment")
            for version in (self.version - 1, self.version):
                for name in ("Levels", "Colours"):
                    await self._operate("projections", "rollback", name, "--to", str(version), version=version)
                await self._until_shown(reader, version)
            await self._operate("rebuild", "Levels", version=self.version)
            await self._operate("projections", "verify", "Levels", "Colours", version=self.version)
            self.injected["versions deployed, rolled back, shown again"] += 1
        finally:
            reader.close()

    async def _operate(self, *command: str, version: int) -> None:
        """Run a command of an operator; it may be disturbed by another fault, and is tried again."""
        deadline = time.monotonic() + RETRIED_S
        while True:
            code, told = await self.service.operate(RETRIED_S, *command, version=version)
            if code == 0:
                return
            if time.monotonic() > deadline:
                self.violations.append(Violation("c", f"`eskernel {' '.join(command)}` ended with {code}: {told}"))
                return
            await asyncio.sleep(0.5)

    async def _until_shown(self, reader: evidence.Reader, version: int) -> bool:
        deadline = time.monotonic() + RETRIED_S
        while True:
            try:
                if await asyncio.to_thread(reader.live_versions) == {version}:
                    return True
            except DBAPIError:
                pass  # the database is away: another fault lasts
            if time.monotonic() > deadline:
                self.violations.append(Violation("c", f"version {version} was not shown in {RETRIED_S:g} s"))
                return False
            await asyncio.sleep(0.1)

    async def _restore_log(self) -> None:
        """Take a snapshot of the log, delete the log, and restore it, while the service is stopped."""
        await self._stop_service()
        snapshot = await take_snapshot(self.server.url, self.load.app_name)
        await evidence.delete(self.server.url, self.load.app_name)
        await restore_snapshot(self.server.url, snapshot)
        self.injected["messages restored from snapshots"] += int(snapshot.state["messages"])
        self.service.start()

    async def _parked(self, reader: evidence.Reader) -> int:
        """Return how many dead letters the bad program has left; wait for a database that can't be reached."""
        deadline = time.monotonic() + PROGRESS_S
        while True:
            try:
                return await asyncio.to_thread(reader.failed, BROKEN_WORDS)
            except DBAPIError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)

    async def _replace_program(self, *, broken: bool) -> None:
        self.service.deploy(broken=broken)
        await self._stop_parent()

    async def _disturb(self, fault: Fault) -> None:
        match fault.kind:
            case Kind.CUT:
                await self.proxy.refuse()
                await asyncio.sleep(fault.seconds)
                await self.proxy.start()
            case Kind.HALF_OPEN:
                self.proxy.lose_requests = fault.choice % 3 != 1
                self.proxy.lose_answers = fault.choice % 3 != 0
                await asyncio.sleep(fault.seconds)
                self.proxy.cut()
            case _:
                self.proxy.delay = 0.05 + (fault.choice % 251) / 1000
                await asyncio.sleep(fault.seconds)
                self.proxy.delay = 0.0
