"""Snapshots of streams by JetStream's own API, which `nats stream backup` and `nats stream restore` use too."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

CHUNK = 64 * 1024


@dataclass(frozen=True)
class Snapshot:
    """A stream's configuration and state, as the API gave them, and its packed contents."""

    config: dict[str, Any]
    state: dict[str, Any]
    chunks: list[bytes]


async def take_snapshot(url: str, stream: str) -> Snapshot:
    """Take a snapshot of a stream, which may be in use."""
    client = await nats.connect(url)
    chunks: list[bytes] = []
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def take(message: Msg) -> None:
        if message.data:
            chunks.append(message.data)
            if message.reply:
                await message.respond(b"")  # the server sends no more until it knows that we keep up
        elif not done.done():
            done.set_result(None)  # an empty message is the end

    inbox = client.new_inbox()
    await client.subscribe(inbox, cb=take)
    request = {"deliver_subject": inbox, "no_consumers": True, "chunk_size": CHUNK}
    try:
        answer = await _call(client, f"$JS.API.STREAM.SNAPSHOT.{stream}", json.dumps(request).encode())
        async with asyncio.timeout(20):
            await done
    finally:
        await client.close()
    return Snapshot(answer["config"], answer["state"], chunks)


async def restore_snapshot(url: str, snapshot: Snapshot) -> None:
    """Make a stream from a snapshot; there must be none of its name."""
    client = await nats.connect(url)
    request = json.dumps({"config": snapshot.config, "state": snapshot.state}).encode()
    try:
        answer = await _call(client, f"$JS.API.STREAM.RESTORE.{snapshot.config['name']}", request)
        for chunk in snapshot.chunks:
            await client.request(answer["deliver_subject"], chunk, timeout=10)
        await _call(client, answer["deliver_subject"], b"")
    finally:
        await client.close()


async def _call(client: Client, subject: str, request: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((await client.request(subject, request, timeout=20)).data)
    assert "error" not in answer, answer["error"]
    return answer
