from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffxfer.diffs.vocab.pair_base import ADDED, NONE, BasePairing
from diffxfer.diffs.vocab.pair_target import TargetPairing
from diffxfer.diffs.vocab.rows import extract_runs, graft_runs
from diffxfer.errors import VocabularyError
from diffxfer.streaming.plan import Run, RunKind
from tests.diffs.vocab.vocabularies import pairs, runs, tok, tokenizers

GRAFT, COPY, ADD, ZERO = RunKind.GRAFT, RunKind.COPY, RunKind.ADD, RunKind.ZERO


def base_pairing(base_ids, base_tokens=None):
    size = len(base_ids) if base_tokens is None else base_tokens
    return BasePairing("ids", np.array(base_ids), {}, {}, size)


def target_pairing(finetuned_ids, additions=None):
    additions = additions or {}
    ids = np.array([*finetuned_ids, *[NONE] * len(additions)])
    names = dict.fromkeys(additions, "<x>")
    return TargetPairing("ids", ids, additions, {}, {}, names, (), ())


class TestExtractRuns:
    def test_identical_with_padding_is_one_run(self):
        found = extract_runs(base_pairing([0, 1, 2]), finetuned_rows=5, base_rows=5)
        assert found == runs((GRAFT, 0, 5, (0, 0)))

    def test_every_kind(self):
        pairing = base_pairing([1, 2, ADDED, NONE, 4, ADDED], base_tokens=7)
        found = extract_runs(pairing, finetuned_rows=10, base_rows=9)
        assert found == runs(
            (GRAFT, 0, 2, (0, 1)),
            (ADD, 2, 1, (2, -1)),
            (ZERO, 3, 1, (-1, -1)),
            (GRAFT, 4, 1, (4, 4)),
            (ADD, 5, 1, (5, -1)),
            (ZERO, 6, 1, (-1, -1)),  # base has a token there, finetuned has not
            (GRAFT, 7, 2, (7, 7)),
            (ZERO, 9, 1, (-1, -1)),
        )

    def test_a_tokenizer_larger_than_the_embedding(self):
        pairing = base_pairing([0, 1, 2, 3])
        both = extract_runs(pairing, finetuned_rows=3, base_rows=3)
        assert both == runs((GRAFT, 0, 3, (0, 0)))
        grown = extract_runs(pairing, finetuned_rows=4, base_rows=3)
        assert grown == runs((GRAFT, 0, 3, (0, 0)), (ZERO, 3, 1, (-1, -1)))

    def test_fewer_rows_where_only_padding_is_lost(self):
        found = extract_runs(base_pairing([0, 1]), finetuned_rows=2, base_rows=8)
        assert found == runs((GRAFT, 0, 2, (0, 0)))

    def test_fewer_rows_where_the_tokens_are_lost_too(self):
        pairing = base_pairing([0, 1], base_tokens=4)
        found = extract_runs(pairing, finetuned_rows=2, base_rows=4)
        assert found == runs((GRAFT, 0, 2, (0, 0)))

    def test_fewer_rows_where_a_token_loses_its_row(self):
        with pytest.raises(VocabularyError) as caught:
            extract_runs(base_pairing([0, 1, 2, 3]), finetuned_rows=2, base_rows=4)
        assert str(caught.value) == (
            "finetuned: has 2 rows and base 4, so 2 tokens that both tokenizers have lack "
            "a row in finetuned (the first is id 2); give finetuned the tokenizer that it was "
            "resized for"
        )

    def test_no_tokenizer(self):
        assert extract_runs(None, finetuned_rows=3, base_rows=3) == runs((GRAFT, 0, 3, (0, 0)))
        with pytest.raises(VocabularyError) as caught:
            extract_runs(None, finetuned_rows=4, base_rows=3)
        assert str(caught.value) == (
            "the vocabulary's rows: 4 in finetuned, 3 in base, and no tokenizer shows which belong "
            "together; add the tokenizer files beside the weights"
        )

    def test_no_rows(self):
        assert extract_runs(base_pairing([]), finetuned_rows=0, base_rows=0) == []


