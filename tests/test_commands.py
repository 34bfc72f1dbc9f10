"""A command that is forked does what a process that is started does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, eskernel, shared

BROKEN = "import sys\nprint('begun')\nsys.stdout.flush()\ndef fail():\n    raise LookupError('ü')\nfail()\n"


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["-m", "kernel.cli", "check", "examples.bank:app"], 0),
        (["-m", "kernel.cli", "config", "show"], 0),
        (["-m", "kernel.cli", "send", "--help"], 0),
        (["-m", "kernel.cli", "send"], 2),
        (["-m", "kernel.cli", "check", "broken:app"], 2),
        (["-m", "kernel.cli", "status"], 3),
        (["-m", "broken"], 1),
    ],
)
def test_a_forked_command_ends_and_prints_as_a_started_one(arguments: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    variables = environment(COLUMNS="30", ESKERNEL_WORKERS="7", PYTHONDONTWRITEBYTECODE="1")
    started = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    forked = shared().run(["python", *arguments], tmp_path, variables)
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)
    assert forked.returncode == code
    assert list(tmp_path.iterdir()) == [tmp_path / "broken.py"]


def test_each_command_imports_the_app_anew(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / "app.py").write_text(f"from kernel import App\napp = App('{name}', aggregates=[])\n")
        assert name in eskernel("check", "app:app", folder=tmp_path, PYTHONDONTWRITEBYTECODE="1").stderr


async def test_commands_run_side_by_side_and_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text("import signal, sys\nprint('waits', flush=True)\nsignal.pause()\n")
    out = (tmp_path / "out").open("w+")
    endless = shared().start(["python", "endless.py"], tmp_path, environment(), out.fileno(), out.fileno())
    helps = [asyncio.to_thread(eskernel, "--help", folder=tmp_path) for _ in range(3)]
    assert [done.returncode for done in await asyncio.gather(*helps)] == [0, 0, 0]
    assert endless.stop() == -signal.SIGTERM
    out.close()


def test_what_python_reads_at_its_start_can_not_be_given(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="LC_ALL needs a process of its own"):
        eskernel("--help", folder=tmp_path, LC_ALL="POSIX")
