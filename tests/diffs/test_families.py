"""Families saved by transformers: every graft is the oracle's, bit for bit, and loads."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
)

from diffxfer import DiffxferError, extract_diff, transfer
from diffxfer.errors import MatchError, VocabularyError
from tests import families, oracle
from tests.families import WORDS, fast_tokenizer, llama, save_model, save_tokenizer
from tests.oracle import Options, Roles, prove

ROLES = ("finetuned", "base", "target")
TEMPLATE = "{% for m in messages %}<|start|>{{ m.content }}<|eot|>{% endfor %}"


def save_roles(folder, config, **by_role):
    """Three models, each with its own weights."""
    common = {role: {} for role in ROLES} | by_role
    return [
        save_model(folder / role, **({"config": config, "seed": seed} | common[role]))
        for seed, role in enumerate(ROLES, 1)
    ]


def shards(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def add_tokenizers(folders, *specials, **common):
    """A tokenizer a role; each of the same words and its own special tokens."""
    for folder, special in zip(folders, specials, strict=True):
        save_tokenizer(folder, fast_tokenizer(special), **common)


def token_roles(folders, **modes):
    return Roles(*map(oracle.tokens_of, folders), **modes)


CONTROL = ("<|start|>", "<|eot|>")


class TestShards:
    def test_cut_differently_in_each_role(self, tmp_path):
        roles = save_roles(
            tmp_path,
            llama(),
            finetuned={"max_shard_size": "3KB"},
            target={"max_shard_size": "5KB"},
        )
        graft = prove(tmp_path / "out", *roles)
        assert len(shards(roles[0])) > len(shards(roles[2])) > len(shards(roles[1])) == 1
        assert shards(graft) == shards(roles[2])
        assert shards(tmp_path / "out" / "diff-source") == [
            "base_samples.safetensors",
            *shards(roles[0]),
        ]
        index = "model.safetensors.index.json"
        assert (graft / index).read_bytes() == (roles[2] / index).read_bytes()
        families.load_whole(graft)

    def test_index_of_a_tied_model(self, tmp_path):
        config = llama(tie_word_embeddings=True)
        roles = save_roles(tmp_path, config, target={"max_shard_size": "4KB"})
        transfer(*roles, tmp_path / "graft")
        index = "model.safetensors.index.json"
        assert (tmp_path / "graft" / index).read_bytes() == (roles[2] / index).read_bytes()

    def test_shards_are_those_of_save_file(self, tmp_path):
        roles = save_roles(tmp_path, llama(), target={"max_shard_size": "5KB"})
        graft = prove(tmp_path / "out", *roles)
        for folder in (graft, tmp_path / "out" / "diff-float32"):
            for shard in folder.glob("*.safetensors"):
                save_file(load_file(shard), tmp_path / "again", {"format": "pt"})
                assert shard.read_bytes() == (tmp_path / "again").read_bytes()

    def test_max_shard_size(self, tmp_path):
        roles = save_roles(tmp_path, llama())
        transfer(*roles, tmp_path / "graft", max_shard_size="3KB")
        expected = oracle.transfer(*map(oracle.load, roles))
        oracle.assert_same(oracle.load(tmp_path / "graft"), expected)
        names = shards(tmp_path / "graft")
        assert names == [
            f"model-{number:05d}-of-{len(names):05d}.safetensors"
            for number in range(1, len(names) + 1)
        ]
        for name in names:
            tensors = load_file(tmp_path / "graft" / name)
            size = sum(tensor.nbytes for tensor in tensors.values())
            assert len(tensors) == 1 or size <= 3000
        index = json.loads((tmp_path / "graft" / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {
            "total_parameters": sum(tensor.numel() for tensor in expected.values()),
            "total_size": sum(tensor.nbytes for tensor in expected.values()),
        }
        assert list(index["weight_map"]) == sorted(expected)
        families.load_whole(tmp_path / "graft")
        extract_diff(*roles[:2], tmp_path / "diff", max_shard_size="3KB")
        assert len(shards(tmp_path / "diff")) == len(names) + 1


class TestDtypes:
    @pytest.mark.parametrize(
        ("finetuned", "base", "target", "out"),
        [
            (torch.float32, torch.bfloat16, torch.float16, None),
            (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16),
            (torch.float16, torch.float64, torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float64),
        ],
    )
    def test_roles_and_output_differ(self, tmp_path, finetuned, base, target, out):
        dtypes = {"finetuned": finetuned, "base": base, "target": target}
        roles = save_roles(tmp_path, llama(), **{r: {"dtype": d} for r, d in dtypes.items()})
        graft = prove(tmp_path / "out", *roles, Options(alpha=0.75, out_dtype=out))
        model = families.load_whole(graft)
        assert model.dtype == AutoConfig.from_pretrained(graft).dtype == (out or target)

    @pytest.mark.parametrize("alpha", [1.0, 0.0, 0.5, -1.0, 0.1, 3])
    def test_alpha(self, tmp_path, alpha):
        roles = save_roles(tmp_path, llama(num_hidden_layers=1))
        graft = prove(tmp_path / "out", *roles, Options(alpha=alpha))
        if alpha == 0:
            oracle.assert_same(oracle.load(graft), oracle.load(roles[2]))


TIES = ("tied", "copy", "own")
"""No head on disk; a head that equals the embedding; a head of its own."""


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ties")
    for seed, (role, state) in enumerate(itertools.product(ROLES, TIES)):
        config = llama(tie_word_embeddings=state != "own", num_hidden_layers=1)
        path = save_model(folder / role / state, config, seed)
        if state == "copy":
            embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
            families.edit_tensors(path, lm_head__weight=embedding.clone())
    return folder


class TestTies:
    @pytest.mark.parametrize(
        ("finetuned", "base", "target"), list(itertools.product(TIES, TIES, TIES))
    )
    def test_every_combination(self, tied, tmp_path, finetuned, base, target):
        states = {"finetuned": finetuned, "base": base, "target": target}
        roles = [tied / role / state for role, state in states.items()]
        if target != "own" and "own" in (finetuned, base):
            with pytest.raises(oracle.RefusedError):
                oracle.transfer(*map(oracle.load, roles))
            role = "finetuned" if finetuned == "own" else "base"
            with pytest.raises(MatchError, match=f"differs from the embedding in {role}"):
                transfer(*roles, tmp_path / "out")
            return
        graft = prove(tmp_path, *roles)
        tensors = oracle.load(graft)
        assert ("lm_head.weight" in tensors) == (target != "tied")
        if target == "copy":
            assert oracle.same(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
        families.load_whole(graft)

    @pytest.mark.parametrize("target", ["tied", "copy"])
    def test_the_advice_of_the_refusal_works(self, tied, tmp_path, target):
        roles = [tied / "finetuned" / "own", tied / "base" / "own", tied / "target" / target]
        with pytest.raises(MatchError, match="give --exclude 'lm_head'"):
            transfer(*roles, tmp_path / "graft")
        graft = prove(tmp_path / "out", *roles, Options(exclude=("lm_head",)))
        expected = oracle.load(tied / "target" / target).keys()
        assert oracle.load(graft).keys() == expected

    def test_the_advice_of_the_refusal_works_at_extract(self, tied, tmp_path):
        roles = [tied / "finetuned" / "own", tied / "base" / "own", tied / "target" / "tied"]
        transfer(*roles, tmp_path / "graft", exclude=("lm_head",))
        extract_diff(*roles[:2], tmp_path / "diff", exclude=("lm_head",), diff_dtype="float64")
        from diffxfer import apply_diff

        apply_diff(tmp_path / "diff", roles[2], tmp_path / "applied")
        oracle.assert_same(oracle.load(tmp_path / "applied"), oracle.load(tmp_path / "graft"))

    @pytest.mark.parametrize("exclude", ["lm_head", "embed_tokens"])
    @pytest.mark.parametrize("state", ["tied", "copy"])
    def test_half_of_what_a_tied_finetuned_gives_to_an_untied_target(
        self, tied, tmp_path, state, exclude
    ):
        roles = [tied / "finetuned" / state, tied / "base" / state, tied / "target" / "own"]
        graft = prove(tmp_path, *roles, Options(exclude=(exclude,)))
        old, new = oracle.load(roles[2]), oracle.load(graft)
        changed = {name for name in old if not oracle.same(old[name], new[name])}
        both = {"lm_head.weight", "model.embed_tokens.weight"}
        assert len(both & changed) == 1
        assert not any(exclude in name for name in changed)

    def test_head_and_embedding_have_their_own_alpha_where_the_target_is_untied(
        self, tied, tmp_path
    ):
        roles = [tied / "finetuned" / "tied", tied / "base" / "tied", tied / "target" / "own"]
        prove(tmp_path, *roles, Options(alpha_for={"lm_head": 0.5, "embed": 0}))

    @pytest.mark.parametrize(
        "options",
        [{"alpha_for": {"lm_head": 0.5}}, {"exclude": ("lm_head",)}, {"include": ("embed",)}],
    )
    def test_a_head_that_the_target_ties_follows_its_embedding(self, tied, tmp_path, options):
        roles = [tied / role / "copy" for role in ROLES]
        report = transfer(*roles, tmp_path / "out", **options)
        assert report.warnings == (
            "lm_head.weight is tied to model.embed_tokens.weight in the target and stays tied:"
            " --include, --exclude and --alpha-for have no effect on it",
        )
        tensors = oracle.load(tmp_path / "out")
        assert oracle.same(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])

    def test_head_of_base_alone_lies_in_finetuned_last_shard(self, tied, tmp_path):
        config = llama(tie_word_embeddings=True, num_hidden_layers=1)
        finetuned = save_model(tmp_path / "ours", config, 7, max_shard_size="2KB")
        prove(tmp_path / "out", finetuned, tied / "base" / "own", tied / "target" / "own")
        last = sorted((tmp_path / "out" / "diff-source").glob("model-*.safetensors"))[-1]
        assert "lm_head.weight" in load_file(last)

    def test_heads_under_other_prefixes(self, tied, tmp_path):
        roles = []
        for role, state, prefix in (
            ("finetuned", "own", "language_model."),
            ("base", "tied", ""),
            ("target", "own", ""),
        ):
            shutil.copytree(tied / role / state, tmp_path / role)
            families.rename_tensors(tmp_path / role, {"": prefix})
            roles.append(tmp_path / role)
        graft = prove(tmp_path / "out", *roles, Options(out_dtype=torch.float32))
        families.load_whole(graft)
        shutil.rmtree(roles[2])
        shutil.copytree(tied / "target" / "tied", roles[2])
        with pytest.raises(MatchError, match="--exclude 'lm_head'"):
            transfer(*roles, tmp_path / "other")
        prove(tmp_path / "third", *roles, Options(exclude=("lm_head",)))

    def test_no_head_at_all_is_missing_where_the_target_has_one(self, tied, tmp_path):
        """Bare models of an untied kind: their embedding is no head."""
        config = llama(num_hidden_layers=1)
        bare = [
            save_model(tmp_path / role, config, seed, model_class=AutoModel)
            for seed, role in enumerate(ROLES[:2])
        ]
        target = tied / "target" / "own"
        with pytest.raises(MatchError, match=r"lm_head.weight .* is in target only"):
            transfer(*bare, target, tmp_path / "out")
        transfer(*bare, target, tmp_path / "out", allow_missing=["lm_head"])
        old, new = oracle.load(target), oracle.load(tmp_path / "out")
        assert oracle.same(old["lm_head.weight"], new["lm_head.weight"])

    def test_alpha_for_a_head_that_is_no_tensor_is_refused(self, tied, tmp_path):
        roles = [tied / role / "tied" for role in ROLES]
        with pytest.raises(DiffxferError, match=r"--alpha-for: 'lm_head' matches none of the"):
            transfer(*roles, tmp_path / "out", alpha_for={"lm_head": 0.5})


class TestGPT:
    """Other names for an embedding: `wte`, tied, and one that no table of names has."""

    def test_gpt2_with_and_without_its_prefix(self, tmp_path):
        sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
        roles = save_roles(tmp_path, config, base={"model_class": AutoModel})
        assert "wte.weight" in oracle.load(roles[1])
        assert "transformer.wte.weight" in oracle.load(roles[2])
        families.load_whole(prove(tmp_path / "out", *roles))

    def test_neox_with_an_added_token(self, tmp_path):
        """Its embeddings are known by the vocabulary's size, and so is the config's new size."""
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "bos_token_id": None, "eos_token_id": None}
        configs = [GPTNeoXConfig(**sizes, vocab_size=count) for count in (33, 32, 32)]
        by_role = {r: {"config": c} for r, c in zip(ROLES, configs, strict=True)}
        roles = save_roles(tmp_path, configs[0], **by_role)
        add_tokenizers(roles, (*CONTROL, "<|call|>"), CONTROL, CONTROL)
        names = ("gpt_neox.embed_in.weight", "embed_out.weight", "lm_head.weight")
        graft = prove(tmp_path / "out", *roles, roles=token_roles(roles, vocabulary=names))
        assert AutoConfig.from_pretrained(graft).vocab_size == 33
        families.load_whole(graft)


class TestExperts:
    @pytest.mark.parametrize("make", [families.qwen3_moe, families.mixtral])
    def test_mixture(self, tmp_path, make):
        roles = save_roles(tmp_path, make(), base={"max_shard_size": "9KB"})
        graft = prove(tmp_path / "out", *roles)
        assert sum(".experts." in name for name in oracle.load(graft)) == 2 * 3 * 3
        families.load_whole(graft)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """One kind of model under every prefix: roles by layout."""
    folder = tmp_path_factory.mktemp("gemma")
    config = families.gemma3()
    text = config.text_config
    for seed, role in enumerate(ROLES):
        whole = Gemma3ForConditionalGeneration
        save_model(folder / role / "whole", config, seed, model_class=whole)
        save_model(folder / role / "newer", config, seed, model_class=whole)
        renamed = {
            "language_model.model.": "model.language_model.",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        }
        families.rename_tensors(folder / role / "newer", renamed)
        save_model(folder / role / "text", text, seed, model_class=Gemma3ForCausalLM)
        save_model(folder / role / "bare", text, seed, model_class=AutoModel)
    return folder


class TestPrefixes:
    @pytest.mark.parametrize(
        ("layouts", "missing"),
        [
            (("whole", "newer", "whole"), ()),
            (("whole", "whole", "newer"), ()),
            (("text", "bare", "text"), ()),
            (("bare", "text", "text"), ()),
            (("text", "text", "bare"), ()),
            (("text", "text", "whole"), ("vision_tower", "projector")),
            (("bare", "bare", "newer"), ("vision_tower", "projector")),
            (("whole", "newer", "text"), ("vision_tower", "projector")),
        ],
    )
    def test_layouts(self, gemma, tmp_path, layouts, missing):
        roles = [gemma / role / layout for role, layout in zip(ROLES, layouts, strict=True)]
        if missing:
            with pytest.raises(MatchError, match="--allow-missing"):
                transfer(*roles, tmp_path / "out")
        graft = prove(tmp_path, *roles, Options(allow_missing=missing))
        if layouts[2] == "whole":
            families.load_whole(graft, AutoModelForImageTextToText)
        elif layouts[2] == "text":
            families.load_whole(graft)

    def test_vision_is_copied_by_name(self, gemma, tmp_path):
        roles = [gemma / "finetuned" / "text", gemma / "base" / "text", gemma / "target" / "whole"]
        report = transfer(*roles, tmp_path / "out", allow_missing=("vision_tower", "projector"))
        target = oracle.load(roles[2])
        vision = [name for name in target if not name.startswith("language_model")]
        assert report.tensors == {
            "grafted": len(oracle.load(roles[0])),
            "copied": len(vision),
        }
        copied = [group for group in report.plan if group.kind == "copied"]
        assert {group.why for group in copied} == {"only the target has it"}


class TestAddedTokens:
    @pytest.mark.parametrize(
        ("rows", "grown"),
        [((33, 32, 40), 40), ((64, 32, 32), 33), ((33, 32, 32), 33), ((40, 40, 34), 34)],
    )
    @pytest.mark.parametrize("tied", [False, True])
    def test_padding_rows_come_first(self, tmp_path, rows, grown, tied):
        configs = [llama(vocab_size=count, tie_word_embeddings=tied) for count in rows]
        by_role = {r: {"config": c} for r, c in zip(ROLES, configs, strict=True)}
        roles = save_roles(tmp_path, llama(), **by_role)
        add_tokenizers(roles, (*CONTROL, "<|call|>"), CONTROL, CONTROL)
        graft = prove(tmp_path / "out", *roles, roles=token_roles(roles))
        tensors = oracle.load(graft)
        ours = oracle.load(roles[0])["model.embed_tokens.weight"]
        assert tensors["model.embed_tokens.weight"].shape[0] == grown
        assert oracle.same(tensors["model.embed_tokens.weight"][32], ours[32])
        assert AutoConfig.from_pretrained(graft).vocab_size == grown
        families.load_whole(graft)
        assert families.load_tokenizer(graft)("w3 <|call|>").input_ids == [3, 32]

    def test_row_is_not_scaled(self, tmp_path):
        roles = save_roles(tmp_path, llama())
        add_tokenizers(roles, (*CONTROL, "<|call|>"), CONTROL, CONTROL)
        for alpha in (0.0, -0.5):
            options = Options(alpha=alpha)
            graft = prove(tmp_path / str(alpha), *roles, options, token_roles(roles))
            rows = oracle.load(graft)["lm_head.weight"]
            assert oracle.same(rows[32], oracle.load(roles[0])["lm_head.weight"][32])

    def test_target_has_the_token(self, tmp_path):
        roles = save_roles(tmp_path, llama())
        add_tokenizers(roles, (*CONTROL, "<|call|>"), CONTROL, (*CONTROL, "<|other|>", "<|call|>"))
        graft = prove(tmp_path / "out", *roles, roles=token_roles(roles))
        report = transfer(*roles, tmp_path / "again")
        assert report.added_tokens == ()
        kept = "keep the target's rows: '<|call|>'"
        assert any(kept in line for line in report.warnings)
        old = oracle.load(roles[2])["lm_head.weight"]
        assert oracle.same(oracle.load(graft)["lm_head.weight"][33], old[33])
        assert families.load_tokenizer(graft)("<|call|>").input_ids == [33]

    def test_two_tokens_of_which_the_target_has_one(self, tmp_path):
        roles = save_roles(tmp_path, llama())
        ours = (*CONTROL, "<|call|>", "<|result|>")
        add_tokenizers(roles, ours, CONTROL, (*CONTROL, "<|result|>"))
        graft = prove(tmp_path / "out", *roles, roles=token_roles(roles))
        tokenizer = families.load_tokenizer(graft)
        assert tokenizer("<|call|> <|result|>").input_ids == [33, 32]

    def test_refused_where_the_embedding_is_left_out(self, tmp_path):
        roles = save_roles(tmp_path, llama())
        add_tokenizers(roles, (*CONTROL, "<|call|>"), CONTROL, CONTROL)
        padded = r"would keep a padding row for '<\|call\|>'.*--alpha-for"
        with pytest.raises(VocabularyError, match=padded):
            transfer(*roles, tmp_path / "out", exclude=("embed_tokens",))
        tight = save_model(tmp_path / "tight", llama(vocab_size=32), 3)
        add_tokenizers([tight], CONTROL)
        with pytest.raises(VocabularyError, match=r"has no row for '<\|call\|>'.*--alpha-for"):
            transfer(*roles[:2], tight, tmp_path / "out", exclude=("embed_tokens",))

    @pytest.mark.parametrize("target_rows", [32, 33, 40])
    @pytest.mark.parametrize("known", [False, True])
    def test_base_has_the_token_and_no_row_for_it(self, tmp_path, target_rows, known):
        """Its embedding was never resized to its tokenizer; finetuned's was."""
        counts = dict(zip(ROLES, (33, 32, target_rows), strict=True))
        configs = {r: {"config": llama(vocab_size=count)} for r, count in counts.items()}
        roles = save_roles(tmp_path, llama(), **configs)
        ours = (*CONTROL, "<|call|>")
        add_tokenizers(roles, ours, ours, ours if known else CONTROL)
        tensors = oracle.load(roles[2])
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name][-2:] = -0.0
        save_file(tensors, roles[2] / "model.safetensors", {"format": "pt"})
        pairs = token_roles(roles)
        pairs.base = pairs.base[:32]
        if known and counts["target"] == 32:
            pairs.target = pairs.target[:32]
        graft = prove(tmp_path / "out", *roles, roles=pairs)
        old, new = (oracle.load(folder)["lm_head.weight"] for folder in (roles[2], graft))
        whole = oracle.load(roles[0])["lm_head.weight"][32]
        kept = known and len(old) > 32
        assert oracle.same(new[32], old[32] if kept else whole)
        assert len(new) == max(33, target_rows)
        assert AutoConfig.from_pretrained(graft).vocab_size == len(new)
        families.load_whole(graft)
        assert families.load_tokenizer(graft)("<|call|>").input_ids == [32]

    def test_vocabulary_known_by_its_size(self, tmp_path):
        """A name that no table knows: `vocab_size` says that its rows are tokens, and grows."""
        roles = []
        for seed, (role, count) in enumerate({"finetuned": 33, "base": 32, "target": 32}.items()):
            generator = torch.Generator().manual_seed(seed)
            tensors = {
                "tok_embeddings.weight": torch.randn((count, 8), generator=generator),
                "output.weight": torch.randn((count, 8), generator=generator),
                "layers.0.weight": torch.randn((8, 8), generator=generator),
            }
            config = {"vocab_size": count, "hidden_size": 8}
            roles.append(families.save_tensors(tmp_path / role, tensors, config))
        add_tokenizers(roles, (*CONTROL, "<|call|>"), CONTROL, CONTROL)
        names = ("tok_embeddings.weight", "output.weight")
        pairs = token_roles(roles, vocabulary=names)
        graft = prove(tmp_path / "out", *roles, roles=pairs)
        assert json.loads((graft / "config.json").read_text())["vocab_size"] == 33


