"""Adapters that `apply --as lora` moves: PEFT merges them as our graft does."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from diffxfer import apply_diff, extract_diff, verify
from diffxfer.errors import (
    CheckpointError,
    MatchError,
    NonFiniteError,
    OptionError,
    OutputExistsError,
    RelatednessError,
)
from diffxfer.family import family_folder
from tests.diffs.adapters.variants import VARIANTS as ADAPTERS
from tests.diffs.adapters.variants import make_adapter
from tests.diffs.adapters.variants import merged as merged_model
from tests.diffs.lora.models import merged_by_peft, save_adapter, tensors
from tests.families import fast_tokenizer, llama, save_model, save_tokenizer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
"""PEFT uses what transformers is about to remove."""
WORDS = [f"w{i}" for i in range(50)]


def config_of(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())


VARIANTS = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {r".*\.0\..*": 3}},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "bias of lora_B": {"target_modules": ["q_proj"], "lora_bias": True},
}


SELECTIONS = {
    "all": {},
    "half": {"alpha": 0.5},
    "some otherwise": {"alpha": 2.0, "alpha_for": {r"layers\.1|embed": 0.25}},
    "without some": {"exclude": [r"layers\.0\.self|lm_head"]},
}


def may_match(regex, variant):
    """Options that match nothing are refused, so each variant gets those that match."""
    parts = regex.split("|")
    return parts[1] if variant == "embeddings" else parts[0]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_merges_it_as_we_graft_it(tmp_path, variant, selection):
    adapter, target = save_adapter(tmp_path, **VARIANTS[variant])
    options = dict(SELECTIONS[selection])
    if "alpha_for" in options:
        scales = options["alpha_for"].items()
        options["alpha_for"] = {may_match(regex, variant): scale for regex, scale in scales}
    if "exclude" in options:
        options["exclude"] = [may_match(regex, variant) for regex in options["exclude"]]
    apply_diff(adapter, target, tmp_path / "moved", as_="lora", **options)
    merged = merged_by_peft(tmp_path / "moved", target, "untied")
    apply_diff(adapter, target, tmp_path / "graft", out_dtype="float64", **options)
    for name, tensor in tensors(tmp_path / "graft").items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-14), name
    assert verify(tmp_path / "moved").kind == "adapter"


def test_layers_that_store_their_weight_transposed(tmp_path):
    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    adapter, target = save_adapter(tmp_path, "gpt2", **options)
    apply_diff(adapter, target, tmp_path / "moved", as_="lora", alpha=0.5)
    merged = merged_by_peft(tmp_path / "moved", target, "gpt2")
    apply_diff(adapter, target, tmp_path / "graft", out_dtype="float64", alpha=0.5)
    for name, tensor in tensors(tmp_path / "graft").items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-14), name


def test_experts_that_the_target_stores_one_by_one(tmp_path):
    """The adapter has one parameter for all experts of a layer, as the loaded model has."""
    family = tmp_path / "family"
    make_adapter(ADAPTERS["Qwen3-MoE experts"], family)
    adapter, target = family / "adapter", family / "target"
    apply_diff(adapter, target, tmp_path / "moved" / "adapter", as_="lora", alpha=0.5)
    apply_diff(adapter, target, tmp_path / "graft", alpha=0.5, out_dtype="float64")
    shutil.copytree(target, tmp_path / "moved" / "base")
    merged, graft, before = (
        merged_model(tmp_path / "moved"),
        *map(tensors, (tmp_path / "graft", target)),
    )
    assert merged.keys() == graft.keys()
    for name, tensor in graft.items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-15), name
    assert any(not torch.equal(graft[n], before[n]) for n in graft if ".experts." in n)


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (float("nan"), None, r"NaN in the adapter at \[1, 1\]"),
        (1e30, "float16", r"overflows F16 in the output at \[1, 1\]; give a wider --out-dtype,"),
    ],
)
def test_a_factor_that_is_not_finite(tmp_path, value, dtype, said):
    adapter, target = save_adapter(tmp_path)
    state = load_file(adapter / "adapter_model.safetensors")
    state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][1, 1] = value
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(NonFiniteError, match=said):
        apply_diff(adapter, target, tmp_path / "moved", as_="lora", out_dtype=dtype)
    assert not (tmp_path / "moved").exists()


def test_the_config_names_the_target_and_the_scale(tmp_path):
    adapter, target = save_adapter(tmp_path)
    report = apply_diff(adapter, target, tmp_path / "moved", as_="lora", alpha=0.5)
    before, after = config_of(adapter), config_of(tmp_path / "moved")
    assert after["base_model_name_or_path"] == str(target.resolve())
    assert (before["lora_alpha"], after["lora_alpha"]) == (6, 3)
    assert report.tensors == {"moved": 4}
    assert (after["r"], after["alpha_pattern"], after["rank_pattern"]) == (4, {}, {})
    assert sorted(after["target_modules"]) == sorted(before["target_modules"])
    old, new = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "moved"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old), "the factors are the same"


@pytest.mark.parametrize(("alpha", "found"), [(1e-14, 6e-14), (0.1, 0.6), (1e300, 6e300)])
def test_the_scale_keeps_its_digits(tmp_path, alpha, found):
    adapter, target = save_adapter(tmp_path)
    apply_diff(adapter, target, tmp_path / "moved", as_="lora", alpha=alpha)
    assert config_of(tmp_path / "moved")["lora_alpha"] == found


def test_rows_of_tokens_move_with_the_tokens(tmp_path):
    adapter, _ = save_adapter(tmp_path, target_modules=["embed_tokens", "lm_head", "q_proj"])
    save_tokenizer(adapter, fast_tokenizer(words=WORDS))
    moved = [*reversed(WORDS), *(f"new{i}" for i in range(6))]
    larger = tmp_path / "larger"
    save_model(larger, llama(vocab_size=56, attention_bias=True), 3, dtype=torch.float32)
    save_tokenizer(larger, fast_tokenizer(words=moved))
    report = apply_diff(adapter, larger, tmp_path / "moved", as_="lora")
    assert report.vocabulary == "tokens"
    old, new = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "moved"))
    prefix = "base_model.model."
    a = f"{prefix}model.embed_tokens.lora_embedding_A"
    b = f"{prefix}lm_head.lora_B.weight"
    assert new[a].shape == (4, 56)
    assert new[b].shape == (56, 4)
    for place, word in enumerate(moved):
        at = WORDS.index(word) if word in WORDS else None
        column, row = (0, 0) if at is None else (old[a][:, at], old[b][at])
        assert torch.equal(new[a][:, place], column + torch.zeros(4))
        assert torch.equal(new[b][place], row + torch.zeros(4))
    untouched = f"{prefix}lm_head.lora_A.weight"
    assert torch.equal(new[untouched], old[untouched])
    loaded = AutoModelForCausalLM.from_pretrained(larger)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.PeftModel.from_pretrained(loaded, tmp_path / "moved")
    tokenizer = json.loads((tmp_path / "moved" / "tokenizer.json").read_text())
    assert tokenizer["model"]["vocab"]["new5"] == 55, "the tokenizer is the target's"


def made_for(adapter, base):
    """The adapter, with the name of its base."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(config_of(adapter) | {"base_model_name_or_path": str(base)}))
    return adapter


