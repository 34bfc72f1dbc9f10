"""A NATS connection with a fast path for tens of thousands of messages per second.

nats-py spends most of the time of a message in regular expressions, header objects and per-subscription queues.
`NatsConnection` is nats-py's own client with two additions. Messages of subscriptions made with `listen` go directly
from the socket's buffer to a function, with their headers left as bytes. `send` writes protocol frames that the caller
has built. Connecting, reconnecting, authentication and requests are unchanged, but where the settings demand TLS, the
connection refuses to work without it. It relies on private names of nats-py. The version is therefore pinned, and a
test in `tests/kernel/transport` checks these names.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

ConnectionTrouble = NatsError
"""The base of nats-py's errors: a request failed because of the connection."""
Listener = Callable[[bytes, bytes, bytes, bytes | None], None]
"""Called with subject, reply subject, payload, and the header bytes or None. It must not raise or block."""

logger = logging.getLogger("eskernel.transport")
_M, _H, _MINUS = b"MH-"
PAYLOAD, CONTROL_LINE = "payload", "control line"
CLOSE_S = 2.0
MAX_CONTROL_LINE = 4096
CONTROL_LINE_REST = 32
"""Bytes of a control line beside its subjects: the verb, the sizes and the spaces."""
_TEMPORARY = (
    "authorization violation",
    "authentication expired",
    "authentication revoked",
    "authentication timeout",
    "account authentication expired",
    "maximum connections exceeded",
    "maximum account active connections exceeded",
    "server shutdown",
)
"""Reasons for which a server closes a connection, but after which it may accept a new one."""
_VIOLATIONS = {"maximum payload violation": PAYLOAD, "maximum control line exceeded": CONTROL_LINE}
"""Reasons for which a server closes a connection because of one message: it must not be sent again."""
_DENIED = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"', re.IGNORECASE)
PATIENCE_S = 60.0
"""Violations within this time of each other make the pause before a reconnect longer."""
LONGEST_PAUSE_S = 5.0
LEARN_S, GUESS_S = 10.0, 1.0
"""Seconds for measuring a limit: after a server has named it, and where it is only a guess."""
SUSPECT = 4_096
"""A connection that is lost after more bytes than this were sent at once was perhaps closed for their size."""


class _FrameParser(Parser):
    """Reads complete MSG and HMSG frames by position. nats-py's parser reads all other lines."""

    nc: NatsConnection
    resets = 0

    def reset(self) -> None:
        super().reset()
        self.resets += 1

    async def parse(self, data: bytes = b"") -> None:
        if self.state != AWAITING_CONTROL_LINE:
            await super().parse(data)
            return
        buffer = bytes(self.buf) + data if self.buf else data
        position, length, find, listeners = 0, len(buffer), buffer.find, self.nc.listeners
        resets = self.resets
        while position < length:
            line_end = find(b"\r\n", position)
            if line_end < 0:
                break
            first = buffer[position]
            if first == _M:
                parts = buffer[position + 4 : line_end].split()
                head = 0
                reply = parts[2] if len(parts) == 4 else b""
            elif first == _H:
                parts = buffer[position + 5 : line_end].split()
                head = int(parts[-2])
                reply = parts[2] if len(parts) == 5 else b""
            else:
                if first == _MINUS:
                    # nats-py passes it on in lower case, and subjects are not
                    self.nc.error_line = buffer[position:line_end].decode(errors="replace")
                self.buf = bytearray(buffer[position : line_end + 2])
                await super().parse()
                if self.resets != resets:
                    return  # the connection was replaced meanwhile: the rest of the buffer belongs to the old one
                position = line_end + 2
                continue
            start = line_end + 2
            end = start + int(parts[-1])
            if end + 2 > length:
                break
            position = end + 2
            headers = buffer[start : start + head] if head else None
            listener = listeners.get(parts[1])
            if listener is not None:
                listener(parts[0], reply, buffer[start + head : end], headers)
            else:
                await self.nc._process_msg(int(parts[1]), parts[0], reply, buffer[start + head : end], headers)  # type: ignore[arg-type]
                if self.resets != resets:
                    return
        self.buf = bytearray(buffer[position:])


