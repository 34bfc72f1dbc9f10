"""Limits changed while the service runs: how they are written, checked, and agreed upon by the workers.

What was changed is one set of overrides with the time at which it was made. Every worker has the same: whoever hears
of a newer one takes it, also when it starts or has been away.
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
        at: when, in Unix time; of two sets the later one counts.
        values: by name, such as `commands.rate`; None is no limit.
    """

    at: float = 0.0
    values: Values = field(default_factory=dict)


def parse(words: Iterable[str]) -> Values:
    """Return what was written as `name=value`.

    Raises:
        LimitsError: what can't be read, and how it is written.
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
            problems.append(f"{word!r} is no limit; {_FORM}")
    if problems:
        raise LimitsError("\n".join(problems))
    return found


def override(rates: Rates, values: Mapping[str, Any], app: App) -> Rates:
    """Return the rates with some values replaced: all of them, or none.

    Raises:
        LimitsError: names or values that can't be.
    """
    tree = rates.model_dump()
    problems = []
    for name, value in values.items():
        *path, leaf = name.split(".")
        known = path[:1] == ["per_aggregate"] if len(path) == 2 else len(path) == 1 and path[0] in LANES
        if not known or leaf not in ("rate", "burst"):
            problems.append(
                f"there is no limit {name!r}; there are {', '.join(LANES)} and per_aggregate.<Type>, "
                "each with .rate and .burst"
            )
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            problems.append(f"{name}: {value!r} is no number")
        else:
            branch = tree[path[0]] if len(path) == 1 else tree["per_aggregate"].setdefault(path[1], {})
            branch[leaf] = value
    try:
        made = Rates.model_validate(tree)
    except ValidationError as error:
        problems += [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)]
    else:
        problems += check(made, app)
    if problems:
        raise LimitsError("\n".join(problems))
    return made


def check(rates: Rates, app: App) -> Sequence[str]:
    """Return what of the limits does not fit the app."""
    types = ", ".join(sorted(app.types))
    problems = [
        f"per_aggregate.{name}: {app.name} has no aggregate {name!r}; it has {types}"
        for name in rates.per_aggregate
        if name not in app.types
    ]
    limits = {"commands": rates.commands, "per_key": rates.per_key, "live": rates.live, "rebuild": rates.rebuild}
    limits |= {f"per_aggregate.{name}": limit for name, limit in rates.per_aggregate.items()}
    problems += [
        f"{name}: a limit is finite; none is no limit"
        for name, limit in limits.items()
        if any(value is not None and not math.isfinite(value) for value in (limit.rate, limit.burst))
    ]
    if rates.per_key.rate is not None and app.rate_key is None:
        problems.append(f"per_key: {app.name} says nobody's key; give App(..., rate_key=...) a function")
    return problems
