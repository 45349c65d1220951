import random
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RealTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from diffxfer.diffs.vocab.pair_base import ADDED, NONE, pair_with_base
from diffxfer.diffs.vocab.pair_target import pair_with_target
from diffxfer.diffs.vocab.rows import graft_runs
from diffxfer.diffs.vocab.tokens import read_tokenizer
from diffxfer.errors import OptionError, VocabularyError
from diffxfer.streaming.plan import RunKind
from tests.diffs.vocab.vocabularies import pairs, runs, tok, tokenizers

GRAFT, COPY = RunKind.GRAFT, RunKind.COPY

# A scaled-down Llama: the words, then the special slots of 3.0, four of which 3.1 renamed.

WORDS = ("a", "b", "c", "d")
LLAMA_30 = (
    *("<|begin_of_text|>", "<|end_of_text|>"),  # 4, 5
    *("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),  # 6, 7
    *("<|reserved_special_token_2|>", "<|reserved_special_token_3|>"),  # 8, 9
    *("<|start_header_id|>", "<|end_header_id|>"),  # 10, 11
    *("<|reserved_special_token_4|>", "<|eot_id|>"),  # 12, 13
    *("<|reserved_special_token_5|>", "<|reserved_special_token_6|>"),  # 14, 15
)
LLAMA_31 = (
    *LLAMA_30[:4],
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>"),
    *LLAMA_30[6:8],
    *("<|eom_id|>", "<|eot_id|>"),
    *("<|python_tag|>", "<|reserved_special_token_3|>"),
)
LLAMA_TEMPLATE = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "{{ m.content }}<|eot_id|>{% endfor %}"
)


def llama(specials=LLAMA_30, eos="<|eot_id|>", template=LLAMA_TEMPLATE):
    return tok(*WORDS, *specials, template=template, bos="<|begin_of_text|>", eos=eos)


def renamed_30(names):
    """Llama 3.0's special tokens with some renamed."""
    return tuple(names.get(token, token) for token in LLAMA_30)


CHATML = {
    "<|reserved_special_token_0|>": "<|im_start|>",
    "<|reserved_special_token_1|>": "<|im_end|>",
}


