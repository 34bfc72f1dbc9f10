"""The wheel, and an environment of its own that it is installed in, without a checkout."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel.runtime.nats_server import find_binary

ROOT = Path(__file__).parents[2]
_NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")


class Installed:
    """An environment that eskernel's wheel is installed in."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))

    def run(
        self, *command: str, folder: Path, code: int = 0, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one of its programs in a folder; check the exit code, and that there is no traceback."""
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=folder,
            env=clean_environment() | (environment or {}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done


class Running:
    """A service that the environment's `eskernel` runs in a folder."""

    def __init__(self, installed: Installed, folder: Path, *command: str) -> None:
        self.output = folder.with_suffix(".log")
        with self.output.open("wb") as output:
            self._process = subprocess.Popen(
                [str(installed.bin / command[0]), *command[1:]],
                cwd=folder,
                env=clean_environment(),
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + 60
        while "stop it with" not in self.text:
            assert self._process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text()

    def stop(self) -> None:
        """Stop it with SIGTERM, and check that it ends well."""
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(30) == 0, self.text
        assert "Traceback" not in self.text

    def kill(self) -> None:
        """End it, if a failed test left it running."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def clean_environment() -> dict[str, str]:
    """Return the variables of a stranger's shell: nothing leads Python to this checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ESKERNEL", "VIRTUAL"))}
    return kept | {"COLUMNS": "120"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy of the checkout."""
    copy, built = tmp_path_factory.mktemp("source") / "checkout", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, copy, ignore=_NOT_COPIED)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    done = subprocess.run(
        [*pip, "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(built), str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A new environment with the wheel; the other libraries are those of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    installed = Installed(folder)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(installed.bin / "python")]
    done = subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # a folder that a .pth file names is searched, but its own .pth files are not: an editable install stays unseen
    libraries = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (installed.packages / "libraries.pth").write_text("\n".join(libraries) + "\n")
    (installed.bin / "nats-server").symlink_to(find_binary())
    return installed


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with nothing but the README's bank, as `bank.py`."""
    folder = tmp_path / "project"
    folder.mkdir()
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- examples/bank/__init__\.py -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    (folder / "bank.py").write_text(block[1])
    return folder


@pytest.fixture
def run_service(installed: Installed, project: Path) -> Iterator[object]:
    """A function that runs a command in the project until the service is there; what is left is ended."""
    running: list[Running] = []

    def run(*command: str) -> Running:
        running.append(Running(installed, project, *command))
        return running[-1]

    yield run
    for service in running:
        service.kill()
