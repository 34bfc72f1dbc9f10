"""The read side: projections fold events into SQL tables, and the tables are rebuilt from the log.

Names are imported when they are used: what only reads a table need not load the engine that fills it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aggregates import Meta, applies
    from projections.autogenerate import alembic_filter
    from projections.errors import (
        Fenced,
        HandlerFailed,
        NoSuchLetter,
        NotReproducible,
        QueryRefused,
        SchemaError,
        TooManyFailures,
    )
    from projections.projection import DROP, Drop, Projection, Recorded, Rows, Sql, Tallies, Tally, Transaction
    from projections.scenario import ProjectionScenario, projected

__all__ = [
    "DROP",
    "Drop",
    "Fenced",
    "HandlerFailed",
    "Meta",
    "NoSuchLetter",
    "NotReproducible",
    "Projection",
    "ProjectionScenario",
    "QueryRefused",
    "Recorded",
    "Rows",
    "SchemaError",
    "Sql",
    "Tallies",
    "Tally",
    "TooManyFailures",
    "Transaction",
    "alembic_filter",
    "applies",
    "projected",
]

_HOMES = {
    "alembic_filter": "projections.autogenerate",
    "Meta": "aggregates",
    "applies": "aggregates",
    **dict.fromkeys(
        (
            "Fenced",
            "HandlerFailed",
            "NoSuchLetter",
            "NotReproducible",
            "QueryRefused",
            "SchemaError",
            "TooManyFailures",
        ),
        "projections.errors",
    ),
    **dict.fromkeys(("ProjectionScenario", "projected"), "projections.scenario"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'projections' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "projections.projection")), name)
    globals()[name] = value
    return value
