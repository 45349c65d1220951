"""What is brought and what it replaces, on plain tensors: numbered heads, towers, prefixes."""

import pytest
import torch

from diffxfer import apply_diff, extract_diff, transfer
from diffxfer.errors import MatchError
from tests import tiny
from tests.diffs.layouts import models

CONFIG = {**tiny.CONFIG, "model_type": "x", "vocab_size": 6, "tie_word_embeddings": False}
TOWER = {
    "vision_tower.layers.0.attn.q.weight": (3, 3),
    "vision_tower.layers.0.norm.weight": (3,),
    "projector.weight": (4, 3),
}


def body(prefix=""):
    return {prefix + name: shape for name, shape in tiny.SHAPES.items()}


def make(root, finetuned, base, target, **config):
    """Three roles with tensors of these shapes."""
    folders = []
    for seed, shapes in enumerate((finetuned, base, target)):
        generator = torch.Generator().manual_seed(seed)
        weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        folders.append(
            tiny.save_model(root / models.ROLES[seed], weights, config={**CONFIG, **config})
        )
    return folders


def graft(roles, out, **options):
    transfer(*roles, out, allow_unrelated=True, **options)
    return models.load(out)


def twice(roles, root, **options):
    """The graft, which a diff vector must give too."""
    found = graft(roles, root / "out", **options)
    diff = root / "diff"
    added = options["added"]
    extract_diff(*roles[:2], diff, diff_dtype="float64", added=added, allow_unrelated=True)
    apply_diff(diff, roles[2], root / "applied", allow_unrelated=True, **options)
    models.assert_equal(models.load(root / "applied"), found)
    return found


SEQUENCE = {"classifier.0.weight": (4, 4), "classifier.2.weight": (2, 4), "classifier.2.bias": (2,)}
MEDUSA = {"medusa_head.0.0.linear.weight": (4, 4), "medusa_head.0.1.weight": (6, 4)}


@pytest.mark.parametrize("head", [SEQUENCE, MEDUSA], ids=["sequence", "medusa"])
class TestNumberedHeads:
    def test_they_are_refused_as_others(self, tmp_path, head):
        roles = make(tmp_path, body() | head, body(), body())
        with pytest.raises(MatchError, match="--added bring"):
            graft(roles, tmp_path / "out")

    def test_they_are_brought_as_others(self, tmp_path, head):
        roles = make(tmp_path, body() | head, body(), body())
        found = twice(roles, tmp_path, added="bring")
        ours = models.load(roles[0])
        assert all(torch.equal(found[name], ours[name]) for name in head)
        assert found.keys() == body().keys() | head.keys()

    def test_beside_a_tower_too(self, tmp_path, head):
        roles = make(tmp_path, body() | head | TOWER, body(), body())
        found = twice(roles, tmp_path, added="bring")
        assert found.keys() == body().keys() | head.keys()


def test_a_tower_of_the_target_is_no_replaced_head(tmp_path):
    roles = make(tmp_path, body() | SEQUENCE, body(), body() | TOWER)
    with pytest.raises(MatchError, match=r"vision_tower.* is in target only"):
        graft(roles, tmp_path / "out", added="bring")


def test_a_tower_of_base_and_target_stays_beside_a_brought_head(tmp_path):
    roles = make(tmp_path, body() | SEQUENCE, body() | TOWER, body() | TOWER)
    found, target = twice(roles, tmp_path, added="bring"), models.load(roles[2])
    assert all(torch.equal(found[name], target[name]) for name in TOWER)


