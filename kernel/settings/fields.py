"""The field types and the base class of all sections."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    SecretStr,
    SerializationInfo,
)

MIB = 1024 * 1024

Seconds = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]
File = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
"""A path, made absolute at once: other commands use it too, and may run in other folders."""


def _listed(value: Any) -> Any:
    return tuple(item.strip() for item in value.split(",") if item.strip()) if isinstance(value, str) else value


def _whole(value: SecretStr, info: SerializationInfo) -> str:
    """Write a secret only if the caller asks for it: for a worker, and for the description of the running service."""
    return value.get_secret_value() if info.context and info.context.get("secrets") else "**********"


Secret = Annotated[SecretStr, PlainSerializer(_whole, when_used="json")]
Listed = BeforeValidator(_listed)


class Section(BaseModel):
    """A section of the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Hide passwords in URLs."""
        for name, value in super().__repr_args__():
            if isinstance(value, tuple):
                value = tuple(shown(item) if isinstance(item, str) else item for item in value)
            yield name, shown(value) if isinstance(value, str) else value


def shown(url: str) -> str:
    """Return a URL, or several separated by commas, without passwords."""
    hidden = re.sub(r"//([^/,:]*)(:[^/,]*)?@", lambda m: f"//{m[1]}:***@" if m[2] else "//***@", url)
    return re.sub(r"([?&]\w*password)=[^&,]*", r"\1=***", hidden)