class TestLlama:
    def test_renamed_reserved_slots_pair_by_position(self):
        base, finetuned, target = llama(eos="<|end_of_text|>"), llama(), llama(LLAMA_31)
        first, second = pairs(base, finetuned, target)
        assert (first.mode, second.mode) == ("ids", "ids")
        assert first.base_ids.tolist() == second.finetuned_ids.tolist() == list(range(16))
        assert second.translate == {i: i for i in range(16)}
        assert (second.dropped, second.warnings, second.renamed) == ((), (), {})
        assert graft_runs(second, first, finetuned_rows=16, base_rows=16, target_rows=16) == (
            16,
            runs((GRAFT, 0, 16, (0, 0, 0))),
        )

    def test_the_same_from_files(self, tmp_path):
        found = {}
        for role, specials in (("base", LLAMA_30), ("finetuned", LLAMA_30), ("target", LLAMA_31)):
            real = RealTokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, []))
            real.add_special_tokens(list(specials))
            fast = PreTrainedTokenizerFast(tokenizer_object=real, eos_token="<|eot_id|>")
            fast.chat_template = LLAMA_TEMPLATE
            fast.save_pretrained(tmp_path / role)
            found[role] = read_tokenizer(tmp_path / role)
        first, second = pairs(**found)
        assert (first.mode, second.mode) == ("ids", "ids")
        assert second.finetuned_ids.tolist() == list(range(16))

    def test_a_reserved_token_in_use_makes_it_tokens(self):
        template = LLAMA_TEMPLATE + "<|reserved_special_token_3|>"
        finetuned = llama(template=template)
        first, second = pairs(llama(), finetuned, llama(LLAMA_31))
        assert (first.mode, second.mode) == ("ids", "tokens")
        expected = [0, 1, 2, 3, 4, 5, 6, 7, NONE, 8, 10, 11, NONE, 13, NONE, 9]
        assert second.finetuned_ids.tolist() == expected
        assert second.dropped == tuple(f"<|reserved_special_token_{i}|>" for i in (4, 5, 6))
        assert second.translate[9] == 15

    def test_a_pad_token_that_the_target_lacks(self):
        finetuned = tok(*WORDS, *LLAMA_30, pad="<|reserved_special_token_5|>")
        target = llama(LLAMA_31, template="<|python_tag|>")
        with pytest.raises(VocabularyError) as caught:
            pairs(llama(), finetuned, target)
        assert str(caught.value) == (
            "the target's tokenizer: does not have '<|reserved_special_token_5|>', which "
            "finetuned uses (pad); add the token to the target's tokenizer, or stop using it in "
            "finetuned's chat template and configs"
        )

    def test_a_pad_token_on_a_slot_that_the_target_uses_for_nothing(self):
        # Llama 3.0's last reserved slot, 128255, is _250, which 3.1 calls _247: fine-tunes of 3.0
        # pad with it.
        finetuned = tok(*WORDS, *LLAMA_30, pad=LLAMA_30[-1], template=LLAMA_TEMPLATE)
        with pytest.raises(VocabularyError) as caught:
            pairs(llama(), finetuned, llama(LLAMA_31))
        assert str(caught.value) == (
            "the target's tokenizer: does not have '<|reserved_special_token_6|>', which "
            "finetuned uses (pad), and has '<|reserved_special_token_3|>' at its id (15); "
            "add the token to the target's tokenizer, or stop using it in finetuned's chat "
            "template and configs, or give --vocab ids to pair rows by position, if that token can "
            "replace it"
        )
        first = pair_with_base(finetuned, llama())
        found = pair_with_target(finetuned, first.added, first.renamed, llama(LLAMA_31), mode="ids")
        assert found.mode == "ids"
        assert found.translate == {i: i for i in range(16)}
        assert found.finetuned_ids.tolist() == list(range(16))
        assert (found.renamed, found.dropped, found.warnings) == ({}, (), ())

    @pytest.mark.parametrize(
        ("words", "specials", "template", "kept"),
        [
            (WORDS, LLAMA_31, "<|reserved_special_token_3|>", LLAMA_TEMPLATE),
            (WORDS, LLAMA_31, LLAMA_TEMPLATE, "<|reserved_special_token_3|>"),
            (WORDS, LLAMA_31[:-1], LLAMA_TEMPLATE, LLAMA_TEMPLATE),
            (WORDS, (*LLAMA_31[:-1], "word"), LLAMA_TEMPLATE, LLAMA_TEMPLATE),
            (("b", "a", "c", "d"), LLAMA_31, LLAMA_TEMPLATE, LLAMA_TEMPLATE),
        ],
        ids=["in use by target", "in use by finetuned", "no slot", "a word", "other words"],
    )
    def test_position_is_no_remedy(self, words, specials, template, kept):
        finetuned = tok(*WORDS, *LLAMA_30, pad=LLAMA_30[-1], template=kept)
        with pytest.raises(VocabularyError, match="does not have") as caught:
            pairs(llama(), finetuned, tok(*words, *specials, template=template))
        assert "--vocab" not in str(caught.value)

    def test_chatml_on_reserved_slots_pairs_by_position_and_renames(self):
        specials = renamed_30(CHATML)
        finetuned = llama(specials, eos="<|im_end|>", template="<|im_start|>x<|im_end|>")
        first, second = pairs(llama(), finetuned, llama(LLAMA_31))
        assert (first.mode, second.mode) == ("ids", "ids")
        assert first.renamed == {
            6: "<|reserved_special_token_0|>",
            7: "<|reserved_special_token_1|>",
        }
        assert first.added == {}
        assert second.renamed == {6: "<|im_start|>", 7: "<|im_end|>"}
        assert second.finetuned_ids.tolist() == list(range(16))
        assert second.translate == {i: i for i in range(16)}

    def test_finetuned_with_the_names_of_31(self):
        finetuned = tok(*WORDS, *LLAMA_31, pad="<|finetune_right_pad_id|>")
        first, second = pairs(llama(), finetuned, llama(LLAMA_31))
        assert (first.mode, second.mode) == ("ids", "ids")
        assert first.renamed == {
            8: "<|reserved_special_token_2|>",
            12: "<|reserved_special_token_4|>",
            14: "<|reserved_special_token_5|>",
        }
        assert (second.renamed, second.warnings) == ({}, ())
        assert second.finetuned_ids.tolist() == list(range(16))

    def test_a_renamed_slot_that_moved_is_found_by_its_name(self):
        specials = renamed_30({"<|reserved_special_token_3|>": "<|im_end|>"})
        finetuned = llama(specials, eos="<|im_end|>")
        first, second = pairs(llama(), finetuned, llama(LLAMA_31))
        assert first.renamed == {9: "<|reserved_special_token_3|>"}
        assert second.mode == "tokens"
        assert second.renamed == {15: "<|im_end|>"}
        assert second.translate[9] == 15
        assert second.finetuned_ids[15] == 9
        assert second.finetuned_ids[9] == 8  # <|reserved_special_token_2|> moved as well

    def test_a_renamed_slot_that_the_target_gave_a_third_name(self):
        used = llama(renamed_30({"<|reserved_special_token_5|>": "<|im_end|>"}), eos="<|im_end|>")
        with pytest.raises(VocabularyError, match=r"does not have '<\|im_end\|>'.*\(eos\)"):
            pairs(llama(), used, llama(LLAMA_31))
        unused = llama(renamed_30({"<|reserved_special_token_5|>": "<|im_end|>"}))
        first, second = pairs(llama(), unused, llama(LLAMA_31))
        assert second.mode == "ids"
        assert second.dropped == ("<|im_end|>",)
        assert second.finetuned_ids.tolist() == [*range(14), NONE, 15]
        assert 14 not in second.translate
        assert graft_runs(second, first, finetuned_rows=16, base_rows=16, target_rows=16)[1] == (
            runs((GRAFT, 0, 14, (0, 0, 0)), (COPY, 14, 1, (-1, -1, 14)), (GRAFT, 15, 1, (15,) * 3))
        )

    def test_a_renamed_slot_whose_new_name_the_target_has_elsewhere(self):
        finetuned = llama(renamed_30(CHATML), eos="<|im_end|>")
        target = llama((*LLAMA_31, "<|im_start|>", "<|im_end|>"))
        _, second = pairs(llama(), finetuned, target)
        assert second.mode == "ids"
        assert second.renamed == {}
        assert (second.translate[6], second.translate[7]) == (16, 17)
        assert second.finetuned_ids.tolist() == [*range(6), NONE, NONE, *range(8, 16), NONE, NONE]
        assert second.warnings == (
            "tokens that finetuned added, but the target already has (2), keep the "
            "target's rows: '<|im_start|>', '<|im_end|>'",
        )

    def test_added_chatml_is_appended(self):
        finetuned = llama((*LLAMA_30, "<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
        target = llama((*LLAMA_31, "<|image|>"))
        first, second = pairs(llama(), finetuned, target)
        assert first.base_ids.tolist() == [*range(16), ADDED, ADDED]
        assert first.added == {16: "<|im_start|>", 17: "<|im_end|>"}
        assert second.mode == "ids"
        assert second.additions == {17: 16, 18: 17}
        assert second.names == {17: "<|im_start|>", 18: "<|im_end|>"}
        assert second.translate == {**{i: i for i in range(16)}, 16: 17, 17: 18}
        assert second.finetuned_ids.tolist() == [*range(16), NONE, NONE, NONE]


class TestPairWithBase:
    def test_identical(self):
        same = tok("a", "b", "<s>")
        found = pair_with_base(same, tok("a", "b", "<s>"))
        assert found.mode == "ids"
        assert found.base_ids.tolist() == [0, 1, 2]
        assert (found.added, found.renamed, found.warnings) == ({}, {}, ())
        assert not found.base_ids.flags.writeable

    def test_tokens_by_string(self):
        found = pair_with_base(tok("b", "a", "x"), tok("a", "b", "y"))
        assert found.mode == "tokens"
        assert found.base_ids.tolist() == [1, 0, ADDED]
        assert found.added == {2: "x"}

    def test_holes_and_tokens_that_finetuned_lost(self):
        found = pair_with_base(tok("a", None, "c"), tok("a", "b", "c", "d"))
        assert found.mode == "ids"
        assert found.base_ids.tolist() == [0, NONE, 2]
        assert found.base_tokens == 4

    def test_a_token_added_in_a_hole_of_base(self):
        found = pair_with_base(tok("a", "b", "c"), tok("a", None, "c"))
        assert (found.mode, found.added) == ("ids", {1: "b"})
        assert found.base_ids.tolist() == [0, ADDED, 2]

    def test_a_regular_word_on_a_reserved_slot_is_a_rename(self):
        found = pair_with_base(tok("a", "word"), tok("a", "<unused0>"))
        assert (found.mode, found.renamed) == ("ids", {1: "<unused0>"})

    def test_in_tokens_a_rename_needs_special_slots_on_both_sides(self):
        base = tok("<unused0>", "<unused1>", "<unused2>", "b", "a")
        found = pair_with_base(tok("word", "<x>", "<y>", "a", "<unused2>"), base)
        assert found.mode == "tokens"
        assert found.renamed == {1: "<unused1>"}
        assert found.added == {0: "word", 2: "<y>"}
        assert found.base_ids.tolist() == [ADDED, 1, ADDED, 4, 2]

    def test_a_special_token_in_use_that_moved_makes_it_tokens(self):
        base = tok("a", "<x>", "<y>")
        swapped = ("a", "<y>", "<x>")
        assert pair_with_base(tok(*swapped), base).base_ids.tolist() == [0, 1, 2]
        used = pair_with_base(tok(*swapped, eos="<x>"), base)
        assert (used.mode, used.base_ids.tolist()) == ("tokens", [0, 2, 1])

    def test_repeated_strings_pair_in_order_and_are_added_once(self):
        found = pair_with_base(tok("b", "a", "a", "a", "n", "n"), tok("a", "b", "a"))
        assert found.base_ids.tolist() == [1, 0, 2, NONE, ADDED, NONE]
        assert found.added == {4: "n"}

    def test_ids_asked_for_trusts_positions_and_says_what_differs(self):
        found = pair_with_base(tok("a", "b", "<x>", "n"), tok("b", "a", "<y>"), "ids")
        assert found.base_ids.tolist() == [0, 1, 2, ADDED]
        assert (found.added, found.renamed) == ({3: "n"}, {2: "<y>"})
        assert found.warnings == (
            "paired by id, although 2 regular tokens differ between finetuned and base (the first "
            "is id 0: 'a' and 'b')",
        )

    def test_tokens_asked_for(self):
        found = pair_with_base(tok("a", "<x>"), tok("a", "<y>", "<x>"), "tokens")
        assert (found.mode, found.base_ids.tolist()) == ("tokens", [0, 2])
        same = tok("a", "b")
        assert pair_with_base(same, same, "tokens").mode == "tokens"

    def test_a_token_without_a_row_in_base_is_added(self):
        same = tok("a", "b", "<x>", "<y>")
        found = pair_with_base(same, same, rows=(3, 2))
        assert found.base_ids.tolist() == [0, 1, ADDED, 3]
        assert (found.mode, found.added, found.renamed) == ("ids", {2: "<x>"}, {})
        found = pair_with_base(tok("a", "b", "<z>"), same, rows=(3, 2))
        assert (found.added, found.renamed) == ({2: "<z>"}, {})
        twice = tok("a", "b", "a")
        assert pair_with_base(twice, twice, rows=(3, 2)).added == {}

    def test_no_such_mode(self):
        with pytest.raises(
            OptionError, match=r"--vocab: 'names' is unknown; use one of auto, ids, tokens"
        ):
            pair_with_base(tok("a"), tok("a"), "names")


class TestPairWithTarget:
    def test_by_string(self):
        base = tok("a", "b", "c", "d")
        target = tok("d", "t", "b", "a")
        _, found = pairs(base, base, target)
        assert found.mode == "tokens"
        assert found.finetuned_ids.tolist() == [3, NONE, 1, 0]
        assert found.translate == {0: 3, 1: 2, 3: 0}
        assert found.dropped == ("c",)
        assert found.warnings == ()

    def test_target_only_tokens_are_kept_in_ids(self):
        base = tok("a", "b")
        _, found = pairs(base, base, tok("a", "b", "c", "<x>"))
        assert found.mode == "ids"
        assert found.finetuned_ids.tolist() == [0, 1, NONE, NONE]

    def test_an_unused_special_token_past_the_targets_end_is_dropped(self):
        base = tok("a", "<x>")
        _, found = pairs(base, base, tok("a"))
        assert (found.mode, found.dropped, found.translate) == ("ids", ("<x>",), {0: 0})

    @pytest.mark.parametrize("role", ["bos", "eos", "pad"])
    def test_a_named_token_without_a_place(self, role):
        base = tok("a", "</s>", **{role: "</s>"})
        with pytest.raises(VocabularyError, match=rf"does not have '</s>'.*\({role}\)"):
            pairs(base, base, tok("a", "b"))

    def test_several_tokens_without_a_place(self):
        base = tok("a", "<x>", "<y>", template="<x><y>")
        listed = r"\(chat template\) \(2 tokens in all: '<x>', '<y>'\)"
        with pytest.raises(VocabularyError, match=listed):
            pairs(base, base, tok("a"))

    def test_a_word_of_the_template_may_be_dropped(self):
        base = tok("user", "a", "b", template="user")
        _, found = pairs(base, base, tok("b", "a"))
        assert found.dropped == ("user",)

    def test_an_added_token_that_the_target_has_keeps_the_targets_row(self):
        base, finetuned = tok("a", "b"), tok("a", "b", "<x>", "<y>", eos="<x>")
        _, found = pairs(base, finetuned, tok("a", "b", "c", "<x>"))
        assert found.mode == "ids"
        assert found.translate == {0: 0, 1: 1, 2: 3, 3: 4}
        assert (found.additions, found.names) == ({4: 3}, {4: "<y>"})
        assert found.finetuned_ids.tolist() == [0, 1, NONE, NONE, NONE]
        assert found.warnings == (
            "tokens that finetuned added, but the target already has (1), keep the "
            "target's rows: '<x>'",
        )
        _, same = pairs(base, finetuned, finetuned)
        assert same.finetuned_ids.tolist() == [0, 1, NONE, NONE]
        assert same.additions == {}

    def test_an_added_token_that_the_target_has_on_an_unused_slot(self):
        base = tok("a", "<unused0>", "<unused1>")
        finetuned = tok("a", "<unused0>", "<unused1>", "<x>")
        _, found = pairs(base, finetuned, tok("a", "<x>", "<unused1>"))
        assert found.mode == "ids"
        assert found.finetuned_ids.tolist() == [0, NONE, 2]
        assert found.translate == {0: 0, 2: 2, 3: 1}
        assert found.dropped == ("<unused0>",)

    def test_added_tokens_are_appended_in_the_order_of_their_ids(self):
        base = tok("a", None, "b")
        finetuned = tok("a", "<z>", "b", "<y>", "<x>")
        _, found = pairs(base, finetuned, tok("b", "a"))
        assert found.mode == "tokens"
        assert found.additions == {2: 1, 3: 3, 4: 4}
        assert found.names == {2: "<z>", 3: "<y>", 4: "<x>"}
        assert found.translate == {0: 1, 2: 0, 1: 2, 3: 3, 4: 4}

    def test_holes_of_either_keep_the_targets_row(self):
        base = tok("a", None, "c", "d")
        _, found = pairs(base, base, tok("a", "b", "c", "d"))
        assert (found.mode, found.finetuned_ids.tolist()) == ("ids", [0, NONE, 2, 3])
        _, found = pairs(base, base, tok("a", "b", None, "d"))
        assert (found.mode, found.finetuned_ids.tolist()) == ("tokens", [0, NONE, NONE, 3])
        assert found.dropped == ("c",)

    def test_ids_asked_for(self):
        base, finetuned = tok("a", "b", "<y>"), tok("a", "b", "<x>", eos="<x>")
        first = pair_with_base(finetuned, base)
        found = pair_with_target(finetuned, {}, first.renamed, tok("b", "a", "<z>"), "ids")
        assert found.finetuned_ids.tolist() == [0, 1, 2]
        assert found.translate == {0: 0, 1: 1, 2: 2}
        assert found.renamed == {2: "<x>"}
        assert found.warnings == (
            "the target's '<z>' (id 2) is renamed to '<x>'",
            "paired by id, although 2 regular tokens differ between finetuned and the target (the "
            "first is id 0: 'a' and 'b')",
        )

    def test_ids_asked_for_leaves_a_slot_to_the_new_token_that_has_its_name(self):
        finetuned = tok("a", "<x>", "<y>")
        first, found = pairs(tok("a", "<s>", "<t>"), finetuned, tok("a", "<y>", "b"), "ids")
        assert first.renamed == {1: "<s>", 2: "<t>"}
        assert found.translate == {0: 0, 2: 1}
        assert (found.renamed, found.dropped) == ({}, ("<x>",))

    def test_tokens_asked_for_keeps_a_renamed_slot_at_its_id(self):
        base, finetuned = tok("a", "<y>"), tok("a", "<x>")
        _, found = pairs(base, finetuned, tok("a", "<y>"), "tokens")
        assert (found.mode, found.renamed) == ("tokens", {1: "<x>"})
        assert found.finetuned_ids.tolist() == [0, 1]
        _, found = pairs(base, finetuned, finetuned, "tokens")
        assert (found.renamed, found.finetuned_ids.tolist()) == ({}, [0, 1])

    def test_unrelated_tokenizers(self):
        base = tok("a", "b", "c", "d", "e")
        _, found = pairs(base, base, tok("v", "w", "x", "y", "a"))
        assert found.warnings == (
            "only 1 of the target's 5 tokens have a counterpart in finetuned: their tokenizers "
            "are barely related",
        )

    @pytest.mark.parametrize(
        ("added", "renamed"),
        [({9: "x"}, {}), ({-1: "x"}, {}), ({0: "b"}, {}), ({}, {2: "x"}), ({0: "a"}, {3: "x"})],
    )
    def test_changes_of_another_tokenizer(self, added, renamed):
        finetuned = tok("a", "b", None, "a")
        with pytest.raises(VocabularyError, match="do not match finetuned's tokenizer"):
            pair_with_target(finetuned, added, renamed, tok("a", "b"))

    def test_many_tokens_are_quick(self):
        words = [f"token {i}" for i in range(150_000)]
        ordered = tok(*words)
        random.Random(0).shuffle(words)
        shuffled = tok(*words)
        start = time.perf_counter()
        first, second = pairs(ordered, shuffled, ordered)
        _, found = graft_runs(
            second, first, finetuned_rows=150_000, base_rows=150_000, target_rows=150_000
        )
        assert time.perf_counter() - start < 60  # 0.5 s; hours, were each compared with all
        assert sum(run.count for run in found) == 150_000


@settings(deadline=None, max_examples=200, database=None, derandomize=True)
@given(tokenizers(), tokenizers(), tokenizers(), st.sampled_from(["auto", "ids", "tokens"]))
def test_what_a_pairing_promises(base, finetuned, target, mode):
    first, second = pairs(base, finetuned, target, mode)
    grafted = [i for i in second.finetuned_ids.tolist() if i != NONE]
    assert len(set(grafted)) == len(grafted)
    assert not set(grafted) & set(first.added)
    assert len(set(second.translate.values())) == len(second.translate)
    assert set(second.additions) == set(
        range(len(target.tokens), len(target.tokens) + len(second.additions))
    )
    places = {place: i for i, place in second.translate.items()}
    for place, i in [*enumerate(second.finetuned_ids.tolist()), *second.additions.items()]:
        assert i == NONE or places[place] == i
    kept = {token for i, token in enumerate(finetuned.tokens) if i in second.translate}
    assert kept.isdisjoint(second.dropped)
    assert kept | set(second.dropped) == set(finetuned.tokens) - {None}
    # The output's tokenizer: no string twice, and in `tokens` every translation keeps its string.
    names = dict(enumerate(target.tokens)) | second.renamed | second.names
    strings = [name for name in names.values() if name is not None]
    assert len(set(strings)) == len(strings)
    if second.mode == "tokens":
        for i, place in second.translate.items():
            assert names[place] == finetuned.tokens[i]
    for i in [*first.added, *first.renamed]:
        if i in second.translate:
            assert names[second.translate[i]] == finetuned.tokens[i]


@settings(deadline=None, max_examples=300, database=None, derandomize=True)
@given(tokenizers(), tokenizers(), tokenizers(), st.data())
def test_the_remedy_of_position_is_one(base, finetuned, target, data):
    specials = [token for token in finetuned.tokens if token and token.startswith("<")]
    assume(specials)
    finetuned = tok(*finetuned.tokens, pad=data.draw(st.sampled_from(specials)))
    first = pair_with_base(finetuned, base)
    try:
        pair_with_target(finetuned, first.added, first.renamed, target)
    except VocabularyError as error:
        if "--vocab ids" in str(error):
            found = pair_with_target(finetuned, first.added, first.renamed, target, mode="ids")
            (pad,) = finetuned.named["pad"]
            assert found.translate[pad] == pad
