"""--rename, and the errors that say which one would pair most names."""

import json
import re
import shlex

import pytest
from transformers import LlamaForCausalLM

from diffxfer import apply_diff, extract_diff, transfer, verify
from diffxfer.diffs.matching.suggest import suggest_renames
from diffxfer.errors import Culprits, MatchError, OptionError
from tests import tiny
from tests.diffs.layouts import models
from tests.families import llama

STYLES = {
    "another root": lambda name: f"stem.{name}".replace("model.layers.", "model.block."),
    "another stack": lambda name: name.replace("model.layers.", "model.blocks."),
    "two places": lambda name: (
        name.replace("model.layers.", "backbone.h.")
        .replace("model.", "backbone.")
        .replace(".self_attn.", ".attention.")
    ),
    "a module more": lambda name: name.replace("self_attn.", "self_attn.inner."),
}


@pytest.fixture
def roles(tmp_path):
    return models.save_roles(tmp_path, *[(LlamaForCausalLM, llama())] * 3)


@pytest.fixture
def expected(roles):
    finetuned, base, target = map(models.load, roles)
    return {name: models.graft_of(finetuned[name], base[name], target[name]) for name in target}


def suggested(error):
    words = shlex.split(error.remedy)
    return [words[at + 1] for at, word in enumerate(words) if word == "--rename"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("role", models.ROLES)
def test_the_option_of_the_error_pairs_them(roles, expected, tmp_path, style, role):
    models.rename(roles[models.ROLES.index(role)], STYLES[style])
    with pytest.raises(MatchError) as caught:
        transfer(*roles, tmp_path / "out")
    assert f"is in {role} only" in caught.value.problem
    options = suggested(caught.value)
    assert options
    assert all(option.startswith(f"{role}:") for option in options)
    report = transfer(*roles, tmp_path / "out", rename=options)
    found = models.load(tmp_path / "out")
    if role == "target":  # its own names stay: they are what its code loads
        found = {name: found[STYLES[style](name)] for name in expected}
    models.assert_equal(found, expected)
    assert any(note.startswith("names changed by --rename: ") for note in report.notes)


@pytest.mark.parametrize("style", STYLES)
def test_through_a_diff_vector(roles, expected, tmp_path, style):
    for folder in roles[:2]:
        models.rename(folder, STYLES[style])
    extract_diff(*roles[:2], tmp_path / "diff", diff_dtype="float64")
    with pytest.raises(MatchError) as caught:
        apply_diff(tmp_path / "diff", roles[2], tmp_path / "out")
    assert "is in the diff vector only" in caught.value.problem
    options = suggested(caught.value)
    apply_diff(tmp_path / "diff", roles[2], tmp_path / "out", rename=options)
    models.assert_equal(models.load(tmp_path / "out"), expected)


def test_in_the_manifest_and_in_verify(roles, tmp_path):
    models.rename(roles[0], lambda name: name.replace("model.layers.", "stem.model.block."))
    option = r"finetuned:^stem\.model\.block\.=model.layers."
    extract_diff(*roles[:2], tmp_path / "diff", rename=[option])
    manifest = json.loads((tmp_path / "diff" / "diffxfer.json").read_text())
    assert manifest["command"]["rename"] == [option]
    assert set(models.load(tmp_path / "diff")) == set(models.load(roles[1]))
    with pytest.raises(OptionError, match="give the same") as caught:
        verify(tmp_path / "diff", base=roles[1], finetuned=roles[0])
    assert option in shlex.split(caught.value.problem)
    assert verify(tmp_path / "diff", base=roles[1], finetuned=roles[0], rename=[option]).restored


def test_another_rename_is_another_run(roles, tmp_path):
    """A run does not continue an unfinished run that had another --rename."""
    from diffxfer.diffs.jobs import job

    seen = []
    original = job.fingerprint

    def record(plan, files, described):
        seen.append(original(plan, files, described))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "fingerprint", record)
        for place, rename in enumerate(((), (r"base:^model\.=model.",))):
            extract_diff(*roles[:2], tmp_path / str(place), rename=rename)
    assert len(set(seen)) == 2


def test_by_the_command_line(roles, expected, tmp_path):
    models.rename(roles[0], STYLES["another root"])
    done = tiny.run("transfer", *roles, "-o", tmp_path / "out")
    assert done.status == 1
    options = re.findall(r"--rename '[^']*'", done.err)
    words = shlex.split(" ".join(options))
    done = tiny.run("transfer", *roles, "-o", tmp_path / "out", *words)
    assert done == tiny.Outcome(0, "", "")
    models.assert_equal(models.load(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("model", "not of the form ROLE:REGEX=TEXT"),
        ("finetuned:model", "not of the form ROLE:REGEX=TEXT"),
        ("finetuned:=x", "not of the form ROLE:REGEX=TEXT"),
        ("tuned:a=b", "'tuned' in 'tuned:a=b' is not a role of this command"),
        ("finetuned:(=b", "is not a regular expression"),
        (r"finetuned:a=\1", "is not a valid replacement for 'a'"),
        ("finetuned:^nowhere=b", "matches none of the"),
    ],
)
def test_senseless_options(roles, tmp_path, option, says):
    with pytest.raises(OptionError, match=re.escape(says)):
        transfer(*roles, tmp_path / "out", rename=[option])


def test_names_that_become_one_are_refused(roles, tmp_path):
    with pytest.raises(MatchError, match=r"renames model\.layers\.0\.\S+ and model\.layers\.1"):
        transfer(*roles, tmp_path / "out", rename=[r"base:layers\.\d=layers.0"])


def test_the_target_has_no_other_role_in_apply(roles, tmp_path):
    extract_diff(*roles[:2], tmp_path / "diff")
    with pytest.raises(OptionError, match="use one of target"):
        apply_diff(tmp_path / "diff", roles[2], tmp_path / "out", rename=["base:a=b"])


def culprits(holders, *names, shape="BF16 (3, 4)"):
    return [Culprits("x", name, (name,), "nothing", shape, "", holders) for name in names]


class TestSuggestions:
    def test_none_where_only_a_few_would_pair(self):
        ours = culprits(("finetuned",), "a.0.x", "b.x", "c.x", "d.x", "e.x")
        theirs = culprits(("base", "target"), "z.0.x")
        assert suggest_renames([*ours, *theirs]) is None

    def test_none_where_shapes_are_others(self):
        ours = culprits(("finetuned",), "a.0.x", "a.1.x")
        theirs = culprits(("base", "target"), "z.0.x", "z.1.x", shape="BF16 (4, 4)")
        assert suggest_renames([*ours, *theirs]) is None

    def test_says_how_many(self):
        ours = culprits(("finetuned",), "a.0.x", "a.1.x", "odd.y")
        theirs = culprits(("base", "target"), "z.0.x", "z.1.x")
        assert suggest_renames([*ours, *theirs]) == (
            r"if these are the same tensors, --rename 'finetuned:^a\.=z.' pairs 2 of the 3"
        )

    def test_nothing_where_one_role_has_them_all(self):
        assert suggest_renames(culprits(("finetuned",), "a.0.x", "a.1.x")) is None
