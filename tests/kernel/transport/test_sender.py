"""The sender of commands: what was sent twice has one outcome."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from aggregates import Rejected
from kernel.protocol import Receipt, encode_error, encode_receipt
from kernel.transport import sender
from kernel.transport.connection import NatsConnection, publish_frame
from kernel.transport.dial import connect
from kernel.transport.sender import CommandSender


@pytest.fixture
async def connection(nats_url: str) -> AsyncIterator[NatsConnection]:
    connected = await connect(nats_url, name="sender")
    yield connected
    await connected.close()


REQUEST = {"aggregate": "Tank", "id": "a", "command": "Fill", "data": {}, "command_id": "c-1"}


async def _answering(connection: NatsConnection, subject: str, answers: list[bytes], first: int) -> CommandSender:
    """Return a sender whose service answers the copies of a command all at once, when the last has come."""
    replies: list[bytes] = []

    def take(_subject: bytes, reply: bytes, _payload: bytes, _headers: bytes | None) -> None:
        replies.append(reply)
        if len(replies) == len(answers):
            order = [first, *(place for place in range(len(answers)) if place != first)]
            for place in order:
                connection.send(publish_frame(replies[place], answers[place]))

    await connection.listen(subject, take)
    made = CommandSender(connection, lambda _aggregate, _id: subject.encode())
    await made.listen()
    return made


async def test_a_command_is_not_rejected_while_an_earlier_copy_takes_effect(
    connection: NatsConnection, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "RESEND_S", 0.3)
    answers = [encode_receipt(Receipt(1, 7, 0, "c-1")), encode_error("rejected", "it is full")]
    sending = await _answering(connection, f"{app_name}.cmd", answers, first=1)
    assert (await sending.send(REQUEST)).sequence == 7


async def test_a_command_of_which_all_copies_are_rejected_is_rejected(
    connection: NatsConnection, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "RESEND_S", 0.3)
    answers = [encode_error("rejected", "it was full"), encode_error("rejected", "it is full")]
    sending = await _answering(connection, f"{app_name}.cmd", answers, first=1)
    with pytest.raises(Rejected, match="it is full"):
        await sending.send(REQUEST)
