"""The plan of the house: which room may import which, which packages enter where, and how large a module may be.

A room is a module or a folder of `kernel/`, or another package of the project. An import counts wherever it stands: at
the top of a module, inside a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

ROOT = Path(__file__).parent.parent
PRODUCT = ("aggregates", "projections", "kernel", "migrations", "examples", "benchmarks")
MODULES = sorted(path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py"))
MAX_BYTES = 20_000

ALL_BELOW: Final = frozenset({"every room that stands above this line of the table"})
_BASE = {"aggregates", "errors", "alerts", "protocol", "packages"}

ROOMS: dict[str, frozenset[str] | set[str]] = {
    # bottom up: a room may import rooms that stand above it here
    "aggregates": set(),
    "projections": {"aggregates"},
    "migrations": {"projections"},
    "errors": {"aggregates"},
    "alerts": set(),
    "packages": set(),
    "protocol": {"aggregates", "errors"},
    "settings": _BASE,
    "transport": _BASE | {"settings"},
    "log": _BASE | {"transport", "settings"},
    "effect": {"aggregates"},
    "app": _BASE | {"effect", "log", "projections"},
    "telemetry": _BASE | {"app", "log", "settings"},
    "runtime": _BASE | {"telemetry", "settings"},
    "governance": _BASE | {"app", "log", "transport", "telemetry", "settings"},
    "actors": _BASE | {"log", "telemetry", "projections"},
    "commands": _BASE | {"actors", "governance", "runtime", "log", "transport", "telemetry", "app", "settings"},
    "projector": _BASE | {"actors", "governance", "log", "telemetry", "app", "settings", "projections"},
    "reactions": _BASE | {"effect", "log", "telemetry", "app", "settings", "projections"},
    "partitions": _BASE | {"reactions", "commands", "projector", "log", "transport", "telemetry", "app"},
    "monitoring": ALL_BELOW,
    "permissions": _BASE | {"partitions", "log", "transport", "app", "settings"},
    "staleness": _BASE | {"log", "transport", "projections"},
    "client": _BASE | {"staleness", "runtime", "log", "transport", "app", "telemetry", "settings", "projections"},
    "preflight": _BASE
    | {"permissions", "runtime", "log", "transport", "app", "telemetry", "settings", "projections", "migrations"},
    "assembly": ALL_BELOW,
    "service": ALL_BELOW,
    "preparation": ALL_BELOW,
    "workers": _BASE | {"service", "monitoring", "runtime", "telemetry", "app", "settings"},
    "testing": ALL_BELOW,
    "web": ALL_BELOW,
    "cli": ALL_BELOW,
    "kernel": ALL_BELOW,  # kernel/__init__.py: the public names, which no room imports
    "examples": ALL_BELOW,  # of these only what is public: tests/kernel/test_public_names.py
    "benchmarks": ALL_BELOW,
}
NOT_BUILT_YET: set[str] = set()

PACKAGES: dict[str, set[str]] = {
    # who may import a package of others: rooms, or single modules of a room
    "aiohttp": {"monitoring", "workers"},
    "alembic": {"migrations"},
    "annotated_types": {"settings"},
    "apscheduler": {"kernel.runtime.scheduler"},
    "click": {"settings", "cli"},
    "fastapi": {"web"},
    "msgspec": {
        *("aggregates", "projections", "protocol", "transport", "log", "runtime", "governance", "actors", "commands"),
        *("reactions", "client", "web", "cli"),
    },
    "nats": {"transport"},
    "nkeys": {"transport"},
    "opentelemetry": {"kernel.telemetry.opentelemetry"},
    "orjson": {
        *("aggregates", "projections", "projector", "protocol", "settings", "transport", "log", "telemetry", "runtime"),
        *("governance", "reactions", "partitions", "monitoring", "client", "assembly", "service", "workers", "cli"),
    },
    "prometheus_client": {"telemetry", "monitoring", "workers"},
    "pydantic": {"settings", "governance", "web"},
    "rich": {"cli"},
    "sqlalchemy": {
        "app",
        *(
            "projections",
            "migrations",
            "projector",
            "reactions",
            "monitoring",
            "client",
            "preflight",
            "preparation",
            "staleness",
            "assembly",
        ),
        *("service", "testing", "cli"),
    },
    "structlog": {"kernel.telemetry.logging"},
    "thespian": {"actors"},
}
FREE = {"examples", "benchmarks"}
"""Rooms that import what packages they like."""


class Import(NamedTuple):
    """An import of a module, and the line where it stands."""

    module: str
    line: int


def imports_of(source: str) -> Iterator[Import]:
    """Yield the modules that a source imports anywhere; `from kernel import errors` is an import of kernel.errors."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full, not relative to the package"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(inner if is_module(inner) else node.module, node.lineno)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return name.split(".", maxsplit=1)[0] in PRODUCT and (path.is_dir() or path.with_suffix(".py").is_file())


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """Return the room that a module of the project is in: `log` of kernel.log.base, `kernel` of kernel itself."""
    top, *rest = module.split(".")
    return rest[0] if top == "kernel" and rest else top


