"""Connects to NATS according to the settings: servers, credentials and TLS."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nkeys
from nats.aio.client import Server

from kernel.errors import BadCredentials, ConnectionFailed
from kernel.settings import Connection, JetStream, Security, Settings
from kernel.settings.fields import shown
from kernel.transport.connection import NatsConnection
from kernel.transport.inboxes import Role, inbox_prefix
from kernel.transport.limits import measuring

logger = logging.getLogger("eskernel.transport")
_JWT = re.compile(r"-----BEGIN NATS USER JWT-----\r?\n([\w-]+\.[\w-]+\.[\w-]+)\r?\n")
_SEED = re.compile(r"-----BEGIN USER NKEY SEED-----\r?\n(SU[A-Z2-7]+)\r?\n")
_FINAL = ("authorization violation", "certificate", "tls", "nkeys", "maximum connections")
"""Texts in a server's refusal that another attempt at start would not change."""


async def dial(
    settings: Settings,
    *,
    name: str,
    app: str = "",
    role: Role = "client",
    url: str = "",
    on_event: Callable[[str], None] | None = None,
) -> NatsConnection:
    """Connect according to the settings.

    Args:
        name: name of the client, if the settings have none.
        app: name of the app, below whose subjects the inboxes are; without it they are below `_INBOX`.
        role: what the connection is for.
        url: URL of the embedded server, if it is to be used.

    Raises:
        BadCredentials: a file or an option of `security` can't be used.
        ConnectionFailed: no server answered; the message has the cause and the setting that it points to.
    """
    connection = settings.connection
    servers = [url] if url else list(connection.servers)
    if url and (given := sorted(settings.security.model_fields_set)):
        raise BadCredentials(
            f"security.{given[0]} is for servers of connection.servers; the embedded server accepts all connections "
            "from this machine, and has no TLS"
        )
    options = {**connection_options(connection), **security_options(settings.security)}
    if "tls" not in options and any(server.startswith("tls://") for server in servers):
        # TLS also applies to servers that these servers announce, and after reconnects
        options["tls"] = _context(settings.security)
    if app:
        options["inbox_prefix"] = inbox_prefix(app, settings, role)
    connected = await connect(
        servers, name=connection.name or name, on_event=on_event, security=settings.security,
        jetstream=settings.jetstream, **options,
    )  # fmt: skip
    if app and role == "service":
        connected.answer_prefix = inbox_prefix(app, settings, "workers")
    return connected


def connection_options(connection: Connection) -> dict[str, Any]:
    """Return nats-py's options for these settings."""
    return {
        "allow_reconnect": connection.max_reconnects != 0,
        "max_reconnect_attempts": connection.max_reconnects,
        "reconnect_time_wait": connection.reconnect_wait,
        "reconnect_to_server_handler": _backing_off(connection),
        "connect_timeout": connection.connect_timeout,
        "ping_interval": connection.ping_interval,
        "max_outstanding_pings": connection.max_missed_pings,
    }


def _backing_off(connection: Connection) -> Callable[[list[Server], dict[str, Any]], tuple[Server, float]]:
    def choose(servers: list[Server], _info: dict[str, Any]) -> tuple[Server, float]:
        """Return the server with the fewest attempts, and a pause that doubles with each round of attempts."""
        chosen = min(servers, key=lambda server: server.reconnects)
        pause = 0.0
        if chosen.reconnects:
            doubled = connection.reconnect_wait * 2.0 ** min(chosen.reconnects - 1, 32)
            pause = min(doubled, connection.reconnect_max_wait)
        spread = connection.reconnect_jitter * random.random()
        return chosen, pause * (1 + spread) if pause else connection.reconnect_wait * spread

    return choose


def security_options(security: Security) -> dict[str, Any]:
    """Return nats-py's options for these settings.

    Raises:
        BadCredentials: a file is missing, or has the wrong content.
    """
    options: dict[str, Any] = {}
    if security.token is not None:
        options["token"] = security.token.get_secret_value()
    if security.user is not None and security.password is not None:
        options.update(user=security.user, password=security.password.get_secret_value())
    if security.nkey_file is not None:
        seed = _read("nkey_file", security.nkey_file).strip()
        if not _is_seed(seed):
            raise BadCredentials(f"security.nkey_file: {security.nkey_file} contains no user's nkey seed (`SU...`)")
        options["nkeys_seed"] = str(security.nkey_file)
    if security.credentials_file is not None:
        text = _read("credentials_file", security.credentials_file).decode(errors="replace")
        found = _SEED.search(text)
        missing = "" if _JWT.search(text) else "user's JWT"
        if found is None or not _is_seed(found[1].encode()):
            missing = missing or "user's nkey seed"
        if missing:
            raise BadCredentials(
                f"security.credentials_file: {security.credentials_file} contains no {missing}; use the file that "
                "`nsc generate creds` writes"
            )
        options["user_credentials"] = str(security.credentials_file)
    if security.tls:
        options["tls"] = _context(security)
    return options


def _is_seed(text: bytes) -> bool:
    try:
        nkeys.from_seed(bytearray(text)).wipe()
    except Exception:
        return False
    return text.startswith(b"SU")


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCredentials(f"security.{name}: {path}: {error.strerror}") from None


