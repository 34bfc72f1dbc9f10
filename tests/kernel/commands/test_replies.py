"""The service as deputy: it publishes nothing for a sender who may not publish it himself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nats
import pytest

from kernel import Client, Service
from kernel.partitions.bucket import bucket_of
from kernel.telemetry.metrics import REPLIES_REFUSED
from tests.apps import Note, Notebook, notebooks
from tests.conftest import settings_for

Wait = Callable[..., Any]
COMMAND = {"aggregate": "Notebook", "id": "n", "command": "Note", "data": {"text": "by a deputy"}}


async def test_the_service_is_nobodys_deputy(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    """Commands, requests for the status and for limits, valid and not: none of them reaches a forged subject."""
    app = notebooks(app_name)
    forged = [
        f"{app_name}.evt.0.Notebook.forged",
        f"$KV.{bucket_of(app_name)}.worker.ghost",
        f"$JS.API.STREAM.PURGE.{app_name}",
        f"{app_name}.svc.limits",
        f"{app_name}.inbox.service.AAAAAAAAAAAAAAAAAAAAAA.1",
        "_INBOX.a.>",
        "stranger.inbox",
    ]
    before = REPLIES_REFUSED._value.get()
    async with Service(app, settings_for(tmp_path, nats=nats_url)) as service:
        connection = await nats.connect(nats_url)
        seen: list[str] = []

        async def note(message: Any) -> None:
            seen.append(message.subject)

        for subject in forged:
            await connection.subscribe(subject.replace(".>", ".*"), cb=note)
        await connection.flush()
        requests = [
            (f"{app_name}.cmd", json.dumps(COMMAND).encode()),
            (f"{app_name}.cmd.3", json.dumps(COMMAND).encode()),
            (f"{app_name}.cmd", b"no json"),
            (f"{app_name}.svc.status", b""),
            (f"{app_name}.svc.limits", b'{"set": {"lane": "commands", "rate": 1}}'),
        ]
        for subject, payload in requests:
            for reply in forged:
                await connection.publish(subject, payload, reply=reply)
        await wait_until(lambda: REPLIES_REFUSED._value.get() - before >= len(requests) * len(forged))
        # what was sent before has been handled: the messages of one connection keep their order
        answer = await connection.request(f"{app_name}.cmd", json.dumps({**COMMAND, "id": "m"}).encode(), timeout=5)
        await connection.flush()
        assert json.loads(answer.data)["ok"]["version"] == 1
        # only what this connection has sent itself
        assert [subject for subject in seen if subject != f"{app_name}.svc.limits"] == []
        async with await Client.connect(app, nats=nats_url) as client:
            assert (await client.execute(Notebook, "n", Note("first"))).version == 1, "a dropped command took effect"
        assert (await service.parts.log.info()).commits == 2
        assert service.status()["limits"]["overrides"]["values"] == {}
        await connection.close()
    lines = [record.getMessage() for record in caplog.records if "is not an inbox" in record.getMessage()]
    assert len(lines) == 1
    assert "connection.reply_prefixes" in lines[0]
