"""Which tensors have rows that belong to tokens."""

from typing import TYPE_CHECKING, cast

import pytest

from diffxfer.checkpoints.stored import TensorSpec
from diffxfer.diffs.vocab.tensors import sort_tensors, vocabulary_tensors

if TYPE_CHECKING:
    from diffxfer.checkpoints.stored import ShardFile

SIZE = 40
CONFIG = {"vocab_size": SIZE, "hidden_size": 8}


def specs(**shapes):
    """Tensors by name, with two underscores for a point."""
    names = {name.replace("__", "."): shape for name, shape in shapes.items()}
    shard = cast("ShardFile", None)
    return {name: TensorSpec(name, "F32", shape, 0, shard) for name, shape in names.items()}


class TestSortTensors:
    def test_a_bias_of_the_vocabularys_size_is_one(self):
        bert = specs(
            bert__embeddings__words__weight=(SIZE, 8),
            bert__encoder__layer__0__dense__weight=(8, 8),
            cls__predictions__bias=(SIZE,),
        )
        names = {"bert.embeddings.words.weight", "cls.predictions.bias"}
        assert sort_tensors(bert, CONFIG) == (names, set())

    def test_a_bias_of_one_row_is_ambiguous_and_does_not_veto(self):
        bart = specs(final_logits_bias=(1, SIZE), words__weight=(SIZE, 8))
        assert sort_tensors(bart, CONFIG) == ({"words.weight"}, {"final_logits_bias"})

    @pytest.mark.parametrize("name", ["model__layers__3__kv_b_proj", "h__3__in_proj"])
    def test_a_projection_in_a_block_is_none(self, name):
        found = specs(**{f"{name}__weight": (SIZE, 4)}, words__weight=(SIZE, 8))
        assert sort_tensors(found, CONFIG) == ({"words.weight"}, set())

    def test_a_known_name_in_a_block_is_one(self):
        name = "model.layers.61.embed_tokens.weight"
        found = specs(model__layers__61__embed_tokens__weight=(SIZE, 8))
        assert vocabulary_tensors(found, CONFIG) == {name}

    @pytest.mark.parametrize(
        ("others", "config"),
        [
            ({"layers__0__norm__weight": (SIZE,)}, {}),
            ({"layers__0__down__weight": (8, SIZE)}, {}),
            ({"wpe__weight": (16, SIZE)}, {}),
            ({}, {"hidden_size": SIZE}),
            ({}, {"n_embd": SIZE}),
        ],
    )
    def test_a_size_that_is_also_another_dimension(self, others, config):
        found = specs(
            **others, norm__weight=(SIZE,), words__weight=(SIZE, 8), wte__weight=(SIZE, 8)
        )
        ambiguous = {"norm.weight", "words.weight"}
        assert sort_tensors(found, CONFIG | config) == ({"wte.weight"}, ambiguous)

    @pytest.mark.parametrize(
        ("name", "known"),
        [
            ("transformer.word_embeddings.weight", True),
            ("word_embeddings_layernorm.weight", False),
            ("tok_embeddings.weight", True),
            ("gpt_neox.embed_in.weight", True),
            ("embed_out.weight", True),
            ("shared.weight", True),
            ("model.shared.weight", True),
            ("layers.0.mlp.shared.weight", False),
            ("model.layers.61.shared_head.head.weight", True),
            ("model.layers.61.shared_head.norm.weight", False),
            ("decoder.weight", False),
        ],
    )
    def test_known_names(self, name, known):
        found = specs(**{name: (3, 8)})
        assert vocabulary_tensors(found, {}) == ({name} if known else set())
