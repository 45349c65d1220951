"""Options that select tensors by name: what they select, and their effect on a graft."""

import re

import pytest
import torch

from diffxfer import apply_diff, extract_diff, transfer
from diffxfer.diffs.jobs.shards import parse_size
from diffxfer.diffs.matching.selection import make_selection
from diffxfer.errors import MatchError, OptionError, VocabularyError
from tests import families, oracle
from tests.oracle import Options, prove

ROLES = ("finetuned", "base", "target")
NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.attn.weight",
    "model.layers.0.mlp.weight",
    "model.layers.1.attn.weight",
    "model.layers.1.mlp.weight",
    "lm_head.weight",
)


@pytest.fixture
def roles(tmp_path):
    folders = []
    for seed, role in enumerate(ROLES):
        generator = torch.Generator().manual_seed(seed)
        model = {name: torch.randn((3, 4), generator=generator).bfloat16() for name in NAMES}
        folders.append(families.save_tensors(tmp_path / role, model))
    return folders


def changed(graft, target):
    old, new = oracle.load(target), oracle.load(graft)
    return [name for name in NAMES if not oracle.same(old[name], new[name])]


class TestSelection:
    def test_everything_by_default(self):
        selection = make_selection()
        assert selection.selects("anything")
        assert selection.alpha_of("anything") == 1.0
        assert not selection.may_be_missing("anything")

    def test_include_then_exclude(self):
        selection = make_selection(include=["attn", "mlp"], exclude=[r"layers\.1\.mlp"])
        assert [name for name in NAMES if selection.selects(name)] == list(NAMES[1:4])

    def test_last_alpha_wins(self):
        scales = {"layers": 0.5, "attn": -1, r"layers\.1": 0}
        selection = make_selection(alpha=2, alpha_for=scales)
        assert [selection.alpha_of(name) for name in NAMES] == [2.0, -1.0, 0.5, 0.0, 0.0, 2.0]

    def test_alpha_for_given_twice_takes_its_last_place(self):
        first = make_selection(alpha_for={"attn": 1, "layers": 2})
        second = make_selection(alpha_for={"layers": 2, "attn": 1})
        assert first.alpha_of(NAMES[1]) == 2
        assert second.alpha_of(NAMES[1]) == 1

    @pytest.mark.parametrize("alpha", [float("nan"), float("inf"), float("-inf")])
    def test_scale_that_is_no_finite_number(self, alpha):
        with pytest.raises(OptionError, match=r"--alpha: .*finite"):
            make_selection(alpha=alpha)
        with pytest.raises(OptionError, match=r"--alpha-for 'mlp': .*finite"):
            make_selection(alpha_for={"mlp": alpha})

    @pytest.mark.parametrize("option", ["include", "exclude", "allow_missing"])
    def test_no_regular_expression(self, option):
        flag = "--" + option.replace("_", "-")
        with pytest.raises(OptionError, match=rf"{flag}: '\*' is not a regular expression \("):
            make_selection(**{option: ["*"]})
        with pytest.raises(OptionError, match=r"--alpha-for: '\(' is not a regular expression"):
            make_selection(alpha_for={"(": 1.0})

    @pytest.mark.parametrize(
        ("options", "flag"),
        [
            ({"include": ["mlp", "mpl"]}, "--include"),
            ({"exclude": ["mpl"]}, "--exclude"),
            ({"alpha_for": {"mpl": 1.0}}, "--alpha-for"),
        ],
    )
    def test_pattern_that_matches_nothing(self, options, flag):
        with pytest.raises(OptionError) as caught:
            make_selection(**options).refuse_unused(NAMES)
        assert str(caught.value) == (
            f"{flag}: 'mpl' matches none of the {len(NAMES)} tensors, which have names"
            " such as lm_head.weight;"
            " quote it for the shell, and correct it"
        )

    def test_allow_missing_may_match_nothing(self):
        make_selection(allow_missing=["vision"]).refuse_unused(NAMES)


