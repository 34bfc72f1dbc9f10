"""Keeping eskernel's packages apart from folders of the same name in a user's project.

A project may well have a folder `migrations` or `projections`. Only processes that eskernel itself starts, the command
line and its workers, change how Python imports. A program that embeds a `Service` imports as it always does.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Final

OWN_PACKAGES: Final = ("aggregates", "kernel", "migrations", "projections")
HOME: Final = Path(__file__).resolve().parent.parent
"""The folder that holds these packages: `site-packages`, or a checkout."""


class _OwnPackagesFirst(MetaPathFinder):
    """Finds eskernel's packages in `HOME`, whatever stands on `sys.path`."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the protocol's signature
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [str(HOME)], target) if fullname in OWN_PACKAGES else None


def reserve() -> None:
    """Import eskernel's packages from `HOME` from now on, whatever stands on `sys.path`."""
    if not any(isinstance(finder, _OwnPackagesFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OwnPackagesFirst())


def enter(folder: Path) -> None:
    """Import a user's modules from this folder before all others, but eskernel's packages from `HOME`."""
    reserve()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def namesake(module: str) -> Path | None:
    """Return the folder or file on `sys.path` that a user may mean by a module of eskernel; None if there is none."""
    top = module.partition(".")[0]
    if top not in OWN_PACKAGES:
        return None
    for entry in sys.path:
        folder = Path(entry, top).absolute()
        if folder.is_dir() and folder.resolve() != HOME / top:
            return folder
        if (file := folder.with_suffix(".py")).is_file():
            return file
    return None


def environment() -> dict[str, str]:
    """Return environment variables for a process that is to run this very code, started with `python -P -m`."""
    if Path(sysconfig.get_path("purelib")).resolve() == HOME:
        return dict(os.environ)  # Python finds it by itself, and behind its standard library
    path = [str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