def _context(security: Security) -> ssl.SSLContext:
    if security.ca_file is not None:
        _read("ca_file", security.ca_file)
    try:
        context = ssl.create_default_context(cafile=security.ca_file)
    except ssl.SSLError as error:
        raise BadCredentials(f"security.ca_file: {security.ca_file} contains no certificates: {error}") from None
    if security.client_certificate is not None and security.client_key is not None:
        _read("client_certificate", security.client_certificate)
        _read("client_key", security.client_key)
        try:
            # without the empty password OpenSSL would ask for a password in the terminal
            context.load_cert_chain(security.client_certificate, security.client_key, "")
        except (ssl.SSLError, OSError) as error:
            raise BadCredentials(
                f"security.client_certificate {security.client_certificate} and security.client_key "
                f"{security.client_key} can't be used together: {getattr(error, 'reason', '') or error}"
            ) from None
    if security.skip_verify:
        logger.warning(
            "security.skip_verify: the server's certificate is NOT verified; an attacker on the network can read and "
            "change all messages"
        )
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _hint(cause: str, security: Security, in_url: bool) -> str:
    """Return a hint for a refusal: the setting or file that is probably wrong."""
    low = cause.lower()
    if "authorization violation" in low or "authentication" in low:
        if security.token is not None:
            return "the server refused security.token"
        if security.user is not None:
            return f"the server refused security.user {security.user!r} or its security.password"
        if security.nkey_file is not None:
            return f"the server does not know the nkey of security.nkey_file {security.nkey_file}"
        if security.credentials_file is not None:
            return f"the server refused security.credentials_file {security.credentials_file}"
        if in_url:
            return "the server refused the credentials in the URL"
        return "the server requires credentials: see the section `security` of the settings"
    if "certificate verify failed" in low:
        signer = f"security.ca_file {security.ca_file}" if security.ca_file else "an authority that this system trusts"
        return f"the server's certificate is not for this host, or not signed by {signer}; see security.ca_file"
    if "alert" in low or "client certificate" in low:
        if security.client_certificate is None:
            return "the server requires a client certificate: security.client_certificate and security.client_key"
        return f"the server does not accept security.client_certificate {security.client_certificate}"
    if "tls was asked for" in low:
        return "the settings require TLS (security.tls_required, or a setting that implies it)"
    return "check that the server is running, and that the credentials are right"


async def connect(
    url: str | Sequence[str],
    *,
    name: str,
    on_event: Callable[[str], None] | None = None,
    security: Security | None = None,
    jetstream: JetStream | None = None,
    **options: Any,
) -> NatsConnection:
    """Connect. The connection reconnects automatically, and calls `on_event` with each event of the connection.

    Args:
        url: URLs of the servers; a text may contain several, separated by commas.
        options: options of nats-py, which replace those of the default settings.

    Raises:
        ConnectionFailed: no server answered; the message has the server's reason, if it gave one.
    """
    servers = url.split(",") if isinstance(url, str) else list(url)
    security = security or Security()
    connection = NatsConnection()
    if jetstream is not None:
        connection.api, connection.request_timeout = jetstream.prefix, jetstream.request_timeout
    causes: list[str] = []
    final = asyncio.Event()

    async def error(problem: Exception) -> None:
        causes.append(str(problem) or type(problem).__name__)
        del causes[: -max(5, len(servers))]
        connection.trouble = causes[-1]
        # each server was tried once
        if len(causes) >= len(servers) and any(map(_is_final, causes)):
            final.set()
        if on_event is not None:
            on_event(f"error: {causes[-1]}")

    async def disconnected() -> None:
        if on_event is not None:
            on_event("disconnected")
        if connection.is_reconnecting:
            await connection.learn()

    async def reconnected() -> None:
        if on_event is not None:
            on_event("reconnected")
        for callback in connection.reconnections:
            callback()

    async def closed() -> None:
        if on_event is not None:
            on_event("closed")

    settings = {**connection_options(Connection()), "pending_size": 64 * 1024 * 1024, **options}
    connection.measure = measuring(connection, settings)
    reconnects, settings["allow_reconnect"] = settings["allow_reconnect"], True  # at the start each server is tried
    connecting = asyncio.ensure_future(
        connection.connect(
            servers,
            name=name,
            error_cb=error,
            disconnected_cb=disconnected,
            reconnected_cb=reconnected,
            closed_cb=closed,
            **settings,
        )
    )
    refused = asyncio.ensure_future(final.wait())
    # one attempt at each server
    patience = settings["connect_timeout"] * len(servers)
    try:
        await asyncio.wait({connecting, refused}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
    except BaseException:
        refused.cancel()
        await _end(connecting)
        await connection.close()
        raise
    refused.cancel()
    if connecting.done() and connecting.exception() is None:
        connection.options["allow_reconnect"] = reconnects
        return connection
    await _end(connecting)
    failure = "no answer" if connecting.cancelled() else connecting.exception()
    await connection.close()
    # a server's refusal says more than the end of the connection that follows it
    reasons = list(filter(_is_final, causes)) or causes or [str(failure)]
    hint = _hint(reasons[-1], security, any("@" in server for server in servers))
    raise ConnectionFailed(f"can't connect to NATS at {shown(','.join(servers))}: {reasons[-1]}; {hint}")


async def _end(task: asyncio.Future[None]) -> None:
    """Cancel a task until it has ended: before Python 3.12 `wait_for` may swallow a cancellation."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)


def _is_final(cause: str) -> bool:
    return any(text in cause.lower() for text in _FINAL)
