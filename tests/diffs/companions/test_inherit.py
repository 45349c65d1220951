import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from diffxfer.diffs.companions.inherit import diff_companions, inherit_companions
from diffxfer.errors import CompanionError

WORDS = ["<unk>", "hello", "world", "a", "b", "c"]
LLAMA_30 = ["<|bot|>", "<|eot_text|>", "<|reserved_0|>", "<|reserved_1|>", "<|eot_id|>"]
LLAMA_31 = ["<|bot|>", "<|eot_text|>", "<|right_pad|>", "<|reserved_1|>", "<|eot_id|>"]
SAME = {"translate": None, "additions": {}, "added_source": {}, "renamed": {}}
SAME |= {"vocab_size": None, "dtype": None}

CONFIG_30 = """{
  "architectures": ["LlamaForCausalLM"],
  "bos_token_id": 6,
  "eos_token_id": 7,
  "hidden_size": 8,
  "max_position_embeddings": 8192,
  "model_type": "llama",
  "num_attention_heads": 2,
  "num_hidden_layers": 1,
  "rms_norm_eps": 1e-05,
  "rope_theta": 500000.0,
  "torch_dtype": "bfloat16",
  "vocab_size": 11
}
"""
CONFIG_31 = CONFIG_30.replace("8192", "131072").replace(
    '"rope_theta"',
    """"rope_scaling": {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3"
  },
  "rope_theta\"""",
)


def make_tokenizer(specials, words=WORDS):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tokenizer


def save(folder, tokenizer, config, generation=None, template=None, **settings):
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    fast.chat_template = template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return folder


def write(inheritance, out):
    out.mkdir()
    for name, source in inheritance.files.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
    return out


def edit(folder, name, **changes):
    document = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(
        json.dumps({k: v for k, v in document.items() if v is not ...}, indent=2) + "\n"
    )


@pytest.fixture
def target(tmp_path):
    return save(
        tmp_path / "target",
        make_tokenizer(LLAMA_31),
        CONFIG_31,
        {"bos_token_id": 6, "eos_token_id": 7, "temperature": 0.6},
        bos_token="<|bot|>",
        eos_token="<|eot_text|>",
        model_max_length=131072,
    )


@pytest.fixture
def finetuned(tmp_path):
    """ChatML on a reserved slot: `<|reserved_1|>` became `<|im_end|>`."""
    specials = [*LLAMA_30[:3], "<|im_end|>", LLAMA_30[4]]
    return save(
        tmp_path / "finetuned",
        make_tokenizer(specials),
        CONFIG_30.replace('"eos_token_id": 7', '"eos_token_id": [9, 10]'),
        {"bos_token_id": 6, "eos_token_id": [9, 10], "pad_token_id": 8, "temperature": 0.25},
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        bos_token="<|bot|>",
        eos_token="<|im_end|>",
        pad_token="<|reserved_0|>",
        padding_side="left",
        model_max_length=8192,
    )


CHATML = {**SAME, "translate": {i: i for i in range(11)}, "renamed": {9: "<|im_end|>"}}


def test_a_chatml_tuning_of_3_0_speaks_on_3_1(target, finetuned, tmp_path):
    inheritance = inherit_companions(target, finetuned, **CHATML)
    out = write(inheritance, tmp_path / "out")
    assert inheritance.warnings == ()
    assert inheritance.left_out == ()
    assert sorted(inheritance.files) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}]).input_ids == [1, 9]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (6, 9, 8)
    assert tokenizer.pad_token == "<|right_pad|>"
    assert len(tokenizer) == 11
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 131072
    generation = GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [9, 10]
    assert (generation.pad_token_id, generation.temperature) == (8, 0.25)
    config = AutoConfig.from_pretrained(out)
    assert config.eos_token_id == [9, 10]
    assert config.max_position_embeddings == 131072
    assert config.rope_parameters["factor"] == 8.0
    assert config.rope_parameters["rope_type"] == "llama3"


