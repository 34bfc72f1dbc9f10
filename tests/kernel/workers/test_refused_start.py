"""`eskernel run --workers N` of what can't work says why, once, and exits as one worker does."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import eskernel

APP = """
from examples.bank import Account
from kernel import App

if "kernel.workers.worker" in open("/proc/self/cmdline").read().split("\\0"):
    raise OSError("something that only one process can have")
app = App("selfish", aggregates=[Account])
"""


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def refusals(folder: Path, *arguments: str) -> list[tuple[int, str]]:
    """Return the exit codes and the errors of the same start with one worker and with two."""
    found = []
    for workers in ("1", "2"):
        done = eskernel("run", *arguments, "--workers", workers, folder=folder)
        said = done.stdout + done.stderr
        assert "Traceback" not in said
        assert "starting it again" not in said
        assert "sqlalche.me" not in said
        found.append((done.returncode, said[said.index("error: ") :]))
    return found


def test_a_foreign_table_with_the_name_of_a_projections(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "p.db")) as connection:
        connection.execute("create table balances__1 (x int)")
    one, two = refusals(tmp_path, "examples.bank:app", "--database", f"sqlite:///{tmp_path / 'p.db'}")
    reason = "table balances__1 exists already, and the kernel did not create it; rename or drop it"
    assert one == two == (1, f"error: {reason}\n")


def test_a_port_that_is_taken(tmp_path: Path, taken_port: int) -> None:
    one, two = refusals(tmp_path, "examples.bank:app", "--port", str(taken_port))
    assert one == two
    code, said = one
    assert code == 1
    assert said.startswith(f"error: can't serve HTTP on 127.0.0.1:{taken_port} (http.host, http.port): ")
    assert "address already in use" in said


def test_a_database_that_is_not_there(tmp_path: Path, postgres_url: str) -> None:
    url = postgres_url.replace("/postgres?", "/nowhere?")
    one, two = refusals(tmp_path, "examples.bank:app", "--database", url)
    assert one == two
    assert one[0] == 1
    assert one[1].count('database "nowhere" does not exist') == 1


def test_an_app_that_only_one_process_can_import(tmp_path: Path) -> None:
    (tmp_path / "selfish.py").write_text(APP)
    done = eskernel("run", "selfish:app", "--workers", "2", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("something that only one process can have") == 1
