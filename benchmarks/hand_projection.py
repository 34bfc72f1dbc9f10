"""Live projection by hand: the fastest pull we know, a fold without a framework, a bulk write in a thread."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import orjson
from nats.aio.msg import Msg

from benchmarks.hand_fold import Fold, Postgresql, Sqlite
from kernel.transport.connection import NatsConnection, publish_frame

PULL, BATCH = 4_000, 20_000


async def run(
    connection: NatsConnection, stream: str, last: int, target: Sqlite | Postgresql, *, plain: bool = False
) -> float:
    """Project the stream up to sequence `last`; return events per second.

    Args:
        plain: receive by nats-py's own subscription, instead of the kernel's faster parser.
    """
    config = {"deliver_policy": "all", "ack_policy": "none", "mem_storage": True, "inactive_threshold": 60_000_000_000}
    request = orjson.dumps({"stream_name": stream, "config": config})
    consumer = orjson.loads((await connection.request(f"$JS.API.CONSUMER.CREATE.{stream}", request)).data)["name"]
    inbox = connection.new_inbox()
    next_pull = publish_frame(
        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}".encode(),
        orjson.dumps({"batch": PULL, "expires": 30_000_000_000}),
        reply=inbox.encode(),
    )
    arrived = asyncio.Event()
    buffer: list[bytes] = []
    got = 0
    sequence = b""

    def receive(_subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
        nonlocal got, sequence
        if headers is not None and headers[8:9] == b" ":
            return  # the pull request has expired
        buffer.append(payload)
        sequence = reply
        got += 1
        if got % PULL == 0:
            connection.send(next_pull)
        arrived.set()

    async def receive_plain(message: Msg) -> None:
        if message.reply:
            receive(b"", message.reply.encode(), message.data, None)

    if plain:
        subscription = await connection.subscribe(
            inbox, cb=receive_plain, pending_msgs_limit=-1, pending_bytes_limit=-1
        )
        stop = subscription.unsubscribe
    else:
        stop = await connection.listen(inbox, receive)
    loop, fold, events, waiting = asyncio.get_running_loop(), Fold(), 0, 0
    writing: asyncio.Future[None] | None = None
    with ThreadPoolExecutor(1) as pool:
        started = time.perf_counter()
        connection.send(next_pull * 2)
        at = 0
        while at < last:
            await arrived.wait()
            arrived.clear()
            taken = buffer[:]
            buffer.clear()
            if taken:
                at = int(sequence.split(b".")[5])
                events += fold.take(taken)
                waiting += len(taken)
            if waiting >= BATCH or at >= last:
                write = fold.write(target.prepare)
                if writing is not None:
                    await writing
                writing = loop.run_in_executor(pool, target.commit, write, at)
                waiting = 0
        if writing is not None:
            await writing
        rate = events / (time.perf_counter() - started)
    await stop()
    await connection.request(f"$JS.API.CONSUMER.DELETE.{stream}.{consumer}", b"")
    return rate