def test_only_the_keys_that_must_change_differ(target, finetuned):
    files = inherit_companions(target, finetuned, **CHATML).files
    assert files["config.json"].decode() == CONFIG_31.replace(
        '"eos_token_id": 7', '"eos_token_id": [\n    9,\n    10\n  ]'
    )
    before = (target / "tokenizer.json").read_bytes()
    assert files["tokenizer.json"] == before.replace(b"<|reserved_1|>", b"<|im_end|>")
    assert files["generation_config.json"] == finetuned / "generation_config.json"
    assert files["chat_template.jinja"] == finetuned / "chat_template.jinja"


def test_a_finetuned_model_that_changes_nothing_leaves_the_targets_files(target):
    inheritance = inherit_companions(target, target, **SAME)
    assert inheritance.files == {
        name: target / name
        for name in (
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    }


MOVED = {6: 8, 7: 9, 8: 10, **{i: i + 2 for i in range(6)}}


@pytest.fixture
def other(tmp_path):
    """A target of another vocabulary, and a finetuned model that added `<|tool|>`."""
    words = ["x", "y", *WORDS]
    target = save(
        tmp_path / "target",
        make_tokenizer(["<s>", "</s>", "<pad>"], words),
        CONFIG_31.replace('"vocab_size": 11', '"vocab_size": 12'),
        {"eos_token_id": 9, "temperature": 0.6},
        "target's",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer = make_tokenizer(["<s>", "</s>", "<pad>"])
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, normalized=False)])
    finetuned = save(
        tmp_path / "finetuned",
        tokenizer,
        CONFIG_30.replace('"eos_token_id": 7', '"eos_token_id": 9, "pad_token_id": 8'),
        {
            "bos_token_id": 6,
            "eos_token_id": [9, 7],
            "suppress_tokens": [-1, 1],
            "bad_words_ids": [[1, 2], [3]],
            "forced_decoder_ids": [[1, 6], [2, 7]],
            "sequence_bias": [[[1, 2], -1.5]],
            "lang_to_id": {"<en>": 4},
            "forced_eos_token_id": None,
            "max_length": 9,
        },
        bos_token="<s>",
        eos_token="<tool>",
        pad_token="<pad>",
    )
    return target, finetuned


ADDED = {**SAME, "translate": {**MOVED, 9: 11}, "additions": {11: "<tool>"}}
ADDED |= {"added_source": {11: 9}}


