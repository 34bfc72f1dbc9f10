"""Opening the projection database."""

from __future__ import annotations

import sys

import pytest

from projections import SchemaError
from projections.database import open_database


def test_postgresql_without_its_driver_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(SchemaError, match=r"psycopg is not installed; run `pip install 'eskernel\[postgres\]'`"):
        open_database("postgresql://user@nowhere/bank")
