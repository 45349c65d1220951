"""Mutated checkpoints: success or a one-line error; `tests.fuzzing` lists the rules.

A few inputs in the quick suite, by hypothesis; any number of inputs with

    FUZZ_INPUTS=100000 pytest -s -m slow tests/test_fuzz.py -k many

which prints the outcomes by kind. FUZZ_SEED is the first input's number.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fuzzing
from tests.fuzzing import TARGETED, Arena, Campaign

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    with fuzzing.in_memory() as folder:
        yield Arena(folder)


@settings(max_examples=60)
@given(kind=st.sampled_from(list(TARGETED)), rng=st.randoms(use_true_random=True))
def test_a_mutated_checkpoint(kind: str, rng: Random, arena: Arena) -> None:
    arena.judge(arena.draw_of(kind, rng))


@pytest.mark.slow
def test_many_mutated_checkpoints() -> None:
    inputs, seed = (int(os.environ.get(name, n)) for name, n in FUZZ_DEFAULTS.items())
    with fuzzing.in_memory() as folder:
        campaign = Campaign(Arena(folder))
        campaign.run(range(seed, seed + inputs))
    print(f"\n{campaign.table()}")
    assert not campaign.findings, campaign.told()


FUZZ_DEFAULTS = {"FUZZ_INPUTS": 5000, "FUZZ_SEED": 0}


@pytest.mark.slow
def test_inputs_that_coverage_finds() -> None:
    """The same, with atheris, which mutates bytes and keeps inputs that reach new lines."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed; it has wheels for Python 3.11 to 3.13 on Linux")
    runs = os.environ.get("FUZZ_INPUTS", "5000")
    with fuzzing.in_memory() as folder:
        command = [sys.executable, "-m", "tests.fuzz_coverage", runs, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    assert f"Done {runs} runs" in done.stderr
    print(done.stdout[-3000:])


ROOT = Path(__file__).parents[1]