def test_an_added_token_and_every_id_find_their_place(other, tmp_path):
    target, finetuned = other
    out = write(inherit_companions(target, finetuned, **ADDED), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids("<tool>") == 11
    assert tokenizer.added_tokens_decoder[11].lstrip is True
    assert tokenizer("hello <tool> world").input_ids == [3, 11, 4]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (8, 11, 10)
    assert len(tokenizer) == 12
    assert tokenizer.chat_template == "target's"
    assert json.loads((out / "tokenizer.json").read_text())["added_tokens"][-1] == {
        "id": 11,
        "content": "<tool>",
        "single_word": False,
        "lstrip": True,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 8,
        "eos_token_id": [11, 9],
        "suppress_tokens": [-1, 3],
        "bad_words_ids": [[3, 4], [5]],
        "forced_decoder_ids": [[1, 8], [2, 9]],
        "sequence_bias": [[[3, 4], -1.5]],
        "lang_to_id": {"<en>": 6},
        "forced_eos_token_id": None,
        "max_length": 9,
    }
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (8, 11, 10)
    assert config["vocab_size"] == 12


def test_an_id_that_the_tokenizer_would_not_give_is_refused(other):
    target, finetuned = other
    options = {**ADDED, "translate": {**MOVED, 9: 20}, "additions": {20: "<tool>"}}
    options |= {"added_source": {20: 9}}
    with pytest.raises(
        CompanionError, match=r"tokenizer\.json: .*'<tool>' must have id 20, but gets 11"
    ):
        inherit_companions(target, finetuned, **options)


def test_a_token_without_a_place_is_refused_by_file_key_and_id(other):
    target, finetuned = other
    with pytest.raises(
        CompanionError,
        match=r"finetuned/config\.json: eos_token_id is 9 \('<tool>'\), which is not a token of",
    ):
        inherit_companions(target, finetuned, **{**SAME, "translate": MOVED})
    edit(finetuned, "config.json", eos_token_id=7)
    with pytest.raises(CompanionError, match=r"generation_config\.json: eos_token_id is 9"):
        inherit_companions(target, finetuned, **{**SAME, "translate": MOVED})
    edit(finetuned, "generation_config.json", eos_token_id=7)
    with pytest.raises(CompanionError, match=r"tokenizer_config\.json: eos_token is '<tool>'"):
        inherit_companions(target, finetuned, **{**SAME, "translate": MOVED})


def test_ids_that_are_no_token_never_become_one(other):
    target, finetuned = other
    edit(finetuned, "config.json", bos_token_id=-1, eos_token_id=30, pad_token_id=None)
    edit(target, "config.json", bos_token_id=8, eos_token_id=9, pad_token_id=10)
    edit(finetuned, "generation_config.json", pad_token_id=30, eos_token_id=[30, 7])
    inheritance = inherit_companions(target, finetuned, **ADDED)
    assert inheritance.files["config.json"] == target / "config.json"
    generation = json.loads(inheritance.files["generation_config.json"])
    assert "pad_token_id" not in generation
    assert generation["eos_token_id"] == [9]
    assert inheritance.warnings == (
        "generation_config.json: pad_token_id is removed, since finetuned has no such token",
    )


def test_without_generation_config_the_ids_come_from_finetuneds_config(other):
    target, finetuned = other
    (finetuned / "generation_config.json").unlink()
    files = inherit_companions(target, finetuned, **ADDED).files
    assert json.loads(files["generation_config.json"]) == {
        "eos_token_id": 11,
        "temperature": 0.6,
        "bos_token_id": 8,
        "pad_token_id": 10,
    }
    (target / "generation_config.json").unlink()
    assert "generation_config.json" not in inherit_companions(target, finetuned, **ADDED).files


def old_style(folder, tokenizer, config, generation, template, extra):
    """As transformers 4 wrote it."""
    save(folder, tokenizer, config, generation)
    decoder = {
        str(i): {
            "content": t.content, "lstrip": t.lstrip, "normalized": t.normalized,
            "rstrip": t.rstrip, "single_word": t.single_word, "special": t.special,
        }
        for i, t in sorted(tokenizer.get_added_tokens_decoder().items())
    }  # fmt: skip
    settings = {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": extra,
        "bos_token": "<|bot|>",
        "eos_token": extra[-1],
        "model_max_length": 77,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    bos = {"content": "<|bot|>", "lstrip": False, "normalized": False, "rstrip": False}
    specials = {"bos_token": {**bos, "single_word": False}, "eos_token": extra[-1]}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=2) + "\n")
    added = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items()}
    (folder / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n")
    return folder


def test_the_old_layout_is_kept_in_agreement_with_itself(tmp_path):
    target = old_style(
        tmp_path / "target", make_tokenizer(LLAMA_31), CONFIG_31, None, "old", ["<|right_pad|>"]
    )
    (target / "chat_template.jinja").write_text("stale")
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "rag.jinja").write_text("stale")
    tuned = make_tokenizer([*LLAMA_30[:3], "<|im_end|>", LLAMA_30[4], "<|im_start|>"])
    template = "<|im_start|> {{ messages[0].content }} <|im_end|>"
    extra = ["<|reserved_0|>", "<|im_start|>", "<|im_end|>"]
    config = CONFIG_30.replace('"eos_token_id": 7', '"eos_token_id": 9')
    finetuned = old_style(tmp_path / "finetuned", tuned, config, None, template, extra)
    options = {**CHATML, "translate": {i: i for i in range(12)}, "vocab_size": 12}
    options |= {"additions": {11: "<|im_start|>"}, "added_source": {11: 11}}
    inheritance = inherit_companions(target, finetuned, **options)
    out = write(inheritance, tmp_path / "out")
    assert inheritance.left_out == ("additional_chat_templates/rag.jinja", "chat_template.jinja")
    assert inheritance.warnings == ()
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert list(settings) == list(json.loads((target / "tokenizer_config.json").read_text()))
    assert settings["chat_template"] == template
    assert settings["model_max_length"] == 77
    assert settings["additional_special_tokens"] == ["<|right_pad|>", "<|im_start|>", "<|im_end|>"]
    assert settings["added_tokens_decoder"]["9"]["content"] == "<|im_end|>"
    assert settings["added_tokens_decoder"]["11"]["special"] is True
    assert json.loads((out / "added_tokens.json").read_text()) == {
        "<|bot|>": 6, "<|eot_text|>": 7, "<|right_pad|>": 8, "<|eot_id|>": 10,
        "<|im_start|>": 11, "<|im_end|>": 9,
    }  # fmt: skip
    assert inheritance.files["special_tokens_map.json"] == finetuned / "special_tokens_map.json"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == 12
    assert tokenizer.eos_token_id == 9
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}]).input_ids
    assert ids == [11, 1, 9]
    assert AutoConfig.from_pretrained(out).vocab_size == 12


