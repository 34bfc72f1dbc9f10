"""One service, deployed as docs/deploying.md says: prepare, start, look, go back, and there again."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from tests.kernel.cli.test_cli import Shell
from tests.kernel.cli.test_cli_comparisons import write


def test_a_version_is_prepared_shown_rolled_back_paused_and_dropped(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    write(shell.folder)
    shutil.copy(shell.folder / "books_app.py", shell.folder / "old_books.py")
    shell.start("books_app:app")
    try:
        for notebook in ("a", "b", "a"):
            shell("send", "Notebook", notebook, "Note", "text=one")
        write(shell.folder, "row.last = event.text; row.size += 3", "size: Mapped[int] = mapped_column(default=0)", 2)
        said = shell("prepare", "books_app:app", "--no-follow", "--quiet")
        assert "what books_app:app needs is ready; start its service" in said
        assert "ready (built, and shown when a service of its program starts)" in shell("projections", "list")
        assert "size" not in shell("query", "select * from pages")
        assert shell.stop() == 0
        shell.start("books_app:app")
        assert json.loads(shell("query", "select sum(size) as n from pages", "--json")) == [{"n": 9}]

        found = json.loads(shell("projections", "show", "Pages", "--json"))
        assert [(made["version"], made["state"], len(made["kept_by"])) for made in found["generations"]] == [
            (1, "retired", 0),
            (2, "live", 1),
        ]
        assert "kept up to date by no service: no running one declares it" in shell("projections", "show", "Pages")
        assert "no projection 'Nothing'" in shell("projections", "show", "Nothing", code=1)

        # the old program is at hand, and not running: what its tables lack is folded
        shell("send", "Notebook", "c", "Note", "text=one")
        said = shell("projections", "rollback", "Pages", "--app", "old_books:app")
        assert "Pages: readers see version 1 (generation 1), after" in said
        assert "size" not in shell("query", "select * from pages")
        assert json.loads(shell("query", "select sum(notes) as n from pages", "--json")) == [{"n": 4}]
        assert "readers see it, and no running program declares it" in shell("status")
        assert "version 2 (generation 2)" in shell("projections", "rollback", "Pages")

        assert "Pages is left as it is" in shell("projections", "pause", "Pages")
        shell("send", "Notebook", "d", "Note", "text=one")
        _until(shell, "select count(*) as n from words where times = 5", 1)
        assert "paused: eskernel projections resume" in shell("status")
        assert json.loads(shell("query", "select count(*) as n from pages", "--json")) == [{"n": 3}]
        assert "Pages is folded again" in shell("projections", "resume", "Pages")
        _until(shell, "select count(*) as n from pages", 4)

        assert "pages_then is Pages as of sequence 2: 2 events" in shell(
            "projections", "build", "Pages", "--at", "2", "--as", "pages_then"
        )
        assert json.loads(shell("query", "select sum(size) as n from pages_then", "--json")) == [{"n": 6}]
        assert "give a stream sequence, or a time" in shell(
            "projections", "build", "Pages", "--at", "then", "--as", "x", code=2
        )
        assert "pages_then and pages__3 are dropped" in shell("projections", "drop", "Pages", "--as", "pages_then")
        assert "readers see version 2 of Pages" in shell("projections", "drop", "Pages", "--version", "2", code=1)
        assert "version 1 of Pages is dropped: tables pages__1" in shell(
            "projections", "drop", "Pages", "--version", "1"
        )
        assert "an earlier version of Pages is no longer there" in shell("projections", "rollback", "Pages", code=1)
    finally:
        assert shell.stop() == 0


def _until(shell: Shell, query: str, number: int) -> None:
    deadline = time.monotonic() + 20
    while json.loads(shell("query", query, "--json")) != [{"n": number}]:
        assert time.monotonic() < deadline
