"""Adapters that are refused: one line that names the file or tensor, and a remedy that works."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.diffs.adapters.variants import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
MERGE = "merge it with PEFT, and give the result: AutoPeftModelForCausalLM.from_pretrained("
AGAIN = "save the adapter again"


def transfer(family: Path) -> tiny.Outcome:
    roles = [family / role for role in ("adapter", "base", "target")]
    return tiny.run("transfer", *roles, "-o", family / "out")


def refused(family: Path, *words: str) -> None:
    """The transfer ends in one line that has these words, and leaves nothing."""
    done = transfer(family)
    assert done.status == 1
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("error: ")
    for word in words:
        assert word in done.err, done.err
    assert not [path for path in family.iterdir() if "out" in path.name]


def edit(family: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the adapter's tensors."""
    path = family / "adapter" / FILE
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def set_config(family: Path, **changed: Any) -> None:
    tiny.edit_json(family / "adapter" / CONFIG, lambda config: config.update(changed))


def save_other(family: Path, config: Any) -> None:
    """Write an adapter of another kind with PEFT."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(family / "base", torch.float32), config)
        model.save_pretrained(family / "adapter")


class TestOtherTuners:
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("IA3", {"target_modules": ["q_proj"], "feedforward_modules": []}),
            ("LoHa", {"target_modules": ["q_proj"]}),
            ("LoKr", {"target_modules": ["q_proj"]}),
            ("OFT", {"target_modules": ["q_proj"], "oft_block_size": 4}),
            ("BOFT", {"target_modules": ["q_proj"], "boft_block_size": 4}),
            ("Vera", {"target_modules": ["q_proj"], "r": 2}),
            ("AdaLora", {"target_modules": ["q_proj"], "total_step": 9, "init_r": 4}),
            ("TrainableTokens", {"token_indices": [1, 2]}),
        ],
    )
    def test_the_type_is_named_and_can_be_merged(
        self, plain: Path, kind: str, options: dict[str, Any]
    ) -> None:
        import peft

        save_other(plain, getattr(peft, f"{kind}Config")(**options))
        stated = json.loads((plain / "adapter" / CONFIG).read_text())["peft_type"]
        assert stated != "LORA"
        refused(plain, f"{plain / 'adapter'}: is a PEFT adapter of type {stated}, ", MERGE)

    def test_prompts_have_no_difference(self, plain: Path) -> None:
        from peft import PromptTuningConfig

        save_other(plain, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        refused(plain, "of type PROMPT_TUNING", "train a plain LoRA instead")

    @pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
    def test_initialisations_that_change_base(self, plain: Path, start: str) -> None:
        from peft import LoraConfig

        save_other(plain, LoraConfig(target_modules=["q_proj"], init_lora_weights=start))
        refused(plain, f"was initialised with {start}, which changed base's weights too", MERGE)

    @pytest.mark.parametrize(
        ("word", "options"),
        [
            ("layer_replication", {"layer_replication": [[0, 2], [1, 2]]}),
            ("aLoRA", {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [1, 2]}),
        ],
    )
    def test_variants_without_a_difference(
        self, plain: Path, word: str, options: dict[str, Any]
    ) -> None:
        from peft import LoraConfig

        save_other(plain, LoraConfig(target_modules=["q_proj"], **options))
        refused(plain, word, "train a plain LoRA instead")

    def test_kasa(self, plain: Path) -> None:
        from peft import KasaConfig, LoraConfig

        save_other(plain, LoraConfig(target_modules=["q_proj"], kasa_config=KasaConfig()))
        refused(plain, "KaSA", MERGE)

    def test_the_remedy_works(self, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from peft import AutoPeftModelForCausalLM, IA3Config

        save_other(
            plain,
            IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
        )
        tiny.edit_json(
            plain / "adapter" / CONFIG,
            lambda config: config.update(base_model_name_or_path=str(plain / "base")),
        )
        found = re.search(r"(AutoPeft.*)\n", transfer(plain).err)
        assert found
        monkeypatch.chdir(plain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            eval(found[1], {"AutoPeftModelForCausalLM": AutoPeftModelForCausalLM})
        roles = [plain / role for role in ("merged", "base", "target")]
        assert tiny.run("transfer", *roles, "-o", plain / "out").status == 0


class TestFactors:
    def test_one_that_names_no_tensor_of_base(self, plain: Path) -> None:
        edit(
            plain,
            lambda t: [
                t.__setitem__(n.replace("q_proj", "z_proj"), t.pop(n)) for n in list(t) if Q in n
            ],
        )
        refused(
            plain,
            f"{plain / 'adapter' / FILE}: '{Q.replace('q_proj', 'z_proj')}.lora_A.weight' changes"
            " model.layers.0.self_attn.z_proj, and base has no such tensor",
            "give the base of this adapter; or merge it with PEFT",
        )

    def test_the_base_that_it_was_made_for_is_named(self, plain: Path) -> None:
        set_config(plain, base_model_name_or_path="org/another")
        edit(plain, lambda t: t.update({A: torch.ones(4, 17)}))
        refused(
            plain,
            f"'{A}' (4, 17) and (16, 4) make no (16, 16), the shape of"
            " model.layers.0.self_attn.q_proj.weight in base",
            "give the base of this adapter, which was made for org/another",
        )

    @pytest.mark.parametrize(("gone", "left"), [(A, B), (B, A)])
    def test_a_missing_half(self, plain: Path, gone: str, left: str) -> None:
        edit(plain, lambda t: t.pop(gone))
        refused(plain, f"'{left}' has no {gone.split('.')[-2]} beside it", AGAIN)

    def test_halves_of_different_ranks(self, plain: Path) -> None:
        edit(plain, lambda t: t.update({B: torch.ones(16, 3)}))
        refused(plain, f"'{B}' has the shape (16, 3), expected (out, 4)", AGAIN)

    def test_another_rank_than_the_config_says(self, plain: Path) -> None:
        edit(plain, lambda t: t.update({A: torch.ones(3, 16), B: torch.ones(16, 3)}))
        refused(plain, f"'{A}' has rank 3, and adapter_config.json says 4", AGAIN)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("name", [A, B])
    def test_nan(self, plain: Path, value: float, name: str) -> None:
        edit(plain, lambda t: t[name].__setitem__((1, 1), value))
        word = "NaN" if math.isnan(value) else "infinity"
        where = f"model.layers.0.self_attn.q_proj.weight: {word} in the adapter at ["
        refused(plain, where, str(plain / "adapter" / FILE), "--allow-nonfinite")

    @pytest.mark.parametrize("shape", [(0,), (4, 0)])
    def test_empty_ones_of_zero_3(self, plain: Path, shape: tuple[int, ...]) -> None:
        edit(plain, lambda t: t.update({A: torch.ones(shape)}))
        refused(plain, f"'{A}' has the shape {shape}", "gather", "ZeRO-3")

    def test_a_flat_one(self, plain: Path) -> None:
        edit(plain, lambda t: t.update({A: torch.ones(64)}))
        refused(plain, f"'{A}' has the shape (64,)", "gather", "ZeRO-3")

    def test_integers(self, plain: Path) -> None:
        edit(plain, lambda t: t.update({A: torch.ones(4, 16, dtype=torch.int8)}))
        refused(plain, f"'{A}' is I8, expected floats", AGAIN)

    def test_no_tensor(self, plain: Path) -> None:
        edit(plain, lambda t: t.clear())
        refused(plain, FILE, "has no tensors")

    def test_a_tensor_of_another_tuner(self, plain: Path) -> None:
        edit(plain, lambda t: t.update({f"{Q}.ia3_l": torch.ones(16, 1)}))
        refused(plain, f"'{Q}.ia3_l'", "no tensor of LoRA", MERGE)

    def test_a_bias_that_base_has_not(self, plain: Path) -> None:
        name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.bias"
        edit(plain, lambda t: t.update({name: torch.ones(16)}))
        refused(plain, f"'{name}' changes model.layers.0.mlp.down_proj.bias, and base has no such")


class TestDora:
    def test_a_missing_magnitude(self, plain: Path) -> None:
        set_config(plain, use_dora=True)
        refused(plain, "has no lora_magnitude_vector beside it", "use_dora: true", AGAIN)

    def test_a_magnitude_that_the_config_denies(self, plain: Path) -> None:
        edit(plain, lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(16)}))
        refused(plain, f"'{A}' has a magnitude", "use_dora: false", AGAIN)

    def test_a_magnitude_without_factors(self, plain: Path) -> None:
        name = f"{Q.replace('q_proj', 'k_proj')}.lora_magnitude_vector"
        edit(plain, lambda t: t.update({name: torch.ones(16)}))
        refused(plain, "k_proj' has a magnitude without factors", AGAIN)

    def test_a_magnitude_of_another_size(self, plain: Path, made) -> None:
        shutil.copytree(made("DoRA"), plain / "dora")
        name = f"{Q}.lora_magnitude_vector"
        edit(plain / "dora", lambda t: t.update({name: torch.ones(15)}))
        refused(plain / "dora", f"'{name}' has the shape (15,), expected (16,)", AGAIN)

    def test_a_row_of_zeros_has_no_direction(self, plain: Path, made) -> None:
        """PEFT's merge gives NaN there too."""
        shutil.copytree(made("DoRA"), plain / "dora")
        edit(plain / "dora", lambda t: t.update({A: torch.zeros(4, 16)}))
        path = plain / "dora" / "base" / tiny.SHARD
        base = load_file(path)
        base["model.layers.0.self_attn.q_proj.weight"][3] = 0
        save_file(base, path, {"format": "pt"})
        refused(plain / "dora", "q_proj.weight: NaN in the adapter at [3, 0]")


