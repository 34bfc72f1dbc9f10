"""Real nats-servers for tests of connections, security and streams, and credentials for their users.

`server` and `cluster` start them; everything else gives text for their configuration, and the files that go with it:

    async with server(tmp_path, password_config("user", "right")) as nats:
        await connect(nats.url.replace("//", "//user:right@"), name="test")

A server is given a JetStream domain by its configuration alone: `server(tmp_path, "jetstream { domain: hub }")`.
A leaf node of it needs one more port: `leafnodes { listen: "127.0.0.1:PORT" }` there, and
`jetstream { domain: leaf }` with `leafnodes { remotes: [{ url: "nats://127.0.0.1:PORT" }] }` here.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import nats
import nkeys
import trustme
from nats.js.api import StreamConfig
from nats.js.errors import Error as JetStreamError

from kernel.runtime.nats_server import end_with_parent, find_binary
from tests.failing import free_port

START_TIMEOUT_S = 20.0
CLUSTER_TIMEOUT_S = 20.0
CLUSTER_ATTEMPTS = 3


class Server:
    """A nats-server that keeps its ports and its store when it is started again.

    Attributes:
        config: its configuration except ports and store; a change takes effect at the next start.
    """

    def __init__(self, directory: Path, config: str = "", *, binary: str | Path | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.config, self.binary = directory, config, str(binary or find_binary())
        self.port, self._monitor_port = free_ports(2)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients connect, without credentials."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def monitor(self) -> str:
        """The URL of the server's monitoring endpoint."""
        return f"http://127.0.0.1:{self._monitor_port}"

    @property
    def pid(self) -> int:
        """Its process id, 0 when it is not running."""
        return self.process.pid if self.process is not None and self.process.poll() is None else 0

    async def monitored(self, path: str) -> dict[str, Any]:
        """Return the answer of the monitoring endpoint, for example to `connz?auth=true`."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.monitor}/{path}") as answer:
            found: dict[str, Any] = await answer.json(content_type=None)
            return found

    async def start(self) -> str:
        """Start the server and return its URL when it accepts connections.

        Raises:
            RuntimeError: it did not start; the message has the end of its log.
        """
        assert not self.pid, "it is running"
        here = self.directory.resolve()
        config = here / "nats.conf"
        # a `jetstream` block in `config` replaces the word here, which is why the store is named outside of it
        config.write_text(
            f'listen: "127.0.0.1:{self.port}"\nhttp: "127.0.0.1:{self._monitor_port}"\n'
            f"ports_file_dir: {json.dumps(str(here))}\nstore_dir: {json.dumps(str(here / 'store'))}\n"
            f"jetstream: enabled\n{self.config}\n"
        )
        with (here / "nats.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary, "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent(signal.SIGKILL),  # noqa: PLW1509
            )
        # this file is written when all ports are open; a trial connection would appear as a client in the server's log
        ports = here / f"nats-server_{self.process.pid}.ports"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ports.exists():
            if not self.pid or time.monotonic() > deadline:
                await self.kill()
                raise RuntimeError(f"nats-server did not start: {self.log_tail()}")
            await asyncio.sleep(0.01)
        return self.url

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop the server, by default in an orderly way: it notifies its clients and closes its store."""
        if self.process is not None:
            self.process.send_signal(how)
            await asyncio.to_thread(self.process.wait)

    async def kill(self) -> None:
        """Kill the server, as in a crash."""
        await self.stop(signal.SIGKILL)

    def log_tail(self) -> str:
        """Return the last lines of its log."""
        return " | ".join((self.directory / "nats.log").read_text(errors="replace").splitlines()[-5:])


