"""The rows about policies: event, policy, command, receipt, beside the same written by hand."""

from __future__ import annotations

import asyncio
import shutil
import time
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from aggregates import Aggregate, Meta, Policy, Reactions, Send, applies, command, event, handles, reacts
from aggregates.commit import decode
from benchmarks import places
from benchmarks.report import Row
from benchmarks.rounds import in_turns, medians, percentiles, rounded
from kernel import App, Client, CommandMessage, Service
from kernel.assembly import Parts
from kernel.settings.sources import settings_of

EVENTS, IN_FLIGHT, ROUNDS = 10_000, 256, 3
SAMPLES, EACH_S = 400, 0.005
"""Events whose way is timed, one each so many seconds."""
AIM = 0.5
_numbers = count(1)


@event
class Ticked:
    number: int


@command
class Tick:
    number: int


class Source(Aggregate):
    number: int = 0

    @handles
    def tick(self, command: Tick) -> Ticked:
        return Ticked(command.number)

    @applies
    def ticked(self, event: Ticked) -> None:
        self.number = event.number


@event
class Tocked:
    number: int


@command
class Tock:
    number: int


class Target(Aggregate):
    number: int = 0

    @handles
    def tock(self, command: Tock) -> Tocked:
        return Tocked(command.number)

    @applies
    def tocked(self, event: Tocked) -> None:
        self.number = event.number


class Answer(Policy, of=Source, start="beginning"):
    @reacts
    def ticked(self, event: Ticked, meta: Meta) -> Reactions:
        return Send(Target, meta.aggregate_id, Tock(event.number))


_decode_event = msgspec.json.Decoder(Ticked).decode


async def measure(path: Path) -> list[Row]:
    """Measure events that wait already, and then single ones."""
    async with places.nats(path / "nats") as url:
        ways = {
            "policy": partial(_throughput, url, path, by_hand=False),
            "by hand": partial(_throughput, url, path, by_hand=True),
        }
        figures = await in_turns("events to receipts of the commands that follow", ways, ROUNDS)
        found = medians(figures)
        policy = await _latency(url, path, by_hand=False)
        hand = await _latency(url, path, by_hand=True)
    ratio = found["policy"] / found["by hand"]
    extra: dict[str, Any] = {"ratio_to_the_loop": round(ratio, 2), "rounds": rounded(figures)}
    return [
        Row(
            f"policy: {EVENTS:,} events that wait, each leading to a command of another aggregate, until its receipt",
            "commands/s",
            found["policy"],
            aim=f">= {AIM:g} of the loop written by hand",
            met=ratio >= AIM,
            rival=found["by hand"],
            rival_is=f"by hand, on the same connection: read, decide, request, {IN_FLIGHT} in flight; nothing kept",
            extra=extra,
        ),
        Row(
            "policy: from the receipt of a command to the event that follows from its event, one at a time",
            "ms",
            policy["p50_ms"],
            rival=hand["p50_ms"],
            rival_is="by hand, on the same connection",
            extra={"p99_ms": policy["p99_ms"], "by_hand_p99_ms": hand["p99_ms"]},
        ),
    ]


def _app(by_hand: bool) -> App:
    name = f"react{next(_numbers)}"
    return App(name, aggregates=[Source, Target], policies=[] if by_hand else [Answer])


async def _throughput(url: str, path: Path, *, by_hand: bool) -> float:
    """Return the commands per second that follow from events which are in the log already."""
    app = _app(by_hand)
    data = path / app.name
    settings = settings_of({"connection.servers": [url], "database.url": f"sqlite:///{data}.db", "data": data})
    filling = App(app.name, aggregates=[Source, Target])
    async with Service(filling, settings), await Client.connect(filling, nats=url) as client:
        ticks = (CommandMessage(Source, f"s{number}", Tick(number)) for number in range(EVENTS))
        async for _ in client.execute_many(ticks):
            pass
    begun = time.perf_counter()
    async with Service(app, settings) as service:
        begun = time.perf_counter()
        if by_hand:
            await _react_by_hand(service.parts, EVENTS)
        else:
            while (await service.parts.log.info()).last < 2 * EVENTS:  # noqa: ASYNC110 - it lasts moments
                await asyncio.sleep(0.005)
        took = time.perf_counter() - begun
    shutil.rmtree(data, ignore_errors=True)
    return EVENTS / took


async def _react_by_hand(parts: Parts, events: int | None) -> None:
    """Read, decide, request: what a policy does, without its promises."""
    reader = await parts.log.read(0)
    slots, sending = asyncio.Semaphore(IN_FLIGHT), set[asyncio.Task[None]]()
    done = 0

    async def send(request: dict[str, Any]) -> None:
        try:
            await parts.sender.send(request)
        finally:
            slots.release()

    try:
        while events is None or done < events:
            for stored in (await reader.next(500)).commits:
                address = parts.log.subjects.parse(stored.subject)
                if address.aggregate != "Source":
                    continue
                for envelope in decode(stored.payload):
                    event = _decode_event(envelope.data)
                    await slots.acquire()
                    request = {
                        "aggregate": "Target", "id": address.id, "command": "Tock", "data": Tock(event.number),
                        "command_id": envelope.id, "causation_id": envelope.id,
                    }  # fmt: skip
                    task = asyncio.create_task(send(request))
                    sending.add(task)
                    task.add_done_callback(sending.discard)
                    done += 1
        await asyncio.gather(*sending)
    finally:
        for task in sending:
            task.cancel()
        await reader.close()


async def _latency(url: str, path: Path, *, by_hand: bool) -> dict[str, float]:
    """Return how long the event that follows took to be in the log, from the receipt of the first command on."""
    app = _app(by_hand)
    data = path / app.name
    settings = settings_of({"connection.servers": [url], "database.url": f"sqlite:///{data}.db", "data": data})
    sent: dict[str, float] = {}
    took: list[float] = []
    async with Service(app, settings) as service, await Client.connect(app, nats=url) as client:
        hand = asyncio.create_task(_react_by_hand(service.parts, None)) if by_hand else None
        reading = asyncio.create_task(_note_arrivals(client, sent, took))
        for number in range(SAMPLES):
            await client.execute(Source, f"s{number}", Tick(number))
            sent[f"s{number}"] = time.perf_counter()
            await asyncio.sleep(EACH_S)
        await reading
        if hand is not None:
            hand.cancel()
            await asyncio.gather(hand, return_exceptions=True)
    shutil.rmtree(data, ignore_errors=True)
    return percentiles(took)


async def _note_arrivals(client: Client, sent: dict[str, float], took: list[float]) -> None:
    reader = await client.log.read(0)
    while len(took) < SAMPLES:
        for stored in (await reader.next(100)).commits:
            address = client.log.subjects.parse(stored.subject)
            if address.aggregate == "Target":
                took.append(max(0.0, time.perf_counter() - sent.get(address.id, time.perf_counter())))
    await reader.close()