class TestConfig:
    def test_none(self, plain: Path) -> None:
        (plain / "adapter" / CONFIG).unlink()
        refused(plain, f"has {FILE} without {CONFIG}", "download it again")

    def test_no_weights(self, plain: Path) -> None:
        (plain / "adapter" / FILE).unlink()
        refused(plain, f"has no {FILE}", "download it again")

    def test_a_pickle_only(self, plain: Path) -> None:
        (plain / "adapter" / FILE).rename(plain / "adapter" / "adapter_model.bin")
        refused(plain, "pickled weights only (adapter_model.bin)", "if you trust it, merge it")

    @pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"peft_type": "LORA"'])
    def test_no_object(self, plain: Path, text: str) -> None:
        (plain / "adapter" / CONFIG).write_text(text)
        refused(plain, str(plain / "adapter" / CONFIG))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("r", 0),
            ("r", -4),
            ("r", "4"),
            ("r", True),
            ("r", 4.0),
            ("r", None),
            ("lora_alpha", "16"),
            ("lora_alpha", None),
            ("lora_alpha", [1]),
            ("use_rslora", "no"),
            ("fan_in_fan_out", 1),
            ("rank_pattern", ["q_proj"]),
            ("rank_pattern", {"q_proj": "2"}),
            ("alpha_pattern", {"q_proj": None}),
            ("target_parameters", "experts"),
            ("target_parameters", [1]),
            ("trainable_token_indices", 3),
            ("trainable_token_indices", [1, "2"]),
            ("trainable_token_indices", {"embed_tokens": 3}),
            ("trainable_token_indices", [-1]),
            ("modules_to_save", "lm_head"),
            ("base_model_name_or_path", 7),
        ],
    )
    def test_a_value_of_the_wrong_kind(self, plain: Path, key: str, value: Any) -> None:
        set_config(plain, **{key: value})
        told = "a token id" if value in ([1, "2"], [-1]) else key
        refused(plain, f"{plain / 'adapter' / CONFIG}: is no LoRA config: {told} ", AGAIN)

    def test_infinity(self, plain: Path) -> None:
        path = plain / "adapter" / CONFIG
        path.write_text(path.read_text().replace('"lora_alpha": 6', '"lora_alpha": 1e999'))
        refused(plain, CONFIG, "lora_alpha is Infinity, expected a number")

    @pytest.mark.parametrize(
        ("key", "value"), [("modules_to_save", ["lm_head"]), ("trainable_token_indices", [1])]
    )
    def test_tensors_that_it_names_are_missing(self, plain: Path, key: str, value: Any) -> None:
        set_config(plain, **{key: value})
        refused(plain, f"has no tensor of {key}, which {CONFIG} names", AGAIN)


