"""What several commands in one NATS message could save: `python -m benchmarks.batching`. Linux only.

It prints the processor time of a command as it is sent now, in the client and in the service, and beside it the time
that frames, requests and answers take, one by one and as a batch. The difference of the latter two is all that a batch
could save: what lies between, deciding and appending, is the same.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import clients
from examples.bank import app
from kernel.protocol import CommandRequest, Receipt, decode_answer, decode_request, encode_receipt
from kernel.transport.connection import NatsConnection, _FrameParser, publish_frame

SECONDS = 4.0
BATCH, ROUNDS = 64, 400
REQUEST = (
    b'{"aggregate":"Account","id":"a%d","command":"Deposit","data":{"cents":1},'
    b'"command_id":"0193f3a0-1234-7abc-8def-0123456789ab"}'
)
_decode_requests = msgspec.json.Decoder(list[CommandRequest]).decode
_decode_answers = msgspec.json.Decoder(list[dict[str, Receipt]]).decode


async def now(path: Path) -> None:
    """Print the processor time of a command in each process."""
    async with clients.load(app, "examples.bank:app", path, sync=False) as (load, _):
        service = clients.process_of(path, app.name)
        before = time.process_time(), _cpu(service)
        _, took = await load.full(SECONDS)
        spent = time.process_time() - before[0], _cpu(service) - before[1]
    for where, seconds in zip(("client", "service"), spent, strict=True):
        print(f"  {where}: {1e6 * seconds / len(took):.1f} us of processor time for each command")


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def framing() -> None:
    """Print what frames, requests and answers take, both ways."""
    requests = [REQUEST % number for number in range(BATCH)]
    answers = [encode_receipt(Receipt(number, 1_000_000 + number, 19, "0193f3a0-1234-7abc")) for number in range(BATCH)]
    connection = NatsConnection()
    parser = connection._ps
    assert isinstance(parser, _FrameParser)
    heard: list[bytes] = []

    def listen(_subject: bytes, _reply: bytes, payload: bytes, _headers: bytes | None) -> None:
        heard.append(payload)

    connection.listeners[b"1"] = listen

    async def single(payloads: list[bytes], decode: Callable[[bytes], Any]) -> None:
        frames = [publish_frame(b"bank.cmd.19", payload, reply=b"_INBOX.abcdefghijkl.1234") for payload in payloads]
        arrived = [
            b"MSG bank.cmd.19 1 _INBOX.abcdefghijkl.1234 %d\r\n%b\r\n" % (len(payload), payload) for payload in payloads
        ]
        b"".join(frames)
        heard.clear()
        await parser.parse(b"".join(arrived))
        for payload in heard:
            decode(payload)

    async def batched(payloads: list[bytes], decode: Callable[[bytes], Any]) -> None:
        await single([b"[%b]" % b",".join(payloads)], decode)

    for what, payloads, one, many in (
        ("requests", requests, decode_request, _decode_requests),
        ("answers", answers, decode_answer, _decode_answers),
    ):
        singly = await _time(lambda one=one, payloads=payloads: single(payloads, one))  # type: ignore[misc]
        together = await _time(lambda many=many, payloads=payloads: batched(payloads, many))  # type: ignore[misc]
        print(f"  {what}: {singly:.2f} us each, one by one; {together:.2f} us each, {BATCH} in a message")


async def _time(work: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(ROUNDS):
            await work()
        best = min(best, time.perf_counter() - begin)
    return 1e6 * best / ROUNDS / BATCH


async def main() -> None:
    """Print both."""
    print("A command, as it is sent now:")
    with tempfile.TemporaryDirectory() as folder:
        await now(Path(folder))
    print("Written to frames, parsed and decoded, at both ends together:")
    await framing()


if __name__ == "__main__":
    asyncio.run(main())
