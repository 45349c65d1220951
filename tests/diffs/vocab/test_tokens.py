import base64
import json
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as RealTokenizer
from transformers import PreTrainedTokenizerFast

from diffxfer.diffs.vocab import token_files as module
from diffxfer.diffs.vocab.token_files import MAX_TOKENS, fingerprint_tokens
from diffxfer.diffs.vocab.tokens import Tokenizer, read_tokenizer
from diffxfer.errors import CompanionError

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def added(token_id, content, special=True):
    return {"id": token_id, "content": content, "special": special, "lstrip": False}


def tokenizer_json(vocab, added_tokens=(), kind="BPE"):
    return {"model": {"type": kind, "vocab": vocab}, "added_tokens": list(added_tokens)}


# A SentencePiece ModelProto, written by hand.


def varint(value):
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def delimited(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def piece(text, kind=None):
    score = varint(2 << 3 | 5) + b"\0\0\x80\xbf"
    message = delimited(1, text if isinstance(text, bytes) else text.encode()) + score
    return delimited(1, message if kind is None else message + varint(3 << 3) + varint(kind))


SENTENCEPIECE = b"".join(
    [
        piece("<unk>", 2),
        piece("<s>", 3),
        piece("</s>", 3),
        piece("<0x0A>", 6),
        piece("<table>", 4),
        piece("▁the"),
        piece("er", 1),
        delimited(2, b"trainer spec"),
        varint(9 << 3 | 1) + b"8 bytes!",
    ]
)
TIKTOKEN = b"".join(
    base64.b64encode(token) + b" %d\n" % rank
    for rank, token in enumerate([b"a", b" the", b"\xff", "é".encode()])
)


class TestTables:
    def test_bpe_saved_by_transformers(self, tmp_path):
        real = RealTokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
        real.add_special_tokens(["<|begin|>", "<|end|>"])
        real.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("plain")])
        fast = PreTrainedTokenizerFast(
            tokenizer_object=real, bos_token="<|begin|>", eos_token="<|end|>"
        )
        fast.chat_template = CHATML
        fast.save_pretrained(tmp_path)
        found = read_tokenizer(tmp_path)
        assert found.tokens == ("a", "b", "ab", "<|begin|>", "<|end|>", "<tool_call>", "plain")
        assert found.ids() == real.get_vocab(with_added_tokens=True)
        assert found.special == {3, 4, 5}
        assert found.named == {"bos": (3,), "eos": (4,)}
        assert found.chat_templates == CHATML
        assert found.format == "tokenizer.json"

    @pytest.mark.parametrize(
        "model",
        [
            models.WordLevel({"x": 0, "[UNK]": 1}, unk_token="[UNK]"),
            models.WordPiece({"x": 0, "[UNK]": 1}, unk_token="[UNK]"),
            models.Unigram([("x", -1.0), ("[UNK]", -2.0)], unk_id=1),
        ],
    )
    def test_word_level_word_piece_and_unigram_models_are_read_too(self, tmp_path, model):
        RealTokenizer(model).save(str(tmp_path / "tokenizer.json"))
        assert read_tokenizer(tmp_path).tokens == ("x", "[UNK]")

    def test_ids_without_a_token_are_none(self, tmp_path):
        put(tmp_path, "tokenizer.json", tokenizer_json({"a": 0, "b": 2}, [added(4, "<x>")]))
        assert read_tokenizer(tmp_path).tokens == ("a", None, "b", None, "<x>")

    def test_reserved_looking_tokens_are_special_and_words_are_not(self, tmp_path):
        names = [
            *("<|reserved_special_token_0|>", "<unused12>", "[unused3]", "<extra_id_0>"),
            *("<|extra_0|>", "<|placeholder1|>", "[control_8]", "<SPECIAL_12>", ">>UNUSED_12<<"),
            *("<|dummy_4|>", "[UNUSED_TOKEN_145]", "<\uff5cplace▁holder▁no▁0\uff5c>"),
            *("reserved", "Ġunused", "placeholder", "<div>", "[0]", "extra_id"),
        ]
        vocab = {name: i for i, name in enumerate(names)}
        put(tmp_path, "tokenizer.json", tokenizer_json(vocab))
        assert read_tokenizer(tmp_path).special == set(range(12))

    def test_a_long_token_takes_no_time(self, tmp_path):
        vocab = {"<" + "reserved" * 400_000: 0, "<unused0>": 1}
        put(tmp_path, "tokenizer.json", tokenizer_json(vocab))
        began = time.perf_counter()
        assert read_tokenizer(tmp_path).special == {1}
        assert time.perf_counter() - began < 60  # hours, where every end is tried

    def test_config_only_tokens_are_those_that_transformers_adds(self, tmp_path):
        put(tmp_path, "tokenizer.json", tokenizer_json({"a": 0, "b": 1}, [added(2, "<x>", False)]))
        decoder = {
            "1": added(None, "stale"),
            "2": added(None, "<x>"),
            "3": added(None, "<pad>"),
            "4": added(None, "a"),
        }
        put(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": decoder})
        found = read_tokenizer(tmp_path)
        assert found.tokens == ("a", "b", "<x>", "<pad>")
        assert found.special == {2, 3}
        assert found.fingerprint == fingerprint_tokens(found.tokens)

    def test_vocab_json_with_added_tokens(self, tmp_path):
        put(tmp_path, "vocab.json", {"a": 0, "<unused0>": 1})
        put(tmp_path, "added_tokens.json", {"<a>": 3})
        decoder = {"1": added(None, "<renamed>"), "2": added(None, "word", False)}
        put(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": decoder})
        found = read_tokenizer(tmp_path)
        assert found.tokens == ("a", "<renamed>", "word", "<a>")
        assert found.special == {1, 3}
        assert found.format == "vocab.json"

    def test_sentencepiece(self, tmp_path):
        put(tmp_path, "tokenizer.model", SENTENCEPIECE)
        put(tmp_path, "added_tokens.json", {"[PAD]": 7})
        found = read_tokenizer(tmp_path)
        assert found.tokens[:7] == ("<unk>", "<s>", "</s>", "<0x0A>", "<table>", "▁the", "er")
        assert found.tokens[7:] == ("[PAD]",)
        assert found.special == {0, 1, 2, 4, 7}
        assert found.format == "sentencepiece"

    @pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken", "tiktoken.model"])
    def test_tiktoken_spells_bytes_as_tokenizer_json_does(self, tmp_path, name):
        put(tmp_path, name, TIKTOKEN)
        found = read_tokenizer(tmp_path)
        assert found.tokens == ("a", "Ġthe", "ÿ", "Ã©")
        assert found.format == "tiktoken"

    def test_order_of_sources(self, tmp_path):
        assert read_tokenizer(tmp_path) is None
        put(tmp_path, "tokenizer.model", SENTENCEPIECE)
        put(tmp_path, "vocab.json", {"v": 0})
        assert read_tokenizer(tmp_path).format == "vocab.json"
        put(tmp_path, "tokenizer.json", tokenizer_json({"t": 0}))
        assert read_tokenizer(tmp_path).tokens == ("t",)

    def test_fingerprint_is_of_the_table_not_of_the_file(self, tmp_path):
        for name, text in (
            ("one", json.dumps(tokenizer_json({"a": 0, "b": 1}))),
            ("two", json.dumps(tokenizer_json({"b": 1, "a": 0}, kind="WordLevel"), indent=4)),
            ("three", json.dumps(tokenizer_json({"b": 0, "a": 1}))),
        ):
            put(tmp_path / name, "tokenizer.json", text)
        one, two, three = (read_tokenizer(tmp_path / name) for name in ("one", "two", "three"))
        assert one.fingerprint == two.fingerprint != three.fingerprint
        assert len(one.fingerprint) == 32
        assert fingerprint_tokens([None, "a"]) != fingerprint_tokens(["null", "a"])

    def test_equal_files_are_parsed_once_and_few_are_remembered(self, tmp_path):
        for name in ("base", "finetuned"):
            put(tmp_path / name, "tokenizer.json", tokenizer_json({"only here": 0}))
        base, finetuned = (read_tokenizer(tmp_path / name) for name in ("base", "finetuned"))
        assert base.tokens is finetuned.tokens
        for number in range(6):
            put(tmp_path, "tokenizer.json", tokenizer_json({str(number): 0}))
            assert read_tokenizer(tmp_path).tokens == (str(number),)
        assert len(module._cache) == 4


class TestBehaviour:
    def test_every_chat_template_counts(self, tmp_path):
        put(tmp_path, "tokenizer.json", tokenizer_json({"a": 0}))
        put(tmp_path, "chat_template.jinja", "one")
        put(tmp_path, "additional_chat_templates/tool.jinja", "two")
        put(tmp_path, "chat_template.json", {"chat_template": "three"})
        several = [{"name": "default", "template": "four"}, {"name": "rag", "template": "five"}]
        put(tmp_path, "tokenizer_config.json", {"chat_template": several})
        assert read_tokenizer(tmp_path).chat_templates == "one\ntwo\nthree\nfour\nfive"
        put(tmp_path, "tokenizer_config.json", {"chat_template": "six"})
        assert read_tokenizer(tmp_path).chat_templates == "one\ntwo\nthree\nsix"

    def test_named_ids_from_strings_and_configs(self, tmp_path):
        put(tmp_path, "vocab.json", {"a": 0, "<s>": 1, "</s>": 2, "<eot>": 3, "<pad>": 4})
        named = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "<gone>"}
        put(tmp_path, "tokenizer_config.json", {**named, "add_bos_token": True, "unk_token": None})
        put(tmp_path, "special_tokens_map.json", {"unk_token": "a", "sep_token": "</s>"})
        inner = {"eos_token_id": 3, "pad_token_id": None}
        put(tmp_path, "config.json", {"bos_token_id": 1, "pad_token_id": -1, "text_config": inner})
        stops = {"eos_token_id": [2, 3, 10**30], "pad_token_id": 4}
        put(tmp_path, "generation_config.json", stops)
        assert read_tokenizer(tmp_path).named == {
            "bos": (1,),
            "eos": (2, 3),
            "unk": (0,),
            "sep": (2,),
            "pad": (4,),
        }

    def test_what_matters(self):
        found = Tokenizer(
            tokens=("user", "<a>", "<b>", None, "<unk>", "</s>"),
            special=frozenset({1, 2, 3, 4, 5}),
            chat_templates="<a>user",
            named={"eos": (5,), "unk": (4,)},
            format="tokenizer.json",
            fingerprint="",
        )
        assert [found.use(i) for i in range(6)] == ["", "chat template", "", "", "", "eos"]
        assert [found.matters(i) for i in range(6)] == [False, True, False, False, False, True]

    def test_ids_of_a_repeated_string_is_the_lowest(self):
        found = Tokenizer(("a", "b", None, "a"), frozenset(), "", {}, "vocab.json", "")
        assert found.ids() == {"a": 0, "b": 1}


HOSTILE = [
    ("tokenizer.json", [], "is a JSON array"),
    ("tokenizer.json", b"\xff", "not UTF-8"),
    ("tokenizer.json", {}, "the vocabulary must be an object of ids by token, but is None"),
    ("tokenizer.json", tokenizer_json("abc"), "the vocabulary must be an object"),
    ("tokenizer.json", tokenizer_json({}), "has no tokens"),
    ("tokenizer.json", tokenizer_json({"a": -1}), "the id of 'a' is -1"),
    ("tokenizer.json", tokenizer_json({"a": MAX_TOKENS}), "expected 0 to 4194303"),
    ("tokenizer.json", tokenizer_json({"a": 10**12}), "the id of 'a' is 1000000000000"),
    ("tokenizer.json", tokenizer_json({"a": 10**390}), "the id of 'a' is 1000"),
    ("tokenizer.json", tokenizer_json({"a": 1.0}), "must be a whole number, but is 1.0"),
    ("tokenizer.json", tokenizer_json({"a": True}), "must be a whole number, but is True"),
    ("tokenizer.json", tokenizer_json({"a": 0, "b": 0}), "id 0 is both 'a' and 'b'"),
    ("tokenizer.json", tokenizer_json([["a", 0.0], []]), "a Unigram piece must be"),
    ("tokenizer.json", tokenizer_json([[5, 0.0]]), "a Unigram piece must be"),
    ("tokenizer.json", tokenizer_json({"a": 0}, [added(0, "b")]), "id 0 is both 'a' and 'b'"),
    ("tokenizer.json", tokenizer_json({"a": 0}, [added("1", "b")]), "must be a whole number"),
    ("tokenizer.json", tokenizer_json({"a": 0}, [{"id": 1}]), "an added token must be"),
    ("tokenizer.json", tokenizer_json({"a": 0}, ["b"]), "an added token must be"),
    ("tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": {"b": 1}}, "must be a list"),
    ("tokenizer.json", '{"model": {"vocab": {"\\ud800": 0}}}', "an unpaired surrogate"),
    ("vocab.json", {"a": None}, "must be a whole number, but is None"),
    ("vocab.json", [], "is a JSON array"),
    ("tokenizer.model", b"", "has no tokens"),
    ("tokenizer.model", SENTENCEPIECE[:-3], "a field of 8 bytes where 5 are left, at piece 7"),
    ("tokenizer.model", SENTENCEPIECE[:20], "at piece 1"),
    ("tokenizer.model", piece(b"\xff"), "text that is not UTF-8, at piece 0"),
    ("tokenizer.model", delimited(1, varint(3 << 3) + b"\1"), "a piece without text, at piece 0"),
    ("tokenizer.model", varint(1 << 3) + b"\1", "a piece without text"),
    ("tokenizer.model", b"\xff" * 20, "an unterminated number"),
    ("tokenizer.model", b"\x0b", "a field of unknown wire type 3"),
    ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "is not a SentencePiece"),
    ("qwen.tiktoken", b"YQ== 0\n!!! 1\n", "line 2 is not base64 and a rank"),
    ("qwen.tiktoken", b"YQ== 0\nYg==\n", "line 2 is not base64 and a rank"),
    ("qwen.tiktoken", b"YQ== -1\n", "line 1 is not base64 and a rank"),
    ("qwen.tiktoken", b"YQ== 999999999999\n", "the id of 'a' is 999999999999"),
    ("qwen.tiktoken", b"YQ== 0\nYg== 0\n", "id 0 is both 'a' and 'b'"),
    ("qwen.tiktoken", b"\xff\xfe\n", "line 1 is not base64 and a rank"),
]
HOSTILE_BESIDE = [
    ("added_tokens.json", {"b": 10**12}, "the id of 'b' is 1000000000000"),
    ("added_tokens.json", {"b": 0}, "id 0 is both 'a' and 'b'"),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder must be"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"-1": added(0, "b")}}, "a number, but is"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"²": added(0, "b")}}, "a number, but is"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": 5}}}, "an added token"),
    ("tokenizer_config.json", {"chat_template": 5}, "chat_template must be text, but is 5"),
    ("tokenizer_config.json", {"chat_template": [["x"]]}, "chat_template must be text"),
    ("tokenizer_config.json", {"eos_token": 5}, "eos_token must be text, but is 5"),
    ("tokenizer_config.json", {"eos_token": {"text": "a"}}, "eos_token must be text"),
    ("tokenizer_config.json", [], "is a JSON array"),
    ("config.json", {"eos_token_id": "0"}, "eos_token_id must be an id or a list of ids"),
    ("config.json", {"text_config": {"eos_token_id": [[0]]}}, "must be an id or a list of ids"),
    ("generation_config.json", {"pad_token_id": True}, "pad_token_id must be an id"),
    ("chat_template.jinja", b"\xff", "is not UTF-8 text"),
]


