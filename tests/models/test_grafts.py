"""Grafts in memory: the tensors, companions and refusals of the folders that would be written."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    T5Config,
)

from diffxfer import apply_diff, extract_diff, load_graft, transfer
from diffxfer.errors import (
    ArtifactError,
    DiffxferError,
    InputChangedError,
    MatchError,
    NonFiniteError,
    RelatednessError,
)
from diffxfer.family import family_folder
from diffxfer.models.graft import graft_source, transfer_source
from diffxfer.models.loading import load, refill
from tests import families
from tests.helpers import same_bits

if TYPE_CHECKING:
    from collections.abc import Iterator

FAMILY = family_folder()
SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
BERT = {**SMALL, "num_attention_heads": 2, "max_position_embeddings": 64}

CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (families.llama(), AutoModelForCausalLM, {}),
    "tied": (families.llama(tie_word_embeddings=True), AutoModelForCausalLM, {}),
    "sharded": (families.llama(), AutoModelForCausalLM, {"max_shard_size": "5KB"}),
    "float32": (families.llama(), AutoModelForCausalLM, {"dtype": torch.float32}),
    "float16": (families.llama(), AutoModelForCausalLM, {"dtype": torch.float16}),
    "qwen3-moe": (families.qwen3_moe(), AutoModelForCausalLM, {}),
    "mixtral": (families.mixtral(), AutoModelForCausalLM, {}),
    "gpt2": (
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64),
        AutoModelForCausalLM,
        {},
    ),
    "bert": (BertConfig(**BERT), AutoModelForMaskedLM, {}),
    "classifier": (BertConfig(**BERT, num_labels=3), AutoModelForSequenceClassification, {}),
    "t5": (
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
        AutoModelForSeq2SeqLM,
        {},
    ),
}


class Family:
    """Base, finetuned and target of one architecture, with the diff vector."""

    def __init__(self, root: Path, case: str) -> None:
        config, self.auto, how = CASES[case]
        for seed, role in enumerate(("base", "finetuned", "target")):
            families.save_model(root / role, config, seed, model_class=self.auto, **how)
            families.save_tokenizer(
                root / role,
                families.fast_tokenizer(),
                template=f"{role}: {{{{ messages }}}}",
                generation={"max_length": 20 + seed} if case == "llama" else None,
            )
        self.root = root
        self.finetuned, self.base, self.target = (
            root / role for role in ("finetuned", "base", "target")
        )
        self.diff = root / "diff"
        extract_diff(self.finetuned, self.base, self.diff)


@pytest.fixture(scope="module", params=CASES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("plain"), "llama")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder for temporary folders, which is empty afterwards."""
    folder = tmp_path / "home"
    folder.mkdir()
    yield folder
    assert not list(folder.iterdir())


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    shards = sorted(folder.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def assert_equal_models(left: Any, right: Any) -> None:
    """The same class, names, dtypes, bits, settings and logits."""
    assert type(left) is type(right)
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in ours)
    shared = [
        {n for n, p in model.named_parameters(remove_duplicate=False) if p is embedding}
        for model in (left, right)
        if (embedding := model.get_input_embeddings().weight) is not None
    ]
    assert shared[0] == shared[1]
    if left.can_generate():
        assert left.generation_config.to_dict() == right.generation_config.to_dict()
    ids = {"input_ids": torch.arange(24)[None]}
    if left.config.is_encoder_decoder:
        ids["decoder_input_ids"] = ids["input_ids"]
    with torch.no_grad():
        assert same_bits(left(**ids).logits, right(**ids).logits)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_graft_has_the_bits_of_the_written_folder(
    family: Family, tmp_path: Path, home: Path, alpha: float
) -> None:
    apply_diff(family.diff, family.target, tmp_path / "graft", alpha=alpha)
    written = on_disk(tmp_path / "graft")
    with graft_source(family.diff, family.target, alpha, home=home) as source:
        assert set(source.names()) == set(written)
        for name, tensor in written.items():
            assert same_bits(source.tensor(name), tensor), name
            assert source.shape(name) == tuple(tensor.shape)
        model, tokenizer = load(source)
    assert_equal_models(model, family.auto.from_pretrained(tmp_path / "graft", dtype="auto").eval())
    folder = families.load_tokenizer(tmp_path / "graft")
    assert tokenizer is not None
    assert tokenizer.get_vocab() == folder.get_vocab()
    assert tokenizer.chat_template == folder.chat_template


def test_a_transfer_has_the_bits_of_the_written_folder(family: Family, tmp_path: Path) -> None:
    roles = family.finetuned, family.base, family.target
    transfer(*roles, tmp_path / "graft", alpha=0.7)
    written = on_disk(tmp_path / "graft")
    with transfer_source(*roles, 0.7) as source:
        assert set(source.names()) == set(written)
        assert all(same_bits(source.tensor(name), written[name]) for name in written)


