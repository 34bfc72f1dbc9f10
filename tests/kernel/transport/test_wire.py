"""The short way through nats-py: what it leans on is there, and it reads what nats-py reads."""

from __future__ import annotations

import asyncio
import tomllib
from importlib.metadata import version
from inspect import iscoroutinefunction, signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.protocol import parser
from nats.protocol.parser import Parser

from kernel.transport.connection import NatsConnection, _FrameParser, header_of, publish_frame, status_of
from kernel.transport.dial import connect

# what kernel/transport/connection.py leans on


def test_the_pinned_version_of_nats_py_is_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    pins = [line for line in project["dependencies"] if line.startswith("nats-py")]
    assert pins == [f"nats-py[nkeys]=={version('nats-py')}"]


def test_the_inner_names_of_nats_py_are_there() -> None:
    client = Client()
    assert client._pending == []
    assert client._pending_data_size == 0
    assert client._sid == 0
    assert isinstance(client._ps, Parser)
    assert hasattr(client, "_flush_queue")
    assert iscoroutinefunction(client._process_msg)
    assert list(signature(client._process_msg).parameters) == ["sid", "subject", "reply", "data", "headers"]
    assert isinstance(NatsConnection()._ps, _FrameParser)


def test_the_inner_names_of_nats_pys_parser_are_there() -> None:
    made = Parser(None)
    assert made.buf == bytearray()
    assert made.state == parser.AWAITING_CONTROL_LINE
    assert iscoroutinefunction(made.parse)
    made.buf.extend(b"MSG")
    made.reset()
    assert made.buf == bytearray()
    assert _FrameParser(None).resets == 1


async def test_a_connection_uses_the_frame_parser_and_its_flush_queue(nats_url: str) -> None:
    connection = await connect(nats_url, name="inner")
    assert type(connection._ps) is _FrameParser
    assert isinstance(connection._flush_queue, asyncio.Queue)
    before = connection._sid
    stop = await connection.listen("inner.test", lambda *_: None)
    assert connection._sid == before + 1
    assert list(connection.listeners) == [str(before + 1).encode()]
    await stop()
    assert connection.listeners == {}
    await connection.close()


# frames

Event = tuple[Any, ...]
LISTENED = 7


class Recorder:
    """Stands where a parser expects its client, and writes down what the parser says."""

    def __init__(self) -> None:
        self.heard: list[Event] = []
        self.listeners = {str(LISTENED).encode(): self._listen}

    def _listen(self, subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
        self.heard.append((LISTENED, bytes(subject), bytes(reply), bytes(payload), headers and bytes(headers)))

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self.heard.append((sid, bytes(subject), bytes(reply), bytes(data), headers and bytes(headers)))

    async def _process_ping(self) -> None:
        self.heard.append(("ping",))

    async def _process_pong(self) -> None:
        self.heard.append(("pong",))

    async def _process_err(self, message: str) -> None:
        self.heard.append(("error", message))

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.heard.append(("info", info))


tokens = st.text("abcXYZ019_-%$", min_size=1, max_size=12)
names = st.lists(tokens, min_size=1, max_size=4).map(lambda parts: ".".join(parts).encode())
payloads = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\r\n", b"PING\r\n", b"MSG a 7 3\r\nabc\r\n", b"HMSG a 7 12 12\r\n", b"x" * 5000]),
)
header_blocks = st.one_of(
    st.sampled_from([b"NATS/1.0\r\n\r\n", b"NATS/1.0 100 Idle Heartbeat\r\n\r\n", b"NATS/1.0 404\r\n\r\n"]),
    st.lists(st.tuples(tokens, tokens), min_size=1, max_size=3).map(
        lambda pairs: b"NATS/1.0\r\n" + b"".join(f"{k}: {v}\r\n".encode() for k, v in pairs) + b"\r\n"
    ),
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, Event]:
    subject, sid, payload = draw(names), draw(st.sampled_from([1, LISTENED, 12345])), draw(payloads)
    reply = draw(st.one_of(st.just(b""), names))
    headers = draw(st.one_of(st.none(), header_blocks))
    words = [subject, b"%d" % sid, *([reply] if reply else [])]
    if headers is None:
        words.append(b"%d" % len(payload))
        frame = b"MSG " + b" ".join(words) + b"\r\n" + payload + b"\r\n"
    else:
        words += [b"%d" % len(headers), b"%d" % (len(headers) + len(payload))]
        frame = b"HMSG " + b" ".join(words) + b"\r\n" + headers + payload + b"\r\n"
    return frame, (sid, subject, reply, payload, headers)


controls = st.sampled_from(
    [
        (b"PING\r\n", ("ping",)),
        (b"PONG\r\n", ("pong",)),
        (b"+OK\r\n", None),
        (b"-ERR 'Stale Connection'\r\n", ("error", "'stale connection'")),
        (b'INFO {"server_id":"x"}\r\n', ("info", {"server_id": "x"})),
    ]
)


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted({cut % (len(stream) + 1) for cut in cuts}), len(stream)]
    return [stream[start:end] for start, end in pairwise(places)]


def heard_by(made: type[Parser], chunks: list[bytes]) -> list[Event]:
    async def feed() -> list[Event]:
        recorder = Recorder()
        reader = made(recorder)
        for chunk in chunks:
            await reader.parse(chunk)
        assert not reader.buf
        return recorder.heard

    return asyncio.run(feed())