def column_norms(tensor, name):
    """The norms that DoRA divides by: of rows, but of columns for an embedding."""
    return tensor.norm(dim=0 if "embed" in name else 1, keepdim=True)


class TestDora:
    @pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens"]])
    def test_the_magnitudes_stay_and_peft_scales_the_target_to_them(self, tmp_path, targets):
        adapter, target = save_adapter(tmp_path, use_dora=True, target_modules=targets)
        report = apply_diff(adapter, target, tmp_path / "moved", as_="lora")
        (said,) = report.warnings
        assert "the magnitudes m of this DoRA are those of its own base" in said
        merged = merged_by_peft(tmp_path / "moved", target, "untied")
        old, new = (
            load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "moved")
        )
        assert {name for name in old if "base_layer" not in name} == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in new)
        for name, before in tensors(target).items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{module}.lora_magnitude_vector" not in new:
                assert torch.equal(merged[name], before)
                continue
            if f"{module}.lora_embedding_A" in new:
                a, b = (new[f"{module}.lora_embedding_{half}"].double() for half in "AB")
                total = before + 1.5 * (b @ a).T
                m = new[f"{module}.lora_magnitude_vector"].double().reshape(1, -1)
            else:
                a, b = (new[f"{module}.lora_{half}.weight"].double() for half in "AB")
                total = before + 1.5 * b @ a
                m = new[f"{module}.lora_magnitude_vector"].double().reshape(-1, 1)
            expected = m * total / column_norms(total, name)
            assert torch.allclose(merged[name], expected, rtol=0, atol=1e-12), name

    def test_no_other_alpha(self, tmp_path):
        adapter, target = save_adapter(tmp_path, use_dora=True)
        with pytest.raises(OptionError, match="not proportional to its factors") as caught:
            apply_diff(adapter, target, tmp_path / "moved", as_="lora", alpha=0.5)
        assert "diffxfer transfer ADAPTER BASE TARGET -o OUT --alpha A" in str(caught.value)
        options = {"as_": "lora", "alpha_for": {"q_proj": 0.0}}
        apply_diff(adapter, target, tmp_path / "moved", **options)
        left = load_file(tmp_path / "moved" / "adapter_model.safetensors")
        assert not any("q_proj" in name for name in left), "alpha 0 leaves a tensor out"

    def test_no_magnitudes_of_tokens_that_move(self, tmp_path):
        adapter, _ = save_adapter(tmp_path, use_dora=True, target_modules=["lm_head"])
        save_tokenizer(adapter, fast_tokenizer(words=WORDS))
        larger = save_model(tmp_path / "larger", llama(vocab_size=56), 3, dtype=torch.float32)
        save_tokenizer(larger, fast_tokenizer(words=[*WORDS, *(f"new{i}" for i in range(6))]))
        with pytest.raises(CheckpointError, match="magnitude of DoRA, and the tokens of lm_head"):
            apply_diff(adapter, larger, tmp_path / "moved", as_="lora")


