"""The table of promises: every command in it selects tests that match all its words."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTION = "## What is promised, and how it is tested\n"


def commands() -> list[str]:
    text = (
        (ROOT / "tests" / "README.md")
        .read_text(encoding="utf-8")
        .split(SECTION)[1]
        .split("\n## ")[0]
    )
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return [re.findall(r"`(pytest [^`]*)` \|$", row)[0] for row in rows]


def test_every_row_has_its_own_command() -> None:
    assert len(set(commands())) == len(commands()) > 20


@pytest.mark.parametrize("command", commands())
def test_a_command_selects_what_it_names(command: str) -> None:
    _, *words = shlex.split(command)
    chosen = words.pop() if "-k" in words else ""
    texts = [(ROOT / word).read_text("utf-8").lower() for word in words if word != "-k"]
    assert all("def test_" in text for text in texts)
    # In a test's name, or in a parameter's that stands in brackets behind it.
    for word in set(re.findall(r"\w+", chosen.lower())) - {"and", "or", "not"}:
        assert any(word in text for text in texts), word
