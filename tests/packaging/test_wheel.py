"""What a stranger gets who installs eskernel."""

from __future__ import annotations

import hashlib
import json
import tomllib
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import pytest

from tests.packaging.conftest import ROOT, Installed, Running

pytestmark = pytest.mark.timeout(300)  # a dozen processes
PACKAGES = {"aggregates", "projections", "kernel", "migrations"}
PLUGIN = "eskernel_pytest.py"
APACHE_2_0 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""SHA-256 of the licence's text as the Apache Software Foundation publishes it."""


@pytest.fixture(scope="module")
def files(wheel: Path) -> dict[str, bytes]:
    """The wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def version() -> str:
    found: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return found


def test_the_wheel_holds_the_four_packages_the_plugin_for_pytest_and_nothing_else(files: dict[str, bytes]) -> None:
    assert {PurePosixPath(name).parts[0] for name in files} == PACKAGES | {PLUGIN, f"eskernel-{version()}.dist-info"}


def test_the_wheel_holds_every_module_of_the_packages_and_what_alembic_needs(files: dict[str, bytes]) -> None:
    sources = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {"migrations/env.py", "migrations/versions/0001_first.py", "kernel/cli/__init__.py"} <= sources
    markers = {f"{package}/py.typed" for package in PACKAGES}
    expected = sources | markers | {PLUGIN, "migrations/script.py.mako"}
    assert {name for name in files if ".dist-info/" not in name} == expected


def test_the_licence_is_apache_2_0_word_for_word(files: dict[str, bytes]) -> None:
    folder = f"eskernel-{version()}.dist-info"
    metadata = message_from_bytes(files[f"{folder}/METADATA"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert hashlib.sha256(files[f"{folder}/licenses/LICENSE"]).hexdigest() == APACHE_2_0


def test_fastapi_is_wanted_by_those_who_ask_for_the_web_only(files: dict[str, bytes]) -> None:
    metadata = message_from_bytes(files[f"eskernel-{version()}.dist-info/METADATA"])
    wanted = [line for line in metadata.get_all("Requires-Dist") or [] if line.startswith(("fastapi", "uvicorn"))]
    assert {line.partition(";")[2].strip().replace("'", '"') for line in wanted if line.startswith("fastapi")} == {
        'extra == "web"',
        'extra == "examples"',
    }
    assert all("extra ==" in line for line in wanted)
    assert "web" in (metadata.get_all("Provides-Extra") or [])


def test_the_packages_come_from_the_environment_not_from_a_checkout(installed: Installed, project: Path) -> None:
    program = "import json, sys, aggregates, kernel, migrations, projections as p\n"
    program += "print(json.dumps([[m.__file__ for m in (aggregates, kernel, migrations, p)], sys.path]))"
    places, path = json.loads(installed.run("python", "-c", program, folder=project).stdout)
    assert {Path(place).parent.parent for place in places} == {installed.packages}
    assert str(ROOT) not in path
    for folder in ("examples", "tests", "benchmarks"):
        find = f"import importlib.util; print(importlib.util.find_spec({folder!r}))"
        assert installed.run("python", "-c", find, folder=project).stdout == "None\n"


def test_the_version_is_pyprojects_and_is_printed_without_loading_the_kernel(
    installed: Installed, project: Path
) -> None:
    assert installed.run("eskernel", "--version", folder=project).stdout == f"eskernel {version()}\n"
    program = (
        "import sys\nfrom kernel.cli import main\ntry:\n    main(['--version'])\nfinally:\n    print(*sys.modules)"
    )
    loaded = set(installed.run("python", "-c", program, folder=project).stdout.split())
    assert "click" in loaded
    assert loaded & {"sqlalchemy", "nats", "pydantic", "thespian", "alembic", "msgspec", "aiohttp", "rich"} == set()


def test_a_stranger_runs_the_readmes_bank(
    installed: Installed, project: Path, run_service: Callable[..., Running]
) -> None:
    def eskernel(*arguments: str) -> str:
        return installed.run("eskernel", *arguments, folder=project).stdout

    assert "bank: the declarations have no problems" in eskernel("check", "bank:app")
    service = run_service("eskernel", "run", "bank:app")
    receipt = json.loads(eskernel("send", "Account", "alice", "Deposit", "cents=500", "--json"))
    assert receipt["version"] == 1
    assert "Balances: generation" in eskernel("rebuild", "Balances")  # until it is complete, with alice's event
    assert json.loads(eskernel("query", "--json", "select * from balances")) == [{"account": "alice", "cents": 500}]
    assert "alice" in eskernel("query", "select * from balances")
    service.stop()
    assert {path.name for path in project.iterdir()} <= {"bank.py", ".eskernel", "__pycache__"}


def test_pytest_has_the_fixture_running_without_an_import(installed: Installed, project: Path) -> None:
    (project / "test_bank.py").write_text(
        "import asyncio\nfrom bank import Account, Deposit, app\n\ndef test_a_deposit(running):\n"
        "    async def deposit():\n        async with running(app) as kernel:\n"
        "            receipt = await kernel.execute(Account, 'alice', Deposit(500))\n"
        "            return await kernel.query('select cents from balances', after=receipt)\n\n"
        "    assert asyncio.run(deposit()) == [{'cents': 500}]\n"
    )
    assert "1 passed" in installed.run("python", "-m", "pytest", "-q", folder=project).stdout
