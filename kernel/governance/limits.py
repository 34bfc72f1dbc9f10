"""Limits that are changed while the service runs: their text form, their checks, and how workers agree on them.

All changes together are one set of overrides with the time at which they were set. A worker adopts a set that is newer
than its own, also at its start and after a reconnect, so that all workers have the same set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from kernel.app import App
from kernel.errors import LimitsError
from kernel.settings.governance import Rates

LANES = ("commands", "per_key", "live", "rebuild")
_FORM = "write it as commands=500, live.burst=2000, per_aggregate.Account=100, or rebuild=none"

Values = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Overrides:
    """Limits set at run time.

    Attributes:
        at: when the overrides were set, in Unix time. A later set replaces an earlier one.
        values: limits by name, such as `commands.rate`; None is no limit.
    """

    at: float = 0.0
    values: Values = field(default_factory=dict)


def parse(words: Iterable[str]) -> Values:
    """Return the limits that are written as `name=value`.

    Raises:
        LimitsError: a word is not a limit; the message shows the form.
    """
    found: Values = {}
    problems = []
    for word in words:
        name, _, value = word.partition("=")
        name = name.removeprefix("rates.")
        if not name.endswith((".rate", ".burst")):
            name += ".rate"
        try:
            found[name] = None if value.lower() == "none" else float(value)
        except ValueError:
            problems.append(f"{word!r} is not a limit; {_FORM}")
    if problems:
        raise LimitsError("\n".join(problems))
    return found


def override(rates: Rates, values: Mapping[str, Any], app: App) -> Rates:
    """Return the rates with some values replaced.

    Raises:
        LimitsError: a name or a value is invalid; the message has a line for each.
    """
    tree = rates.model_dump()
    problems = []
    for name, value in values.items():
        *path, leaf = name.split(".")
        if leaf not in ("rate", "burst") or not _is_limit(path):
            problems.append(
                f"there is no limit {name!r}; there are {', '.join(LANES)} and per_aggregate.<Type>, "
                "each with .rate and .burst"
            )
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            problems.append(f"{name}: {value!r} is not a number")
        else:
            branch = tree[path[0]] if len(path) == 1 else tree["per_aggregate"].setdefault(path[1], {})
            branch[leaf] = value
    try:
        made = Rates.model_validate(tree)
    except ValidationError as error:
        problems += [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
    else:
        problems += check(made, app)
    if problems:
        raise LimitsError("\n".join(problems))
    return made


def _is_limit(path: Sequence[str]) -> bool:
    if len(path) == 2:
        return path[0] == "per_aggregate"
    return len(path) == 1 and path[0] in LANES


def check(rates: Rates, app: App) -> Sequence[str]:
    """Return one sentence for each limit that does not fit the app."""
    types = ", ".join(sorted(app.types))
    problems = [
        f"per_aggregate.{name}: {app.name} has no aggregate {name!r}; it has {types}"
        for name in rates.per_aggregate
        if name not in app.types
    ]
    limits = {"commands": rates.commands, "per_key": rates.per_key, "live": rates.live, "rebuild": rates.rebuild}
    limits |= {f"per_aggregate.{name}": limit for name, limit in rates.per_aggregate.items()}
    problems += [
        f"{name}: a limit must be finite; use none for no limit"
        for name, limit in limits.items()
        if any(value is not None and not math.isfinite(value) for value in (limit.rate, limit.burst))
    ]
    return problems
