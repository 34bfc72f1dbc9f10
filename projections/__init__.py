"""The read side: projections fold events into SQL tables, and the tables are rebuilt from the log."""

from aggregates import applies
from projections.errors import Fenced, HandlerFailed, NoSuchLetter, QueryRefused, SchemaError
from projections.projection import DROP, Drop, Meta, Projection, Recorded, Rows, Sql, Tallies, Tally, Transaction
from projections.scenario import ProjectionScenario, projected

__all__ = [
    "DROP",
    "Drop",
    "Fenced",
    "HandlerFailed",
    "Meta",
    "NoSuchLetter",
    "Projection",
    "ProjectionScenario",
    "QueryRefused",
    "Recorded",
    "Rows",
    "SchemaError",
    "Sql",
    "Tallies",
    "Tally",
    "Transaction",
    "applies",
    "projected",
]