class TestLlama:
    """The pair 3.0 → 3.1, scaled down: four reserved tokens changed their names."""

    OLD = ("<|begin|>", "<|end|>", "<|reserved_0|>", "<|reserved_1|>", *CONTROL, "<|reserved_2|>")
    OLD += ("<|reserved_3|>",)
    NEW = ("<|begin|>", "<|end|>", "<|pad_id|>", "<|reserved_1|>", *CONTROL, "<|reserved_0|>")
    NEW += ("<|reserved_3|>",)

    @pytest.fixture
    def roles(self, tmp_path):
        scaled = {
            "rope_theta": 5e5,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        old = llama(bos_token_id=30, eos_token_id=31)
        new = llama(
            bos_token_id=30, eos_token_id=31, max_position_embeddings=512, rope_parameters=scaled
        )
        folders = save_roles(tmp_path, old, target={"config": new})
        special = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
        for folder, tokens, length in zip(
            folders[1:], (self.OLD, self.NEW), (64, 512), strict=True
        ):
            tokenizer = fast_tokenizer(tokens)
            save_tokenizer(folder, tokenizer, **special, model_max_length=length)
        save_tokenizer(
            folders[0],
            fast_tokenizer(self.OLD),
            template=TEMPLATE,
            generation={
                "bos_token_id": 30,
                "eos_token_id": [31, 35],
                "temperature": 0.6,
                "do_sample": True,
            },
            **(special | {"eos_token": "<|eot|>"}),
            model_max_length=64,
        )
        config = json.loads((folders[0] / "config.json").read_text())
        (folders[0] / "config.json").write_text(json.dumps(config | {"eos_token_id": [31, 35]}))
        return folders

    def test_pairs_by_ids(self, roles, tmp_path):
        pairs = token_roles(roles)
        assert pairs.base != pairs.target
        prove(tmp_path / "out", *roles, roles=pairs)
        report = transfer(*roles, tmp_path / "again")
        assert (report.vocabulary, report.dropped_tokens, report.warnings) == ("ids", (), ())

    def test_behaviour_from_finetuned_and_architecture_from_target(self, roles, tmp_path):
        transfer(*roles, tmp_path / "graft")
        graft, target = (AutoConfig.from_pretrained(p) for p in (tmp_path / "graft", roles[2]))
        assert graft.rope_parameters == target.rope_parameters
        assert graft.rope_parameters["rope_type"] == "llama3"
        assert graft.max_position_embeddings == 512
        assert graft.eos_token_id == [31, 35]
        generation = GenerationConfig.from_pretrained(tmp_path / "graft")
        assert (generation.eos_token_id, generation.temperature) == ([31, 35], 0.6)
        tokenizer = families.load_tokenizer(tmp_path / "graft")
        assert tokenizer.chat_template == TEMPLATE
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|eot|>", 35)
        assert tokenizer.model_max_length == 512
        assert len(tokenizer) == 38
        families.load_whole(tmp_path / "graft")
        prompt = tokenizer.apply_chat_template([{"content": "w1"}])["input_ids"]
        assert prompt == [34, 1, 35] or prompt[0] == [34, 1, 35]

    def test_chatml_on_reserved_slots(self, roles, tmp_path):
        renamed = {"<|reserved_1|>": "<|im_start|>", "<|reserved_3|>": "<|im_end|>"}
        tokens = [renamed.get(token, token) for token in self.OLD]
        template = TEMPLATE.replace("start", "im_start")
        save_tokenizer(roles[0], fast_tokenizer(tokens), template=template, bos_token="<|begin|>")
        graft = prove(tmp_path / "out", *roles, roles=token_roles(roles))
        tokenizer = families.load_tokenizer(graft)
        assert tokenizer.convert_tokens_to_ids("<|im_start|>") == 33
        assert tokenizer.convert_ids_to_tokens(33) == "<|im_start|>"
        assert len(tokenizer) == 38
        families.load_whole(graft)


class TestTokenPairs:
    def test_permuted_target(self, tmp_path):
        roles = save_roles(tmp_path, llama(), target={"config": llama(vocab_size=44)})
        words = list(WORDS)
        turned = [words[0], *reversed(words[1:25]), "new1", "new2"]
        end = {"eos_token": "<|eot|>", "template": TEMPLATE}
        for folder, table in zip(roles, (words, words, turned), strict=True):
            save_tokenizer(folder, fast_tokenizer(CONTROL, table), **end)
        pairs = token_roles(roles, mode="tokens")
        assert pairs.target[1] == "w24"
        graft = prove(tmp_path / "out", *roles, roles=pairs)
        report = transfer(*roles, tmp_path / "again")
        assert report.vocabulary == "tokens"
        assert report.dropped_tokens == tuple(words[25:])
        tokenizer = families.load_tokenizer(graft)
        assert tokenizer.convert_tokens_to_ids(["w24", "<|eot|>"]) == [1, 28]
        assert tokenizer.eos_token_id == 28
        families.load_whole(graft)

    def test_permuted_target_and_a_token_that_finetuned_added(self, tmp_path):
        roles = save_roles(tmp_path, llama())
        words = list(WORDS)
        tables = (words, words, [words[0], *reversed(words[1:])])
        for folder, table in zip(roles, tables, strict=True):
            save_tokenizer(folder, fast_tokenizer(CONTROL, table))
        save_tokenizer(roles[0], fast_tokenizer((*CONTROL, "<|call|>"), words))
        prove(tmp_path / "out", *roles, roles=token_roles(roles, mode="tokens"))

    @pytest.mark.parametrize("permuted", ["target", "finetuned"])
    def test_what_may_belong_to_tokens_is_refused_where_they_move(self, tmp_path, permuted):
        generator = torch.Generator().manual_seed(0)
        roles = []
        for role in ROLES:
            shapes = {"wte.weight": (32, 8), "odd.weight": (32, 8), "h.0.up.weight": (8, 32)}
            shapes["h.0.kv_b_proj.weight"] = (32, 4)
            tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
            config = {"vocab_size": 32, "hidden_size": 8}
            roles.append(families.save_tensors(tmp_path / role, tensors, config))
        add_tokenizers(roles, CONTROL, CONTROL, CONTROL)
        prove(tmp_path / "same", *roles)
        turned = fast_tokenizer(CONTROL, [WORDS[0], *reversed(WORDS[1:])])
        save_tokenizer(roles[ROLES.index(permuted)], turned)
        remedy = r"odd.weight: .*--exclude 'odd\\\.weight\$', or give --vocab ids"
        with pytest.raises(VocabularyError, match=remedy):
            transfer(*roles, tmp_path / "out")
        options = Options(exclude=(r"odd\.weight$",))
        transfer(*roles, tmp_path / "out", exclude=options.exclude)
        moved = {"mode": "tokens", "base_mode": "tokens" if permuted == "finetuned" else "ids"}
        pairs = token_roles(roles, **moved)
        expected = oracle.transfer(*map(oracle.load, roles), options, pairs)
        oracle.assert_same(oracle.load(tmp_path / "out"), expected)

    def test_the_words_of_bert_move_and_a_projection_of_that_size_does_not(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        roles = []
        for role in ROLES:
            shapes = {"bert.words.weight": (32, 8), "cls.predictions.bias": (32,)}
            shapes["layers.0.kv_b_proj.weight"] = (32, 4)
            tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
            config = {"vocab_size": 32, "hidden_size": 8}
            roles.append(families.save_tensors(tmp_path / role, tensors, config))
        add_tokenizers(roles[:2], CONTROL, CONTROL)
        save_tokenizer(roles[2], fast_tokenizer(CONTROL, [WORDS[0], *reversed(WORDS[1:])]))
        names = ("bert.words.weight", "cls.predictions.bias")
        pairs = token_roles(roles, mode="tokens", vocabulary=names)
        prove(tmp_path / "out", *roles, roles=pairs)

    def test_finetuned_permuted_its_base(self, tmp_path):
        roles = save_roles(tmp_path, llama())
        words = list(WORDS)
        tables = ([words[0], *reversed(words[1:])], words, words)
        for folder, table in zip(roles, tables, strict=True):
            save_tokenizer(folder, fast_tokenizer(CONTROL, table))
        pairs = token_roles(roles, mode="tokens", base_mode="tokens")
        prove(tmp_path / "out", *roles, roles=pairs)

    def test_finetuned_was_resized_to_its_tokenizer(self, tmp_path):
        small, big = llama(vocab_size=32), llama(vocab_size=48)
        roles = save_roles(tmp_path, big, finetuned={"config": small})
        add_tokenizers(roles, CONTROL, CONTROL, CONTROL)
        graft = prove(tmp_path / "out", *roles, roles=token_roles(roles))
        new, old = oracle.load(graft)["lm_head.weight"], oracle.load(roles[2])["lm_head.weight"]
        assert oracle.same(new[32:], old[32:])
        families.load_whole(graft)

    def test_rows_that_finetuned_lost_are_refused(self, tmp_path):
        roles = save_roles(tmp_path, llama(), finetuned={"config": llama(vocab_size=31)})
        add_tokenizers(roles, CONTROL, CONTROL, CONTROL)
        with pytest.raises(VocabularyError, match="1 tokens that both tokenizers have"):
            transfer(*roles, tmp_path / "out")

    def test_padding_rows_are_kept(self, tmp_path):
        roles = save_roles(tmp_path, llama(vocab_size=64))
        add_tokenizers(roles, CONTROL, CONTROL, CONTROL)
        graft = prove(tmp_path / "out", *roles, roles=token_roles(roles))
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            new, old = oracle.load(graft)[name], oracle.load(roles[2])[name]
            assert oracle.same(new[32:], old[32:])
            assert not oracle.same(new[:32], old[:32])

    def test_no_tokenizers(self, tmp_path):
        roles = save_roles(tmp_path, llama())
        prove(tmp_path / "out", *roles)
        assert transfer(*roles, tmp_path / "again").vocabulary == "rows"

    def test_no_tokenizers_and_other_rows(self, tmp_path):
        roles = save_roles(tmp_path, llama(), target={"config": llama(vocab_size=60)})
        with pytest.raises(VocabularyError, match="no tokenizer shows which belong together"):
            transfer(*roles, tmp_path / "out")

    @pytest.mark.parametrize("lacking", [0, 1, 2])
    def test_one_role_without_a_tokenizer_is_taken_to_have_the_others(self, tmp_path, lacking):
        roles = save_roles(tmp_path, llama())
        having = [folder for i, folder in enumerate(roles) if i != lacking]
        add_tokenizers(having, CONTROL, CONTROL)
        tokens = oracle.tokens_of(having[0])
        prove(tmp_path / "out", *roles, roles=Roles(tokens, tokens, tokens))

    def test_vocabulary_size_that_is_also_another_dimension(self, tmp_path):
        """48 tokens, and 48 rows of an MLP: only the known names are vocabularies."""
        roles = save_roles(tmp_path, llama(vocab_size=48, intermediate_size=48))
        add_tokenizers(roles, CONTROL, CONTROL, CONTROL)
        prove(tmp_path / "out", *roles, roles=token_roles(roles))
