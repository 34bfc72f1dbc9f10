"""Each kind of credentials and certificates: accepted when right, and named in the error when wrong."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kernel import Client, Service
from kernel.errors import BadCredentials
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import dial
from kernel.transport.jetstream_api import call_api
from tests.apps import Note, Notebook, notebooks
from tests.conftest import settings_for
from tests.failing import free_port
from tests.servers import Operator, Server, Tls, cluster, nkey, password_config, server, tls, token_config

Wait = Callable[..., Any]
PROMPT_S = 3.0
"""Seconds, far less than the time-out: wrong credentials must fail without waiting for it."""
PATIENT = {"connection__connect_timeout": 60.0}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return tls(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def dialled(url: str, **values: Any) -> AsyncIterator[NatsConnection]:
    connection = await dial(settings_for(Path(), nats=url, **values), name="test")
    try:
        yield connection
    finally:
        await connection.close()


async def taken(url: str, **values: Any) -> None:
    """Check that a service would be let in and can use JetStream."""
    async with dialled(url, **values) as connection:
        assert "streams" in await call_api(connection, "INFO", None)


async def refused(url: str, *words: str, **values: Any) -> str:
    """Check that a service is refused in these words, well before the time-out, with one server and with several."""
    gone = f"nats://127.0.0.1:{free_port()}"
    text = ""
    for servers in (url, f"{gone},{url}", f"{url},{url.replace('127.0.0.1', 'localhost')}"):
        async with asyncio.timeout(PROMPT_S):
            with pytest.raises(ConnectionError) as caught:
                async with dialled(servers, **{**PATIENT, **values}):
                    pass
        text = str(caught.value)
        for word in words:
            assert word in text, text
    return text


async def unusable(*words: str, **values: Any) -> None:
    """Check that an unusable file is reported without connecting to any server."""
    with pytest.raises(BadCredentials) as caught:
        async with dialled("nats://127.0.0.1:1", **values):
            pass
    for word in words:
        assert word in str(caught.value)


@pytest.mark.setting("security.token")
async def test_a_token(tmp_path: Path, binary: str) -> None:
    async with server(tmp_path, token_config("right"), binary=binary) as nats:
        await taken(nats.url, security__token="right")
        message = await refused(nats.url, "Authorization Violation", "security.token", security__token="hush-hush")
        assert "hush" not in message
        await refused(nats.url, "requires credentials", "`security`")


@pytest.mark.setting("security.user", "security.password")
async def test_a_user_and_a_password(tmp_path: Path, binary: str) -> None:
    async with server(tmp_path, password_config("me", "p@ss"), binary=binary) as nats:
        await taken(nats.url, security__user="me", security__password="p@ss")
        await taken(nats.url.replace("//", "//me:p@ss@"))
        message = await refused(
            nats.url, "security.user 'me'", "security.password", security__user="me", security__password="hush"
        )
        assert "hush" not in message
        assert "hush" not in await refused(nats.url.replace("//", "//me:hush@"), "credentials in the URL")


@pytest.mark.setting("security.nkey_file")
async def test_an_nkey(tmp_path: Path, binary: str) -> None:
    mine, other = nkey(tmp_path / "mine.nk"), nkey(tmp_path / "other.nk")
    async with server(tmp_path, mine.config, binary=binary) as nats:
        await taken(nats.url, security__nkey_file=mine.seed_file)
        await refused(nats.url, "security.nkey_file", str(other.seed_file), security__nkey_file=other.seed_file)


@pytest.mark.setting("security.credentials_file")
async def test_a_credentials_file(tmp_path: Path, binary: str) -> None:
    operator, stranger = Operator(), Operator()
    good, old = operator.creds(tmp_path / "my.creds"), operator.creds(tmp_path / "old.creds", int(time.time()) - 60)
    other = stranger.creds(tmp_path / "other.creds")
    async with server(tmp_path, operator.config, binary=binary) as nats:
        await taken(nats.url, security__credentials_file=good)
        for wrong in (old, other):
            await refused(nats.url, "security.credentials_file", str(wrong), security__credentials_file=wrong)


@pytest.mark.setting("security.nkey_file", "security.credentials_file", "security.ca_file", on="")
@pytest.mark.parametrize("name", ["nkey_file", "credentials_file", "ca_file"])
async def test_a_file_that_is_missing_or_something_else_is_named(tmp_path: Path, name: str) -> None:
    option: dict[str, Any] = {f"security__{name}": tmp_path / "missing"}
    await unusable(f"security.{name}", str(tmp_path / "missing"), "No such file", **option)
    (tmp_path / "folder").mkdir()
    await unusable(f"security.{name}", "Is a directory", **{f"security__{name}": tmp_path / "folder"})
    (tmp_path / "text").write_text("hush")
    await unusable(f"security.{name}", str(tmp_path / "text"), **{f"security__{name}": tmp_path / "text"})


@pytest.mark.setting("security.credentials_file", on="")
@pytest.mark.parametrize("part", ["jwt", "seed"])
async def test_credentials_whose_half_is_damaged_are_named(tmp_path: Path, part: str) -> None:
    creds = Operator().creds(tmp_path / "my.creds")
    lines = creds.read_text().splitlines()
    place = next(n for n, line in enumerate(lines) if line.startswith("eyJ" if part == "jwt" else "SU"))
    lines[place] = lines[place].replace(".", "", 2) if part == "jwt" else lines[place][:-9]
    creds.write_text("\n".join(lines))
    await unusable("JWT" if part == "jwt" else "seed", str(creds), security__credentials_file=creds)


# TLS


@pytest.mark.setting("security.ca_file")
async def test_the_servers_certificate_is_verified(tmp_path: Path, binary: str, certificates: Tls) -> None:
    async with server(tmp_path, certificates.required, binary=binary) as nats:
        await taken(nats.url, security__ca_file=certificates.ca)
        await taken(nats.url.replace("nats:", "tls:"), security__ca_file=certificates.ca)
        wrong = certificates.stranger_ca
        await refused(nats.url, "CERTIFICATE_VERIFY_FAILED", f"security.ca_file {wrong}", security__ca_file=wrong)
        await refused(nats.url, "CERTIFICATE_VERIFY_FAILED", "this system trusts", "security.ca_file")


@pytest.mark.setting("security.client_certificate", "security.client_key")
async def test_the_server_verifies_the_clients_certificate(tmp_path: Path, binary: str, certificates: Tls) -> None:
    files = certificates
    async with server(tmp_path, files.verifying, binary=binary) as nats:
        trusting: dict[str, Any] = {"security__ca_file": files.ca}
        mine = {"security__client_certificate": files.client_cert, "security__client_key": files.client_key}
        await taken(nats.url, **trusting, **mine)
        await refused(nats.url, "requires a client certificate", "security.client_certificate", **trusting)
        other = {"security__client_certificate": files.stranger_cert, "security__client_key": files.stranger_key}
        await refused(
            nats.url, f"does not accept security.client_certificate {files.stranger_cert}", **trusting, **other
        )


@pytest.mark.setting("security.client_certificate", "security.client_key", on="")
async def test_a_key_that_does_not_fit_or_is_encrypted_is_named(tmp_path: Path, certificates: Tls) -> None:
    files = certificates
    options = {"security__client_certificate": files.client_cert}
    await unusable("client_key", str(files.stranger_key), security__client_key=files.stranger_key, **options)
    await unusable("client_key", str(files.ca), security__client_key=files.ca, **options)
    await unusable("client_key", "No such file", security__client_key=tmp_path / "missing", **options)
    locked = tmp_path / "locked.key"
    command = ["openssl", "rsa", "-aes256", "-passout", "pass:hush", "-in", str(files.client_key), "-out", str(locked)]
    if b"EC" in files.client_key.read_bytes():
        command[1] = "ec"
    subprocess.run(command, check=True, capture_output=True)
    async with asyncio.timeout(PROMPT_S):
        await unusable("client_key", str(locked), security__client_key=locked, **options)


@pytest.mark.setting("security.skip_verify")
async def test_a_certificate_that_is_not_verified_is_warned_of(
    tmp_path: Path, binary: str, certificates: Tls, caplog: pytest.LogCaptureFixture
) -> None:
    async with server(tmp_path, certificates.required, binary=binary) as nats:
        await taken(nats.url, security__skip_verify=True)
        assert "NOT verified" in caplog.text


@pytest.mark.setting("security.tls_required")
async def test_nothing_is_sent_to_a_server_in_clear_text(tmp_path: Path, binary: str, certificates: Tls) -> None:
    async with server(tmp_path, token_config("right"), binary=binary) as nats:
        for url, options in (
            (nats.url, {"security__tls_required": True}),
            (nats.url.replace("nats:", "tls:"), {}),
            (nats.url, {"security__ca_file": certificates.ca}),
        ):
            await refused(url, "TLS was asked for", "security.tls_required", security__token="right", **options)
        assert (await nats.monitored("varz"))["total_connections"] > 0
        assert (await nats.monitored("connz?state=all&auth=true"))["connections"][0].get("authorized_user") in (
            None,
            "",
        )


@pytest.mark.setting("security.tls_required")
@pytest.mark.parametrize("how", ["required", "url"])
async def test_nothing_is_sent_to_a_server_that_comes_back_in_clear_text(
    tmp_path: Path, binary: str, certificates: Tls, wait_until: Wait, how: str
) -> None:
    async with server(tmp_path, certificates.required + token_config("right"), binary=binary) as nats:
        url = nats.url if how == "required" else nats.url.replace("nats:", "tls:")
        options: dict[str, Any] = {"security__tls_required": True} if how == "required" else {}
        async with dialled(url, security__ca_file=certificates.ca, security__token="right", **options) as connection:
            await nats.stop()
            nats.config = token_config("right")
            await nats.start()
            await wait_until(lambda: "TLS was asked for" in connection.trouble)
            assert not connection.is_connected
            await nats.stop()
            nats.config = certificates.required + token_config("right")
            await nats.start()
            await wait_until(lambda: connection.is_connected)


@pytest.mark.setting("security.tls_required")
async def test_servers_that_a_tls_server_names_are_connected_to_with_tls_too(tmp_path: Path, certificates: Tls) -> None:
    async with server(tmp_path, certificates.required) as nats:
        settings: dict[str, Any] = {"security__ca_file": certificates.ca}
        async with dialled(nats.url.replace("nats:", "tls:"), **settings) as connection:
            assert connection._wants_tls()
            assert "tls" in connection.options
        async with dialled(f"nats://127.0.0.1:{free_port()},tls://127.0.0.1:{nats.port}", **settings) as connection:
            assert "tls" in connection.options


# secrets


async def test_no_secret_is_logged_or_shown_by_a_service(
    tmp_path: Path, app_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with server(tmp_path, token_config("hush-hush")) as nats:
        values: dict[str, Any] = {"nats": nats.url, "security__token": "hush-hush", "drain": 2.0}
        service = Service(notebooks(app_name), settings_for(tmp_path / "data", **values))
        await service.start()
        async with await Client.connect(service.app, data=tmp_path / "data") as client:
            # the client reads the service's description, which has the token and is readable by its owner only
            await client.execute(Notebook, "n", Note("a"))
        description = tmp_path / "data" / app_name / "service.json"
        assert description.stat().st_mode & 0o077 == 0
        assert "hush-hush" in description.read_text()
        assert "hush" not in repr(service.settings) + str(service.status())
        await service.stop()
    assert "hush" not in caplog.text


async def test_credentials_for_the_embedded_server_are_refused(tmp_path: Path, app_name: str) -> None:
    service = Service(notebooks(app_name), settings_for(tmp_path, security__token="t"))
    with pytest.raises(BadCredentials, match=r"security.token is for servers of connection.servers"):
        await service.start()


async def test_each_server_of_a_cluster_may_refuse(tmp_path: Path) -> None:
    async with cluster(tmp_path, 2) as members:
        for member in members:
            await member.stop()
            member.config += token_config("right")
        await asyncio.gather(*(member.start() for member in members))
        await refused(",".join(member.url for member in members), "security.token", security__token="wrong")


async def test_a_server_that_takes_us_is_found_behind_one_that_does_not(tmp_path: Path) -> None:
    picky, open_ = Server(tmp_path / "a", token_config("right")), Server(tmp_path / "b")
    try:
        await asyncio.gather(picky.start(), open_.start())
        for _ in range(4):  # the servers are tried in any order
            for reconnects in (-1, 0):
                await taken(f"{picky.url},{open_.url}", security__token="wrong", connection__max_reconnects=reconnects)
    finally:
        await picky.kill()
        await open_.kill()