def free_ports(count: int) -> list[int]:
    """Return this many different free ports."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return list(found)


@asynccontextmanager
async def server(directory: Path, config: str = "", *, binary: str | Path | None = None) -> AsyncIterator[Server]:
    """Run a nats-server with JetStream.

    Args:
        directory: holds its store, its configuration and its log.
        config: text at the end of its configuration.
        binary: another executable than the one of this environment.
    """
    made = Server(directory, config, binary=binary)
    try:
        await made.start()
        yield made
    finally:
        await made.kill()


@asynccontextmanager
async def cluster(directory: Path, size: int = 3, binary: str | Path | None = None) -> AsyncIterator[list[Server]]:
    """Run a JetStream cluster whose servers are named n0, n1, ...; it is able to make replicated streams.

    Servers that dial each other at the same moment may each close the other's connection as a duplicate, and stay
    apart. That happens to about one cluster in fifty on a busy machine, and such a cluster is started anew.

    Raises:
        RuntimeError: the cluster did not form in any attempt; the message has the ends of the logs.
    """
    async with AsyncExitStack() as running:
        for attempt in range(1, CLUSTER_ATTEMPTS + 1):
            async with AsyncExitStack() as stack:
                members = _members(directory / f"cluster{attempt}", size, binary)
                for member in members:
                    stack.push_async_callback(member.kill)
                for member in members:
                    await member.start()
                try:
                    async with asyncio.timeout(CLUSTER_TIMEOUT_S):
                        await _formed(members)
                except TimeoutError:
                    if attempt == CLUSTER_ATTEMPTS:
                        tails = "; ".join(member.log_tail() for member in members)
                        raise RuntimeError(f"the cluster did not form: {tails}") from None
                else:
                    running.push_async_exit(stack.pop_all())
                    break
        yield members


def _members(directory: Path, size: int, binary: str | Path | None) -> list[Server]:
    """Return the servers of a cluster that has not been started."""
    routes = free_ports(size)
    members = [Server(directory / f"n{number}", binary=binary) for number in range(size)]
    for number, member in enumerate(members):
        others = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes if port != routes[number])
        member.config = (
            f"server_name: n{number}\n"
            f'cluster {{ name: test, listen: "127.0.0.1:{routes[number]}", routes: [{others}] }}\n'
        )
    return members


async def _formed(members: list[Server]) -> None:
    """Wait until all servers know a leader, and the leader can place a replicated stream."""
    for member in members:
        while True:
            meta = (await member.monitored("jsz")).get("meta_cluster", {})
            if meta.get("leader") and meta.get("cluster_size") == len(members):
                break
            await asyncio.sleep(0.02)
    client = await nats.connect(members[0].url)
    streams = client.jetstream(timeout=2)
    trial = StreamConfig(name="trial", subjects=["trial"], num_replicas=min(len(members), 3))
    try:
        while True:
            try:
                await streams.add_stream(trial)
                await streams.delete_stream("trial")
                break
            except (JetStreamError, nats.errors.Error):
                await asyncio.sleep(0.05)
    finally:
        await client.close()


@dataclass(frozen=True)
class Tls:
    """Files of certificates, and configurations with them. The names certified are 127.0.0.1 and localhost.

    Attributes:
        ca: the authority of everything here but what is called a stranger's.
        required, verifying, handshake_first: configurations: TLS at all, with a client certificate, before anything.
        stranger_ca, stranger_cert, stranger_key: an unrelated authority, and a client certificate of it.
    """

    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path
    stranger_ca: Path
    stranger_cert: Path
    stranger_key: Path

    def _config(self, more: str = "") -> str:
        return f'tls {{ cert_file: "{self.cert}", key_file: "{self.key}", ca_file: "{self.ca}"{more} }}\n'

    @property
    def required(self) -> str:
        return self._config()

    @property
    def verifying(self) -> str:
        return self._config(", verify: true")

    @property
    def handshake_first(self) -> str:
        return self._config(", handshake_first: true")


def tls(directory: Path) -> Tls:
    """Make certificates and their keys, as files in a directory."""
    directory.mkdir(parents=True, exist_ok=True)

    def authority(name: str) -> tuple[trustme.CA, Path]:
        made, file = trustme.CA(), directory / f"{name}.pem"
        made.cert_pem.write_to_path(file)
        return made, file

    def issued(by: trustme.CA, name: str, *identities: str) -> tuple[Path, Path]:
        made = by.issue_cert(*identities)
        cert, key = directory / f"{name}.pem", directory / f"{name}.key"
        made.private_key_pem.write_to_path(key)
        cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        return cert, key

    ours, ca = authority("ca")
    stranger, stranger_ca = authority("stranger-ca")
    return Tls(
        ca,
        *issued(ours, "server", "127.0.0.1", "localhost"),
        *issued(ours, "client", "client@example.org"),
        stranger_ca,
        *issued(stranger, "stranger", "client@example.org"),
    )


def token_config(token: str) -> str:
    """Let in clients with this token."""
    return f"authorization {{ token: {json.dumps(token)} }}\n"


def password_config(user: str, password: str, permissions: str = "") -> str:
    """Let in one user.

    Args:
        permissions: the user's permissions, for example `NO_JETSTREAM`; everything if empty.
    """
    allowed = f", permissions: {permissions}" if permissions else ""
    return f"authorization {{ users: [{{ {_user(user, password)}{allowed} }}] }}\n"


NO_JETSTREAM = '{ publish: { deny: ["$JS.API.>"] } }'
"""Permissions of a user that can't use JetStream."""