def test_finetuned_without_a_special_tokens_map_speaks_in_the_targets(target, finetuned):
    (target / "special_tokens_map.json").write_text(
        '{"bos_token": "<|bot|>", "eos_token": "<|eot_text|>"}'
    )
    files = inherit_companions(target, finetuned, **CHATML).files
    assert json.loads(files["special_tokens_map.json"]) == {
        "bos_token": "<|bot|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|right_pad|>",
    }


def test_a_special_token_that_no_tokenizer_has_is_left_to_the_target(other):
    target, finetuned = other
    edit(finetuned, "tokenizer_config.json", pad_token="[PAD]", extra_special_tokens=["[X]", "<s>"])
    edit(target, "tokenizer_config.json", additional_special_tokens=["<pad>"])
    inheritance = inherit_companions(target, finetuned, **ADDED)
    settings = json.loads(inheritance.files["tokenizer_config.json"])
    assert "pad_token" not in settings
    assert settings["extra_special_tokens"] == ["<s>"]
    assert "additional_special_tokens" not in settings
    assert inheritance.warnings == (
        "tokenizer_config.json: pad_token: the output's tokenizer has no '[PAD]', so the target's "
        "setting is kept",
        "tokenizer_config.json: extra_special_tokens: the output's tokenizer has no '[X]', so "
        "it is left out",
    )


@pytest.mark.parametrize("form", ["file", "folder", "json", "tokenizer", "processor"])
def test_a_template_in_any_form_replaces_the_targets_in_every_form(target, finetuned, form):
    (finetuned / "chat_template.jinja").unlink()
    for folder, text in ((target, "old"), (finetuned, "new")):
        (folder / "processor_config.json").write_text('{"image_seq_len": 4}')
        forms = {form} if folder is finetuned else ["file", "folder", "json", "tokenizer"]
        forms = forms if folder is finetuned else [*forms, "processor"]
        if "file" in forms:
            (folder / "chat_template.jinja").write_text(text)
        if "folder" in forms:
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / f"{text}.jinja").write_text(text)
        if "json" in forms:
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))
        if "tokenizer" in forms:
            edit(folder, "tokenizer_config.json", chat_template=text)
        if "processor" in forms:
            edit(folder, "processor_config.json", chat_template=text)
    files = inherit_companions(target, finetuned, **CHATML).files
    texts = {
        name: data if isinstance(data, bytes) else data.read_bytes() for name, data in files.items()
    }
    where = {
        "file": "chat_template.jinja",
        "folder": "additional_chat_templates/new.jinja",
        "json": "chat_template.json",
        "tokenizer": "tokenizer_config.json",
        "processor": "processor_config.json",
    }
    assert [name for name, text in texts.items() if b"new" in text] == [where[form]]
    assert not [name for name, text in texts.items() if b"old" in text]


