"""The memory of a graft in memory: the model and a little more, not two models."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer import extract_diff
from tests import families

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

WIDE = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2000}
DENSE = families.llama(**{**WIDE, "intermediate_size": 4096, "num_hidden_layers": 9})
FUSED = families.mixtral(
    **{**WIDE, "intermediate_size": 1024, "num_hidden_layers": 8, "num_local_experts": 5}
)
CODE = """
import json, resource, sys
import torch
from diffxfer import load_graft
from diffxfer.models.checkpoint import checkpoint_source
from diffxfer.models.loading import load, refill
from diffxfer.models.path import path_source

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

small, diff, target, finetuned, what = sys.argv[1:]
load_graft(small + "/diff", small + "/target")  # imports and compiles everything
before = peak()
if what == "graft":
    model = load_graft(diff, target).model
else:
    a, b = checkpoint_source(target), checkpoint_source(finetuned)
    loaded = load(path_source(a, b, 0.5))
    refill(loaded, path_source(a, b, 0.25))
    model = loaded.model
size = sum(parameter.nbytes for parameter in model.parameters())
largest = max(parameter.nbytes for parameter in model.parameters())
print(json.dumps([peak() - before, size, largest]))
"""


def family(root: Path, config: Any) -> Path:
    for seed, role in enumerate(("base", "finetuned", "target")):
        families.save_model(root / role, config, seed)
        families.save_tokenizer(root / role, families.fast_tokenizer())
    extract_diff(root / "finetuned", root / "base", root / "diff")
    return root


@pytest.mark.parametrize("what", ["graft", "path"])
@pytest.mark.parametrize("config", [DENSE, FUSED], ids=["dense", "fused"])
def test_a_model_takes_its_size_and_a_few_tensors(tmp_path: Path, config: Any, what: str) -> None:
    kind = families.llama() if config is DENSE else families.mixtral()
    small, large = family(tmp_path / "small", kind), family(tmp_path / "large", config)
    folders = [small, large / "diff", large / "target", large / "finetuned"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, folders), what],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, size, largest = json.loads(done.stdout.splitlines()[-1])
    assert size > 250e6
    print(f"{what}: {grown / 1e6:.0f} MB for {size / 1e6:.0f} MB")
    assert grown < size + 5 * largest + 40e6
