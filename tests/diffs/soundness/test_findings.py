"""Files that contradict each other: the finding, and its remedy, which works."""

import json

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, MixtralConfig

from diffxfer import apply_diff, extract_diff, inspect_checkpoint, transfer
from diffxfer.errors import CompanionError, VocabularyError
from tests import families, tiny
from tests.families import fast_tokenizer, llama, load_tokenizer, save_model, save_tokenizer

WORDS = tuple(f"w{i}" for i in range(99))
CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
MARKS = ("<|im_start|>", "<|im_end|>")
ROLES = ("finetuned", "base", "target")


@pytest.fixture
def roles(tmp_path):
    """99 rows and 99 words in every role."""
    folders = [tmp_path / role for role in ROLES]
    for seed, folder in enumerate(folders):
        save_model(folder, llama(vocab_size=99), seed)
        save_tokenizer(folder, fast_tokenizer((), WORDS))
    return folders


def resize(folder, rows):
    """Do what the remedy says."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)


def edit(folder, name, **changes):
    path = folder / name
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(document | changes))


def only(folder, severity="error"):
    """The one finding of a checkpoint."""
    (found,) = inspect_checkpoint(folder).findings
    assert found.severity == severity
    return found


class TestTokensWithoutRows:
    def test_what_nothing_uses_is_left_out(self, roles, tmp_path):
        save_tokenizer(roles[0], fast_tokenizer(MARKS, WORDS))
        report = transfer(*roles, tmp_path / "out")
        assert report.added_tokens == report.dropped_tokens == ()
        assert report.warnings == (
            "tokens of finetuned's tokenizer that have no row in its embedding "
            "(model.embed_tokens.weight has 99 rows) and that nothing uses are left out: "
            "<|im_start|>, <|im_end|>",
        )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert "im_start" not in (tmp_path / "out" / name).read_text()
        assert len(load_tokenizer(tmp_path / "out")) == 99
        families.load_whole(tmp_path / "out")
        assert inspect_checkpoint(tmp_path / "out").findings == ()

    def test_also_by_way_of_a_diff_vector(self, roles, tmp_path):
        save_tokenizer(roles[0], fast_tokenizer(MARKS, WORDS))
        extracted = extract_diff(*roles[:2], tmp_path / "diff", diff_dtype="float64")
        applied = apply_diff(tmp_path / "diff", roles[2], tmp_path / "out")
        assert extracted.added_tokens == applied.added_tokens == ()
        assert len(extracted.warnings) == len(applied.warnings) == 1
        assert extracted.warnings == applied.warnings
        transfer(*roles, tmp_path / "direct")
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (
                tmp_path / "direct" / name
            ).read_bytes()

    def test_only_those_without_a_row(self, roles, tmp_path):
        """One of two added tokens was given a row."""
        save_model(roles[0], llama(vocab_size=100), 0)
        save_tokenizer(roles[0], fast_tokenizer(MARKS, WORDS))
        report = transfer(*roles, tmp_path / "out")
        assert report.added_tokens == ("<|im_start|>",)
        assert report.warnings[0].endswith("left out: <|im_end|>")
        assert load_tokenizer(tmp_path / "out")("<|im_start|>").input_ids == [99]
        families.load_whole(tmp_path / "out")

    def test_what_base_lacks_a_row_for_too_is_no_news(self, roles, tmp_path):
        for folder in roles:
            save_tokenizer(folder, fast_tokenizer(("<image_soft_token>",), WORDS))
        assert transfer(*roles, tmp_path / "out").warnings == ()

    def test_a_plain_added_token(self, roles, tmp_path):
        save_tokenizer(roles[0], fast_tokenizer((), WORDS, plain=["call"]))
        report = transfer(*roles, tmp_path / "out")
        assert (report.vocabulary, report.added_tokens) == ("ids", ())
        assert report.warnings[0].endswith("left out: call")

    @pytest.mark.parametrize("role", [0, 1, 2])
    @pytest.mark.parametrize("verb", ["transfer", "dry run"])
    def test_what_a_template_writes_is_an_error(self, roles, tmp_path, role, verb):
        save_tokenizer(roles[role], fast_tokenizer(MARKS, WORDS), template=CHATML)
        with pytest.raises(CompanionError) as caught:
            transfer(*roles, tmp_path / "out", dry_run=verb == "dry run")
        assert str(caught.value) == (
            f"{roles[role]}/tokenizer.json: '<|im_start|>' (id 99), '<|im_end|>' (id 100) have no "
            "row in the embedding (model.embed_tokens.weight has 99 rows), and the chat template "
            "in chat_template.jinja writes them; resize the embedding "
            "(model.resize_token_embeddings(101), then save_pretrained), or remove them from the "
            "chat template"
        )
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))

    def test_the_first_remedy_works(self, roles, tmp_path):
        save_tokenizer(roles[0], fast_tokenizer(MARKS, WORDS), template=CHATML)
        resize(roles[0], 101)
        edit(roles[0], "generation_config.json", eos_token_id=100)
        report = transfer(*roles, tmp_path / "out")
        assert report.added_tokens == MARKS
        families.load_whole(tmp_path / "out")
        assert inspect_checkpoint(tmp_path / "out").findings == ()

    def test_the_second_remedy_works(self, roles, tmp_path):
        save_tokenizer(roles[0], fast_tokenizer(MARKS, WORDS), template=CHATML)
        (roles[0] / "chat_template.jinja").write_text("{{ messages[0].content }}")
        assert transfer(*roles, tmp_path / "out").added_tokens == ()
        families.load_whole(tmp_path / "out")

    def test_yi_s_names_of_tokens_without_rows(self, roles, tmp_path):
        """Added by `added_tokens_decoder` alone, as where a slow tokenizer was converted."""
        decoder = {
            str(99 + i): {"content": token, "special": True} for i, token in enumerate(MARKS)
        }
        edit(roles[0], "tokenizer_config.json", added_tokens_decoder=decoder)
        found = only(roles[0], "warning")
        assert found.remedy.startswith("remove them from tokenizer_config.json, or resize")
        assert transfer(*roles, tmp_path / "one").added_tokens == ()
        edit(roles[0], "tokenizer_config.json", chat_template=CHATML)
        with pytest.raises(CompanionError, match=r"template in tokenizer_config.json writes them"):
            transfer(*roles, tmp_path / "two")

    def test_a_stop_list_is_an_error(self, roles, tmp_path):
        save_tokenizer(
            roles[0], fast_tokenizer(MARKS, WORDS), generation={"eos_token_id": [2, 100]}
        )
        with pytest.raises(CompanionError) as caught:
            extract_diff(*roles[:2], tmp_path / "out")
        assert str(caught.value).startswith(
            f"{roles[0]}/generation_config.json: eos_token_id '<|im_end|>' (id 100) has no row"
        )
        GenerationConfig(eos_token_id=2).save_pretrained(roles[0])
        assert extract_diff(*roles[:2], tmp_path / "out").written

    @pytest.mark.parametrize(
        ("role", "severity"), [("eos", "error"), ("bos", "error"), ("pad", "warning")]
    )
    def test_a_role_that_the_tokenizer_gives(self, roles, role, severity):
        named = {f"{role}_token": "<|im_end|>"}
        save_tokenizer(roles[0], fast_tokenizer(("<|im_end|>",), WORDS), **named)
        found = next(
            f for f in inspect_checkpoint(roles[0]).findings if f.value.startswith(f"{role}_token ")
        )
        assert (found.severity, found.file) == (severity, "tokenizer_config.json")
        assert found.remedy.endswith("to a token with an id below 99")
        edit(roles[0], "tokenizer_config.json", **{f"{role}_token": "w3"})
        edit(roles[0], "generation_config.json", eos_token_id=3)
        assert only(roles[0], "warning").value == "'<|im_end|>' (id 99)"

    def test_a_pad_token_of_a_base_is_nobody_s_business(self, roles, tmp_path):
        for folder in roles[1:]:
            save_tokenizer(folder, fast_tokenizer(("<pad>",), WORDS), pad_token="<pad>")
        save_tokenizer(roles[0], fast_tokenizer(("<pad>",), WORDS), pad_token="w0")
        assert transfer(*roles, tmp_path / "out").warnings == ()

    def test_the_tokenizer_of_another_model(self, roles):
        save_tokenizer(roles[2], fast_tokenizer((), [f"v{i}" for i in range(200)]))
        found = only(roles[2])
        assert found.value.startswith("'v99' (id 99), ")
        assert found.value.endswith("and 96 more")
        assert "any text may contain them" in found.problem

    def test_lost_rows_are_refused_as_before(self, roles, tmp_path):
        save_model(roles[1], llama(vocab_size=101), 1)
        for folder in roles[:2]:
            save_tokenizer(folder, fast_tokenizer(MARKS, WORDS))
        with pytest.raises(VocabularyError, match="2 tokens that both tokenizers have lack"):
            transfer(*roles, tmp_path / "out")


class TestTheResult:
    def test_a_token_that_only_the_target_has_no_row_for(self, roles, tmp_path):
        """Finetuned's template writes tokens of base's; the target's embedding was cut."""
        for seed, folder in enumerate(roles[:2]):
            save_model(folder, llama(vocab_size=101, eos_token_id=100), seed)
        for folder in roles:
            save_tokenizer(folder, fast_tokenizer(MARKS, WORDS))
        save_tokenizer(roles[0], fast_tokenizer(MARKS, WORDS), template=CHATML)
        with pytest.raises(CompanionError) as caught:
            transfer(*roles, tmp_path / "out", dry_run=True)
        said = str(caught.value)
        assert said.startswith("the graft/tokenizer.json: '<|im_start|>' (id 99)")
        assert "resize the target's embedding (model.resize_token_embeddings(101)" in said
        assert said.endswith("or remove them from finetuned's chat template")
        resize(roles[2], 101)
        transfer(*roles, tmp_path / "out")
        families.load_whole(tmp_path / "out")
        assert inspect_checkpoint(tmp_path / "out").findings == ()