class TestRelatedness:
    """On the shipped family: smaller models have too few weights for a verdict."""

    @pytest.fixture
    def adapter(self, tmp_path):
        shutil.copytree(family_folder() / "adapter", tmp_path / "adapter")
        return made_for(tmp_path / "adapter", family_folder() / "base")

    def test_an_unrelated_target_is_refused_if_base_is_here(self, adapter, tmp_path):
        target = shutil.copytree(family_folder() / "target", tmp_path / "target")
        torch.manual_seed(0)
        drawn = {n: torch.randn_like(t) for n, t in load_file(target / "model.safetensors").items()}
        save_file(drawn, target / "model.safetensors", {"format": "pt"})
        with pytest.raises(RelatednessError, match="base and target are unrelated"):
            apply_diff(adapter, target, tmp_path / "moved", as_="lora")
        assert not (tmp_path / "moved").exists()
        options = {"as_": "lora", "allow_unrelated": True}
        report = apply_diff(adapter, target, tmp_path / "moved", **options)
        assert [relation.roles for relation in report.relations] == [("base", "target")]
        assert not any("was not checked" in note for note in report.notes)

    def test_a_successor_is_not(self, adapter, tmp_path):
        target = family_folder() / "target"
        report = apply_diff(adapter, target, tmp_path / "moved", as_="lora")
        name = "model.layers.0.mlp.up_proj.weight"
        pair = [tensors(family_folder() / role)[name].flatten() for role in ("base", "target")]
        cosine = torch.cosine_similarity(*pair, dim=0)
        assert report.relations[0].cosine == pytest.approx(float(cosine), abs=0.1)
        assert not report.warnings

    @pytest.mark.parametrize("named", ["", "org/never-downloaded", "/no/such/folder"])
    def test_without_base_it_is_said_that_nothing_was_checked(self, tmp_path, named):
        adapter, target = save_adapter(tmp_path)
        made_for(adapter, named)
        report = apply_diff(adapter, target, tmp_path / "moved", as_="lora")
        assert report.relations == ()
        assert any("was not checked" in note for note in report.notes)


