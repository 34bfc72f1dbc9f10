"""Reading the settings: a TOML file, then the environment, then the command line; the later one wins."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource, TomlConfigSettingsSource
from pydantic_settings.exceptions import SettingsError as SourceError

from kernel.errors import SettingsError
from kernel.settings import Settings
from kernel.settings.fields import shown

PREFIX = "ESKERNEL_"
DEFAULT_FILE = Path("eskernel.toml")
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and where each comes from.

    Attributes:
        origins: of the settings that are not defaults, by dotted name: a file, a variable, or `command line`.
    """

    settings: Settings
    origins: dict[str, str]


class _Environment(EnvSettingsSource):
    """Lists may be written with commas, not only as JSON."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        return super().decode_complex_value(field_name, field, value) if _is_json(value) else value


def load(
    file: Path | None = None,
    given: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Loaded:
    """Read the settings.

    Args:
        file: a TOML file; without one ESKERNEL_CONFIG, and without that `eskernel.toml` here, if there is one.
        given: values by dotted name, such as `{"stream.replicas": 3}`: what the command line said.
        environment: variables; those of the process otherwise. `ESKERNEL_STREAM__REPLICAS` is `stream.replicas`.

    Raises:
        SettingsError: what is wrong, each with its key, where it comes from, and the nearest valid one.
    """
    variables = os.environ if environment is None else environment
    named = file or (Path(variables[f"{PREFIX}CONFIG"]) if f"{PREFIX}CONFIG" in variables else None)
    if named is not None and not named.is_file():
        raise SettingsError([f"{named}: no such file"])
    origins: dict[str, str] = {}
    tree: Tree = {}
    problems = _unknown_variables(variables)
    path = named or DEFAULT_FILE
    if path.is_file():
        try:
            _merge(tree, TomlConfigSettingsSource(Settings, path)(), str(path), origins)
        except (ValueError, OSError) as error:
            raise SettingsError([f"{path}: {error}"]) from None
    try:
        source = _Environment(Settings, env_prefix=PREFIX, env_nested_delimiter="__")
        source.env_vars = {name.lower(): value for name, value in variables.items()}
        _merge(tree, source(), "environment", origins)
    except SourceError as error:
        problems.append(f"environment: {error}")
    for name, value in (given or {}).items():
        _merge(tree, _nested(name, value), "command line", origins)
    given_as = {name.upper() for name in variables}
    for name, origin in origins.items():
        if origin == "environment":
            # a whole section may be one variable
            parts = name.upper().split(".")
            spelled = [PREFIX + "__".join(parts[:count]) for count in range(len(parts), 0, -1)]
            origins[name] = next((one for one in spelled if one in given_as), spelled[0])
    try:
        settings = _validated(tree, origins)
    except SettingsError as error:
        problems += error.problems
    if problems:
        raise SettingsError(problems)
    return Loaded(settings, origins)


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Return settings made of dotted names alone, without file or environment. Raises `SettingsError`."""
    tree: Tree = {}
    for name, value in values.items():
        _merge(tree, _nested(name, value), "", {})
    return _validated(tree, {})


def _validated(tree: Tree, origins: Mapping[str, str]) -> Settings:
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError([_explain(one, origins) for one in error.errors(include_url=False)]) from None


def changed(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Return settings that differ in these dotted names. Raises `SettingsError`."""
    tree = settings.model_dump(exclude_unset=True)
    for name, value in values.items():
        _merge(tree, _nested(name, value), "", {})
    return _validated(tree, {})


def written(settings: Settings) -> Tree:
    """Return what is not a default as JSON data, secrets included: for a worker, or a file for its owner only."""
    tree: Tree = settings.model_dump(mode="json", exclude_unset=True, context={"secrets": True})
    return tree


def leaves(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Return every setting with its dotted name."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
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
    """Return a value as it may be printed: no secrets, no passwords in URLs."""
    if isinstance(value, SecretStr):
        return "**********"
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: shown_value(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return [shown_value(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    return shown(value) if isinstance(value, str) else value


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return name and value of `name=value`; lists and tables may be JSON. Raises `SettingsError`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SettingsError([f"{text!r}: write it as name=value, such as stream.replicas=3"])
    try:
        return name, orjson.loads(value) if _is_json(value) else value
    except orjson.JSONDecodeError as error:
        raise SettingsError([f"{name}: not JSON: {error}"]) from None


def _is_json(value: Any) -> bool:
    """Only lists and tables: a token of digits, or in quotes, stays the text that it is."""
    return isinstance(value, str) and value.lstrip().startswith(("[", "{"))


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
    names = [one for one, _ in leaves()]
    last = name.rsplit(".", 1)[-1]
    # the right word in the wrong section, or the wrong word in the right one
    found = [one for one in names if one.rsplit(".", 1)[-1] == last] or difflib.get_close_matches(name, names, 1, 0.6)
    if not found:
        tails = difflib.get_close_matches(last, [one.rsplit(".", 1)[-1] for one in names], 1, 0.75)
        found = [one for one in names if tails and one.rsplit(".", 1)[-1] == tails[0]]
    return f"; the nearest is {spelled(found[0])}" if found else "; `eskernel config show` lists all"


def _unknown_variables(variables: Mapping[str, str]) -> list[str]:
    sections = set(Settings.model_fields)
    problems = []
    for name in variables:
        if not name.upper().startswith(PREFIX) or name.upper() == f"{PREFIX}CONFIG":
            continue
        dotted = name[len(PREFIX) :].lower().replace("__", ".")
        if dotted.split(".")[0] not in sections:
            problems.append(f"{name}: no such setting{_nearest(dotted, variable_of)}")
    return problems


def _explain(error: Any, origins: Mapping[str, str]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    contradiction = error["type"] == "value_error"  # which names its keys itself
    told = [
        origin
        for one, origin in origins.items()
        if (
            one in message
            if contradiction
            else one == name or f"{one}.".startswith(f"{name}.") or name.startswith(f"{one}.")
        )
    ]
    where = f" ({', '.join(dict.fromkeys(told))})" if told else ""
    if error["type"] == "extra_forbidden":
        return f"{name}: no such setting{where}{_nearest(name)}"
    if contradiction:
        return f"{message}{where}"
    return f"{name}: {message[0].lower()}{message[1:]}{where}"
