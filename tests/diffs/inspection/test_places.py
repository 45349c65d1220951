"""The layer and kind of a tensor from its name; all names are those of real checkpoints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffxfer.diffs.inspection.places import Place, places

LLAMA = {
    "model.embed_tokens.weight": Place("", -1, "embedding"),
    "lm_head.weight": Place("", -1, "head"),
    "model.norm.weight": Place("", -1, "norms"),
    "model.layers.0.self_attn.q_proj.weight": Place("layers", 0, "q"),
    "model.layers.0.self_attn.q_proj.bias": Place("layers", 0, "q"),
    "model.layers.11.self_attn.o_proj.weight": Place("layers", 11, "o"),
    "model.layers.11.self_attn.q_norm.weight": Place("layers", 11, "norms"),
    "model.layers.11.mlp.gate_proj.weight": Place("layers", 11, "gate"),
    "model.layers.11.mlp.down_proj.weight": Place("layers", 11, "down"),
    "model.layers.11.input_layernorm.weight": Place("layers", 11, "norms"),
}
MIXED_EXPERTS = {
    "model.layers.0.mlp.gate_proj.weight": Place("layers", 0, "gate_proj"),
    "model.layers.3.mlp.gate.weight": Place("layers", 3, "gate"),
    "model.layers.3.mlp.experts.17.gate_proj.weight": Place("layers", 3, "experts"),
    "model.layers.3.mlp.shared_experts.up_proj.weight": Place("layers", 3, "experts"),
    "model.layers.3.mlp.experts.gate_up_proj": Place("layers", 3, "experts"),
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": Place("layers", 3, "kv_a_proj_with_mqa"),
}
GPT2 = {
    "transformer.wte.weight": Place("", -1, "embedding"),
    "transformer.wpe.weight": Place("", -1, "embedding"),
    "transformer.ln_f.bias": Place("", -1, "norms"),
    "transformer.h.2.ln_1.weight": Place("h", 2, "norms"),
    "transformer.h.2.attn.c_attn.weight": Place("h", 2, "c_attn"),
    "transformer.h.2.attn.c_proj.weight": Place("h", 2, "attn.c_proj"),
    "transformer.h.2.mlp.c_proj.weight": Place("h", 2, "mlp.c_proj"),
}
T5 = {
    "shared.weight": Place("", -1, "embedding"),
    "encoder.block.0.layer.0.SelfAttention.q.weight": Place("encoder.block", 0, "q"),
    "decoder.block.1.layer.0.SelfAttention.q.weight": Place("decoder.block", 1, "SelfAttention.q"),
    "decoder.block.1.layer.1.EncDecAttention.q.weight": Place(
        "decoder.block", 1, "EncDecAttention.q"
    ),
    "decoder.final_layer_norm.weight": Place("", -1, "norms"),
}
PICTURES = {
    "model.language_model.layers.5.self_attn.v_proj.weight": Place("layers", 5, "v"),
    "vision_tower.encoder.layers.5.self_attn.v_proj.weight": Place(
        "vision_tower.encoder.layers", 5, "v"
    ),
    "visual.merger.mlp.0.weight": Place("", -1, "mlp"),
    "visual.merger.mlp.2.weight": Place("", -1, "mlp"),
    "vision_tower.embeddings.patch_embedding.weight": Place("", -1, "embedding"),
}
MAMBA = {
    "backbone.layers.0.mixer.A_log": Place("backbone.layers", 0, "A_log"),
    "backbone.layers.0.mixer.in_proj.weight": Place("backbone.layers", 0, "in"),
}
ODD = {
    "x": Place("", -1, "x"),
    "7": Place("", -1, "7"),
    "weight": Place("", -1, "weight"),
    "": Place("", -1, ""),
    "layers." + "9" * 30 + ".x.weight": Place("layers", 999_999_999, "x"),
}
MODELS = {
    "llama": LLAMA,
    "mixed experts": MIXED_EXPERTS,
    "gpt2": GPT2,
    "t5": T5,
    "pictures": PICTURES,
    "mamba": MAMBA,
    "odd": ODD,
}


@pytest.mark.parametrize("expected", MODELS.values(), ids=MODELS)
def test_names_say_it(expected: dict[str, Place]) -> None:
    assert places(expected) == expected


def test_a_name_of_very_many_parts_takes_no_longer_than_reading_it() -> None:
    deep = ".".join(["a"] * 100_000)
    found = places(["b." + deep, "c." + deep, "layers." + deep, "layers.0." + deep])
    assert [(place.stack, place.layer) for place in found.values()] == [("", -1)] * 3 + [
        ("layers", 0)
    ]
    assert len(set(found.values())) == 4


PARTS = st.sampled_from(
    ["layers", "0", "12", "mlp", "up", "up_proj", "norm", "weight", "_proj", ""]
)


@given(st.lists(st.lists(PARTS, min_size=1, max_size=6).map(".".join), unique=True, max_size=8))
def test_every_name_has_a_place_whatever_the_order(names: list[str]) -> None:
    found = places(names)
    assert found.keys() == set(names)
    assert places(names[::-1]) == found
    for place in found.values():
        assert (place.layer >= 0) == bool(place.stack)