class TestGrafts:
    @pytest.mark.parametrize(
        "options",
        [
            Options(include=("attn",)),
            Options(exclude=("attn", "head")),
            Options(include=("layers",), exclude=("mlp",), alpha=0.5),
            Options(alpha_for={"layers": 0.5, r"layers\.1": -1.0, "embed": 0}),
            Options(alpha=0.0, alpha_for={"mlp": 1.0}),
            Options(alpha=-2, include=("mlp",), out_dtype=torch.float32),
        ],
        ids=repr,
    )
    def test_is_the_oracles(self, roles, tmp_path, options):
        prove(tmp_path / "out", *roles, options)

    def test_what_is_left_out_keeps_its_bytes(self, roles, tmp_path):
        transfer(*roles, tmp_path / "out", include=["attn"])
        assert changed(tmp_path / "out", roles[2]) == [NAMES[1], NAMES[3]]

    def test_alpha_zero_copies(self, roles, tmp_path):
        report = transfer(*roles, tmp_path / "out", alpha=0)
        assert changed(tmp_path / "out", roles[2]) == []
        assert report.tensors == {"copied": len(NAMES)}
        assert {group.why for group in report.plan} == {"alpha is 0"}

    def test_negative_zero_is_zero(self, roles, tmp_path):
        transfer(*roles, tmp_path / "out", alpha=-0.0)
        assert changed(tmp_path / "out", roles[2]) == []

    def test_alpha_zero_lets_a_broken_difference_be(self, roles, tmp_path):
        """What alpha 0 only copies is not read in the other roles: NaN there does no harm."""
        nan = torch.full((3, 4), float("nan"), dtype=torch.bfloat16)
        families.edit_tensors(roles[0], lm_head__weight=nan)
        transfer(*roles, tmp_path / "out", alpha_for={"lm_head": 0.0})

    def test_typing_errors_are_refused_before_anything_is_written(self, roles, tmp_path):
        for options in ({"include": ["mpl"]}, {"exclude": ["mpl"]}, {"alpha_for": {"mpl": 1}}):
            with pytest.raises(OptionError, match="'mpl' matches none of the"):
                transfer(*roles, tmp_path / "out", **options)
        with pytest.raises(OptionError, match="'mpl' matches none of the"):
            extract_diff(*roles[:2], tmp_path / "out", exclude=["mpl"])
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("verb", ["transfer", "apply"])
    def test_a_tensor_that_the_target_lacks_may_be_excluded(self, roles, tmp_path, verb):
        extra = torch.ones(2)
        for folder in roles[:2]:
            families.edit_tensors(folder, value_head__weight=extra)
        if verb == "transfer":
            report = transfer(*roles, tmp_path / "out", exclude=["value_head"])
        else:
            extract_diff(*roles[:2], tmp_path / "diff")
            diff = tmp_path / "diff"
            report = apply_diff(diff, roles[2], tmp_path / "out", exclude=["value_head"])
        assert report.tensors == {"grafted": len(NAMES), "dropped": 1}


class TestExtract:
    def test_what_was_left_out_is_not_missing(self, roles, tmp_path):
        report = extract_diff(*roles[:2], tmp_path / "diff", exclude=["mlp", "embed"])
        assert report.tensors == {"extracted": 3, "left out": 3}
        assert oracle.load(tmp_path / "diff").keys() == {NAMES[1], NAMES[3], NAMES[5]}
        report = apply_diff(tmp_path / "diff", roles[2], tmp_path / "out")
        assert report.tensors == {"grafted": 3, "copied": 3}
        copied = {group.why for group in report.plan if group.kind == "copied"}
        assert copied == {"not part of the diff vector"}
        assert changed(tmp_path / "out", roles[2]) == [NAMES[1], NAMES[3], NAMES[5]]

    def test_same_as_leaving_it_out_of_a_transfer(self, roles, tmp_path):
        extract_diff(*roles[:2], tmp_path / "diff", include=["attn"], diff_dtype="float64")
        apply_diff(tmp_path / "diff", roles[2], tmp_path / "applied")
        transfer(*roles, tmp_path / "graft", include=["attn"])
        oracle.assert_same(oracle.load(tmp_path / "applied"), oracle.load(tmp_path / "graft"))

    def test_what_was_left_out_may_have_another_shape(self, roles, tmp_path):
        families.edit_tensors(roles[1], lm_head__weight=torch.ones(5, 4).bfloat16())
        with pytest.raises(VocabularyError, match="3 in finetuned, 5 in base"):
            extract_diff(*roles[:2], tmp_path / "diff")
        extract_diff(*roles[:2], tmp_path / "diff", exclude=["lm_head"])

    def test_nothing_left(self, roles, tmp_path):
        with pytest.raises(MatchError, match="no tensor is left to extract"):
            extract_diff(*roles[:2], tmp_path / "diff", exclude=["weight"])

    @pytest.mark.parametrize("excluded", [("mlp",), ("embed_tokens", "lm_head")])
    def test_tied_finetuned_and_untied_target(self, roles, tmp_path, excluded):
        """What was left out of a tied model is left out for both of the target's tensors."""
        for folder in roles[:2]:
            tensors = oracle.load(folder)
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            families.edit_tensors(folder, **tensors)
        names = [name for name in excluded if name != "lm_head"]
        extract_diff(*roles[:2], tmp_path / "diff", exclude=names, diff_dtype="float64")
        apply_diff(tmp_path / "diff", roles[2], tmp_path / "applied")
        transfer(*roles, tmp_path / "graft", exclude=excluded)
        oracle.assert_same(oracle.load(tmp_path / "applied"), oracle.load(tmp_path / "graft"))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 mb", 5 * 10**8),
        ("1.5KB", 1500),
        ("20B", 20),
        ("7G", 7 * 10**9),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "0.1B", "-5GB", "GB", "5GiB", "7", "9" * 400 + "GB", "five", "5 GB 2", "1e9"]
)
def test_sizes_that_are_none(text):
    with pytest.raises(OptionError, match=f"--max-shard-size: .*{re.escape(repr(text))}"):
        parse_size(text)


def test_unknown_dtypes(roles, tmp_path):
    with pytest.raises(OptionError, match=r"--diff-dtype: .*'int8'.*; use one of source, float64"):
        extract_diff(*roles[:2], tmp_path / "out", diff_dtype="int8")
    with pytest.raises(OptionError, match=r"--out-dtype: .*'int8'.*; use one of float64"):
        transfer(*roles, tmp_path / "out", out_dtype="int8")


def test_unknown_vocabulary_mode(roles, tmp_path):
    with pytest.raises(OptionError, match=r"--vocab: .*'names'.*; use one of auto, ids, tokens"):
        transfer(*roles, tmp_path / "out", vocab="names")
