"""Adapters of `extract --as lora`: PEFT loads them, and they are the best of their rank."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
)

from diffxfer import extract_diff, transfer, verify
from diffxfer.errors import MatchError, NonFiniteError, OptionError
from tests import tiny
from tests.diffs.lora.models import KINDS, merged_by_peft, save_adapter, save_pair, tensors
from tests.families import fast_tokenizer, llama, save_tokenizer

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
"""PEFT uses what transformers is about to remove."""
RANK = 5
RESTS = ("modules_to_save", "lora", "drop")


def config_of(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())


def names_in(adapter):
    return {
        name.removeprefix("base_model.model.")
        for name in load_file(adapter / "adapter_model.safetensors")
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return {kind: save_pair(root / kind, kind) for kind in KINDS}


class TestPeft:
    @pytest.mark.parametrize("rest", RESTS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_merges_what_we_mean(self, pairs, tmp_path, kind, rest):
        finetuned, base = pairs[kind]
        report = extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=RANK, rest=rest)
        merged = merged_by_peft(tmp_path / "a", base, kind)
        ours, theirs = tensors(finetuned), tensors(base)
        for name, entry in report.factors.items():
            delta = ours[name] - theirs[name]
            error, size = float((merged[name] - ours[name]).norm()), float(delta.norm())
            if entry.rank:
                values = torch.linalg.svdvals(delta)
                least = float(values[RANK:].square().sum().sqrt())
                # float32 factors, and nothing else, keep it from the best.
                assert error == pytest.approx(least, abs=1e-6 * size)
                kept = 1 - (least / size) ** 2
                assert entry.kept == pytest.approx(kept, abs=1e-5)
            elif entry.form == "dropped":
                assert torch.equal(merged[name], theirs[name])
            else:
                assert torch.equal(merged[name], ours[name])
            assert entry.delta_norm == pytest.approx(size, rel=1e-6)

    @pytest.mark.parametrize("rest", RESTS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_merges_as_our_graft_does(self, pairs, tmp_path, kind, rest):
        finetuned, base = pairs[kind]
        extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=RANK, rest=rest)
        merged = merged_by_peft(tmp_path / "a", base, kind)
        transfer(tmp_path / "a", base, base, tmp_path / "graft", out_dtype="float64")
        for name, tensor in tensors(tmp_path / "graft").items():
            assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-15), name

    def test_transformers_loads_it_too(self, pairs, tmp_path):
        finetuned, base = pairs["tied"]
        extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=RANK)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
        state = model.state_dict()
        assert any("lora_A" in name for name in state)
        assert torch.equal(state["model.embed_tokens.weight"].double(), state_of(finetuned))

    @pytest.mark.parametrize("kind", ["untied", "tied"])
    def test_added_tokens_come_whole(self, tmp_path, kind):
        finetuned, base = save_pair(tmp_path, kind, rows=53)
        save_tokenizer(base, fast_tokenizer(words=[f"w{i}" for i in range(50)]))
        save_tokenizer(finetuned, fast_tokenizer(words=[f"w{i}" for i in range(53)]))
        for rest in ("modules_to_save", "lora"):
            out = tmp_path / rest
            report = extract_diff(finetuned, base, out, as_="lora", rank=RANK, rest=rest)
            assert any("resize_token_embeddings(53)" in note for note in report.notes)
            merged = merged_by_peft(out, base, kind, rows=53)
            assert torch.equal(merged["model.embed_tokens.weight"], state_of(finetuned))
            assert (out / "tokenizer.json").read_bytes() == (
                finetuned / "tokenizer.json"
            ).read_bytes()

    def test_padding_that_finetuned_lacks_is_that_of_base(self, tmp_path):
        finetuned, base = save_pair(tmp_path, "untied", rows=48)
        for folder in (finetuned, base):
            save_tokenizer(folder, fast_tokenizer(words=[f"w{i}" for i in range(48)]))
        extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=RANK)
        merged = merged_by_peft(tmp_path / "a", base, "untied")["model.embed_tokens.weight"]
        assert torch.equal(merged[:48], state_of(finetuned))
        assert torch.equal(merged[48:], state_of(base)[48:])

    def test_the_table_says_what_is_left_out(self, tmp_path):
        finetuned, base = save_pair(tmp_path, "untied")
        argv = ("extract", finetuned, base, "-o", tmp_path / "a", "--as", "lora", "--rank", "4")
        done = tiny.run(*argv, "--rest", "drop", summary=True)
        row = next(line for line in done.out.splitlines() if line.startswith("model.norm"))
        assert row.split()[1:5] == ["0.00%", "left", "out", "0"]
        done = tiny.run(*argv, "--overwrite", summary=True)
        row = next(line for line in done.out.splitlines() if line.startswith("model.norm"))
        assert row.split()[1:3] == ["100.00%", "whole"]

    def test_added_tokens_are_those_of_finetuned(self, tmp_path):
        finetuned, base = save_pair(tmp_path, "untied", rows=52)
        words = [f"w{i}" for i in range(50)]
        save_tokenizer(base, fast_tokenizer(words=words))
        save_tokenizer(finetuned, fast_tokenizer(words=[*words, "new1", "new2"]))
        done = tiny.run("extract", finetuned, base, "-o", tmp_path / "d", summary=True)
        assert "tokens added by finetuned: new1, new2" in done.err

    def test_modules_without_factors_are_no_targets(self, tmp_path):
        finetuned, base = save_pair(
            tmp_path, "untied", lambda name: "layers.1" in name or "q_proj.weight" in name
        )
        extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=RANK, rest="drop")
        config = config_of(tmp_path / "a")
        assert "q_proj" in config["target_modules"]
        assert "model.layers.1.self_attn.k_proj" in config["target_modules"]
        assert "k_proj" not in config["target_modules"]
        merged = merged_by_peft(tmp_path / "a", base, "untied")
        theirs = tensors(base)["model.layers.0.mlp.up_proj.weight"]
        assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], theirs)

    def test_ranks_may_differ(self, pairs, tmp_path):
        finetuned, base = pairs["untied"]
        report = extract_diff(finetuned, base, tmp_path / "a", as_="lora", energy=0.8, max_rank=12)
        ranks = {entry.rank for entry in report.factors.values()} - {0}
        config = config_of(tmp_path / "a")
        assert len(ranks) > 1
        assert config["r"] == config["lora_alpha"] == max(ranks)
        assert config["rank_pattern"] == config["alpha_pattern"] != {}
        factors = [entry for entry in report.factors.values() if entry.rank]
        assert all(entry.kept >= 0.8 for entry in factors)
        merged = merged_by_peft(tmp_path / "a", base, "untied")
        for name, entry in report.factors.items():
            error = float((merged[name] - tensors(finetuned)[name]).norm())
            assert error**2 == pytest.approx(
                (1 - entry.kept) * entry.delta_norm**2, abs=1e-6 * entry.delta_norm**2
            )

    def test_a_checkpoint_of_the_bare_model_is_named_as_the_model_with_a_head(self, tmp_path):
        finetuned, base = save_pair(tmp_path, "gpt2")
        expected = tensors(finetuned)
        for folder in (finetuned, base):
            stored = load_file(folder / "model.safetensors")
            bare = {name.removeprefix("transformer."): t for name, t in stored.items()}
            save_file(bare, folder / "model.safetensors", {"format": "pt"})
        extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=16)
        assert "transformer.h.0.attn.c_attn.lora_A.weight" in names_in(tmp_path / "a")
        merged = merged_by_peft(tmp_path / "a", base, "gpt2")
        for name, tensor in expected.items():
            assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-6), name

    @pytest.mark.parametrize("rest", ["modules_to_save", "lora"])
    def test_a_head_of_its_own_over_a_tied_base(self, pairs, tmp_path, rest):
        base = pairs["tied"][1]
        model = LlamaForCausalLM(llama(tie_word_embeddings=False))
        state = {name: tensor.float() for name, tensor in tensors(base).items()}
        model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"] * 2})
        model.save_pretrained(tmp_path / "finetuned")
        extract_diff(tmp_path / "finetuned", base, tmp_path / "a", as_="lora", rest=rest)
        merged = merged_by_peft(tmp_path / "a", base, "tied")
        for name, tensor in tensors(tmp_path / "finetuned").items():
            assert torch.equal(merged[name], tensor), name

    def test_a_fine_tune_may_be_an_adapter_itself(self, tmp_path):
        adapter, _ = save_adapter(tmp_path)
        base = tmp_path / "base"
        report = extract_diff(adapter, base, tmp_path / "a", as_="lora", rank=8)
        assert {entry.rank for entry in report.factors.values()} == {4}, "no more than it has"
        for name, tensor in merged_by_peft(tmp_path / "a", base, "untied").items():
            expected = merged_by_peft(adapter, base, "untied")[name]
            assert torch.allclose(tensor, expected, rtol=0, atol=1e-6), name


def state_of(folder):
    return tensors(folder)["model.embed_tokens.weight"]


class TestFolder:
    def test_is_whole_and_verifies(self, pairs, tmp_path):
        extract_diff(*pairs["untied"], tmp_path / "a", as_="lora", rank=RANK)
        assert {path.name for path in (tmp_path / "a").iterdir()} == {
            *("adapter_config.json", "adapter_model.safetensors", "diffxfer.json"),
            *("generation_config.json", "README.md"),
        }
        assert verify(tmp_path / "a").kind == "adapter"
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_does_not_depend_on_threads(self, pairs, tmp_path):
        for threads in (1, 3):
            out = tmp_path / str(threads) / "a"
            extract_diff(*pairs["gpt2"], out, as_="lora", rank=RANK, threads=threads)
        for path in (tmp_path / "1" / "a").iterdir():
            assert path.read_bytes() == (tmp_path / "3" / "a" / path.name).read_bytes(), path.name

    def test_manifest_and_card_say_what_is_kept(self, pairs, tmp_path):
        report = extract_diff(*pairs["untied"], tmp_path / "a", as_="lora", rank=RANK)
        manifest = json.loads((tmp_path / "a" / "diffxfer.json").read_text())
        name = "model.layers.0.mlp.up_proj.weight"
        assert manifest["kind"] == "adapter"
        assert manifest["factors"][name] == report.factors[name].model_dump()
        assert manifest["factors"][name]["bytes"] == 4 * RANK * sum(
            tensors(pairs["untied"][1])[name].shape
        )
        card = (tmp_path / "a" / "README.md").read_text()
        assert "library_name: peft" in card
        assert f"| model.layers.0 | {report.layers[2].kept:.2%} |" in card

    def test_dtype_is_finetuneds_unless_asked(self, pairs, tmp_path):
        for dtype, expected in (("source", torch.float32), ("bfloat16", torch.bfloat16)):
            extract_diff(*pairs["tied"], tmp_path / dtype, as_="lora", diff_dtype=dtype)
            stored = load_file(tmp_path / dtype / "adapter_model.safetensors")
            assert {tensor.dtype for tensor in stored.values()} == {expected}

    def test_a_dry_run_writes_nothing(self, pairs, tmp_path):
        report = extract_diff(*pairs["tied"], tmp_path / "a", as_="lora", rank=3, dry_run=True)
        assert not list(tmp_path.iterdir())
        extract_diff(*pairs["tied"], tmp_path / "a", as_="lora", rank=3)
        size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
        assert report.bytes_to_write == size


class TestCommand:
    def test_prints_a_row_for_each_layer(self, pairs, tmp_path):
        argv = ("extract", *pairs["untied"], "-o", tmp_path / "a", "--as", "lora", "--rank", "5")
        done = tiny.run(*argv, summary=True)
        assert done.status == 0
        rows = [line.split()[0] for line in done.out.splitlines()[1:]]
        assert rows == [
            *("lm_head", "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"),
            "all",
        ]
        assert "vLLM" in done.err

    def test_json_has_layers_and_tensors(self, pairs, tmp_path):
        argv = ("extract", *pairs["untied"], "-o", tmp_path / "a", "--as", "lora", "--json")
        found = json.loads(tiny.run(*argv).out)
        assert 0 < found["kept"] <= 1
        assert {layer["layer"] for layer in found["layers"]} >= {"model.layers.0", "lm_head"}
        assert found["factors"]["lm_head.weight"]["form"] == "whole"

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"rank": 3}, "--rank: belongs to an adapter"),
            ({"exact": True}, "--exact: belongs to an adapter"),
            ({"as_": "dora"}, "--as: 'dora' is unknown"),
            ({"as_": "lora", "rank": 0}, "--rank: 0 is no rank"),
            ({"as_": "lora", "rank": 3, "energy": 0.5}, "--rank: contradicts --energy"),
            ({"as_": "lora", "energy": 1.5}, "--energy: 1.5 is no share"),
            ({"as_": "lora", "max_rank": 3}, "--max-rank: needs --energy"),
            ({"as_": "lora", "rest": "some"}, "--rest: 'some' is unknown"),
            ({"as_": "lora", "max_shard_size": "1GB"}, "--max-shard-size: has no effect"),
        ],
    )
    def test_odd_options_are_refused(self, pairs, tmp_path, given, said):
        with pytest.raises(OptionError) as caught:
            extract_diff(*pairs["tied"], tmp_path / "a", **given)
        assert str(caught.value).startswith(said)


class TestRefusal:
    def test_of_an_empty_difference(self, pairs, tmp_path):
        base = pairs["tied"][1]
        copy = shutil.copytree(base, tmp_path / "copy")
        with pytest.raises(MatchError, match="equal in every tensor"):
            extract_diff(copy, base, tmp_path / "a", as_="lora")
        assert not (tmp_path / "a").exists()

    def test_of_an_adapter_that_would_drop_all(self, tmp_path):
        finetuned, base = save_pair(tmp_path, "untied", lambda name: "norm" in name)
        with pytest.raises(MatchError, match="only in tensors that --rest drop leaves out"):
            extract_diff(finetuned, base, tmp_path / "a", as_="lora", rest="drop")

    def test_only_whole_tensors_are_an_adapter_too(self, tmp_path):
        finetuned, base = save_pair(tmp_path, "untied", lambda name: "norm" in name)
        extract_diff(finetuned, base, tmp_path / "a", as_="lora")
        merged = merged_by_peft(tmp_path / "a", base, "untied")
        for name, tensor in tensors(finetuned).items():
            assert torch.equal(merged[name], tensor)

    def test_of_fused_experts_that_changed(self, tmp_path):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "vocab_size": 50}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
        model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_hidden_layers=1))
        model.save_pretrained(tmp_path / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        model.save_pretrained(tmp_path / "finetuned")
        roles = tmp_path / "finetuned", tmp_path / "base"
        with pytest.raises(MatchError, match=r"down_proj .*holds fused experts.*--exclude"):
            extract_diff(*roles, tmp_path / "a", as_="lora")
        extract_diff(*roles, tmp_path / "a", as_="lora", exclude=["experts", "sinks"])
        assert "model.layers.0.mlp.router.weight" in names_in(tmp_path / "a"), "it is no linear"

    def test_of_nan(self, tmp_path):
        folders = [
            tiny.save_model(tmp_path / role, tiny.tensors(role)) for role in ("finetuned", "base")
        ]
        broken = tiny.tensors("finetuned")
        broken[tiny.UP][1, 2] = torch.nan
        shutil.rmtree(folders[0])
        tiny.save_model(folders[0], broken)
        with pytest.raises(NonFiniteError, match=r"NaN or infinite at \[1, 2\]"):
            extract_diff(*folders, tmp_path / "a", as_="lora", allow_unrelated=True)
