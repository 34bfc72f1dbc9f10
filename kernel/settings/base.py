"""What all parts of the settings are made of."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge, Gt
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, SecretStr, SerializationInfo

MIB = 1024 * 1024

Seconds = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]


def _listed(value: Any) -> Any:
    return tuple(one.strip() for one in value.split(",") if one.strip()) if isinstance(value, str) else value


def _whole(value: SecretStr, info: SerializationInfo) -> str:
    """Secrets leave the process only where that is asked for: for a worker, and for the service's own description."""
    return value.get_secret_value() if info.context and info.context.get("secrets") else "**********"


Secret = Annotated[SecretStr, PlainSerializer(_whole, when_used="json")]
Listed = BeforeValidator(_listed)


class Section(BaseModel):
    """A part of the tree."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)
