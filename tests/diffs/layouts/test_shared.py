"""A tensor that is stored several times: equal copies count once, unequal ones are an error."""

import shutil

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from diffxfer import apply_diff, extract_diff, transfer, verify
from diffxfer.errors import MatchError
from tests.diffs.layouts import models

T5 = T5Config(
    vocab_size=50,
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=1,
    num_heads=2,
    decoder_start_token_id=0,
)
BART = BartConfig(
    vocab_size=50,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=20,
    forced_eos_token_id=None,
)
BERT = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    pad_token_id=None,
)

KINDS = {
    "t5": (T5ForConditionalGeneration, T5, "shared.weight"),
    "bart": (BartForConditionalGeneration, BART, "model.shared.weight"),
}
COPIES = {
    "t5": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    "bart": (
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    model_class, config, _ = KINDS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    return request.param, models.save_roles(root, *[(model_class, config)] * 3)


def copied(roles, root):
    return [shutil.copytree(folder, root / folder.name) for folder in roles]


def spread(folder, shared, names, change=0.0):
    return models.edit(
        folder, lambda tensors: tensors | dict.fromkeys(names, tensors[shared] + change)
    )


@pytest.mark.parametrize(
    "several", [("finetuned",), ("base",), ("target",), ("finetuned", "base"), models.ROLES]
)
def test_several_times_in_some_roles(kind, tmp_path, several):
    name, roles = kind
    model_class, _, shared = KINDS[name]
    folders = copied(roles, tmp_path)
    finetuned, base, target = map(models.load, folders)
    expected = {n: models.graft_of(finetuned[n], base[n], target[n]) for n in target}
    for role, folder in zip(models.ROLES, folders, strict=True):
        if role in several:
            spread(folder, shared, COPIES[name])
    if "target" in several:
        expected |= dict.fromkeys(COPIES[name], expected[shared])
    transfer(*folders, tmp_path / "out")
    models.assert_equal(models.load(tmp_path / "out"), expected)
    models.load_clean(model_class, tmp_path / "out")
    extract_diff(*folders[:2], tmp_path / "diff", diff_dtype="float64")
    apply_diff(tmp_path / "diff", folders[2], tmp_path / "applied")
    models.assert_equal(models.load(tmp_path / "applied"), expected)
    assert verify(tmp_path / "diff", base=folders[1], finetuned=folders[0]).restored


def test_under_another_of_its_names(kind, tmp_path):
    """Files of an old `save_model` have the embedding under its last name alone."""
    name, roles = kind
    shared = KINDS[name][2]
    folders = copied(roles, tmp_path)
    finetuned, base, target = map(models.load, folders)
    expected = {n: models.graft_of(finetuned[n], base[n], target[n]) for n in target}
    models.rename(folders[0], lambda n: COPIES[name][1] if n == shared else n)
    transfer(*folders, tmp_path / "out")
    models.assert_equal(models.load(tmp_path / "out"), expected)


@pytest.mark.parametrize("role", models.ROLES)
def test_unequal_copies_are_an_error(kind, tmp_path, role):
    name, roles = kind
    folders = copied(roles, tmp_path)
    folder = folders[models.ROLES.index(role)]
    spread(folder, KINDS[name][2], COPIES[name][:1], change=1.0)
    with pytest.raises(MatchError) as caught:
        transfer(*folders, tmp_path / "out")
    assert f"have different values in {role}, but " in caught.value.problem
    assert COPIES[name][0] in caught.value.problem


@pytest.mark.parametrize("place", [0, 2], ids=["embedding", "head"])
def test_unequal_copies_where_the_target_s_are_one(kind, tmp_path, place):
    """Every role stores it several times; a graft of each would take the target's apart."""
    name, roles = kind
    folders = copied(roles, tmp_path)
    for folder in folders:
        spread(folder, KINDS[name][2], COPIES[name])
    spread(folders[0], KINDS[name][2], COPIES[name][place : place + 1], change=1.0)
    with pytest.raises(MatchError) as caught:
        transfer(*folders, tmp_path / "out")
    assert (
        "have different values in finetuned or base, but target stores one" in caught.value.problem
    )
    extract_diff(*folders[:2], tmp_path / "diff")
    with pytest.raises(
        MatchError, match="have different values in diff vector, but target stores one"
    ):
        apply_diff(tmp_path / "diff", folders[2], tmp_path / "out")


def test_copies_that_all_roles_have_as_their_own(kind, tmp_path):
    name, roles = kind
    folders = copied(roles, tmp_path)
    for folder, change in zip(folders, (1.0, 2.0, 3.0), strict=True):
        spread(folder, KINDS[name][2], COPIES[name], change=change)
        spread(folder, KINDS[name][2], COPIES[name][1:2], change=change / 4)
    transfer(*folders, tmp_path / "out")
    finetuned, base, target = map(models.load, folders)
    expected = {n: models.graft_of(finetuned[n], base[n], target[n]) for n in target}
    models.assert_equal(models.load(tmp_path / "out"), expected)


def test_options_do_not_take_copies_apart(kind, tmp_path):
    name, roles = kind
    folders = copied(roles, tmp_path)
    for folder in folders:
        spread(folder, KINDS[name][2], COPIES[name])
    transfer(*folders, tmp_path / "out", exclude=[COPIES[name][0]])
    found = models.load(tmp_path / "out")
    assert all(torch.equal(found[n], found[KINDS[name][2]]) for n in COPIES[name])


def test_a_decoder_of_masked_words_that_is_its_embedding(tmp_path):
    """Old files of BERT have the head's copies of embedding and bias, new ones have not."""
    roles = models.save_roles(tmp_path, *[(BertForMaskedLM, BERT)] * 3)
    embedding, bias = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
    models.edit(
        roles[1],
        lambda tensors: (
            tensors
            | {
                "cls.predictions.decoder.weight": tensors[embedding],
                "cls.predictions.decoder.bias": tensors[bias],
            }
        ),
    )
    report = transfer(*roles, tmp_path / "out")
    finetuned, base, target = map(models.load, roles)
    expected = {n: models.graft_of(finetuned[n], base[n], target[n]) for n in target}
    models.assert_equal(models.load(tmp_path / "out"), expected)
    models.load_clean(BertForMaskedLM, tmp_path / "out")
    assert any("one tensor stored under several names" in note for note in report.notes)
    assert torch.equal(base[embedding], base["cls.predictions.decoder.weight"])
