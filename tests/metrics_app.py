"""An app whose failures are all transient, for `eskernel run tests.metrics_app:app`."""

from __future__ import annotations

import os

from kernel import App
from tests.apps import Lines, Notebook, Pages, Words

NAME_VARIABLE = "METRICS_APP"
app = App(
    os.environ.get(NAME_VARIABLE, "metrics"),
    aggregates=[Notebook],
    projections=[Pages, Words, Lines],
    transient=[ValueError],
)