class TestGraftRuns:
    def test_identical_is_one_run(self):
        pairing, first = target_pairing([0, 1, 2]), base_pairing([0, 1, 2])
        found = graft_runs(pairing, first, finetuned_rows=3, base_rows=3, target_rows=3)
        assert found == (3, runs((GRAFT, 0, 3, (0, 0, 0))))
        found = graft_runs(pairing, None, finetuned_rows=3, base_rows=None, target_rows=3)
        assert found == (3, runs((GRAFT, 0, 3, (0, 0))))
        found = graft_runs(pairing, None, finetuned_rows=3, base_rows=3, target_rows=3)
        assert found == (3, runs((GRAFT, 0, 3, (0, 0, 0))))

    def test_padding_of_the_target_is_kept(self):
        pairing = target_pairing([0, 1, 2])
        found = graft_runs(pairing, None, finetuned_rows=8, base_rows=None, target_rows=5)
        assert found == (5, runs((GRAFT, 0, 3, (0, 0)), (COPY, 3, 2, (-1, 3))))

    def test_padding_is_used_before_the_tensor_grows(self):
        pairing = target_pairing([0, 1], {2: 2, 3: 3, 4: 4})
        padded = graft_runs(pairing, None, finetuned_rows=5, base_rows=None, target_rows=6)
        assert padded == (
            6,
            runs((GRAFT, 0, 2, (0, 0)), (ADD, 2, 3, (2, -1)), (COPY, 5, 1, (-1, 5))),
        )
        grown = graft_runs(pairing, None, finetuned_rows=5, base_rows=None, target_rows=3)
        assert grown == (5, runs((GRAFT, 0, 2, (0, 0)), (ADD, 2, 3, (2, -1))))
        first = base_pairing([0, 1, ADDED, ADDED, ADDED], base_tokens=2)
        three = graft_runs(pairing, first, finetuned_rows=5, base_rows=2, target_rows=2)
        assert three == (5, runs((GRAFT, 0, 2, (0, 0, 0)), (ADD, 2, 3, (2, -1, -1))))

    def test_permuted_rows(self):
        pairing, first = target_pairing([2, 3, NONE, 0]), base_pairing([3, 1, 0, 1])
        found = graft_runs(pairing, first, finetuned_rows=4, base_rows=4, target_rows=4)
        assert found == (
            4,
            runs(
                (GRAFT, 0, 2, (2, 0, 0)),
                (COPY, 2, 1, (-1, -1, 2)),
                (GRAFT, 3, 1, (0, 3, 3)),
            ),
        )

    def test_rows_beyond_a_tensor_have_no_difference(self):
        pairing, first = target_pairing([0, 1, 2, 3]), base_pairing([0, 1, 3, NONE])
        rows = {"finetuned_rows": 4, "base_rows": 4, "target_rows": 4}
        kept = runs((GRAFT, 0, 2, (0, 0, 0)), (GRAFT, 2, 1, (2, 3, 2)), (COPY, 3, 1, (-1, -1, 3)))
        assert graft_runs(pairing, first, **rows) == (4, kept)
        short = runs((GRAFT, 0, 2, (0, 0, 0)), (COPY, 2, 2, (-1, -1, 2)))
        assert graft_runs(pairing, first, **{**rows, "base_rows": 3}) == (4, short)
        short = runs((GRAFT, 0, 3, (0, 0)), (COPY, 3, 1, (-1, 3)))
        rows = {"finetuned_rows": 3, "base_rows": None, "target_rows": 4}
        assert graft_runs(pairing, None, **rows) == (4, short)
        rows = {"finetuned_rows": 4, "base_rows": None, "target_rows": 2}
        assert graft_runs(pairing, None, **rows) == (2, runs((GRAFT, 0, 2, (0, 0))))

    def test_an_added_token_without_a_row_brings_none(self):
        pairing = target_pairing([0, 1], {2: 2, 3: 3})
        found = graft_runs(pairing, None, finetuned_rows=3, base_rows=None, target_rows=2)
        assert found == (3, runs((GRAFT, 0, 2, (0, 0)), (ADD, 2, 1, (2, -1))))
        found = graft_runs(pairing, None, finetuned_rows=2, base_rows=None, target_rows=3)
        assert found == (3, runs((GRAFT, 0, 2, (0, 0)), (COPY, 2, 1, (-1, 2))))

    def test_a_kept_token_without_a_row_in_the_target_brings_its_own(self):
        pairing = replace(target_pairing([0, 1, NONE]), kept={2: 3})
        sizes = {"finetuned_rows": 4, "base_rows": None}
        kept = graft_runs(pairing, None, target_rows=3, **sizes)
        assert kept == (3, runs((GRAFT, 0, 2, (0, 0)), (COPY, 2, 1, (-1, 2))))
        brought = graft_runs(pairing, None, target_rows=2, **sizes)
        assert brought == (3, runs((GRAFT, 0, 2, (0, 0)), (ADD, 2, 1, (3, -1))))
        with pytest.raises(VocabularyError, match="just before that of the added token of id 2"):
            graft_runs(pairing, None, target_rows=1, **sizes)

    def test_an_added_token_above_rows_that_the_target_lacks(self):
        pairing = target_pairing([0, 1, 2], {3: 3})
        with pytest.raises(VocabularyError) as caught:
            graft_runs(pairing, None, finetuned_rows=4, base_rows=None, target_rows=2)
        assert str(caught.value) == (
            "the target: has 2 rows, but its tokenizer has 3 tokens, so there is no row just "
            "before that of the added token '<x>'; resize the target's embeddings to "
            "its tokenizer first"
        )

    def test_a_token_that_lost_its_row(self):
        pairing, first = target_pairing([0, 1, 2]), base_pairing([0, 1, 2])
        with pytest.raises(VocabularyError, match="1 tokens that both tokenizers have"):
            graft_runs(pairing, first, finetuned_rows=2, base_rows=3, target_rows=3)

    def test_no_tokenizer(self):
        found = graft_runs(None, None, finetuned_rows=3, base_rows=3, target_rows=3)
        assert found == (3, runs((GRAFT, 0, 3, (0, 0, 0))))
        found = graft_runs(None, None, finetuned_rows=3, base_rows=None, target_rows=3)
        assert found == (3, runs((GRAFT, 0, 3, (0, 0))))
        with pytest.raises(VocabularyError, match="3 in finetuned, 3 in base, 4 in target"):
            graft_runs(None, None, finetuned_rows=3, base_rows=3, target_rows=4)