def may_import(room: str) -> set[str]:
    """Return the rooms that a room may import, itself included."""
    listed = ROOMS[room]
    order = list(ROOMS)
    return {*order[: order.index(room)], room} if listed == ALL_BELOW else {*listed, room}


def wrong_imports(module: str, source: str, where: str) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield each import that the plan forbids, with a sentence about it."""
    room = room_of(module)
    for target, line in dict.fromkeys(imports_of(source)):
        top = target.split(".")[0]
        if top in sys.stdlib_module_names:
            continue
        if top in PRODUCT or top == "tests":
            to = room_of(target)
            if to not in may_import(room):
                allowed = ", ".join(sorted(may_import(room) - {room})) or "no other room"
                yield (
                    (module, target),
                    f"{where}:{line}: {room} -> {to} (imports {target}); {room} may import: {allowed}",
                )
        elif room not in FREE and not {room, module} & PACKAGES.get(top, set()):
            allowed = ", ".join(sorted(PACKAGES.get(top, set()))) or "no room; see PACKAGES in tests/test_rooms.py"
            yield (module, target), f"{where}:{line}: {room} -> {top}, a package that may be imported by: {allowed}"


@cache
def all_wrong_imports() -> list[tuple[tuple[str, str], str]]:
    return [
        wrong
        for path in MODULES
        if room_of(name_of(path)) in ROOMS
        for wrong in wrong_imports(name_of(path), path.read_text(), str(path.relative_to(ROOT)))
    ]


def rooms_on_disk() -> dict[str, str]:
    """Return the rooms that there are, each with a module of it."""
    found: dict[str, str] = {}
    for path in MODULES:
        found.setdefault(room_of(name_of(path)), str(path.relative_to(ROOT)))
    return found


def sentences(wrong: Iterable[tuple[tuple[str, str], str]]) -> str:
    return "\n".join(sentence for _, sentence in wrong)


# the rules themselves


def test_there_is_something_to_look_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PRODUCT)
    assert len(MODULES) > 100


def test_an_import_anywhere_is_seen() -> None:
    source = (
        "import a.b\nif TYPE_CHECKING:\n    from c.d import e\n"
        "def f():\n    import g as h\n    from kernel import errors, App\n"
    )
    assert [*imports_of(source)] == [
        Import("a.b", 1),
        Import("c.d", 3),
        Import("g", 5),
        Import("kernel.errors", 6),
        Import("kernel", 6),
    ]


def test_a_wrong_arrow_is_told_with_its_line_and_what_would_be_right() -> None:
    source = (
        "import asyncio\n\nfrom kernel.settings import Settings\nfrom kernel.service import Service\nimport click\n"
    )
    assert [sentence for _, sentence in wrong_imports("kernel.transport.dial", source, "kernel/transport/dial.py")] == [
        "kernel/transport/dial.py:4: transport -> service (imports kernel.service); "
        "transport may import: aggregates, alerts, errors, packages, protocol, settings",
        "kernel/transport/dial.py:5: transport -> click, a package that may be imported by: cli, settings",
    ]


def test_every_arrow_of_the_plan_points_down() -> None:
    order = list(ROOMS)
    up = [
        f"{room} -> {target}"
        for room in ROOMS
        for target in may_import(room) - {room}
        if order.index(target) > order.index(room)
    ]
    assert up == []


def test_the_plan_names_only_rooms_that_there_are() -> None:
    named = {name for places in PACKAGES.values() for name in places if not is_module(name)}
    assert named <= set(ROOMS)
    assert set(ROOMS) - set(rooms_on_disk()) <= NOT_BUILT_YET


# the house


def test_every_module_is_in_a_room() -> None:
    strange = [
        f"{path}: {room} is no room of the plan; add it to ROOMS, or move the module into a room"
        for room, path in rooms_on_disk().items()
        if room not in ROOMS
    ]
    assert strange == []


def test_a_room_imports_only_what_it_may() -> None:
    wrong = list(all_wrong_imports())
    assert not wrong, f"\n{sentences(wrong)}"


# modules


def test_a_module_is_read_in_one_sitting() -> None:
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in MODULES}
    assert {path: size for path, size in sizes.items() if size > MAX_BYTES} == {}, f"more than {MAX_BYTES} bytes"


def test_a_module_says_what_it_is_for() -> None:
    silent = [str(path.relative_to(ROOT)) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == [], "begin with a docstring"


def test_nothing_names_a_place_on_a_machine() -> None:
    homes = ["/" + "home/", "/" + "Users/", "/" + "root/", "/" + "work/", "C:" + "\\"]
    texts = [*MODULES, *(ROOT / "tests").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    texts += [*(ROOT / "docs").rglob("*.py"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    wrong = [f"{path.relative_to(ROOT)}: {home}" for path in texts for home in homes if home in path.read_text()]
    assert wrong == []
