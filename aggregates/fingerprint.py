"""A fingerprint of an aggregate's code: it differs wherever the same events might fold into another state.

It errs on the side of a difference. It covers the source of every module that the aggregate's class leads to, the code
of its methods with all constants that they use, and its events. Of a library it covers the module that is used, and not
what that one uses. It can't see what code does that depends on the world
outside: on time, files or the network. An applier may not use those.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from aggregates.declaration import AggregateType

_ATOMS = (str, bytes, int, float, complex, type(None))
_OWN = ("aggregates", "kernel", "projections")
SIZE = 16


def fingerprint(declared: AggregateType[Any]) -> bytes | None:
    """Return the fingerprint of an aggregate's code, or None if its source can't be found."""
    return fingerprint_code(declared, [])


def fingerprint_code(declared: AggregateType[Any], more: Sequence[type]) -> bytes | None:
    """Return the fingerprint of an aggregate's code and of more classes, or None if a source can't be found."""
    classes = [declared.cls, *declared.event_types, *more]
    hashed = blake2b(repr((sys.version_info[:2], sys.implementation.name)).encode(), digest_size=SIZE)
    for name, event in sorted(declared.events.items()):
        hashed.update(repr((name, event.version, event.cls.__qualname__)).encode())
    modules: dict[str, bytes] = {}
    try:
        for cls in classes:
            _collect(sys.modules[cls.__module__], modules)
        for name, source in sorted(modules.items()):
            hashed.update(repr((name, len(source))).encode() + source)
        functions = [member for event in declared.events.values() for member in _functions(event.cls)]
        functions += [function for cls in more for function in _functions(cls)]
        for part in _describe([*_functions(declared.cls), *functions]):
            hashed.update(part)
    except (OSError, KeyError, AttributeError):
        return None  # typed at a prompt, or inside an archive
    return hashed.digest()


def _collect(module: ModuleType, modules: dict[str, bytes]) -> None:
    """Add the source of a module and of the modules that its globals lead to, without Python's and the kernel's."""
    name = module.__name__
    if name in modules or _is_foreign(module):
        return
    modules[name] = Path(_file_of(module)).read_bytes()
    for value in list(vars(module).values()):
        found = value if isinstance(value, ModuleType) else _module_of(value)
        if found is not None and not _is_foreign(found) and getattr(found, "__file__", None):
            if _is_installed(found) and not _is_installed(module):
                # a library: where it leads to is not followed
                if found.__name__ not in modules:
                    modules[found.__name__] = Path(_file_of(found)).read_bytes()
            else:
                _collect(found, modules)


def _module_of(value: Any) -> ModuleType | None:
    try:
        name = value.__module__
    except Exception:  # of an object that looks its attributes up somewhere else
        return None
    return sys.modules.get(name) if isinstance(name, str) else None


def _is_foreign(module: ModuleType) -> bool:
    top = module.__name__.partition(".")[0]
    return (top in sys.stdlib_module_names and top != "__main__") or top in _OWN


def _is_installed(module: ModuleType) -> bool:
    return "site-packages" in _file_of(module) or "dist-packages" in _file_of(module)


def _file_of(module: ModuleType) -> str:
    file = module.__file__
    if file is None:
        raise OSError(f"{module.__name__} has no file")
    return file


def _functions(cls: type) -> Iterator[FunctionType]:
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in sys.stdlib_module_names or base.__module__.partition(".")[0] in _OWN:
            continue
        for _, member in sorted(vars(base).items()):
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(function, FunctionType):
                yield function


def _describe(functions: Iterable[FunctionType]) -> Iterator[bytes]:
    """Yield the code of functions, and of functions that they call by name, with the plain values that they use."""
    seen: set[int] = set()
    waiting = list(functions)
    while waiting:
        function = waiting.pop(0)
        if id(function) in seen:
            continue
        seen.add(id(function))
        yield from _code(function.__code__)
        closed = function.__closure__ or ()
        used = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in closed:
            try:
                used.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
        used += [function.__globals__.get(name) for name in sorted(_names(function.__code__))]
        for value in used:
            if isinstance(value, FunctionType):
                if value.__module__.partition(".")[0] not in (*sys.stdlib_module_names, *_OWN):
                    waiting.append(value)
            else:
                yield _plain(value)


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _code(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr((code.co_name, code.co_names, code.co_varnames)).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield _plain(constant)


def _plain(value: Any) -> bytes:
    """Return what tells a plain value from another one; for other objects, what kind they are."""
    if isinstance(value, enum.Enum):
        return repr((type(value).__qualname__, value.name)).encode() + _plain(value.value)
    if isinstance(value, _ATOMS):
        return repr(value).encode(errors="surrogatepass")
    if isinstance(value, tuple | list):
        return b"(" + b",".join(map(_plain, value)) + b")"
    if isinstance(value, set | frozenset):
        return b"{" + b",".join(sorted(map(_plain, value))) + b"}"
    if isinstance(value, dict):
        return b"{" + b",".join(_plain(key) + b":" + _plain(item) for key, item in value.items()) + b"}"
    return f"{type(value).__module__}.{type(value).__qualname__}:{getattr(value, '__qualname__', '')}".encode()