def of_row(found):
    """(kind, rows) of every output row, checking that each is covered once, in order."""
    rows = []
    for run in found:
        assert run.start == len(rows)
        assert run.count > 0
        rows += [
            (run.kind, tuple(row + k if row >= 0 else -1 for row in run.rows))
            for k in range(run.count)
        ]
    return rows


def follows(before, after):
    """Whether a row continues the one before, so that both belong in one run."""
    same = before[0] == after[0]
    steps = zip(before[1], after[1], strict=True)
    return same and all(b == a == -1 or (a >= 0 and b == a + 1) for a, b in steps)


@settings(deadline=None, max_examples=200, database=None, derandomize=True)
@given(tokenizers(), tokenizers(), tokenizers(), st.data())
def test_transfer_is_extract_then_apply(base, finetuned, target, data):
    mode = data.draw(st.sampled_from(["auto", "ids", "tokens"]))
    first, second = pairs(base, finetuned, target, mode)
    extra = st.integers(0, 3)
    finetuned_rows = len(finetuned.tokens) + data.draw(extra)
    base_rows = max(1, len(base.tokens) + data.draw(st.integers(-2, 3)))
    target_rows = len(target.tokens) + data.draw(extra)
    stored = extract_runs(first, finetuned_rows=finetuned_rows, base_rows=base_rows)
    sizes = {"finetuned_rows": finetuned_rows, "target_rows": target_rows}
    size, direct = graft_runs(second, first, base_rows=base_rows, **sizes)
    applied_size, applied = graft_runs(second, None, base_rows=None, **sizes)
    assert size == applied_size == max(target_rows, len(second.finetuned_ids))
    stored = of_row(stored)
    direct = of_row(direct)
    assert (len(stored), len(direct)) == (finetuned_rows, size)
    composed = []
    for r, (kind, rows) in enumerate(of_row(applied)):
        source = stored[rows[0]] if rows[0] >= 0 else None
        if kind is GRAFT and source[0] is ZERO:
            composed.append((COPY, (-1, -1, r)))
        elif kind is GRAFT:
            assert source[0] is GRAFT
            composed.append((GRAFT, (*source[1], r)))
        elif kind is ADD:
            assert source[0] is ADD
            composed.append((ADD, (rows[0], -1, -1)))
        else:
            composed.append((COPY, (-1, -1, r)))
    assert direct == composed


@settings(deadline=None, max_examples=100, database=None, derandomize=True)
@given(tokenizers(), st.randoms(use_true_random=False))
def test_a_permuted_target_is_right_token_by_token(base, rng):
    words = list(base.tokens)
    rng.shuffle(words)
    target = tok(*words)
    first, second = pairs(base, base, target, "tokens")
    assert second.dropped == ()
    for place, i in enumerate(second.finetuned_ids.tolist()):
        assert (base.tokens[i] if i != NONE else None) == target.tokens[place]
    rows = {"finetuned_rows": len(words), "base_rows": len(words), "target_rows": len(words)}
    cut = graft_runs(second, first, **rows)[1]
    for place, (kind, sources) in enumerate(of_row(cut)):
        if target.tokens[place] is None:
            assert (kind, sources) == (COPY, (-1, -1, place))
        else:
            i = base.tokens.index(target.tokens[place])
            assert (kind, sources) == (GRAFT, (i, i, place))
    by_row = of_row(cut)
    assert not any(follows(by_row[run.start - 1], by_row[run.start]) for run in cut[1:])


@settings(deadline=None, max_examples=50, database=None, derandomize=True)
@given(tokenizers(), st.integers(0, 4))
def test_identical_roles_are_one_run(base, padding):
    rows = len(base.tokens) + padding
    first, second = pairs(base, base, base)
    assert (first.mode, second.mode) == ("ids", "ids")
    if None in base.tokens:
        return
    found = graft_runs(second, first, finetuned_rows=rows, base_rows=rows, target_rows=rows)[1]
    assert found[0] == Run(GRAFT, 0, len(base.tokens), (0, 0, 0))
    assert len(found) == 1 + (padding > 0)
    whole = extract_runs(first, finetuned_rows=rows, base_rows=rows)
    assert whole == [Run(GRAFT, 0, rows, (0, 0))]


def test_rows_of_finetuned_and_base_must_agree_where_no_tokenizer_pairs_them():
    pairing = target_pairing([0, 1, 2])
    with pytest.raises(VocabularyError, match="3 in finetuned, 2 in base"):
        graft_runs(pairing, None, finetuned_rows=3, base_rows=2, target_rows=3)