class NatsConnection(Client):
    """nats-py's client with `listen` and `send`.

    Attributes:
        reconnections: functions that are called after each reconnect.
        trouble: last error of the connection, empty while it works.
        api: prefix of JetStream's API.
        request_timeout: time limit in seconds for an answer of the API.
        max_control_line: most bytes of the line that begins a message and has its subjects. No server announces it:
            it is a server's default until one has refused a shorter line.
        denials: functions that are called with a subject to which the server let this user not publish or subscribe.
        unheard: subjects to which the server let this user not subscribe, since it was last connected to.
        answer_prefix: prefix of the inboxes for the answers of an app's workers, where it is not that of all inboxes.
        measure: called after a server has closed the connection, perhaps because of a message that is larger than it
            takes: with which limit, and the size in question. It sets the limits that this server has.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ps = _FrameParser(self)
        self.listeners: dict[bytes, Listener] = {}
        self.reconnections: list[Callable[[], None]] = []
        self.trouble = ""
        self.api = "$JS.API"
        self.request_timeout = 5.0
        self.max_control_line = MAX_CONTROL_LINE
        self.denials: list[Callable[[str], None]] = []
        self.unheard: set[str] = set()
        self.measure: Callable[[str, int], Awaitable[None]] | None = None
        self.violation = self.error_line = ""
        self.answer_prefix = ""
        self._hidden_limit = 0
        self._violations: list[float] = []
        self._largest_sent = self._proven = 0

    @property
    def max_payload(self) -> int:
        """Most bytes of a message, its headers included: what the server announces, or less where an account has less.

        It changes when the connection is made again.
        """
        announced: int = self._max_payload
        return min(announced, self._hidden_limit or announced)

    def new_answer_inbox(self) -> str:
        """Return a new inbox for the answers of an app's workers."""
        inbox = self.new_inbox()
        return f"{self.answer_prefix}.{inbox.rpartition('.')[2]}" if self.answer_prefix else inbox

    def explain_silence(self) -> str:
        """Return why no answers can arrive, as far as permissions are the reason; empty otherwise."""
        own = self._inbox_prefix.decode()
        if not any(subject.startswith(f"{own}.") for subject in self.unheard):
            return ""
        return (
            f"the user of this connection may not subscribe to {own}.>, where answers arrive: allow it, or set "
            "connection.inbox_prefix"
        )

    def limit_payload(self, most: int) -> None:
        """Note that the server takes less than it announces."""
        self._hidden_limit = most

    def fits(self, subject: bytes, payload: bytes, reply: bytes = b"", /) -> bool:
        """Return whether the server takes a message without headers. A larger one would cost the connection."""
        if len(payload) > self.max_payload:
            return False
        return len(subject) + len(reply) + CONTROL_LINE_REST <= self.max_control_line

    async def listen(self, subject: str, listener: Listener, queue: str = "", linger: float = 0.0) -> Callable[[], Any]:
        """Subscribe, and return a coroutine function that unsubscribes. The subscription survives reconnects.

        Args:
            linger: seconds after unsubscribing for which messages on their way still reach the listener.
        """

        async def ignore(_message: Msg) -> None:
            pass

        # registered before the SUB is sent: a message can follow at once
        self.listeners[str(self._sid + 1).encode()] = listener
        subscription = await self.subscribe(subject, queue=queue, cb=ignore)
        key = str(subscription._id).encode()

        async def stop() -> None:
            if key not in self.listeners:
                return
            if linger:
                asyncio.get_running_loop().call_later(linger, self.listeners.pop, key, None)
            else:
                del self.listeners[key]
            if not self.is_closed and subscription._id in self._subs:
                await subscription.unsubscribe()

        return stop

    async def _process_connect_init(self) -> None:
        try:
            await super()._process_connect_init()
        except ConnectionError as error:
            if self._server_info.get("tls_verify"):
                # the server's TLS alert is often lost, because the client has sent data meanwhile
                raise NatsError(f"nats: {error}; this server verifies client certificates") from error
            raise
        except (OSError, NatsError, TimeoutError):
            raise
        except Exception as error:
            # any other exception would permanently end nats-py's attempts to reconnect
            raise NatsError(f"nats: the answer is not from a NATS server: {error}") from error
        self.trouble = ""
        self.unheard.clear()
        self._largest_sent = 0
        self._drop_oversized()
        if self._reading_task is not None:
            self._reading_task.add_done_callback(self._read_loop_ended)

    def _read_loop_ended(self, task: asyncio.Task[None]) -> None:
        """Reconnect: nats-py does not notice the end of its read loop, and stays connected in name."""
        if task is self._reading_task and self.is_connected:
            self._again = asyncio.get_running_loop().create_task(self.force_reconnect())

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and self._wants_tls() and info.get("tls_available"):
            info["tls_required"] = True  # the server only offers TLS; nats-py decides by this field alone
        await super()._process_info(info, initial_connection)

    async def _process_err(self, err_msg: str) -> None:
        low = err_msg.lower()
        if denied := _DENIED.search(self.error_line or err_msg):
            if denied[1].lower() == "subscription":
                self.unheard.add(denied[2])
            for callback in list(self.denials):
                callback(denied[2])
        self.violation = next((kind for text, kind in _VIOLATIONS.items() if text in low), self.violation)
        if self.violation or any(known in low for known in _TEMPORARY):
            # nats-py would close the connection permanently
            error = NatsError(f"nats: {err_msg}")
            await self._error_cb(error)
            await self._process_op_err(error)
        else:
            await super()._process_err(err_msg)

    async def flush(self, timeout: int = 10) -> None:
        """Wait until the server has handled what was sent before. nats-py's PING alone would overtake it."""
        await self._flush_pending(force_flush=True)
        await super().flush(timeout)

    async def _attempt_reconnect(self) -> None:
        self._abort()
        for waiting in list(self._resp_map.values()):
            if not waiting.done():  # the answer can't arrive any more
                waiting.set_exception(NatsError("nats: the connection was lost"))
        await super()._attempt_reconnect()

    async def learn(self) -> None:
        """Find out what the server takes, if that may be why it has closed the connection, before sending again.

        To be awaited in nats-py's callback for a lost connection: it reconnects after that.
        """
        violation, self.violation = self.violation, ""
        patience = LEARN_S
        if violation:
            now = time.monotonic()
            self._violations = [at for at in self._violations if now - at < PATIENCE_S] + [now]
            if (count := len(self._violations)) > 1:
                await asyncio.sleep(min(0.05 * 2.0**count, LONGEST_PAUSE_S))
        elif self._largest_sent > max(self._proven, SUSPECT):
            violation = PAYLOAD  # the server's reason is often lost, because the client was still sending
            patience = GUESS_S
        if violation and self.measure is not None:
            try:
                async with asyncio.timeout(patience):
                    await self.measure(violation, min(self._largest_sent, self.max_payload))
            except (OSError, NatsError, TimeoutError) as error:
                logger.info("what the server takes (%s) could not be measured: %s", violation, error)
            else:
                self._proven = max(self._proven, self._largest_sent)

    def _drop_oversized(self) -> None:
        """Drop what waits to be sent and is larger than this server takes: it would close the connection again.

        The senders learn of it as they learn of any lost message, or from the new limits.
        """
        kept = [left for frames in self._pending if (left := self._within_limits(bytes(frames)))]
        self._pending, self._pending_data_size = kept, sum(map(len, kept))

    def _within_limits(self, frames: bytes) -> bytes:
        kept: list[bytes] = []
        position = 0
        while position < len(frames):
            line_end = frames.find(b"\r\n", position)
            end = line_end + 2 if line_end >= 0 else len(frames)
            fits = True
            if frames.startswith((b"PUB ", b"HPUB "), position) and line_end >= 0:
                size = int(frames[position:line_end].rsplit(b" ", 1)[1])
                end += size + 2
                fits = size <= self.max_payload and line_end - position <= self.max_control_line
            if fits:
                kept.append(frames[position:end])
            position = end
        return frames if sum(map(len, kept)) == len(frames) else b"".join(kept)

    def _abort(self) -> None:
        """Drop the old connection. An orderly close would wait for a dead peer to accept unsent data.

        After a failed TLS handshake it would wait without end, because the stream below never learns of the close.
        """
        transport: Any = self._transport
        if getattr(transport, "_io_writer", None) is not None:
            transport._io_writer.transport.abort()
            transport._io_writer = None

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        if not self.is_connected:
            self._abort()
        await super()._close(status, do_cbs)

    async def close(self) -> None:
        """Close the connection permanently, within seconds even if the server is dead."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await super().close()
        except (TimeoutError, OSError):
            self._abort()

    def _wants_tls(self) -> bool:
        server = self._current_server
        return "tls" in self.options or (server is not None and server.uri.scheme == "tls")

    def _connect_command(self) -> bytes:
        """Refuse to send credentials without TLS. nats-py calls it at each connect, before it sends them."""
        writer = getattr(self._transport, "_io_writer", None)
        if self._wants_tls() and writer is not None and writer.get_extra_info("ssl_object") is None:
            # nats-py would continue without TLS
            raise NatsError("nats: TLS was asked for, and the server does not offer it")
        command: bytes = super()._connect_command()
        return command

    def revive(self) -> None:
        """Restart reconnecting if an unexpected error has ended nats-py's task for it."""
        task = self._reconnection_task
        if not self.is_closed and not self.is_connected and task is not None and task.done():
            self._status = Client.RECONNECTING
            self._reconnection_task = asyncio.get_running_loop().create_task(self._attempt_reconnect())

    def send(self, frames: bytes) -> None:
        """Queue protocol frames for the socket. While disconnected they wait; they are sent after the reconnect."""
        self._pending.append(frames)
        self._pending_data_size += (size := len(frames))
        self._largest_sent = max(self._largest_sent, size)
        if self._flush_queue is not None and self._flush_queue.empty() and self.is_connected:
            self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())


def publish_frame(subject: bytes, payload: bytes, *, reply: bytes = b"", headers: bytes = b"") -> bytes:
    """Return a PUB or HPUB frame.

    Args:
        headers: a complete header block, from `NATS/1.0` to the empty line.
    """
    if headers:
        sizes = (len(headers), len(headers) + len(payload))
        return b"HPUB %b %b %d %d\r\n%b%b\r\n" % (subject, reply, *sizes, headers, payload)
    return b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(payload), payload)


def status_of(headers: bytes | None) -> int:
    """Return the status code of a control message, 0 for an ordinary message."""
    if headers is not None and headers[8:9] == b" ":
        code = headers[9:12]
        return int(code) if code.isdigit() else 0
    return 0


def header_of(headers: bytes, name: bytes) -> bytes | None:
    """Return the value of a header, or None if it is missing."""
    start = headers.find(b"\r\n" + name + b":")
    if start < 0:
        return None
    start += len(name) + 3
    return headers[start : headers.find(b"\r\n", start)].strip()