class TestHostile:
    @pytest.mark.parametrize(("name", "content", "message"), HOSTILE)
    def test_a_table_that_means_nothing(self, tmp_path, name, content, message):
        put(tmp_path, name, content)
        with pytest.raises(CompanionError) as caught:
            read_tokenizer(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert message in str(caught.value)
        assert len(str(caught.value)) < len(str(tmp_path)) + 250

    @pytest.mark.parametrize(("name", "content", "message"), HOSTILE_BESIDE)
    def test_a_companion_that_means_nothing(self, tmp_path, name, content, message):
        put(tmp_path, "vocab.json", {"a": 0})
        put(tmp_path, name, content)
        with pytest.raises(CompanionError, match=message) as caught:
            read_tokenizer(tmp_path)
        assert name in str(caught.value) or "vocab.json" in str(caught.value)

    def test_a_link_out_of_the_folder(self, tmp_path):
        put(tmp_path, "secret.json", tokenizer_json({"a": 0}))
        (tmp_path / "model").mkdir()
        (tmp_path / "model/tokenizer.json").symlink_to(tmp_path / "secret.json")
        with pytest.raises(CompanionError, match="points outside the checkpoint"):
            read_tokenizer(tmp_path / "model")

    @settings(deadline=None, max_examples=150, database=None, derandomize=True)
    @given(data=st.data())
    def test_damaged_sentencepiece(self, tmp_path_factory, data):
        raw = bytearray(SENTENCEPIECE[: data.draw(st.integers(1, len(SENTENCEPIECE)))])
        for at in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=3)):
            raw[at] = data.draw(st.integers(0, 255))
        self.read_or_refuse(tmp_path_factory.mktemp("damaged"), "tokenizer.model", bytes(raw))

    @settings(deadline=None, max_examples=150, database=None, derandomize=True)
    @given(data=st.data())
    def test_any_json(self, tmp_path_factory, data):
        scalars = st.none() | st.booleans() | st.integers(-5, 10**15) | st.text(max_size=3)
        keys = st.sampled_from(["id", "content", "special", "chat_template", "0", "7", "<x>"])
        anything = st.recursive(
            scalars,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
            max_leaves=6,
        )
        folder = tmp_path_factory.mktemp("any")
        config = ["added_tokens_decoder", "chat_template", "eos_token"]
        values = {name: data.draw(anything) for name in config}
        put(folder, "tokenizer_config.json", values)
        put(folder, "config.json", {"eos_token_id": data.draw(anything)})
        table = {"model": {"vocab": data.draw(anything)}, "added_tokens": data.draw(anything)}
        self.read_or_refuse(folder, "tokenizer.json", table)

    def read_or_refuse(self, folder, name, content):
        put(folder, name, content)
        try:
            found = read_tokenizer(folder)
        except CompanionError:
            return
        assert found.tokens[-1] is not None
        assert all(0 <= i < len(found.tokens) for i in found.special)


@pytest.mark.parametrize("last", [(1 << 16) + 64, MAX_TOKENS - 1])
def test_an_id_far_beyond_all_others_takes_no_memory(last, tmp_path):
    put(tmp_path, "vocab.json", {"a": last})
    says = f"the id of 'a' is {last}, but it has only 1 tokens; download or save"
    with pytest.raises(CompanionError, match=says):
        read_tokenizer(tmp_path)
    put(tmp_path, "vocab.json", {"a": 1})
    put(tmp_path, "added_tokens.json", {"b": min(last + 64, MAX_TOKENS - 1)})
    tracemalloc.start()
    try:
        with pytest.raises(CompanionError, match=r"the id of 'b' is \d+, but it has only 2"):
            read_tokenizer(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_ids_may_have_large_gaps(tmp_path):
    put(tmp_path, "vocab.json", {"a": 1, "b": (1 << 16) + 127})
    assert len(read_tokenizer(tmp_path).tokens) == (1 << 16) + 128
