"""Appending by hand and by nats-py: what `kernel.log` is measured against."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass

import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg

from aggregates.commit import Decision, encode, timestamp
from aggregates.context import uuid7
from aggregates.declaration import EventType
from examples.bank import Deposited
from kernel.log import JetStreamLog

EXPECTED = "Nats-Expected-Last-Subject-Sequence"
AGGREGATES = 1_000
WINDOW = 4_000
GROUP = 200


@dataclass(slots=True)
class Task:
    """The work of every way: append the payloads to the subjects, round robin, each after its subject's last one."""

    subjects: list[str]
    last: list[int]
    payloads: list[bytes]


def payloads(count: int) -> list[bytes]:
    """Return commits of one event, no two alike."""
    deposited = EventType(Deposited, "Deposited", 1)
    return [
        encode(
            "/bench/Account",
            f"account-{number}",
            [Decision(uuid7(), [deposited.encode(Deposited(number))])],
            1,
            timestamp(),
        )
        for number in range(count)
    ]


async def ours(log: JetStreamLog, task: Task) -> float:
    """Append with the kernel's log, one commit under way for each aggregate."""
    finished = asyncio.get_running_loop().create_future()
    left = len(task.payloads)
    size = len(task.subjects)

    def go_on(place: int, number: int) -> None:
        future = log.append(task.subjects[place], task.last[place], task.payloads[number])
        future.add_done_callback(lambda done: stored(place, number, done))

    def stored(place: int, number: int, done: asyncio.Future[int]) -> None:
        nonlocal left
        task.last[place] = done.result()
        left -= 1
        if number + size < len(task.payloads):
            go_on(place, number + size)
        elif not left:
            finished.set_result(None)

    started = time.perf_counter()
    for place in range(size):
        go_on(place, place)
    await finished
    return len(task.payloads) / (time.perf_counter() - started)


async def by_hand(client: Client, task: Task) -> float:
    """Publish with plain nats-py and count the answers in one inbox, several thousand under way.

    With one sender the stream's next sequence is known beforehand, so no append waits for the answer to its subject's
    last commit. The server still checks every one.
    """
    inbox = client.new_inbox()
    room = asyncio.Event()
    sent = acked = 0
    known = max(task.last)

    async def answered(message: Msg) -> None:
        nonlocal acked
        answer = orjson.loads(message.data)
        assert "error" not in answer, answer
        acked += 1
        room.set()

    answers = await client.subscribe(inbox, cb=answered, pending_msgs_limit=-1, pending_bytes_limit=-1)
    size = len(task.subjects)
    started = time.perf_counter()
    for number, payload in enumerate(task.payloads):
        place = number % size
        await client.publish(task.subjects[place], payload, inbox, headers={EXPECTED: str(task.last[place])})
        sent += 1
        task.last[place] = known + sent
        while sent - acked >= WINDOW:
            room.clear()
            await room.wait()
    while acked < sent:
        room.clear()
        await room.wait()
    rate = len(task.payloads) / (time.perf_counter() - started)
    await answers.unsubscribe()
    return rate


async def by_publish_async(client: Client, task: Task) -> float:
    """Publish with nats-py's own pipelining, one message under way for each aggregate."""
    stream = client.jetstream()
    size = len(task.subjects)

    async def append_in_turn(place: int) -> None:
        for number in range(place, len(task.payloads), size):
            headers = {EXPECTED: str(task.last[place])}
            future = await stream.publish_async(task.subjects[place], task.payloads[number], headers=headers)
            task.last[place] = (await future).seq

    started = time.perf_counter()
    await asyncio.gather(*(append_in_turn(place) for place in range(size)))
    return len(task.payloads) / (time.perf_counter() - started)


async def by_awaiting(client: Client, task: Task) -> float:
    """Publish and wait, one message after the other."""
    stream = client.jetstream()
    started = time.perf_counter()
    for number, payload in enumerate(task.payloads):
        place = number % len(task.subjects)
        headers = {EXPECTED: str(task.last[place])}
        task.last[place] = (await stream.publish(task.subjects[place], payload, headers=headers)).seq
    return len(task.payloads) / (time.perf_counter() - started)


async def by_batches(client: Client, task: Task) -> float:
    """Publish atomic batches with plain nats-py, one under way for each group of aggregates."""
    inbox = client.new_inbox()
    answers: dict[str, asyncio.Future[int]] = {}

    async def answered(message: Msg) -> None:
        answer = orjson.loads(message.data)
        assert "error" not in answer, answer
        answers.pop(message.subject).set_result(answer["seq"])

    subscription = await client.subscribe(f"{inbox}.*", cb=answered)
    size = len(task.subjects)

    async def group(start: int) -> None:
        for first in range(start, len(task.payloads), size):
            batch = uuid.uuid4().hex
            reply = f"{inbox}.{batch}"
            future = answers[reply] = asyncio.get_running_loop().create_future()
            for step in range(GROUP):
                headers = {
                    EXPECTED: str(task.last[start + step]),
                    "Nats-Batch-Id": batch,
                    "Nats-Batch-Sequence": str(step + 1),
                }
                final = step == GROUP - 1
                if final:
                    headers["Nats-Batch-Commit"] = "1"
                subject, payload = task.subjects[start + step], task.payloads[first + step]
                await client.publish(subject, payload, reply if final else "", headers=headers)
            last = await future
            for step in range(GROUP):
                task.last[start + step] = last - GROUP + 1 + step

    started = time.perf_counter()
    await asyncio.gather(*(group(start) for start in range(0, size, GROUP)))
    rate = len(task.payloads) / (time.perf_counter() - started)
    await subscription.unsubscribe()
    return rate