class TestStops:
    TOKENS = ("<|endoftext|>", *MARKS)

    @pytest.fixture
    def endless(self, roles):
        """Turns end with `<|im_end|>`, and generation stops at `<|endoftext|>` alone."""
        for seed, folder in enumerate(roles):
            save_model(folder, llama(vocab_size=104, eos_token_id=99), seed)
            save_tokenizer(
                folder,
                fast_tokenizer(self.TOKENS, WORDS),
                template=CHATML,
                generation={"eos_token_id": 99},
                eos_token="<|endoftext|>",
            )
        return roles

    SAYS = (
        "generation_config.json: eos_token_id 99 ('<|endoftext|>') lacks the stop token (the "
        "chat template in chat_template.jinja ends a turn with '<|im_end|>' (id 101)): generation "
        "may never stop; set eos_token_id to [101, 99] "
    )

    def test_said_once_of_a_graft(self, endless, tmp_path):
        report = transfer(*endless, tmp_path / "out")
        says = f"the graft: {self.SAYS}in finetuned's generation_config.json"
        assert report.warnings == (says,)
        edit(endless[0], "generation_config.json", eos_token_id=[101, 99])
        assert transfer(*endless, tmp_path / "mended").warnings == ()

    def test_said_of_finetuned_where_a_diff_vector_is_made(self, endless, tmp_path):
        report = extract_diff(*endless[:2], tmp_path / "out")
        assert report.warnings == (f"finetuned: {self.SAYS}there",)

    def test_stop_strings_do_as_well(self, endless):
        edit(endless[0], "generation_config.json", stop_strings=["<|im_end|>"])
        assert inspect_checkpoint(endless[0]).findings == ()

    def test_only_generation_settings_count_where_there_are_any(self, endless):
        """transformers' `generate` does not fall back on the config then."""
        edit(endless[0], "config.json", eos_token_id=101)
        assert str(only(endless[0], "warning")) == f"{self.SAYS}there"
        (endless[0] / "generation_config.json").write_text("{}")
        model = AutoModelForCausalLM.from_pretrained(endless[0])
        assert model._prepare_generation_config(None)[0].eos_token_id is None
        assert only(endless[0], "warning").value == "eos_token_id"
        (endless[0] / "generation_config.json").unlink()
        assert inspect_checkpoint(endless[0]).findings == ()

    def test_the_tokenizer_s_end_without_a_template(self, endless):
        (endless[0] / "chat_template.jinja").unlink()
        edit(endless[0], "tokenizer_config.json", eos_token="<|im_end|>")
        assert "the tokenizer's eos_token is '<|im_end|>' (id 101)" in str(
            only(endless[0], "warning")
        )

    @pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
    def test_an_id_of_no_token_and_no_row(self, tmp_path, key):
        """GPT-2's own default in a smaller vocabulary."""
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}
        ids = {"bos_token_id": 1, "eos_token_id": 1, key: 50256}
        save_model(tmp_path, GPT2Config(**sizes, **ids), 0)
        values = {(f.severity, f.file, f.value) for f in inspect_checkpoint(tmp_path).findings}
        assert values == {
            ("warning", file, f"{key} 50256") for file in ("config.json", "generation_config.json")
        }

    def test_a_pad_id_that_the_model_is_made_with(self, roles):
        edit(roles[0], "config.json", pad_token_id=99)
        with pytest.raises(AssertionError, match="Padding_idx"):
            AutoModelForCausalLM.from_pretrained(roles[0])
        assert only(roles[0]).value == "pad_token_id 99"
        edit(roles[0], "config.json", pad_token_id=None)
        families.load_whole(roles[0])
        assert inspect_checkpoint(roles[0]).findings == ()


