"""Settings for all tests: no requests to the real Hub, one thread of torch, the same examples of
hypothesis every time, and a process that runs commands without importing libraries each time."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.documented.warm import skip_inventory
from tests.hub.forks import Forks

if TYPE_CHECKING:
    from collections.abc import Iterator

settings.register_profile(
    "diffxfer",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("diffxfer")

# Before huggingface_hub and datasets are imported, which read these once; the tests' own Hub is in
# tests/hub.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

# Before torch is imported: models this small are slower on several threads, much slower on a busy
# machine. Processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="session")
def no_needless_work() -> None:
    """Spare every scored model a second for lm-eval's list of versions, and another quarter for
    the garbage collector, which would look at all that was imported and collected so far."""
    if "torch" in sys.modules:
        skip_inventory()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def warm() -> Iterator[Forks]:
    """A process that has imported what scoring and training need, and forks for every command."""
    process = Forks("tests.documented.warm", {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    yield process
    process.close()