@settings(max_examples=150)
@given(
    frames=st.lists(st.one_of(messages(), messages(), controls), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 1_000_000), max_size=30),
)
def test_frames_cut_anywhere_are_heard_as_nats_py_hears_them(
    frames: list[tuple[bytes, Event | None]], cuts: list[int]
) -> None:
    stream = b"".join(frame for frame, _ in frames)
    expected = [event for _, event in frames if event is not None]
    chunks = pieces(stream, cuts)
    assert heard_by(_FrameParser, chunks) == expected
    assert heard_by(Parser, chunks) == expected


def test_frames_that_come_byte_by_byte_are_heard() -> None:
    stream = b"MSG a.b 1 r 5\r\nhello\r\nPING\r\nHMSG c 7 12 14\r\nNATS/1.0\r\n\r\nhi\r\nPONG\r\nMSG d 7 0\r\n\r\n"
    assert heard_by(_FrameParser, [stream[place : place + 1] for place in range(len(stream))]) == [
        (1, b"a.b", b"r", b"hello", None),
        ("ping",),
        (7, b"c", b"", b"hi", b"NATS/1.0\r\n\r\n"),
        ("pong",),
        (7, b"d", b"", b"", None),
    ]


@pytest.mark.parametrize("frame", [b"PING\r\n", b"MSG a 1 2\r\nhi\r\n"], ids=["control", "message"])
async def test_a_connection_that_is_replaced_meanwhile_leaves_nothing_behind(frame: bytes) -> None:
    recorder = Recorder()
    reader = _FrameParser(recorder)

    async def replaced(*_event: Any) -> None:
        reader.reset()

    recorder._process_ping = recorder._process_msg = replaced  # type: ignore[method-assign]
    await reader.parse(frame + b"MSG old 7 3\r\nold\r\nMSG cut 7 9\r\nha")
    assert reader.buf == bytearray()
    await reader.parse(b"MSG new 7 3\r\nnew\r\n")
    assert recorder.heard == [(7, b"new", b"", b"new", None)]


# over a real connection


@pytest.mark.parametrize("headers", [b"", b"NATS/1.0\r\nKind: big\r\n\r\n"], ids=["bare", "headers"])
async def test_big_payloads_arrive_whole(nats_url: str, app_name: str, headers: bytes) -> None:
    sender, receiver = await connect(nats_url, name="sender"), await connect(nats_url, name="receiver")
    heard: list[Event] = []
    complete = asyncio.Event()

    def listener(*event: Any) -> None:
        heard.append(event)
        if len(heard) == 5:
            complete.set()

    stop = await receiver.listen(f"{app_name}.>", listener)
    await receiver.flush()
    payloads = [bytes([number]) * 900_000 for number in range(5)]
    subject = f"{app_name}.x".encode()
    for payload in payloads:
        sender.send(publish_frame(subject, payload, reply=b"answer.here", headers=headers))
    async with asyncio.timeout(30):
        await complete.wait()
    assert heard == [(subject, b"answer.here", payload, headers or None) for payload in payloads]
    await stop()
    await sender.close()
    await receiver.close()


async def test_listeners_and_ordinary_subscriptions_live_side_by_side(nats_url: str, app_name: str) -> None:
    connection = await connect(nats_url, name="both")
    heard: list[bytes] = []
    stop = await connection.listen(f"{app_name}.*", lambda subject, _reply, payload, _headers: heard.append(payload))
    ordinary = await connection.subscribe(f"{app_name}.*")
    await connection.publish(f"{app_name}.a", b"one", headers={"Kind": "small"})
    message = await ordinary.next_msg(timeout=10)
    assert (message.data, message.headers, heard) == (b"one", {"Kind": "small"}, [b"one"])
    await stop()
    await connection.publish(f"{app_name}.a", b"two")
    assert (await ordinary.next_msg(timeout=10)).data == b"two"
    assert heard == [b"one"]
    await connection.close()


async def test_no_server_is_a_connection_error_that_names_the_address() -> None:
    with pytest.raises(ConnectionError, match=r"nats://127\.0\.0\.1:1"):
        await connect("nats://127.0.0.1:1", name="nobody", connect_timeout=0.5)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (None, 0),
        (b"NATS/1.0\r\n\r\n", 0),
        (b"NATS/1.0\r\nStatus: 404\r\n\r\n", 0),
        (b"NATS/1.0 503\r\n\r\n", 503),
        (b"NATS/1.0 100 Idle Heartbeat\r\n\r\n", 100),
        (b"NATS/1.0 bad\r\n\r\n", 0),
    ],
)
def test_a_status_is_read_from_the_version_line(headers: bytes | None, status: int) -> None:
    assert status_of(headers) == status


def test_a_header_is_found_by_its_whole_name() -> None:
    headers = b"NATS/1.0\r\nNats-Sequence: 12\r\nNats-Num-Pending:3\r\nX-Nats-Subject: no\r\nNats-Subject: a.b\r\n\r\n"
    assert header_of(headers, b"Nats-Sequence") == b"12"
    assert header_of(headers, b"Nats-Num-Pending") == b"3"
    assert header_of(headers, b"Nats-Subject") == b"a.b"
    assert header_of(headers, b"Nats") is None