class TestShapes:
    @pytest.mark.parametrize(
        ("key", "value", "remedy"),
        [
            ("vocab_size", 101, "set vocab_size to 99 there"),
            ("hidden_size", 32, "set hidden_size to 16 there"),
            ("num_hidden_layers", 3, "set num_hidden_layers to 2 there"),
            ("num_attention_heads", 4, "set num_attention_heads to 2 there"),
            ("num_key_value_heads", 2, "set num_key_value_heads to 1 there"),
        ],
    )
    @pytest.mark.parametrize("role", [0, 1, 2])
    def test_an_error_in_every_role(self, roles, tmp_path, key, value, remedy, role):
        edit(roles[role], "config.json", **{key: value})
        found = only(roles[role])
        assert (found.file, found.value) == ("config.json", f"{key} {value}")
        assert found.remedy.startswith(remedy)
        with pytest.raises(CompanionError, match=f"config.json: {key} {value} .*; {remedy}"):
            transfer(*roles, tmp_path / "out")
        right = int(remedy.split()[3])
        edit(roles[role], "config.json", **{key: right})
        families.load_whole(roles[role])
        transfer(*roles, tmp_path / "out")

    def test_heads_without_a_stated_size(self, roles):
        config = json.loads((roles[0] / "config.json").read_text())
        config.pop("head_dim")
        (roles[0] / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}))
        assert only(roles[0]).remedy.startswith("set num_key_value_heads to 1 there")

    def test_more_layers_than_the_config_counts(self, roles, tmp_path):
        edit(roles[1], "config.json", num_hidden_layers=1)
        found = only(roles[1], "warning")
        assert found.problem.endswith("model.layers ends with layer 1")
        assert transfer(*roles, tmp_path / "out").warnings == (f"base: {found}",)

    def test_a_model_with_code_of_its_own_is_warned_of(self, roles, tmp_path):
        for folder in roles:
            code = {"AutoModelForCausalLM": "modeling.Mine"}
            edit(folder, "config.json", auto_map=code, vocab_size=96)
        only(roles[0], "warning")
        assert len(transfer(*roles, tmp_path / "out").warnings) == 3

    def test_a_tensor_that_is_cut(self, tmp_path):
        config = MixtralConfig(
            **{**families.SIZES, "num_local_experts": 2, "num_experts_per_tok": 1}, vocab_size=50
        )
        save_model(tmp_path, config, 0)
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        embedding = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([embedding, embedding[:1]])
        tensors["lm_head.weight"] = torch.cat([embedding, embedding[:1]])
        save_file(tensors, path, {"format": "pt"})
        assert only(tmp_path).value == "vocab_size 50"