def test_a_processors_template_finds_a_home_in_a_target_without_processor(target, finetuned):
    (finetuned / "chat_template.jinja").unlink()
    (finetuned / "processor_config.json").write_text('{"chat_template": "new"}')
    files = inherit_companions(target, finetuned, **CHATML).files
    assert files["chat_template.jinja"] == b"new"
    assert "processor_config.json" not in files


def test_code_comes_from_the_target_only(target, finetuned):
    auto_map = {"AutoConfig": "evil.Config"}
    for folder in (target, finetuned):
        (folder / f"modeling_{folder.name}.py").write_text("")
        (folder / "LICENSE").write_text(folder.name)
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            edit(folder, name, auto_map={"AutoConfig": f"{folder.name}.Config"})
    (finetuned / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "auto_map": auto_map, "tokenizer_file": "/etc/x"})
    )
    (finetuned / "chat_template.json").write_text(json.dumps({"auto_map": auto_map}))
    inheritance = inherit_companions(target, finetuned, **CHATML)
    assert [name for name in inheritance.files if name.endswith(".py")] == ["modeling_target.py"]
    assert inheritance.files["LICENSE"] == target / "LICENSE"
    for name in ("config.json", "tokenizer_config.json"):
        auto = json.loads(inheritance.files[name])["auto_map"]
        assert auto == {"AutoConfig": "target.Config"}
    assert b"auto_map" not in inheritance.files["generation_config.json"]
    assert json.loads(inheritance.files["special_tokens_map.json"]) == {"eos_token": "<|im_end|>"}
    assert inheritance.files["chat_template.json"] == b"{}"
    assert inheritance.warnings == (
        "finetuned's code (modeling_finetuned.py) is not copied: code comes only from the target",
    )