def test_a_loaded_model_is_refilled_with_another_graft(family: Family) -> None:
    with graft_source(family.diff, family.target, 0.3) as source:
        expected = load(source).model
    with graft_source(family.diff, family.target, 1.0) as source:
        loaded = load(source)
        assert not all(
            same_bits(*pair)
            for pair in zip(
                loaded.model.state_dict().values(), expected.state_dict().values(), strict=True
            )
        )
    with graft_source(family.diff, family.target, 0.3) as source:
        refill(loaded, source)
    assert_equal_models(loaded.model, expected)


def test_dtype_attention_and_class_are_those_asked_for(plain: Family, tmp_path: Path) -> None:
    apply_diff(plain.diff, plain.target, tmp_path / "graft")
    given: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    with graft_source(plain.diff, plain.target) as source:
        model = load(source, **given, device="cpu", auto=AutoModelForCausalLM).model
        assert model.config.name_or_path == source.label
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "graft", **given).eval()
    assert_equal_models(model, expected)
    assert model.config._attn_implementation == "eager"


def test_progress_counts_the_bytes_of_the_weights(plain: Family, tmp_path: Path) -> None:
    apply_diff(plain.diff, plain.target, tmp_path / "graft")
    size = sum(tensor.nbytes for tensor in on_disk(tmp_path / "graft").values())
    seen: list[tuple[int, int]] = []
    with graft_source(plain.diff, plain.target) as source:
        load(source, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)
    assert {total for _, total in seen} == {size}


def refusal_of(call: Any) -> tuple[type, str]:
    with pytest.raises(DiffxferError) as caught:
        call()
    return type(caught.value), str(caught.value)


def test_what_apply_refuses_is_refused_in_the_same_words(
    plain: Family, tmp_path: Path, home: Path
) -> None:
    other = families.save_model(tmp_path / "other", families.llama(hidden_size=8), 5)
    for target in (other, plain.diff, tmp_path / "none"):
        expected = refusal_of(lambda target=target: apply_diff(plain.diff, target, tmp_path / "x"))
        found = refusal_of(lambda target=target: graft_source(plain.diff, target, home=home))
        assert found == expected


