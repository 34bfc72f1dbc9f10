"""How busy a gateway is, as the detector of pressure measures it, at an interval of its own."""

from __future__ import annotations

import asyncio

from kernel.actors.snapshots import NO_SNAPSHOTS
from kernel.commands.admission import Admission
from kernel.commands.gateway import CommandGateway
from kernel.commands.replies import ReplyGuard
from kernel.governance.governor import Governor
from kernel.log import MemoryLog
from kernel.settings import Commands, Passivation
from kernel.transport.inboxes import ReplyFilter
from kernel.transport.outbox import Outbox
from tests.apps import notebooks


class Sent:
    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def send(self, frames: bytes) -> None:
        self.frames.append(frames)

    def fits(self, *_message: bytes) -> bool:
        return True


async def test_the_slowest_append_counts_once_and_until_it_is_measured() -> None:
    """Also where the governor, which has a count of its own, has looked in between."""
    app, log, sent = notebooks("books"), MemoryLog("books"), Sent()
    outbox = Outbox(sent)
    gateway = CommandGateway(app, log, outbox, lambda _partition: True, Passivation(), NO_SNAPSHOTS)
    guard = ReplyGuard(ReplyFilter(("_INBOX",), ()))
    admission = Admission(app, log.subjects, outbox, gateway, Governor(app), Commands(), guard)
    admission.assign(frozenset(range(log.subjects.partitions)))
    request = b'{"aggregate":"Notebook","id":"n","command":"Note","data":{"text":"a"}}'
    admission.receive(b"books.cmd", b"_INBOX.a.1", request, None)
    async with asyncio.timeout(10):
        while not sent.frames:
            await asyncio.sleep(0)
    gateway.slowest_append = 0.0  # as the governor does each second
    pending, slowest = gateway.measure_load()
    assert (pending, slowest > 0) == (0, True)
    assert gateway.measure_load() == (0, 0.0)
    gateway.close()
