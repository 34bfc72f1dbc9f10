"""Every setting has a test that shows its effect, and the documents about settings are up to date."""

from __future__ import annotations

from pathlib import Path

from tests.pages import load_page
from tests.settings_table import TABLE, listed, marked, names

ROOT = Path(__file__).parents[2]


def test_every_setting_has_a_test_that_shows_its_effect() -> None:
    assert [name for name in names() if name not in marked()] == []


def test_the_marks_name_settings_that_there_are() -> None:
    assert marked() - set(names()) == set()


def test_the_table_is_of_the_settings_that_there_are() -> None:
    assert listed(TABLE.read_text()) == names(), "run `make settings-table`"


def test_the_table_has_tests_for_all_that_are_marked() -> None:
    rows = [line.split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    without = {row[0].strip("| `") for row in rows if "::" not in row[1]}
    assert without & marked() == set(), "run `make settings-table`"


def test_the_configuration_document_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == load_page("configuration").document(), "run `make docs`"