def test_a_damaged_diff_vector_is_refused(plain: Family, tmp_path: Path, home: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(plain.diff, damaged)
    shard = damaged / "model.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    expected = refusal_of(lambda: apply_diff(damaged, plain.target, tmp_path / "x"))
    with graft_source(damaged, plain.target, home=home) as source:
        kind, text = refusal_of(lambda: load(source))
    assert kind is expected[0] is ArtifactError
    assert expected[1].startswith(f"{text}; ")  # a run says too what it keeps


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The diff vector of the family of trained models."""
    folder = tmp_path_factory.mktemp("trained") / "diff"
    extract_diff(FAMILY / "finetuned", FAMILY / "base", folder)
    return folder


def test_a_target_that_is_the_base_is_said(trained: Path, tmp_path: Path, home: Path) -> None:
    report = apply_diff(trained, FAMILY / "base", tmp_path / "graft")
    with graft_source(trained, FAMILY / "base", home=home) as source:
        assert source.warnings == report.warnings
    assert any("the base itself" in warning for warning in report.warnings)


def test_an_unrelated_target_is_refused(trained: Path, tmp_path: Path, home: Path) -> None:
    target = tmp_path / "unrelated"
    shutil.copytree(FAMILY / "base", target)
    weights = on_disk(target)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if tensor.dim() > 1:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            weights[name] = noise.to(tensor.dtype)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    expected = refusal_of(lambda: apply_diff(trained, target, tmp_path / "x"))
    assert refusal_of(lambda: graft_source(trained, target, home=home)) == expected
    assert expected[0] is RelatednessError
    graft_source(trained, target, home=home, allow_unrelated=True).close()


def test_transformers_must_use_exactly_the_tensors(plain: Family, tmp_path: Path) -> None:
    target = families.save_model(tmp_path / "target", families.llama(), 2)
    families.edit_tensors(target, model__extra__weight=torch.ones(2))
    with (
        graft_source(plain.diff, target, allow_missing=["extra"]) as source,
        pytest.raises(DiffxferError, match=r"tensors that transformers ignores.*extra"),
    ):
        load(source)


def test_code_in_a_target_is_not_executed(plain: Family, tmp_path: Path) -> None:
    target = families.save_model(tmp_path / "target", families.llama(), 2)
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (target / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (target / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    with (
        graft_source(plain.diff, target) as source,
        pytest.raises(DiffxferError, match="cannot be loaded by transformers"),
    ):
        load(source)
    assert not ran.exists()


def test_tensors_that_differ_are_named(plain: Family) -> None:
    with pytest.raises(MatchError, match="do not fit"):
        graft_source(plain.diff, plain.target, rename=["target:norm=other"])


def test_tokens_that_fine_tuning_added(tmp_path: Path) -> None:
    roles = {"base": (30, ()), "finetuned": (31, ("<new>",)), "target": (30, ())}
    for seed, (role, (rows, added)) in enumerate(roles.items()):
        families.save_model(tmp_path / role, families.llama(vocab_size=rows), seed)
        families.save_tokenizer(
            tmp_path / role, families.fast_tokenizer(plain=added), template=f"{role}: x"
        )
    extract_diff(tmp_path / "finetuned", tmp_path / "base", tmp_path / "diff")
    report = apply_diff(tmp_path / "diff", tmp_path / "target", tmp_path / "graft")
    assert report.added_tokens == ("<new>",)
    model, tokenizer = load_graft(tmp_path / "diff", tmp_path / "target")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "graft", dtype="auto").eval()
    assert_equal_models(model, written)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 31
    assert tokenizer is not None
    assert tokenizer.convert_tokens_to_ids("<new>") == 30
    assert tokenizer.chat_template == "finetuned: x"


class TestAnAdapter:
    def test_has_the_bits_of_the_written_folder(self, tmp_path: Path) -> None:
        apply_diff(FAMILY / "adapter", FAMILY / "target", tmp_path / "graft", alpha=0.8)
        model, tokenizer = load_graft(FAMILY / "adapter", FAMILY / "target", alpha=0.8)
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "graft", dtype="auto").eval()
        assert_equal_models(model, written)
        folder = families.load_tokenizer(tmp_path / "graft")
        assert tokenizer is not None
        assert tokenizer.get_vocab() == folder.get_vocab()
        assert tokenizer.chat_template == folder.chat_template

    def test_of_a_kind_that_apply_refuses_is_refused(self, tmp_path: Path, home: Path) -> None:
        dora = tmp_path / "dora"
        shutil.copytree(FAMILY / "adapter", dora)
        factors = load_file(dora / "adapter_model.safetensors")
        for name in [name for name in factors if ".lora_B." in name]:
            module = name.partition(".lora_B.")[0]
            factors[f"{module}.lora_magnitude_vector"] = torch.ones(len(factors[name]))
        save_file(factors, dora / "adapter_model.safetensors")
        path = dora / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
        expected = refusal_of(lambda: apply_diff(dora, FAMILY / "target", tmp_path / "x"))
        assert refusal_of(lambda: graft_source(dora, FAMILY / "target", home=home)) == expected
        assert "DoRA" in expected[1]


def test_options_of_apply_decide_the_weights(plain: Family, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "alpha": 0.9,
        "alpha_for": {"mlp": 0.5},
        "exclude": ["lm_head"],
        "out_dtype": "float32",
    }
    apply_diff(plain.diff, plain.target, tmp_path / "graft", **options)
    model = load_graft(plain.diff, plain.target, **options).model
    assert_equal_models(
        model, AutoModelForCausalLM.from_pretrained(tmp_path / "graft", dtype="auto").eval()
    )
    assert model.dtype == torch.float32


def test_an_overflow_is_refused_as_apply_refuses_it(plain: Family, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(plain.target, target)
    families.edit_tensors(target, lm_head__weight=torch.full((50, 16), 3e38).bfloat16())
    how: dict[str, Any] = {"alpha": 1e40, "allow_unrelated": True}
    kind, _ = refusal_of(lambda: apply_diff(plain.diff, target, tmp_path / "x", **how))
    found = refusal_of(lambda: load_graft(plain.diff, target, include=["lm_head"], **how))
    assert found[0] is kind is NonFiniteError
    assert "lm_head.weight" in found[1]
    model = load_graft(plain.diff, target, include=["lm_head"], allow_nonfinite=True, **how).model
    assert not bool(torch.isfinite(model.lm_head.weight).all())


def test_warnings_of_apply_are_warnings(trained: Path) -> None:
    with pytest.warns(UserWarning, match="the base itself"):
        load_graft(trained, FAMILY / "base")


def test_threads_change_nothing(plain: Family) -> None:
    with (
        graft_source(plain.diff, plain.target, threads=1) as one,
        graft_source(plain.diff, plain.target, threads=7) as many,
    ):
        assert all(same_bits(one.tensor(name), many.tensor(name)) for name in one.names())


def test_an_input_that_changes_is_refused(plain: Family, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(plain.target, target)
    with graft_source(plain.diff, target) as source:
        os.utime(target / "model.safetensors", ns=(1, 1))
        with pytest.raises(InputChangedError):
            load(source)


def test_a_source_that_is_not_closed_leaves_nothing(plain: Family, home: Path) -> None:
    source = graft_source(plain.diff, plain.target, home=home)
    folder = source.folder
    assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json"}
    assert not list(folder.rglob("*.safetensors"))
    del source
    gc.collect()
    assert not folder.exists()


def test_what_a_killed_process_left_is_removed_by_the_next(plain: Family, home: Path) -> None:
    code = f"""
from pathlib import Path
from diffxfer.models.graft import graft_source
source = graft_source({str(plain.diff)!r}, {str(plain.target)!r}, home=Path({str(home)!r}))
print(source.folder, flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        left = Path(child.stdout.readline().strip())
        child.kill()
    assert left.is_dir()
    with graft_source(plain.diff, plain.target, home=home):
        assert not left.exists()
