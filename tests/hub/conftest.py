"""A Hub for a test, and the command line that talks to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import diffxfer
from tests.hub.forks import Forks
from tests.hub.models import make_family
from tests.hub.server import Hub

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    process = Forks()
    yield process
    process.close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as running:
        yield running


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of three roles."""
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def grafted(family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results for the same models in folders."""
    out = tmp_path_factory.mktemp("grafted") / "out"
    diffxfer.transfer(*family.values(), out, threads=1)
    return out


@dataclass
class User:
    """A user at a command line, with a cache for files of the Hub.

    Attributes:
        home: where commands run; ``home / "hf"`` is `HF_HOME`.
        env: the variables that are set.
        forks: what runs commands.
    """

    home: Path
    env: dict[str, str]
    forks: Forks

    def run(self, *argv: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command: ``user.run("transfer", …, HF_TOKEN="hf_x")``."""
        return self.forks.run(*argv, cwd=self.home, env={**self.env, **env})

    @property
    def cache(self) -> Path:
        """Where huggingface_hub keeps what it downloads."""
        return self.home / "hf" / "hub"


@pytest.fixture
def user(hub: Hub, forks: Forks, tmp_path: Path) -> User:
    home = tmp_path / "home"
    home.mkdir()
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return User(home, env, forks)