class TestTokenRows:
    NAME = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"

    @pytest.fixture
    def rows(self, made, tmp_path: Path) -> Path:
        shutil.copytree(made("token rows"), tmp_path / "rows")
        return tmp_path / "rows"

    def test_more_ids_than_rows(self, rows: Path) -> None:
        set_config(rows, trainable_token_indices=[7, 3, 11, 12])
        refused(rows, f"'{self.NAME}' has the shape (3, 16), expected (4, 16)", AGAIN)

    def test_an_id_that_base_has_not(self, rows: Path) -> None:
        set_config(rows, trainable_token_indices=[7, 3, 40])
        refused(rows, "has a row for token 40, and model.embed_tokens.weight has 40 rows")

    def test_one_id_twice(self, rows: Path) -> None:
        set_config(rows, trainable_token_indices=[7, 3, 7])
        refused(rows, f"'{self.NAME}' has two rows for one token", AGAIN)


def test_an_adapter_in_another_role_is_refused(plain: Path) -> None:
    adapter, base = plain / "adapter", plain / "base"
    for roles in ((adapter, adapter, base), (adapter, base, adapter)):
        done = tiny.run("transfer", *roles, "-o", plain / "out")
        assert done.status == 1
        assert f"{adapter}: is a LoRA adapter" in done.err
        assert "expected a complete checkpoint" in done.err


class TestStackedExperts:
    def test_of_a_model_that_transformers_does_not_know(self, made, tmp_path: Path) -> None:
        """The names on disk may be others than the adapter's, and nothing says which."""
        family = tmp_path / "family"
        shutil.copytree(made("Mixtral experts"), family)
        for role in ("base", "target"):
            tiny.edit_json(family / role / "config.json", lambda c: c.update(model_type="unheard"))
        refused(
            family,
            "changes model.layers.0.mlp.experts, which base stores under other names",
            "the installed transformers does not say which",
            MERGE,
        )

    def test_of_another_size(self, made, tmp_path: Path) -> None:
        family = tmp_path / "family"
        shutil.copytree(made("Mixtral experts"), family)
        shutil.rmtree(family / "base")
        shutil.copytree(made("square Mixtral experts") / "base", family / "base")
        refused(family, "fits none of model.layers.0.mlp.experts.", "give the base of this adapter")
