"""Reads the settings from a TOML file, the environment and the command line. A later source overrides earlier ones."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, get_origin

import orjson
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from kernel.errors import SettingsError
from kernel.settings import Settings
from kernel.settings.fields import shown
from kernel.settings.foreign import is_foreign
from kernel.settings.toml import read_toml

PREFIX = "ESKERNEL_"
DEFAULT_FILE = Path("eskernel.toml")
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and the origin of each.

    Attributes:
        origins: for each setting that is not a default, by dotted name: a file, a variable, or `command line`.
        ignored: environment variables that begin as ours do, and that Kubernetes made for a Service.
    """

    settings: Settings
    origins: dict[str, str]
    ignored: tuple[str, ...] = ()


def load(
    file: Path | None = None,
    given: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Loaded:
    """Read the settings.

    Args:
        file: a TOML file; by default the file in ESKERNEL_CONFIG, or else `eskernel.toml` in the working directory, if
            it exists.
        given: values of the command line by dotted name, such as `{"stream.replicas": 3}`.
        environment: variables; by default those of the process. `ESKERNEL_STREAM__REPLICAS` is `stream.replicas`.

    Raises:
        SettingsError: settings are unknown or invalid. Each problem has the key, its origin, and the nearest valid key.
    """
    variables = os.environ if environment is None else environment
    named = file or (Path(variables[f"{PREFIX}CONFIG"]) if f"{PREFIX}CONFIG" in variables else None)
    origins: dict[str, str] = {}
    tree: Tree = {}
    problems: list[str] = []
    if named is not None or os.path.lexists(DEFAULT_FILE):
        path = named or DEFAULT_FILE
        _merge(tree, read_toml(path), str(path), origins)
    ours = [name for name in variables if name.upper().startswith(PREFIX) and name.upper() != f"{PREFIX}CONFIG"]
    ignored = []
    # a whole section may be one variable; the variables of its settings override it
    for variable in sorted(ours, key=lambda name: (name.count("__"), name)):
        dotted = variable[len(PREFIX) :].lower().replace("__", ".")
        if dotted.split(".")[0] not in Settings.model_fields:
            if is_foreign(variable, variables[variable]):
                ignored.append(variable)
            else:
                problems.append(f"{variable}: no such setting{_nearest(dotted, variable_of)}")
            continue
        try:
            value = _decoded(dotted, variables[variable])
        except orjson.JSONDecodeError as error:
            problems.append(f"{dotted}: not JSON: {error} ({variable})")
        else:
            _merge(tree, _nested(dotted, value), variable, origins)
    for name, value in (given or {}).items():
        _merge(tree, _nested(name, value), "command line", origins)
    try:
        settings = _validated(tree, origins)
    except SettingsError as error:
        problems += error.problems
    if problems:
        raise SettingsError(problems)
    return Loaded(settings, origins, tuple(ignored))


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Return settings from values by dotted name, without file and environment. Raises `SettingsError`."""
    tree: Tree = {}
    for name, value in values.items():
        _merge(tree, _nested(name, value), "", {})
    return _validated(tree, {})


def _validated(tree: Tree, origins: Mapping[str, str]) -> Settings:
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(problem, origins) for problem in error.errors(include_url=False)]
        raise SettingsError(problems) from None


def changed(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Return settings in which these values, by dotted name, are replaced. Raises `SettingsError`."""
    tree = settings.model_dump(exclude_unset=True)
    for name, value in values.items():
        _merge(tree, _nested(name, value), "", {})
    return _validated(tree, {})


def written(settings: Settings) -> Tree:
    """Return the settings that are not defaults as JSON data with secrets: for a worker, or for a private file."""
    tree: Tree = settings.model_dump(mode="json", exclude_unset=True, context={"secrets": True})
    return tree


def leaves(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting with its dotted name."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if _is_section(kind):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def value_of(settings: Settings, name: str) -> Any:
    """Return the value of a dotted name."""
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def shown_value(value: Any) -> Any:
    """Return a value that may be printed: without secrets and without passwords in URLs."""
    if isinstance(value, SecretStr):
        return "**********"
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: shown_value(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [shown_value(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return shown(value) if isinstance(value, str) else value


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return the name and the value of `name=value`. Lists and tables may be JSON. Raises `SettingsError`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SettingsError([f"{text!r}: write it as name=value, such as stream.replicas=3"])
    try:
        return name, orjson.loads(value) if _is_json(value) else value
    except orjson.JSONDecodeError as error:
        raise SettingsError([f"{name}: not JSON: {error}"]) from None


def _is_json(value: Any) -> bool:
    """Return whether a value is a list or a table in JSON. Numbers and quoted texts stay texts: a token may be one."""
    return isinstance(value, str) and value.lstrip().startswith(("[", "{"))


def _decoded(name: str, value: str) -> Any:
    """Return a variable's value: JSON of a list, a table or a section is decoded, and any other text stays one."""
    model: type[BaseModel] = Settings
    field: FieldInfo | None = None
    for part in name.split("."):
        field = model.model_fields.get(part)
        if field is None:
            return value
        if _is_section(field.annotation):
            model = field.annotation
    listed = field is not None and (_is_section(field.annotation) or get_origin(field.annotation) in (tuple, dict))
    return orjson.loads(value) if listed and _is_json(value) else value


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _nested(name: str, value: Any) -> Tree:
    for part in reversed(name.split(".")):
        value = {part: value}
    nested: Tree = value
    return nested


def _merge(into: Tree, more: Mapping[str, Any], origin: str, origins: dict[str, str], prefix: str = "") -> None:
    for key, value in more.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and isinstance(into.setdefault(key, {}), dict):
            _merge(into[key], value, origin, origins, f"{name}.")
        else:
            into[key] = value
            origins[name] = origin


def variable_of(name: str) -> str:
    """Return the environment variable of a dotted name."""
    return PREFIX + name.upper().replace(".", "__")


def _nearest(name: str, spelled: Callable[[str], str] = str) -> str:
    names = [known for known, _ in leaves()]
    last = name.rsplit(".", 1)[-1]
    # the right word in the wrong section, or a wrong word in the right section
    found = [known for known in names if known.rsplit(".", 1)[-1] == last]
    found = found or difflib.get_close_matches(name, names, 1, 0.6)
    if not found:
        tails = difflib.get_close_matches(last, [known.rsplit(".", 1)[-1] for known in names], 1, 0.75)
        found = [known for known in names if tails and known.rsplit(".", 1)[-1] == tails[0]]
    return f"; the nearest is {spelled(found[0])}" if found else "; `eskernel config show` lists all"


def _explain(error: Any, origins: Mapping[str, str]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    contradiction = error["type"] == "value_error"  # its message contains the keys
    involved = [
        origin
        for key, origin in origins.items()
        if (
            key in message
            if contradiction
            else key == name or f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.")
        )
    ]
    where = f" ({', '.join(dict.fromkeys(involved))})" if involved else ""
    if error["type"] == "extra_forbidden":
        return f"{name}: no such setting{where}{_nearest(name)}"
    if contradiction:
        return f"{message}{where}"
    return f"{name}: {message[0].lower()}{message[1:]}{where}"