@pytest.mark.parametrize("lacking", ["model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("role", [0, 1])
def test_a_part_of_the_body_is_no_head(tmp_path, lacking, role):
    shapes = [body() | SEQUENCE, body(), body()]
    shapes[role] = {name: shape for name, shape in shapes[role].items() if name != lacking}
    with pytest.raises(MatchError, match=lacking):
        graft(make(tmp_path, *shapes), tmp_path / "out", added="bring")


def test_a_norm_beside_what_is_shared_is_no_replaced_head(tmp_path):
    """BERT's first norm stands outside of the module that has its layers."""
    shapes = {"bert.embeddings.word_embeddings.weight": (6, 4)}
    shapes |= {f"bert.encoder.layer.{i}.output.dense.weight": (4, 4) for i in range(2)}
    norm = {"bert.embeddings.LayerNorm.weight": (4,)}
    with pytest.raises(MatchError, match="LayerNorm"):
        graft(
            make(tmp_path, shapes | SEQUENCE, shapes | norm, shapes | norm),
            tmp_path / "out",
            added="bring",
        )


def test_a_norm_beside_what_is_shared_is_no_part_of_a_tower(tmp_path):
    shapes = {"bert.embeddings.word_embeddings.weight": (6, 4)}
    shapes |= {f"bert.encoder.layer.{i}.output.dense.weight": (4, 4) for i in range(2)}
    more = {"bert.embeddings.LayerNorm.weight": (4,), **TOWER}
    with pytest.raises(MatchError, match="LayerNorm"):
        graft(make(tmp_path, shapes | more, shapes, shapes | more), tmp_path / "out")


@pytest.mark.parametrize(
    ("prefixes", "ours", "expected"),
    [
        (("model.", ""), "model.pooler.dense.weight", "pooler.dense.weight"),
        (("", "thinker."), "score.weight", "thinker.score.weight"),
        (("lm.", ""), "lm.my.norm.weight", "my.norm.weight"),
    ],
)
def test_it_gets_the_prefixes_of_the_target(tmp_path, prefixes, ours, expected):
    layers = {f"layers.{i}.mlp.up.weight": (3, 4) for i in range(2)} | {"norm.weight": (4,)}
    one = {f"model.{name}": shape for name, shape in layers.items()}
    if prefixes[0] == "model.":
        finetuned, target = one, layers
    else:
        finetuned, target = (
            {prefix + name: shape for name, shape in one.items()} for prefix in prefixes
        )
    roles = make(tmp_path, finetuned | {ours: (2, 4)}, one, target)
    found = twice(roles, tmp_path, added="bring")
    assert found.keys() == target.keys() | {expected}
    assert torch.equal(found[expected], models.load(roles[0])[ours])


def test_wrappers_in_a_head_are_no_other_head(tmp_path):
    """Where ``module.`` is within every name, a tied head is one, and so is what is brought."""
    wrapped = {name.replace(".weight", ".module.weight"): s for name, s in body().items()}
    roles = make(tmp_path, body(), body(), wrapped)
    embedding = "model.embed_tokens.module.weight"
    models.edit(roles[2], lambda t: t | {"lm_head.module.weight": t[embedding]})
    with pytest.raises(MatchError, match="differs from the embedding in finetuned"):
        graft(roles, tmp_path / "out")
    roles = make(tmp_path / "2", wrapped | {"score.module.weight": (2, 4)}, body(), body())
    assert graft(roles, tmp_path / "out", added="bring").keys() == body().keys() | {"score.weight"}


class TestOptions:
    def test_include_holds_for_what_a_diff_vector_brings(self, tmp_path):
        roles = make(tmp_path, body() | {"score.weight": (2, 4)}, body(), body())
        found = twice(roles, tmp_path, added="bring", include=["norm"])
        assert found.keys() == body().keys()

    def test_the_output_s_dtype(self, tmp_path):
        roles = make(tmp_path, body() | {"score.weight": (2, 4)}, body(), body())
        found = twice(roles, tmp_path, added="bring", out_dtype="bfloat16")
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


SHARED = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def seq2seq(*names, width=4):
    stacks = {f"{s}.block.0.layer.0.q.weight": (4, 4) for s in ("encoder", "decoder")}
    return stacks | dict.fromkeys(names, (6, width))


def test_copies_of_a_tensor_that_is_refused(tmp_path):
    roles = make(tmp_path, *[seq2seq(SHARED[0])] * 2, seq2seq(*SHARED, width=5))
    models.edit(roles[2], lambda t: t | dict.fromkeys(SHARED, t[SHARED[0]]))
    with pytest.raises(MatchError, match=r"shared\.weight is F32"):
        graft(roles, tmp_path / "out")


def test_a_copy_of_two_tensors_with_other_differences(tmp_path):
    """The target's head is its embeddings, which are two in base: no one knows the head's Δ."""
    names = (*SHARED, "lm_head.weight")
    roles = make(tmp_path, *[seq2seq(*SHARED)] * 2, seq2seq(*names))
    models.edit(roles[2], lambda t: t | dict.fromkeys(names, t[names[0]]))
    with pytest.raises(MatchError, match="have different values in finetuned"):
        graft(roles, tmp_path / "out")
