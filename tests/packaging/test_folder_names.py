"""A user's folders may have the names of eskernel's packages: unless the app imports them, they do no harm."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kernel.settings import Settings
from kernel.workers.worker import REFUSED, describe
from tests.packaging.conftest import Installed, Running, clean_environment

pytestmark = pytest.mark.timeout(300)  # each test starts several processes
NAMES = ("aggregates", "examples", "kernel", "migrations", "projections")
WORKERS = ["--workers", "2"]
TRAP = "raise RuntimeError('the folder of the project was imported instead of the package')\n"
MEANT = {
    "aggregates": "from aggregates.account import Account",
    "projections": "from projections.balances import Balances",
    "migrations": "import migrations.env",
    "kernel": "from kernel import thing",
}
"""What an app's own import of such a folder may look like; eskernel has a module `migrations.env` too."""


def make_folder(project: Path, name: str, text: str) -> Path:
    folder = project / name
    folder.mkdir()
    for module in ("__init__", "account", "balances", "env", "upgrade"):
        (folder / f"{module}.py").write_text(text)
    return folder


def sentence(printed: str) -> str:
    """Return what a command printed, which is to be one line."""
    (line,) = printed.splitlines()
    return line


@pytest.mark.parametrize(
    ("start", "workers"),
    [(["eskernel"], WORKERS), (["python", "-m", "kernel.cli"], [])],
    ids=["script, two workers", "module, one worker"],
)
def test_folders_that_the_app_does_not_import_are_harmless(
    installed: Installed,
    project: Path,
    run_service: Callable[..., Running],
    start: list[str],
    workers: list[str],
) -> None:
    for name in NAMES:
        if not (name == "kernel" and "-m" in start):  # Python itself would run the user's kernel.cli
            make_folder(project, name, TRAP)
    service = run_service(*start, "run", "bank:app", *workers)
    sent = installed.run(*start, "send", "Account", "alice", "Deposit", "cents=500", "--json", folder=project)
    assert json.loads(sent.stdout)["version"] == 1
    assert "Balances: generation" in installed.run(*start, "rebuild", "Balances", folder=project).stdout
    rows = installed.run(*start, "query", "--json", "select cents from balances", folder=project).stdout
    assert json.loads(rows) == [{"cents": 500}]
    service.stop()
    assert "starting it again" not in service.text


@pytest.mark.parametrize("name", ["kernel", "projections"])
def test_each_folder_alone_is_harmless_also_where_pythonpath_leads_to_it(
    installed: Installed, project: Path, name: str
) -> None:
    make_folder(project, name, TRAP)
    environment = {"PYTHONPATH": str(project)} if name != "kernel" else {}
    check = installed.run("eskernel", "check", "bank:app", folder=project, environment=environment)
    assert "the declarations have no problems" in check.stdout
    config = installed.run("eskernel", "config", "check", "bank:app", folder=project, environment=environment)
    assert "error" not in config.stdout


@pytest.mark.parametrize(("name", "workers"), [("kernel", []), ("projections", []), ("migrations", WORKERS)])
def test_an_app_that_imports_such_a_folder_is_told_to_rename_it(
    installed: Installed, project: Path, name: str, workers: list[str]
) -> None:
    folder = make_folder(project, name, "thing = Account = Balances = 1\n")
    (project / "shop.py").write_text(f"{MEANT[name]}\nfrom bank import app\n")
    said = sentence(installed.run("eskernel", "run", "shop:app", *workers, folder=project, code=2).stderr)
    assert said.startswith("error: can't import 'shop': ")
    assert f"'{name}' is a package of eskernel, which hides your folder {folder}" in said
    assert said.endswith("rename your folder, or move it into a package of yours")
    assert sentence(installed.run("eskernel", "check", "shop:app", folder=project, code=2).stderr) == said


@pytest.mark.parametrize("name", MEANT)
def test_an_app_in_a_module_of_such_a_name_is_to_be_renamed(installed: Installed, project: Path, name: str) -> None:
    (project / "bank.py").rename(project / f"{name}.py")
    said = sentence(installed.run("eskernel", "check", f"{name}:app", folder=project, code=2).stderr)
    assert f"hides your file {project / name}.py: rename your file" in said


def test_an_attribute_that_only_the_users_module_has_is_missed_with_the_same_words(
    installed: Installed, project: Path
) -> None:
    make_folder(project, "projections", "")
    (project / "shop.py").write_text("import projections.tables\nTABLE = projections.tables.Orders\n")
    said = sentence(installed.run("eskernel", "check", "shop:app", folder=project, code=2).stderr)
    assert f"hides your folder {project / 'projections'}" in said


def test_a_missing_module_is_not_blamed_on_a_folder_that_the_app_does_not_import(
    installed: Installed, project: Path
) -> None:
    make_folder(project, "projections", TRAP)
    (project / "shop.py").write_text("import absent\n")
    said = sentence(installed.run("eskernel", "check", "shop:app", folder=project, code=2).stderr)
    assert "No module named 'absent'" in said
    assert "projections" not in said


def test_a_worker_that_cannot_import_the_app_tells_its_parent_why(installed: Installed, project: Path) -> None:
    folder = make_folder(project, "projections", "Balances = 1\n")
    (project / "shop.py").write_text(MEANT["projections"])
    order = describe("shop:app", str(project), Settings(data=project / ".eskernel"))
    done = subprocess.run(
        [str(installed.bin / "python"), "-P", "-m", "kernel.workers.worker", "1"],
        cwd=project,
        env=clean_environment(),
        input=order + os.linesep.encode(),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (REFUSED, b"")
    assert f"hides your folder {folder}" in json.loads(done.stdout)["failed"]


def test_pytest_without_eskernels_fixture_imports_neither_eskernel_nor_such_a_folder(
    installed: Installed, tmp_path: Path
) -> None:
    for name in NAMES:
        make_folder(tmp_path, name, TRAP)
    (tmp_path / "test_other.py").write_text(
        f"import sys\n\ndef test_nothing_is_loaded():\n    assert sys.modules.keys().isdisjoint({NAMES!r})\n"
        "    assert 'eskernel_pytest' in sys.modules\n"
    )
    said = installed.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_other.py", folder=tmp_path)
    assert "1 passed" in said.stdout
