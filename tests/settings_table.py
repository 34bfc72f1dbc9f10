"""The table of settings and the tests that show their effect: `make settings-table` writes docs/settings-tested.md.

A test is marked with `@pytest.mark.setting("stream.max_bytes")`. Its parameters name the systems it ran on (`2.15`,
`2.10`, `sqlite`, `postgresql`); a test without a version among them runs on the current server, and `on=""` says that
it needs none. `lacking="..."` is what the service says on a server that lacks the setting.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from kernel.settings.sources import leaves

TABLE = Path(__file__).parent.parent / "docs" / "settings-tested.md"
_SERVERS, _DATABASES = ("2.15", "2.10"), ("sqlite", "postgresql")


def names() -> list[str]:
    """Return every setting of the model."""
    return [name for name, _ in leaves()]


@cache
def marked() -> set[str]:
    """Return the settings that the tests' marks name, from the tests' source."""
    found: set[str] = set()
    for file in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setting":
                found.update(argument.value for argument in node.args if isinstance(argument, ast.Constant))
    return found


def listed(table: str) -> list[str]:
    """Return the settings that have rows in a table."""
    return [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]


@dataclass
class Row:
    tests: dict[str, None] = field(default_factory=dict)
    on: set[str] = field(default_factory=set)
    lacking: dict[str, None] = field(default_factory=dict)


class Recorder:
    """Records the marked tests that pass."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, {name: Row() for name in names()}
        self.failed = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> object:
        report: pytest.TestReport = yield  # type: ignore[misc]
        self.failed |= report.failed
        if report.when == "call" and report.passed:
            for mark in item.iter_markers("setting"):
                for name in mark.args:
                    self._note(self.rows[name], item, mark)
        return report

    def _note(self, row: Row, item: pytest.Item, mark: pytest.Mark) -> None:
        test = getattr(item, "originalname", item.name)
        row.tests[f"{item.path.stem}::{test}"] = None
        parameters = (
            {str(parameter) for parameter in item.callspec.params.values()} if hasattr(item, "callspec") else set()
        )
        row.on |= parameters.intersection(_SERVERS + _DATABASES)
        if not parameters.intersection(_SERVERS) and mark.kwargs.get("on") is None:
            row.on.add(_SERVERS[0])
        if lacking := mark.kwargs.get("lacking"):
            row.lacking[lacking] = None

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.testscollected and not self.failed:
            self.path.write_text(self.text())

    def text(self) -> str:
        lines = [
            "# Settings and the tests that show their effect",
            "",
            "Written by `make settings-table`, which runs these tests on real servers. A setting without a server or",
            "database concerns neither.",
            "",
            "| setting | shown by | nats-server | database | on a server that lacks it |",
            "|---|---|---|---|---|",
        ]
        for name, row in self.rows.items():
            tests = "<br>".join(row.tests) or "**nothing**"
            servers, databases = (", ".join(o for o in known if o in row.on) for known in (_SERVERS, _DATABASES))
            lines.append(f"| `{name}` | {tests} | {servers} | {databases} | {'; '.join(row.lacking)} |")
        return "\n".join(lines) + "\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--settings-table", type=Path, help="write to this file which test shows which setting's effect")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--settings-table"):
        config.pluginmanager.register(Recorder(path))