def test_a_diff_vector_keeps_everything_but_code(finetuned, target, tmp_path):
    (finetuned / "modeling_x.py").write_text("")
    (finetuned / "trainer_state.json").write_text("{}")
    edit(finetuned, "config.json", auto_map={"a": "b"}, text_config={"auto_map": {}, "x": 1})
    (finetuned / "deep.json").write_text('[{"\\u0061uto_map": 1, "eps": 1E-6}]')
    kept = diff_companions(finetuned)
    assert kept.left_out == ("modeling_x.py", "trainer_state.json")
    assert sorted(kept.files) == [
        "chat_template.jinja", "config.json", "deep.json", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert kept.files["deep.json"] == b'[{"eps": 1E-6}]'
    assert kept.files["tokenizer.json"] == finetuned / "tokenizer.json"
    config = json.loads(kept.files["config.json"])
    assert "auto_map" not in config
    assert config["text_config"] == {"x": 1}
    whole = write(inherit_companions(target, finetuned, **CHATML), tmp_path / "whole")
    companions = write(kept, tmp_path / "companions")
    again = write(inherit_companions(target, companions, **CHATML), tmp_path / "again")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


@pytest.mark.parametrize(
    ("layers", "grown", "expected"),
    [(11, 12, (12, 12)), (9, 10, (11, 10)), (9, 12, (12, 9)), (9, None, (11, 9))],
)
def test_the_rows_of_the_layers_embedding(target, finetuned, layers, grown, expected):
    nested = {"vocab_size": 11, "vocab_size_per_layer_input": layers}
    edit(target, "config.json", text_config=nested)
    options = {**CHATML, "vocab_size": grown}
    config = json.loads(inherit_companions(target, finetuned, **options).files["config.json"])
    found = config["text_config"]
    assert (found["vocab_size"], found["vocab_size_per_layer_input"]) == expected


def test_nested_ids_sizes_and_dtypes_change_where_the_target_has_them(target, finetuned):
    nested = {"eos_token_id": 7, "vocab_size": 11, "dtype": "bfloat16", "hidden_size": 8}
    vision = {"dtype": "bfloat16", "vocab_size": 999}
    edit(
        target,
        "config.json",
        text_config=nested,
        vision_config=vision,
        eos_token_id=...,
        torch_dtype=...,
        dtype="bfloat16",
    )
    options = {**CHATML, "vocab_size": 12, "dtype": "float32"}
    config = json.loads(inherit_companions(target, finetuned, **options).files["config.json"])
    text = {"eos_token_id": [9, 10], "vocab_size": 12, "dtype": "float32", "hidden_size": 8}
    assert config["text_config"] == text
    assert config["vision_config"] == {"dtype": "float32", "vocab_size": 999}
    assert (config["vocab_size"], config["dtype"]) == (12, "float32")
    assert "eos_token_id" not in config
    assert "torch_dtype" not in config


def test_finetuneds_nested_ids_reach_a_flat_target(target, finetuned):
    edit(finetuned, "config.json", eos_token_id=..., text_config={"eos_token_id": 10})
    config = json.loads(inherit_companions(target, finetuned, **CHATML).files["config.json"])
    assert config["eos_token_id"] == 10
    assert "text_config" not in config


def test_a_renamed_slot_changes_in_the_vocabulary_too(tmp_path):
    words = [*WORDS, "<unused0>"]
    target, finetuned = (
        save(tmp_path / name, make_tokenizer(["<s>"], vocabulary), CONFIG_30, bos_token="<s>")
        for name, vocabulary in (("target", words), ("finetuned", [*WORDS, "<tool>"]))
    )
    (target / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    options = {**SAME, "translate": {i: i for i in range(8)}, "renamed": {6: "<tool>"}}
    files = inherit_companions(target, finetuned, **options).files
    assert json.loads(files["vocab.json"])["<tool>"] == 6
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.token_to_id("<tool>") == 6
    assert tokenizer.token_to_id("<unused0>") is None
    assert tokenizer.encode("hello <tool>").ids == [1, 6]


def test_a_unigram_slot_keeps_every_score_as_it_is_written(tmp_path):
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.5), ("<u>", -1e-7)], unk_id=0))
    target = save(tmp_path / "target", tokenizer, CONFIG_30)
    raw = (target / "tokenizer.json").read_bytes().replace(b"-1.5", b"-1.50e0")
    (target / "tokenizer.json").write_bytes(raw)
    files = inherit_companions(target, target, **{**SAME, "renamed": {2: "<t>"}}).files
    assert files["tokenizer.json"] == raw.replace(b'"<u>"', b'"<t>"')


def test_sentencepiece_alone_takes_no_token(target, finetuned):
    vocabulary = {word: i for i, word in enumerate([*WORDS, *LLAMA_31])}
    (target / "tokenizer.json").unlink()
    (target / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(
        CompanionError,
        match=r"only as SentencePiece or vocab\.json, which cannot take added tokens; convert it",
    ):
        inherit_companions(target, finetuned, **CHATML)


def test_a_target_without_tokenizer_files_gets_finetuneds_settings_only(target, finetuned):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).unlink()
    inheritance = inherit_companions(target, finetuned, **SAME)
    settings = json.loads(inheritance.files["tokenizer_config.json"])
    assert "model_max_length" not in settings
    assert settings["eos_token"] == "<|im_end|>"
    assert "tokenizer.json" not in inheritance.files
    assert inheritance.warnings == ("the target has no tokenizer, so the output has none either",)


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "LICENSE"])
def test_a_link_out_of_finetuned_is_never_followed(target, finetuned, tmp_path, name):
    (tmp_path / "secret").write_text("{}")
    (finetuned / name).unlink(missing_ok=True)
    (finetuned / name).symlink_to(tmp_path / "secret")
    for verb in (diff_companions, lambda folder: inherit_companions(target, folder, **CHATML)):
        with pytest.raises(CompanionError, match="points outside the checkpoint"):
            verb(finetuned)