def test_an_embedding_that_base_did_not_resize_is_left_out(tmp_path):
    """The target has more rows than base; the copy that PEFT stored has base's."""
    adapter, _ = save_adapter(tmp_path, target_modules=["embed_tokens", "q_proj"])
    made_for(adapter, tmp_path / "base")
    save_tokenizer(adapter, fast_tokenizer(words=WORDS))
    larger = tmp_path / "larger"
    save_model(larger, llama(vocab_size=56, attention_bias=True), 3, dtype=torch.float32)
    save_tokenizer(larger, fast_tokenizer(words=[*WORDS, *(f"new{i}" for i in range(6))]))
    options = {"as_": "lora", "allow_unrelated": True}
    apply_diff(adapter, larger, tmp_path / "moved", **options)
    new = load_file(tmp_path / "moved" / "adapter_model.safetensors")
    assert new["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (4, 56)
    with pytest.raises(CheckpointError, match="an embedding of 50 rows, and the target has 56"):
        apply_diff(adapter, larger, tmp_path / "graft")


def test_a_target_whose_head_has_a_prefix(tmp_path):
    adapter, target = save_adapter(tmp_path, target_modules=["lm_head", "q_proj"])
    file = target / "model.safetensors"
    save_file(
        {f"language_model.{n}": t for n, t in load_file(file).items()}, file, {"format": "pt"}
    )
    apply_diff(adapter, target, tmp_path / "moved", as_="lora")
    moved = load_file(tmp_path / "moved" / "adapter_model.safetensors")
    assert "base_model.model.language_model.lm_head.lora_A.weight" in moved


class TestRefusal:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"modules_to_save": ["lm_head"]}, "is stored whole"),
            ({"trainable_token_indices": [1, 2]}, "rows of tokens"),
        ],
    )
    def test_of_what_holds_values_of_its_own_base(self, tmp_path, options, said):
        adapter, target = save_adapter(tmp_path, **options)
        with pytest.raises(CheckpointError, match=said) as caught:
            apply_diff(adapter, target, tmp_path / "moved", as_="lora")
        assert "diffxfer transfer ADAPTER BASE TARGET" in str(caught.value)
        assert not (tmp_path / "moved").exists()

    def test_of_a_target_of_another_shape(self, tmp_path):
        adapter, _ = save_adapter(tmp_path)
        other = save_model(tmp_path / "other", llama(hidden_size=32), 1)
        with pytest.raises(CheckpointError, match="make no"):
            apply_diff(adapter, other, tmp_path / "moved", as_="lora")

    def test_of_a_target_without_such_modules(self, tmp_path):
        adapter, target = save_adapter(tmp_path)
        file = adapter / "adapter_model.safetensors"
        renamed = {name.replace("q_proj", "qq_proj"): t for name, t in load_file(file).items()}
        save_file(renamed, file)
        with pytest.raises(CheckpointError, match="no such tensor"):
            apply_diff(adapter, target, tmp_path / "moved", as_="lora")

    def test_of_a_diff_vector(self, tmp_path):
        _, target = save_adapter(tmp_path)
        extract_diff(target, tmp_path / "base", tmp_path / "diff", allow_unrelated=True)
        with pytest.raises(OptionError, match="is a diff vector"):
            apply_diff(tmp_path / "diff", target, tmp_path / "moved", as_="lora")

    def test_of_nothing(self, tmp_path):
        adapter, target = save_adapter(tmp_path)
        with pytest.raises(MatchError, match="no tensor of the adapter is left"):
            apply_diff(adapter, target, tmp_path / "moved", as_="lora", exclude=["proj"])

    def test_of_alpha_0(self, tmp_path):
        adapter, target = save_adapter(tmp_path)
        with pytest.raises(OptionError, match="--alpha: 0 leaves no factors"):
            apply_diff(adapter, target, tmp_path / "moved", as_="lora", alpha=0.0)

    def test_of_an_infinite_alpha(self, tmp_path):
        adapter, target = save_adapter(tmp_path)
        with pytest.raises(OptionError, match="--alpha: makes lora_alpha infinite; give a smaller"):
            apply_diff(adapter, target, tmp_path / "moved", as_="lora", alpha=1e308)
        assert not (tmp_path / "moved").exists()

    def test_of_an_output_that_exists(self, tmp_path):
        adapter, target = save_adapter(tmp_path)
        with pytest.raises(OutputExistsError):
            apply_diff(adapter, target, adapter, as_="lora")

    def test_of_a_choice_by_name_if_parameters_are_adapted(self, tmp_path):
        adapter, target = save_adapter(tmp_path)
        config = config_of(adapter) | {"target_parameters": ["mlp.experts.down_proj"]}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(OptionError, match="target_parameters only as a whole"):
            apply_diff(adapter, target, tmp_path / "out", as_="lora", alpha_for={"q_proj": 0.5})
        assert not (tmp_path / "out").exists()
