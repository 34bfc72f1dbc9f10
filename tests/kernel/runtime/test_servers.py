"""The test servers work: each lets in the clients that it should, and no others."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import psutil
import pytest
from nats.aio.client import Client
from nats.js.api import StreamConfig
from nats.js.errors import APIError

from tests.conftest import OLD_SERVER
from tests.failing import ROOT
from tests.servers import (
    NO_JETSTREAM,
    Operator,
    Server,
    Tls,
    account_config,
    cluster,
    nkey,
    password_config,
    server,
    tls,
    token_config,
)

Wait = Callable[..., Any]
OWNER = """
import asyncio, sys
from pathlib import Path
from tests.servers import server

async def main():
    async with server(Path(sys.argv[1])) as nats:
        print(nats.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return tls(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def connected(url: str, errors: list[str] | None = None, **options: Any) -> AsyncIterator[Client]:
    """A client that does not retry; the errors that it gets go to `errors`."""

    async def error(problem: Exception) -> None:
        if errors is not None:
            errors.append(str(problem))

    # a refused client is not closed: nats-py's close never returns after a failed TLS handshake
    client = await nats.connect(
        url, allow_reconnect=False, max_reconnect_attempts=1, reconnect_time_wait=0, error_cb=error, **options
    )
    try:
        yield client
    finally:
        await client.close()


async def taken(url: str, **options: Any) -> None:
    """Check that a client is let in and can use JetStream."""
    async with connected(url, **options) as client:
        await client.jetstream().add_stream(StreamConfig(name="taken", subjects=["taken"]))


async def refused(reason: str, url: str, **options: Any) -> None:
    """Check that a client is not let in, for this reason."""
    errors: list[str] = []
    with pytest.raises((nats.errors.Error, OSError)):
        async with connected(url, errors, **options):
            pass
    assert reason.lower() in " ".join(errors).lower()


def trusting(ca: Path, cert: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    if cert is not None:
        context.load_cert_chain(cert, key)
    return context


# servers


async def test_it_runs_the_version_asked_for_and_lists_its_connections(tmp_path: Path, binary: str) -> None:
    async with server(tmp_path, binary=binary) as running:
        async with connected(running.url, name="me"):
            connections = (await running.monitored("connz"))["connections"]
            assert [connection["name"] for connection in connections] == ["me"]
        version = (await running.monitored("varz"))["version"]
        assert version.startswith("2.10." if binary == str(OLD_SERVER) else "2.15.")


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_it_starts_again_with_its_ports_and_its_store(tmp_path: Path, binary: str, how: str) -> None:
    async with server(tmp_path, binary=binary) as running:
        before = (running.url, running.monitor)
        async with connected(running.url) as client:
            await client.jetstream().add_stream(StreamConfig(name="kept", subjects=["kept"]))
            await client.jetstream().publish("kept", b"1")
        await getattr(running, how)()
        assert running.pid == 0
        await refused("Connect call failed", running.url)
        await running.start()
        assert (running.url, running.monitor) == before
        async with connected(running.url) as client:
            assert (await client.jetstream().stream_info("kept")).state.messages == 1


async def test_it_is_stopped_at_the_end_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with server(tmp_path) as running:
            pid = running.pid
            raise ZeroDivisionError
    assert not psutil.pid_exists(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
async def test_it_ends_with_a_test_run_that_is_killed(tmp_path: Path, wait_until: Wait) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as owner:
        try:
            assert owner.stdout is not None
            started = psutil.Process(int(owner.stdout.readline()))
        finally:
            owner.send_signal(signal.SIGKILL)
    await wait_until(lambda: not started.is_running() or started.status() == psutil.STATUS_ZOMBIE)


async def test_a_server_that_does_not_start_says_why(tmp_path: Path, binary: str) -> None:
    made = Server(tmp_path, "nonsense: {", binary=binary)
    with pytest.raises(RuntimeError, match="did not start.*Parse error"):
        await made.start()
    assert made.pid == 0


async def test_a_cluster_has_replicated_streams_that_survive_a_server(tmp_path: Path, binary: str) -> None:
    async with cluster(tmp_path, binary=binary) as members:
        async with connected(members[0].url) as client:
            made = await client.jetstream().add_stream(StreamConfig(name="s", subjects=["s"], num_replicas=3))
        assert made.cluster is not None
        assert made.cluster.leader is not None
        followers = [replica.name for replica in made.cluster.replicas or []]
        assert {made.cluster.leader, *followers} == {"n0", "n1", "n2"}
        leader, follower = (members[int(str(name)[1:])] for name in (made.cluster.leader, followers[0]))
        await follower.kill()
        async with connected(leader.url) as client:
            assert (await client.jetstream().publish("s", b"1")).seq == 1
        await follower.start()


async def test_a_cluster_may_have_another_size_and_is_stopped_at_the_end(tmp_path: Path) -> None:
    async with cluster(tmp_path, 2) as members:
        assert (await members[1].monitored("jsz"))["meta_cluster"]["cluster_size"] == 2
        pids = [member.pid for member in members]
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_a_domain_is_a_matter_of_configuration(tmp_path: Path, binary: str) -> None:
    async with server(tmp_path, "jetstream { domain: hub }", binary=binary) as running:
        async with connected(running.url) as client:
            assert (await client.jetstream(domain="hub").account_info()).domain == "hub"
            await client.jetstream(domain="hub").add_stream(StreamConfig(name="s", subjects=["s"]))
            with pytest.raises(nats.js.errors.ServiceUnavailableError):
                await client.jetstream(domain="leaf").account_info()
    assert (tmp_path / "store").exists()


# TLS


async def test_tls_is_required_and_its_authority_known(tmp_path: Path, binary: str, certificates: Tls) -> None:
    async with server(tmp_path, certificates.required, binary=binary) as running:
        await taken(running.url, tls=trusting(certificates.ca))
        await taken(running.url.replace("127.0.0.1", "localhost"), tls=trusting(certificates.ca))
        await refused("CERTIFICATE_VERIFY_FAILED", running.url, tls=trusting(certificates.stranger_ca))


async def test_client_certificates_are_verified(tmp_path: Path, binary: str, certificates: Tls) -> None:
    tls_of = certificates
    async with server(tmp_path, tls_of.verifying, binary=binary) as running:
        await taken(running.url, tls=trusting(tls_of.ca, tls_of.client_cert, tls_of.client_key))
        for wrong in (trusting(tls_of.ca), trusting(tls_of.ca, tls_of.stranger_cert, tls_of.stranger_key)):
            await refused("", running.url, tls=wrong)
            assert "TLS handshake error" in running.log_tail()


async def test_the_handshake_may_come_first(tmp_path: Path, binary: str, certificates: Tls) -> None:
    async with server(tmp_path, certificates.handshake_first, binary=binary) as running:
        await taken(running.url, tls=trusting(certificates.ca), tls_handshake_first=True)
        context = trusting(certificates.stranger_ca)
        await refused("CERTIFICATE_VERIFY_FAILED", running.url, tls=context, tls_handshake_first=True)


# users


async def test_a_token_lets_in(tmp_path: Path, binary: str) -> None:
    async with server(tmp_path, token_config("right"), binary=binary) as running:
        await taken(running.url, token="right")
        await refused("Authorization Violation", running.url, token="wrong")
        await refused("Authorization Violation", running.url)


async def test_a_password_lets_in(tmp_path: Path, binary: str) -> None:
    async with server(tmp_path, password_config("me", "right"), binary=binary) as running:
        await taken(running.url, user="me", password="right")
        await taken(running.url.replace("//", "//me:right@"))
        await refused("Authorization Violation", running.url, user="me", password="wrong")
        await refused("Authorization Violation", running.url)


async def test_an_nkey_lets_in(tmp_path: Path, binary: str) -> None:
    mine, other = nkey(tmp_path / "mine.nk"), nkey(tmp_path / "other.nk")
    async with server(tmp_path, mine.config, binary=binary) as running:
        await taken(running.url, nkeys_seed=str(mine.seed_file))
        await refused("Authorization Violation", running.url, nkeys_seed=str(other.seed_file))
        await refused("Authorization Violation", running.url)


async def test_credentials_of_the_trusted_operator_let_in(tmp_path: Path, binary: str) -> None:
    operator, other = Operator(), Operator()
    async with server(tmp_path, operator.config, binary=binary) as running:
        creds = operator.creds(tmp_path / "mine.creds")
        await taken(running.url, user_credentials=str(creds))
        async with connected(running.url, user_credentials=str(creds)):
            [connection] = (await running.monitored("connz?auth=true"))["connections"]
            assert connection["account"] == operator.account
        wrong = [
            {"user_credentials": str(other.creds(tmp_path / "other.creds"))},
            {"user_credentials": str(operator.creds(tmp_path / "old.creds", expires=int(time.time()) - 60))},
            {},
        ]
        for options in wrong:
            await refused("Authorization Violation", running.url, **options)


# permissions


async def test_a_user_may_be_kept_from_jetstream(tmp_path: Path, binary: str) -> None:
    config = password_config("me", "right", NO_JETSTREAM)
    async with server(tmp_path, config, binary=binary) as running:
        async with connected(running.url, user="me", password="right") as client:
            with pytest.raises(nats.errors.TimeoutError):
                await client.jetstream(timeout=0.3).account_info()
            assert "permissions violation" in str(client.last_error).lower()
            await client.publish("anything", b"")
            await client.flush()


async def in_excess(url: str, **options: Any) -> None:
    """Check that a second stream is refused, for its size or the number of streams."""
    async with connected(url, **options) as client:
        streams = client.jetstream()
        with pytest.raises(APIError, match="insufficient storage"):
            await streams.add_stream(StreamConfig(name="large", subjects=["large"], max_bytes=2_000_000))
        await streams.add_stream(StreamConfig(name="one", subjects=["one"]))
        with pytest.raises(APIError, match="maximum number of streams"):
            await streams.add_stream(StreamConfig(name="two", subjects=["two"]))


async def test_an_account_may_have_limits(tmp_path: Path, binary: str) -> None:
    config = account_config("me", "right", "max_streams: 1, max_file: 1000000")
    async with server(tmp_path, config, binary=binary) as running:
        await in_excess(running.url, user="me", password="right")


async def test_an_account_of_an_operator_may_have_limits(tmp_path: Path, binary: str) -> None:
    operator = Operator(streams=1, disk_bytes=1_000_000)
    async with server(tmp_path, operator.config, binary=binary) as running:
        await in_excess(running.url, user_credentials=str(operator.creds(tmp_path / "mine.creds")))
