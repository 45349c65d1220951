"""The reference page agrees with the help of every command."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.cli.test_commands import EVERY, options_in

REFERENCE = Path(__file__).parents[2] / "examples" / "reference"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REFERENCE))
    return import_module("make_reference")


def test_the_page_is_up_to_date(script: Any) -> None:
    page = (REFERENCE / "README.md").read_text("utf-8")
    assert page == script.reference(), "run: python examples/reference/make_reference.py"


@pytest.mark.parametrize("command", EVERY)
def test_every_option_of_the_help_has_a_row(command: str) -> None:
    page = (REFERENCE / "README.md").read_text("utf-8")
    section = page.split(f"\n## {command}\n")[1].split("\n## ")[0]
    named = {
        word.strip("`,|\\") for row in section.splitlines() if "|" in row for word in row.split()
    }
    assert options_in(tiny.run(command, "--help").out) - named == set()
