"""Adapters made by PEFT, each once per session."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.diffs.adapters.variants import VARIANTS, make_adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder with base, target and adapter of a variant; tests must not change it."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp("variant")
            make_adapter(VARIANTS[name], folder)
            folders[name] = folder
        return folders[name]

    return make


@pytest.fixture
def plain(made: Callable[[str], Path], tmp_path: Path) -> Path:
    """A plain LoRA with its models, in a folder that the test may change."""
    folder = tmp_path / "family"
    shutil.copytree(made("alpha over r"), folder)
    return folder
