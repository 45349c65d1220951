"""Warnings of adapters that are sound, but most likely a mistake."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.diffs.adapters.variants import load, randomised

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILE = "adapter_model.safetensors"
UNTRAINED = "B·A is zero in every module of the adapter: it was not trained, and changes nothing"
VERBS: dict[str, tuple[tuple[str, ...], ...]] = {
    "transfer": (("transfer",), ("adapter", "base", "target")),
    "apply": (("apply",), ("adapter", "target")),
    "extract": (("extract",), ("adapter", "base")),
    "move": (("apply", "--as", "lora"), ("adapter", "target")),
}


def told(family: Path, verb: str = "transfer") -> list[str]:
    """The warnings of a run."""
    argv, roles = VERBS[verb]
    given = [family / role for role in roles]
    out = ("-o", family / "out", "--overwrite", "--json")
    done = tiny.run(*argv[:1], *given, *argv[1:], *out)
    assert done.status == 0, done.err
    found: list[str] = json.loads(done.out)["warnings"]
    return found


def adapt(family: Path, *, trained: bool = False, **options: Any) -> None:
    """Write an adapter as PEFT starts it, or trained at random."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(load(family / "base", torch.float32), LoraConfig(**options))
        made = randomised(model) if trained else model
        made.save_pretrained(family / "adapter")


def set_b(family: Path, value: float) -> None:
    path = family / "adapter" / FILE
    found = load_file(path)
    for name, tensor in found.items():
        if "lora_B" in name:
            tensor.fill_(value)
    save_file(found, path)


@pytest.mark.parametrize("verb", VERBS)
def test_an_adapter_that_was_not_trained(plain: Path, verb: str) -> None:
    adapt(plain, target_modules=["q_proj", "down_proj"], r=2)
    assert told(plain, verb) == [UNTRAINED]


@pytest.mark.parametrize("modules", [["embed_tokens"], ["embed_tokens", "q_proj"]])
def test_embeddings_start_with_another_factor_at_zero(plain: Path, modules: list[str]) -> None:
    adapt(plain, target_modules=modules)
    assert told(plain) == [UNTRAINED]
    adapt(plain, target_modules=modules, trained=True)
    assert told(plain) == []


def test_minus_zero_in_16_bits_is_zero_too(plain: Path) -> None:
    path = plain / "adapter" / FILE
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    set_b(plain, -0.0)
    assert told(plain) == [UNTRAINED]


def test_one_trained_module_is_enough(plain: Path) -> None:
    set_b(plain, 0.0)
    path = plain / "adapter" / FILE
    found = load_file(path)
    last = sorted(name for name in found if "lora_B" in name)[-1]
    found[last].flatten()[-1] = 1e-7
    save_file(found, path)
    assert told(plain) == []


@pytest.mark.parametrize("name", ["modules_to_save", "token rows", "DoRA", "lora_bias"])
def test_more_than_factors_may_be_trained(
    made: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    family = tmp_path / "family"
    shutil.copytree(made(name), family)
    path = family / "adapter" / FILE
    found = load_file(path)
    for key, tensor in found.items():
        if key.endswith("lora_B.weight"):
            tensor.zero_()
    save_file(found, path)
    assert told(family) == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_rank_larger_than_full_rank(plain: Path, verb: str) -> None:
    """q_proj is 16 × 16, and k_proj 8 × 16."""
    adapt(plain, trained=True, target_modules=["q_proj", "k_proj"], r=9)
    assert told(plain, verb) == [
        "the rank of 'model.layers.0.self_attn.k_proj' is 9, and its full rank is 8 (2 such"
        " modules): the adapter is larger than it has to be; diffxfer extract --as lora makes a"
        " smaller one"
    ]


def test_the_smaller_one_that_the_warning_names(plain: Path) -> None:
    adapt(plain, trained=True, target_modules=["k_proj"], r=9)
    assert told(plain)
    done = tiny.run(
        *("extract", plain / "adapter", plain / "base", "-o", plain / "small"),
        *("--as", "lora", "--rank", "8"),
    )
    assert done.status == 0, done.err
    (plain / "adapter").rename(plain / "large")
    (plain / "small").rename(plain / "adapter")
    (plain / "out").rename(plain / "before")
    assert told(plain) == []
    out, before = (load_file(plain / name / tiny.SHARD) for name in ("out", "before"))
    for name, tensor in before.items():
        assert torch.allclose(out[name].double(), tensor.double(), atol=2e-3, rtol=2**-7), name


@pytest.mark.parametrize("name", ["embedding and head", "square Mixtral gates", "convolution"])
def test_full_rank_itself_is_no_mistake(made: Callable[[str], Path], name: str) -> None:
    family = made(name)
    roles = [family / role for role in ("adapter", "base", "target")]
    found = tiny.run("transfer", *roles, "-o", family / "unused", "--dry-run", "--json")
    assert json.loads(found.out)["warnings"] == []
