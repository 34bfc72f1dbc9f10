"""A pooler before PostgreSQL that treats a connection's start as PgBouncer does, and notes prepared statements."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from sqlalchemy.engine import make_url

KNOWN = {"user", "database", "client_encoding", "datestyle", "timezone", "standard_conforming_strings"}
KNOWN |= {"application_name"}
_PLAIN = (80877103, 80877104)
"""Requests for encryption, which is not offered."""


class Pooler:
    """Forwards connections to a server's socket.

    Args:
        unknown: what happens to the startup parameter `options`: the connection is refused, as by default, or the
            parameter is left out, as with `ignore_startup_parameters`.

    Attributes:
        prepared: names of the statements that clients have prepared.
        started: the startup parameters of each connection.
    """

    def __init__(self, server: str, unknown: Literal["refuse", "ignore"]) -> None:
        self._server, self._unknown = server, unknown
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.prepared: list[str] = []
        self.started: list[dict[str, str]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            try:
                body = self._start(client)
                if body is None:
                    return
                server.connect(self._server)
                server.sendall(struct.pack("!I", len(body) + 4) + body)
                threading.Thread(target=self._forward, args=(server, client), daemon=True).start()
                while message := self._message(client):
                    if message[:1] == b"P" and (name := message[5:].split(b"\0", 1)[0]):
                        self.prepared.append(name.decode())
                    server.sendall(message)
            except OSError:
                pass

    def _start(self, client: socket.socket) -> bytes | None:
        while True:
            body = self._exactly(client, struct.unpack("!I", self._exactly(client, 4))[0] - 4)
            if struct.unpack("!I", body[:4])[0] not in _PLAIN:
                break
            client.sendall(b"N")
        parts = [part.decode() for part in body[4:].split(b"\0")]
        given = {name: value for name, value in zip(parts[::2], parts[1::2], strict=False) if name}
        self.started.append(given)
        strange = [name for name in given if name.lower() not in KNOWN]
        if strange and self._unknown == "refuse":
            text = f"SFATAL\0VFATAL\0C08P01\0Munsupported startup parameter: {strange[0]}\0\0".encode()
            client.sendall(b"E" + struct.pack("!I", len(text) + 4) + text)
            return None
        kept = "".join(f"{name}\0{value}\0" for name, value in given.items() if name not in strange)
        return body[:4] + kept.encode() + b"\0"

    def _message(self, client: socket.socket) -> bytes:
        head = self._exactly(client, 5)
        return head + self._exactly(client, struct.unpack("!I", head[1:])[0] - 4)

    def _exactly(self, source: socket.socket, size: int) -> bytes:
        got = b""
        while len(got) < size:
            more = source.recv(size - len(got))
            if not more:
                raise ConnectionError("the other side has closed the connection")
            got += more
        return got

    def _forward(self, server: socket.socket, client: socket.socket) -> None:
        try:
            while data := server.recv(65536):
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


@contextmanager
def pooler(database: str, unknown: Literal["refuse", "ignore"]) -> Iterator[tuple[Pooler, str]]:
    """Yield a pooler before a database, and the database's URL through it."""
    url = make_url(database)
    made = Pooler(f"{url.query['host']}/.s.PGSQL.5432", unknown)
    try:
        yield made, f"postgresql://{url.username}@127.0.0.1:{made.port}/{url.database}"
    finally:
        made.close()