class TestInspect:
    def test_text_and_json(self, roles):
        save_tokenizer(roles[0], fast_tokenizer(MARKS, WORDS), template=CHATML)
        edit(roles[0], "config.json", num_hidden_layers=1)
        text = tiny.run("inspect", roles[0])
        assert (text.status, text.err) == (0, "")
        lines = text.out.splitlines()
        heading = lines.index("contradictions between its files")
        assert [line.split(": ")[:2] for line in lines[heading + 1 :]] == [
            ["error", "tokenizer.json"],
            ["warning", "config.json"],
        ]
        found = json.loads(tiny.run("inspect", roles[0], "--json").out)["findings"]
        assert [list(finding) for finding in found] == [
            ["severity", "file", "value", "problem", "remedy"]
        ] * 2
        assert found[0]["severity"] == "error"
        assert found[0]["value"] == "'<|im_start|>' (id 99), '<|im_end|>' (id 100)"

    def test_nothing_to_say(self, roles):
        assert "contradictions" not in tiny.run("inspect", roles[0]).out
        assert json.loads(tiny.run("inspect", roles[0], "--json").out)["findings"] == []

    def test_a_file_that_cannot_be_read_is_a_finding(self, roles):
        (roles[0] / "tokenizer.json").write_text("{")
        found = only(roles[0])
        assert found.file == "tokenizer.json"
        assert str(found).startswith("tokenizer.json: is not JSON (line 1)")

    def test_a_diff_vector_has_those_of_its_companions(self, roles, tmp_path):
        save_tokenizer(roles[0], fast_tokenizer(MARKS, WORDS))
        extract_diff(*roles[:2], tmp_path / "diff", include=["embed_tokens", r"layers\.0"])
        assert only(tmp_path / "diff", "warning").value.startswith("'<|im_start|>' (id 99)")

    def test_a_diff_vector_that_cannot_work_is_refused(self, roles, tmp_path):
        """As an older version wrote it, which did not check."""
        save_tokenizer(roles[0], fast_tokenizer(MARKS, WORDS))
        extract_diff(*roles[:2], tmp_path / "diff")
        raw = CHATML.encode()
        (tmp_path / "diff" / "companions" / "chat_template.jinja").write_bytes(raw)
        entry = {"size": len(raw), "xxh3": xxhash.xxh3_128_hexdigest(raw)}
        name = "companions/chat_template.jinja"
        tiny.edit_json(
            tmp_path / "diff" / "diffxfer.json", lambda m: m["files"].update({name: entry})
        )
        with pytest.raises(CompanionError, match=r"companions/tokenizer.json: '<\|im_start\|>'"):
            apply_diff(tmp_path / "diff", roles[2], tmp_path / "out")

    def test_a_diff_vector_that_lists_tokens_without_rows_as_added(self, roles, tmp_path):
        """As an older version wrote it."""
        save_tokenizer(roles[0], fast_tokenizer(MARKS, WORDS))
        extract_diff(*roles[:2], tmp_path / "diff")
        added = {"99": MARKS[0], "100": MARKS[1]}
        tiny.edit_json(
            tmp_path / "diff" / "diffxfer.json", lambda m: m["tokens"].update({"added": added})
        )
        assert apply_diff(tmp_path / "diff", roles[2], tmp_path / "out").added_tokens == ()
        assert len(load_tokenizer(tmp_path / "out")) == 99
