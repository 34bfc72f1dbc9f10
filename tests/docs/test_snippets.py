"""Every snippet of the README and of the guide does what the page says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel.runtime.nats_server import EmbeddedServer
from tests.commands import shared
from tests.conftest import run
from tests.docs.pages import GUIDE, ROOT, read_blocks
from tests.docs.walk import Walk, matches
from tests.failing import free_port

PAGES = [ROOT / "README.md", *sorted(GUIDE.glob("*.md"))]
SKIPPED = {
    "README.md": 1,  # make demo, make test
    "docs/guide/README.md": 1,  # installing
}
CLUSTER = "nats://nats.example.com:4222"
POSTGRES = "postgresql://bank@db.example.com/bank"
PORT = "127.0.0.1:9100"


def environment() -> dict[str, str]:
    """Return that of the commands that pages type."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ESKERNEL_", "PYTEST_"))}
    found = {**inherited, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    # where eskernel is installed, pytest finds its plugin by an entry point; here that may be so or not, and pytest
    # would warn of modules that `shared()` has imported before
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "eskernel_pytest,pytest_asyncio.plugin"}
    return {**found, **plugins}


@pytest.fixture
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """What stands in the pages for a port, a NATS server and a PostgreSQL database of this machine."""
    text = request.getfixturevalue("path").read_text()
    found = {PORT: f"127.0.0.1:{free_port()}", "--port 9100": ""}
    found["--port 9100"] = f"--port {found[PORT].rpartition(':')[2]}"
    found["port = 9100"] = f"port = {found[PORT].rpartition(':')[2]}"
    if POSTGRES in text:
        found[POSTGRES] = request.getfixturevalue("fresh_postgres")
    if CLUSTER not in text:
        yield found
        return
    server = EmbeddedServer(tmp_path / "nats")
    found[CLUSTER] = run(server.start())
    yield found
    run(server.stop())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_snippet_does_what_the_page_says(
    path: Path, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bank"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    walk = Walk(path, folder, shared(), environment(), places)
    try:
        walk.go()
    finally:
        walk.close()


def test_nothing_is_skipped_beyond_what_is_known() -> None:
    skipped = {
        str(path.relative_to(ROOT)): count
        for path in PAGES
        if (count := sum(block.argument("skip") is not None for block in read_blocks(path)))
    }
    assert skipped == SKIPPED


def test_the_readme_shows_the_bank_as_it_is() -> None:
    source = "examples/bank/__init__.py"
    (block,) = [block for block in read_blocks(ROOT / "README.md") if block.comment == source]
    assert (ROOT / source).read_text().partition('"""\n\n')[2] == block.text


def test_an_output_that_differs_is_noticed() -> None:
    assert matches("a ... c\n...\nlast\n", "a b c\nany\nline\nlast\n")
    assert matches("a\n...\n", "a\n")
    assert not matches("a ... c\n", "a b d\n")
    assert not matches("a\n", "a\nb\n")
