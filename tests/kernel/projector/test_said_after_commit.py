"""What the log lines say of parked aggregates and quarantined messages has happened: their batch was committed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from aggregates import applies
from kernel import App, Client, Service
from projections import Rows
from projections.errors import Fenced
from projections.unit_of_work import Write, Writer
from tests.apps import Note, Notebook, Noted, Page
from tests.conftest import settings_for
from tests.failing import metric


class Pages(Rows[Page], of=Notebook):
    @applies
    def noted(self, row: Page, event: Noted) -> None:
        if event.text == "bad":
            raise ValueError("no such page")
        row.notes += 1


@pytest.mark.parametrize("refusal", [Fenced("the fence"), OperationalError("write", {}, Exception("bug"))], ids=repr)
async def test_a_batch_that_was_refused_has_parked_nothing(
    nats_url: str,
    app_name: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Exception,
    wait_until: Any,
) -> None:
    app = App(app_name, aggregates=[Notebook], projections=[Pages])
    honest, refused = Writer.commit, 0

    def commit(writer: Writer, write: Write) -> Any:
        nonlocal refused
        if write.letters and refused < 2:
            refused += 1
            assert not lines()
            raise refusal
        return honest(writer, write)

    def lines() -> list[str]:
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        return [line for line in said if line.startswith(("parked", "quarantined"))]

    monkeypatch.setattr(Writer, "commit", commit)
    counted = metric("eskernel_parkings_total", reason="handler")
    service = Service(app, settings_for(tmp_path, nats=nats_url))
    async with service, await Client.connect(app, nats=nats_url) as client:
        await client.execute(Notebook, "a", Note("bad"))
        subject = service.parts.log.subjects.address("Notebook", "b").subject
        await service.parts.log.append(subject, 0, b"no commit")
        await wait_until(lambda: len(lines()) >= 2)
        await wait_until(lambda: service.parts.projector.state == "running")
    assert refused == 2
    assert sorted(line.split()[0] for line in lines()) == ["parked", "quarantined"]
    assert metric("eskernel_parkings_total", reason="handler") == counted + 1
