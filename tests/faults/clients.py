"""The load: many senders with seeded random habits, and a record of the answer to each command."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import nats
import nats.errors
import orjson
from nats.aio.client import Client as Nats

from aggregates import Rejected
from kernel import Client
from kernel.errors import CommandError, LogError
from tests.faults.app import Burst, Drain, Fill, Mark, Tank, tanks
from tests.faults.rules import PROJECTIONS, Attempt, Garbage, partition_of

LANES = 80
HOT, COLD = 12, 500
PATIENCE_S = 30.0
COLOURS = ["red", "green", "blue", "black", "white", "grey"]
_COMMANDS: dict[str, Any] = {"Fill": Fill, "Drain": Drain, "Burst": Burst, "Mark": Mark}


def _tank(chance: random.Random, hot: float = 0.5) -> str:
    """Choose a tank: few tanks get half of the commands, so that queues form; some have odd names."""
    if chance.random() < hot:
        return f"hot-{chance.randrange(HOT)}"
    number = chance.randrange(COLD)
    return f"tank {number}/é.{number}" if number % 10 == 0 else f"cold-{number}"


class Load:
    """Senders on several clients, some connected to the server directly and one through the proxy."""

    def __init__(self, app: str, direct: str, proxied: str, seed: int) -> None:
        self.app_name = app
        self.attempts: list[Attempt] = []
        self.garbage: list[Garbage] = []
        self.problems: Counter[str] = Counter()
        self.acknowledged = 0
        self._app = tanks(app)
        self._urls = [direct, direct, direct, proxied]
        self._clients: list[Client] = []
        self._seed = seed
        self._made = 0
        self._stopping = asyncio.Event()
        self._lanes: list[asyncio.Task[None]] = []
        self._later: set[asyncio.Task[None]] = set()
        self._nats: Nats | None = None

    async def start(self, timeout: float = 60.0) -> None:
        """Connect as soon as the service has created its stream, and begin to send."""
        deadline = time.monotonic() + timeout
        for url in self._urls:
            while True:
                try:
                    self._clients.append(await Client.connect(self._app, nats=url))
                    break
                except (LogError, ConnectionError):
                    if time.monotonic() > deadline:
                        raise
                    await asyncio.sleep(0.1)
        self._nats = await nats.connect(
            self._urls[0], max_reconnect_attempts=-1, reconnect_time_wait=0.25, error_cb=_ignore
        )
        self._lanes = [asyncio.create_task(self._lane(number)) for number in range(LANES)]

    async def stop(self, timeout: float = 120.0) -> None:
        """Send no new commands; wait until every sent command has an outcome."""
        self._stopping.set()
        waiting = [*self._lanes, *self._later]
        while waiting:
            done, pending = await asyncio.wait(waiting, timeout=timeout)
            for task in done:
                task.result()
            if pending:
                raise TimeoutError(f"{len(pending)} senders did not end within {timeout:g} s")
            waiting = list(self._later)

    async def close(self) -> None:
        """End at once."""
        for task in [*self._lanes, *self._later]:
            task.cancel()
        await asyncio.gather(*self._lanes, *self._later, return_exceptions=True)
        for client in self._clients:
            await client.close()
        if self._nats is not None:
            await self._nats.close()

    # commands

    def _command(self, chance: random.Random, name: str = "", tank: str = "", poison: str = "") -> Attempt:
        self._made += 1
        number = self._made
        name = name or chance.choices(["Fill", "Drain", "Burst", "Mark"], [45, 35, 15, 5])[0]
        notes = [f"{chance.choice(COLOURS)} {number}.{place}" for place in range(chance.randrange(2, 5))]
        if poison:
            # in a burst, the events before the poison are folded, and those after it wait
            notes[chance.randrange(len(notes)) if name == "Burst" else 0] = f"poison-{poison} {number}"
        data: dict[str, Any] = {"note": notes[0]}
        if name in ("Fill", "Drain"):
            data["amount"] = chance.randrange(1, 31)
        elif name == "Burst":
            data = {"notes": notes, "amounts": [0 if poison else chance.randrange(-12, 21) for _ in notes]}
        return Attempt(f"{self._seed}-{number}", tank or _tank(chance), name, data)

    async def _send(self, command: Attempt, client: int, timeout: float) -> Attempt:
        """Send a command through the client's `execute`, and record the answer."""
        attempt = Attempt(command.command_id, command.tank, command.name, command.data, sent=time.time())
        self.attempts.append(attempt)
        try:
            sender = await self._client(client)
            receipt = await sender.execute(
                Tank,
                command.tank,
                _COMMANDS[command.name](**command.data),
                command_id=command.command_id,
                timeout=timeout,
            )
        except Rejected as refusal:
            attempt.outcome, attempt.reason = "refused", str(refusal)
        except TimeoutError:
            attempt.reason = "time-out"
        except CommandError as error:
            attempt.reason = error.type
            self.problems[f"command error {error.type}: {error.message[:80]}"] += 1
        except (LogError, ConnectionError, nats.errors.Error) as error:
            attempt.reason = type(error).__name__
            self.problems[f"{type(error).__name__}: {str(error)[:80]}"] += 1
        else:
            attempt.outcome = "acknowledged"
            attempt.version, attempt.sequence, attempt.partition = receipt.version, receipt.sequence, receipt.partition
            self.acknowledged += 1
        attempt.answered = time.time()
        return attempt

    async def _client(self, index: int) -> Client:
        client = self._clients[index]
        if client._connection.is_closed:
            self.problems["a client's connection was closed for good"] += 1
            self._clients[index] = await Client.connect(self._app, nats=self._urls[index])
        return self._clients[index]

    async def _lane(self, number: int) -> None:
        chance = random.Random(f"{self._seed}/{number}")
        while not self._stopping.is_set():
            command, client, style = self._command(chance), chance.randrange(4), chance.random()
            if style < 0.10:
                await self._send(command, client, chance.uniform(0.001, 0.2))
                self._spawn(self._repeat(command, chance.randrange(4), chance.uniform(0, 8)))
            elif style < 0.16:
                await self._send(command, client, PATIENCE_S)
                self._spawn(self._repeat(command, chance.randrange(4), chance.uniform(0, 10)))
            elif style < 0.20:
                await asyncio.gather(
                    self._send(command, client, PATIENCE_S),
                    self._send(command, (client + 1) % 4, PATIENCE_S),
                )
            elif style < 0.24:
                self._spawn(self._late(command, client, chance.uniform(1, 8)))
            else:
                sent = await self._send(command, client, chance.choice([3.0, 12.0, PATIENCE_S]))
                if sent.outcome == "unknown" and chance.random() < 0.7:
                    self._spawn(self._repeat(command, chance.randrange(4), chance.uniform(0, 3)))
            await self._rest(chance.uniform(0.0, 0.5))

    async def _repeat(self, command: Attempt, client: int, after: float) -> None:
        await self._rest(after)
        await self._send(command, client, PATIENCE_S)

    async def _late(self, command: Attempt, client: int, after: float) -> None:
        await self._rest(after)
        await self._send(command, client, PATIENCE_S)

    async def _rest(self, seconds: float) -> None:
        """Pause between two commands, except when the load is stopping."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    # actions for the schedule

    def poison(self, choice: int) -> None:
        """Let one projection fail on one tank, by a command that is accepted at any level."""
        chance = random.Random(choice)
        command = self._command(
            chance, name=chance.choice(["Mark", "Burst"]), tank=_tank(chance, 0.8), poison=PROJECTIONS[choice % 3]
        )
        self._spawn(self._insist(command, choice % 4))

    async def _insist(self, command: Attempt, client: int) -> None:
        sent = await self._send(command, client, PATIENCE_S)
        while sent.outcome == "unknown" and not self._stopping.is_set():
            sent = await self._send(command, client, PATIENCE_S)

    async def publish_garbage(self, choice: int) -> None:
        """Publish bytes that are not a commit, on subjects that no tank has."""
        assert self._nats is not None
        chance = random.Random(choice)
        name = f"garbage-{choice}"
        right, event = partition_of(name, 64), f"{self.app_name}.evt"
        stream = self._nats.jetstream(timeout=5)
        for subject, payload in [
            (f"{event}.{right}.Tank.{name}", chance.randbytes(chance.randrange(1, 200))),
            (f"{event}.{right}.Tank.{name}-empty", b""),
            (f"{event}.{right}.Tank.{name}", b"[]"),
            (f"{event}.{right}.Tank.{name}", b'[{"type": "Filled"}]'),
            (f"{event}.{right}.Nothing.{name}", b"[]"),
            (f"{event}.{(right + 1) % 64}.Tank.{name}", b'{"torn'),
            (f"{event}.{name}", b"short"),
            (f"{event}.x.Tank.{name}", b"\x00\xff"),
            (f"{event}.{right}.Tank.{name}.more", b"long"),
        ]:
            sequence = None
            try:
                sequence = (await stream.publish(subject, payload)).seq
            except (nats.errors.Error, TimeoutError, ConnectionError):
                pass  # it may have been stored or not
            self.garbage.append(Garbage(subject, payload, sequence))

    async def send_deputies(self, choice: int) -> None:
        """Send requests whose answers would go to subjects that a sender may not publish to.

        Their commands are recorded nowhere: the checker finds each that takes effect, and each message that no sender
        has published.
        """
        assert self._nats is not None
        app, name = self.app_name, f"deputy-{choice}"
        command = {"aggregate": "Tank", "id": name, "command": "Fill", "data": {"amount": 1, "note": name}}
        requests = [
            (f"{app}.cmd", orjson.dumps(command)),
            (f"{app}.cmd.{partition_of(name, 64)}", orjson.dumps(command)),
            (f"{app}.cmd", b"no request"),
            (f"{app}.svc.status", b""),
            (f"{app}.svc.limits", b""),
        ]
        for subject, payload in requests:
            for reply in (
                f"{app}.evt.{partition_of(name, 64)}.Tank.{name}",
                f"{app}.snap.{partition_of(name, 64)}.Tank.{name}",
                f"$KV.{app}-leases.w.{name}",
                f"$JS.API.STREAM.PURGE.{app}",
                f"{app}.inbox.service.{name}.1",
            ):
                try:
                    await self._nats.publish(subject, payload, reply=reply)
                except (nats.errors.Error, ConnectionError):
                    self.problems["a deputy's request was not sent"] += 1


async def _ignore(_error: Exception) -> None:
    """Take the error, which nats-py would print otherwise."""
