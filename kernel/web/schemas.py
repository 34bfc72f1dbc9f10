"""What OpenAPI says of commands, states and answers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec

from kernel.protocol import INTEGERS
from kernel.web.problems import PROBLEM

Schema = dict[str, Any]

_PROBLEM_SCHEMA: Schema = {
    "title": "Problem",
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "description": "`urn:eskernel:` and the error type of the wire format"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "version": {"type": "integer", "description": "with 412: that the aggregate has"},
    },
}
ETAG = {"ETag": {"description": 'the version, such as `"3"`: for If-Match', "schema": {"type": "string"}}}
AFTER = {"After": {"description": "for the header After of what is read next", "schema": {"type": "string"}}}


def schema_of(cls: type) -> Schema:
    """Return the JSON schema of a class in one piece: OpenAPI resolves references from its root, which is not ours."""
    try:
        schema = msgspec.json.schema(cls)
    except Exception:  # a state may hold what JSON has no schema for
        return {"type": "object"}
    definitions = schema.pop("$defs", {})
    inlined: Schema = _inline(schema, definitions, ())
    return inlined


def command_schema(cls: type) -> Schema:
    """Return the schema of a command's fields."""
    return schema_of(cls) | {"additionalProperties": False}


def state_schema(cls: type) -> Schema:
    """Return the schema of a state, which has all of its fields always."""
    schema = schema_of(cls)
    return schema | {"required": list(schema.get("properties", {}))}


def _inline(schema: Any, definitions: Mapping[str, Any], within: tuple[str, ...]) -> Any:
    if isinstance(schema, list):
        return [_inline(item, definitions, within) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(reference := schema.get("$ref"), str):
        name = reference.removeprefix("#/$defs/")
        # what contains itself is described once
        return {"type": "object"} if name in within else _inline(definitions[name], definitions, (*within, name))
    found = {key: _inline(value, definitions, within) for key, value in schema.items() if key != "discriminator"}
    if found.get("type") == "integer":
        found = {"minimum": INTEGERS[0], "maximum": INTEGERS[1]} | found
    if isinstance(text := found.pop("description", None), str):
        found |= _described(text, found.get("title", ""))
    elif text is not None:
        found["description"] = text  # a field of this name
    return found


def text_of(cls: type) -> str | None:
    """Return a class's own docstring."""
    return _described(vars(cls).get("__doc__") or "", cls.__name__).get("description")


def _described(text: str, name: str) -> dict[str, str]:
    # dataclasses without a docstring are given their signature
    return {} if not text or text.startswith(f"{name}(") else {"description": inspect.cleandoc(text)}


def problems(*statuses: int) -> dict[int | str, Schema]:
    """Return what OpenAPI says of problems with these statuses, for `responses=` of an endpoint or of a router."""
    content = {PROBLEM: {"schema": _PROBLEM_SCHEMA}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def answers(schema: Schema, headers: Schema) -> dict[int | str, Schema]:
    """Return what OpenAPI says of what a request is answered with."""
    return {200: {"description": "OK", "headers": headers, "content": {"application/json": {"schema": schema}}}}