def account_config(user: str, password: str, limits: str) -> str:
    """Let in one user, of an account with limits of JetStream.

    Args:
        limits: for example `max_streams: 1, max_file: 1MB`.
    """
    return f"accounts {{ LIMITED {{ jetstream {{ {limits} }}, users: [{{ {_user(user, password)} }}] }} }}\n"


def _user(user: str, password: str) -> str:
    return f"user: {json.dumps(user)}, password: {json.dumps(password)}"


def _pair(prefix: int) -> nkeys.KeyPair:
    return nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), prefix)))


def _public(pair: nkeys.KeyPair) -> str:
    return bytes(pair.public_key).decode()


@dataclass(frozen=True)
class Nkey:
    """A user's key pair.

    Attributes:
        seed_file: the private half, for the client.
        config: lets in this user, by the public half.
    """

    seed_file: Path
    public: str

    @property
    def config(self) -> str:
        return f"authorization {{ users: [{{ nkey: {self.public} }}] }}\n"


def nkey(file: Path) -> Nkey:
    """Make a key pair, its seed in a file."""
    pair = _pair(nkeys.PREFIX_BYTE_USER)
    file.write_bytes(pair.seed)
    return Nkey(file, _public(pair))


CREDS = """-----BEGIN NATS USER JWT-----
{jwt}
------END NATS USER JWT------

************************* IMPORTANT *************************
NKEY Seed printed below can be used to sign and prove identity.
NKEYs are sensitive and should be treated as secrets.

-----BEGIN USER NKEY SEED-----
{seed}
------END USER NKEY SEED------

*************************************************************
"""


class Operator:
    """An operator with one account for users with all permissions, and the system account that JetStream needs.

    Attributes:
        config: trusts this operator.
        account: the public key of its account, which is the account's name in `connz?auth=true`.

    Args:
        streams, disk_bytes: limits of the account; -1 is none.
    """

    def __init__(self, *, streams: int = -1, disk_bytes: int = -1) -> None:
        pair, system = _pair(nkeys.PREFIX_BYTE_OPERATOR), _pair(nkeys.PREFIX_BYTE_ACCOUNT)
        self._account = _pair(nkeys.PREFIX_BYTE_ACCOUNT)
        self.account = _public(self._account)
        unlimited = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
        limits = {**unlimited, "wildcards": True}
        jetstream = {"mem_storage": -1, "disk_storage": disk_bytes, "streams": streams, "consumer": -1}
        trusted = _jwt(pair, "test", _public(pair), {"type": "operator"})
        ours = _jwt(pair, "app", self.account, {"type": "account", "limits": {**limits, **jetstream}})
        sys = _jwt(pair, "SYS", _public(system), {"type": "account", "limits": limits})
        self.config = (
            f'operator: "{trusted}"\nsystem_account: {_public(system)}\nresolver: MEMORY\n'
            f'resolver_preload {{\n  {self.account}: "{ours}"\n  {_public(system)}: "{sys}"\n}}\n'
        )

    def creds(self, file: Path, expires: int | None = None) -> Path:
        """Write the credentials of a new user.

        Args:
            expires: seconds of the epoch after which they are refused; never if None.
        """
        pair = _pair(nkeys.PREFIX_BYTE_USER)
        claims = {"type": "user", "subs": -1, "data": -1, "payload": -1}
        jwt = _jwt(self._account, "user", _public(pair), claims, expires)
        file.write_text(CREDS.format(jwt=jwt, seed=bytes(pair.seed).decode()))
        return file


def _jwt(issuer: nkeys.KeyPair, name: str, subject: str, claims: dict[str, Any], expires: int | None = None) -> str:
    """Return a NATS JWT: the usual three parts, signed with the issuer's NKey."""
    body: dict[str, Any] = {
        "jti": uuid.uuid4().hex,
        "iat": int(time.time()),
        "iss": _public(issuer),
        "name": name,
        "sub": subject,
        "nats": {**claims, "version": 2},
    }
    if expires is not None:
        body["exp"] = expires
    signed = ".".join(_base64(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, body))
    return f"{signed}.{_base64(issuer.sign(signed.encode()))}"


def _base64(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()
