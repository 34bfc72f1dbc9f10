"""Writes the page about settings: `python docs/configuration.py > docs/configuration.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel, ByteSize, SecretStr
from pydantic.fields import FieldInfo

from kernel.settings import Settings
from kernel.settings.sources import shown_value, variable_of

_NAMES: list[tuple[type, str]] = [
    (bool, "`true`, `false`"),
    (ByteSize, "bytes"),
    (int, "integer"),
    (float, "number"),
    (SecretStr, "secret"),
    (Path, "path"),
    (str, "text"),
]
_HEADER = """# Configuration

<!-- `make docs` generates this page from kernel/settings; a test fails when it is out of date -->

The service reads its settings from three sources. A later source overrides an earlier one:

1. a TOML file: `--config FILE`, or the file in the variable `ESKERNEL_CONFIG`, or `eskernel.toml` in the working
   directory;
2. environment variables: `ESKERNEL_STREAM__REPLICAS=3` sets `stream.replicas`, with two underscores for the dot;
3. the command line: `--set stream.replicas=3`, or a short option such as `--nats`. All users of the machine can read
   the command line: put secrets into the file or the environment.

In the file, lists are written as in TOML. In the environment and on the command line they are separated by commas, or
written as JSON. Sizes are in bytes, or a text such as `"64MiB"`. Times are in seconds. Relative paths start in the
working directory; `~` is the home directory.

If a key is unknown, a value is out of range, or settings contradict each other, the service does not start and exits
with code 2. It reports all problems at once, each with the origin of the value.

- `eskernel config show` prints the settings in effect and their origins.
- `eskernel config check APP` checks the settings on the running servers and changes nothing.
- `eskernel config schema` prints a JSON schema for editors.

[settings-tested.md](settings-tested.md) lists the test that shows the effect of each setting.

```toml
workers = 2

[connection]
servers = ["tls://nats-1.example.org:4222", "tls://nats-2.example.org:4222", "tls://nats-3.example.org:4222"]

[security]
credentials_file = "/etc/eskernel/bank.creds"
ca_file = "/etc/eskernel/ca.pem"

[stream]
replicas = 3
max_bytes = "200GiB"

[database]
url = "postgresql://bank@db.example.org/bank"
pool_size = 8

[http]
host = "0.0.0.0"  # it needs a token: ESKERNEL_HTTP__TOKEN
port = 8080
```
"""


def document() -> str:
    """Return the whole page."""
    return _HEADER + "".join(_parts())


def type_name(annotation: Any) -> str:
    """Return a setting's type for people."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join(type_name(member) for member in arguments if member is not NoneType)
    if origin is tuple:
        return "list of numbers" if type_name(arguments[0]) == "number" else "list"
    if origin is dict:
        return "table"
    return next(name for known, name in _NAMES if issubclass(annotation, known))


def _parts() -> Iterator[str]:
    own = {name: field for name, field in Settings.model_fields.items() if not _is_section(field)}
    yield from _table("The service", Settings, own, "")
    for name, field in Settings.model_fields.items():
        if _is_section(field):
            section: Any = field.annotation
            yield from _section(f"{name}.", section)


def _section(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    yield from _table(f"`[{prefix[:-1]}]`", model, _flat(model, prefix), prefix)


def _flat(model: type[BaseModel], prefix: str) -> dict[str, FieldInfo]:
    """Return the settings of a section and of the sections inside it."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if _is_section(field):
            inner: Any = field.annotation
            subject = (field.description or "").strip()
            for below, leaf in _flat(inner, f"{prefix}{name}.").items():
                copied = leaf._copy()
                copied.description = f"{subject} {leaf.description}"
                found[f"{name}.{below}"] = copied
        else:
            found[name] = field
    return found


def _table(title: str, model: type[BaseModel], fields: dict[str, FieldInfo], prefix: str) -> Iterator[str]:
    text = inspect.cleandoc(model.__doc__ or "") if prefix else "Keys before the first section of the file."
    yield f"\n## {title}\n\n{text}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
    for name, field in fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"| `{prefix}{name}` | {_type(field)} | {_default(field)} | {meaning} |\n"
    if prefix:
        first = f"{prefix}{next(iter(fields))}"
        yield f"\nIn the environment: `{variable_of(first)}`, and so on.\n"


def _type(field: FieldInfo) -> str:
    limits = {type(constraint).__name__: constraint for constraint in field.metadata}
    bounds = []
    for kind, words in (("Ge", "at least {}"), ("Gt", "above {}"), ("Le", "at most {}")):
        if kind in limits:
            bounds.append(words.format(f"{getattr(limits[kind], kind.lower()):,}"))
    name = type_name(field.annotation)
    return f"{name}, {', '.join(bounds)}" if bounds else name


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, ByteSize):
        return f"`{value.human_readable().replace('.0', '')}`" if value else "`0`"
    if value is None or value in ("", (), {}):
        return ""
    value = shown_value(value)
    return f"`{', '.join(map(str, value))}`" if isinstance(value, list) else f"`{value}`"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


if __name__ == "__main__":
    click.echo(document(), nl=False)
