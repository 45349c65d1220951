"""Patterns of module names against PEFT's own look-up."""

from __future__ import annotations

import pytest

from diffxfer.checkpoints.adapters.patterns import Patterns

MODULES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 11)
    for part in ("self_attn.q_proj", "self_attn.xq_proj", "mlp.down_proj", "mlp.experts")
] + ["lm_head", "model.embed_tokens"]


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj"],
        ["proj"],
        ["layers.1.mlp.down_proj", "down_proj"],
        ["down_proj", "layers.1.mlp.down_proj"],
        [r".*\.1\..*", "q_proj"],
        ["q_proj", r".*\.1\..*", "lm_head"],
        [r"^model\.layers\.\d\.mlp", "mlp.experts"],
        ["model.layers.0.self_attn.q_proj", "self_attn.(q_proj|xq_proj)", ""],
        [],
    ],
)
def test_the_same_pattern_is_found(patterns: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    values = {pattern: place for place, pattern in enumerate(patterns)}
    found = Patterns(values)
    for module in MODULES:
        assert found.get(module, -1) == values.get(get_pattern_key(patterns, module), -1), module


def test_what_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        Patterns({"(": 1})


def test_thousands_of_patterns_for_thousands_of_modules() -> None:
    names = [f"layers.{layer}.experts.{place}" for layer in range(50) for place in range(100)]
    found = Patterns({name: place for place, name in enumerate(names)})
    assert [found.get(f"model.{name}", -1) for name in names] == [*range(5000)]
