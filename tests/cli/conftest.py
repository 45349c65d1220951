"""Small models for tests of commands: one family that is only read, and a copy for each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from tests.tiny import World


@pytest.fixture(scope="package")
def family(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tiny.make_world(tmp_path_factory.mktemp("family"))


@pytest.fixture
def world(family: World, tmp_path: Path) -> World:
    return family.copy(tmp_path)
