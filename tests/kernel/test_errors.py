"""Every error that a caller may meet: where it is imported from, what it derives from, and that it is explained."""

from __future__ import annotations

import builtins
import copy
import importlib
import inspect
import pickle
import pkgutil
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, get_args

import pytest

from aggregates import DeclarationError, EskernelError
from kernel.cli.exit_codes import exit_code_of
from kernel.errors import CommandError, Conflict, NotReturned, SettingsError, VersionConflict
from kernel.protocol import ErrorType, Receipt
from kernel.transport.jetstream_api import ApiError
from projections import HandlerFailed
from tests.kernel.test_public_names import PACKAGES, PUBLIC
from tests.pages import DOCS, load_page

PAGE = load_page("errors")

INTERNAL = {
    "ApiError": "an answer of JetStream's API, which its caller turns into a public error; a LogError if it escapes",
    "FileReplaced": "between the engine and the projector, which waits; people read it in the health report",
    "NewerEvent": "an InvalidMessage: the aggregate's projections wait, its commands are answered as unavailable",
    "NotPermitted": "an Unavailable, after which a client sends without knowing the partition",
    "Failed": "between the work on an event and its session, which parks the aggregate",
    "NotWorking": "between a probe and the health report",
    "ProjectionPaused": "between a session and the projector, which begins another one without that projection",
    "Refused": "a HandlerFailed: the aggregate whose value a column can't carry is parked",
    "RowsWait": "between what finds the rows of an event and the session, which begins another one without that view",
    "Unsupported": "a SchemaError, at the start",
    "Unstorable": "between an actor and its gateway",
}
"""Errors that no caller meets under their own name, and why."""

SAMPLES: dict[type[EskernelError], Callable[[type[Any]], EskernelError]] = {
    DeclarationError: lambda kind: kind(["a: first", "b: second"]),
    SettingsError: lambda kind: kind(["stream.replicas: too many", "http.port: no number"]),
    Conflict: lambda kind: kind("bank.evt.0.Account.x", 3, 4, uncertain=True),
    VersionConflict: lambda kind: kind("Account x has version 4, and not 3", 4),
    CommandError: lambda kind: kind("overloaded", "too much", 1.5),
    NotReturned: lambda kind: kind("too large", Receipt(4, 17, 3, "c-1")),
    ApiError: lambda kind: kind("STREAM.INFO", {"description": "no stream", "err_code": 10059}),
    HandlerFailed: lambda kind: kind(1, ("Account", "x"), 3, "ValueError: no", "handler", True),
}
"""How an error is made, where not of a message alone; holds for the classes below too."""


def modules() -> Iterator[ModuleType]:
    for package in PACKAGES:
        yield importlib.import_module(package)
        for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if not found.name.endswith((".__main__", "migrations.env")):  # these run when they are imported
                yield importlib.import_module(found.name)


def defined_errors() -> list[type[BaseException]]:
    """Return the exception classes of our packages, private ones left out."""
    return sorted(
        {
            value
            for module in modules()
            for name, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, BaseException)
            if value.__module__ == module.__name__ and not name.startswith("_")
        },
        key=lambda kind: kind.__name__,
    )


def public_errors() -> list[type[EskernelError]]:
    return [kind for kind in defined_errors() if kind.__name__ not in INTERNAL and issubclass(kind, EskernelError)]


def exporters(name: str) -> list[str]:
    return [module for module in PUBLIC if name in importlib.import_module(module).__all__]


def sample(kind: type[EskernelError]) -> EskernelError:
    return next((make(kind) for base, make in SAMPLES.items() if issubclass(kind, base)), None) or kind("a message")


# where they stand


def test_there_are_errors_to_look_at() -> None:
    assert len(defined_errors()) > 25
    assert {kind.__name__ for kind in defined_errors()} >= INTERNAL.keys()


def test_every_error_is_an_eskernel_error_that_users_can_import() -> None:
    lost = [
        f"{kind.__module__}.{kind.__qualname__}"
        for kind in defined_errors()
        if kind.__name__ not in INTERNAL
        if not issubclass(kind, EskernelError) or not exporters(kind.__name__)
    ]
    assert lost == [], f"derive it from EskernelError and export it from one of {', '.join(PUBLIC)}"


def test_the_drawing_shows_every_error_below_its_parent() -> None:
    drawn = {error.name: (error.parent, *error.also) for error in PAGE.drawn()}
    defined = {kind.__name__: tuple(base.__name__ for base in kind.__bases__) for kind in public_errors()}
    assert drawn == defined, "kernel/errors.py: the drawing and the classes differ"


def test_the_drawing_says_where_an_error_is_imported_from() -> None:
    wrong = [error.name for error in PAGE.drawn() if error.home not in exporters(error.name)]
    assert wrong == []


# what docstrings promise


def promised(text: str) -> Iterator[str]:
    """Yield the errors that a docstring names under Raises."""
    section = re.search(r"^Raises:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
    for line in (section[1] if section else "").splitlines():
        if entry := re.match(r" {4}([\w.]+(?:, [\w.]+)*): ", line):
            yield from entry[1].split(", ")
    yield from re.findall(r"Raises `([\w.]+)`", text)


def texts_of_public_things() -> Iterator[tuple[str, str]]:
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            thing = getattr(importlib.import_module(module), name)
            yield f"{module}.{name}", inspect.getdoc(thing) or ""
            for member, method in vars(thing).items() if inspect.isclass(thing) else ():
                function = method.__func__ if isinstance(method, classmethod | staticmethod) else method
                if inspect.isfunction(function):
                    yield f"{module}.{name}.{member}", inspect.getdoc(function) or ""


def can_be_caught(name: str) -> bool:
    """Say whether users can name an error: built in, exported, or of another package by its full name."""
    module, _, last = name.rpartition(".")
    if not module:
        return last in vars(builtins) or bool(exporters(last))
    if module.split(".", 1)[0] in PACKAGES:
        return module in exporters(last)
    return inspect.isclass(getattr(importlib.import_module(module), last, None))


def test_raises_is_read() -> None:
    text = "Do.\n\nRaises:\n    A, b.C: when so,\n        and so: not this.\n    D: that.\n\nExample: no\n"
    assert [*promised(text), *promised("Do. Raises `E`.")] == ["A", "b.C", "D", "E"]
    assert len([name for _, text in texts_of_public_things() for name in promised(text)]) > 15


def test_errors_that_public_docstrings_promise_can_be_imported() -> None:
    wrong = [
        f"{where}: {name}"
        for where, text in texts_of_public_things()
        for name in promised(text)
        if not can_be_caught(name)
    ]
    assert wrong == []


# across processes


@pytest.mark.parametrize("kind", [kind for kind in defined_errors() if issubclass(kind, EskernelError)], ids=str)
@pytest.mark.parametrize("how", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_an_error_survives_pickling_and_copying(kind: type[EskernelError], how: Callable[[Any], Any]) -> None:
    error = sample(kind)
    again = how(error)
    assert type(again) is kind
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


# the page


def test_every_error_says_what_to_do() -> None:
    assert PAGE.DO.keys() == {error.name for error in PAGE.drawn()}
    assert PAGE.WIRE.keys() == set(get_args(ErrorType))


def test_every_error_has_an_exit_code() -> None:
    assert [kind.__name__ for kind in public_errors() if exit_code_of(kind) is None] == []


def test_the_page_of_errors_is_up_to_date() -> None:
    assert (DOCS / "errors.md").read_text() == PAGE.render(), "make docs"
