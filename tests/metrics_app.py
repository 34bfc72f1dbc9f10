"""An app whose failures are all transient, for `eskernel run tests.metrics_app:app`."""

from __future__ import annotations

import os
from datetime import timedelta

from aggregates import After, Meta, Policy, Reactions, Send, reacts
from kernel import App
from tests.apps import Lines, Note, Notebook, Noted, Pages, Words

NAME_VARIABLE = "METRICS_APP"


class Ripples(Policy, of=Notebook):
    @reacts
    def noted(self, event: Noted, meta: Meta) -> Reactions:
        ripple = Send(Notebook, f"{meta.aggregate_id}-ripple", Note("still"))
        if event.text == "ripple":
            return [ripple, Send(Notebook, "n0", Note("")), After(timedelta(hours=1), ripple)]
        if event.text == "late ripple":
            raise LookupError("nothing to throw")
        return None


app = App(
    os.environ.get(NAME_VARIABLE, "metrics"),
    aggregates=[Notebook],
    projections=[Pages, Words, Lines],
    policies=[Ripples],
    transient=[ValueError],
)
