"""Mistakes that a run detects although every file is valid by itself."""

import json
import os
import subprocess
import sys

import pytest

from diffxfer import apply_diff, extract_diff, transfer
from diffxfer.errors import ArtifactError, CheckpointError, InputChangedError
from tests import tiny


@pytest.fixture
def roles(tmp_path):
    folders = tiny.make_world(tmp_path / "world").folders
    return [folders[role] for role in ("finetuned", "base", "target")]


def test_one_pattern_may_be_given_as_a_string(roles, tmp_path):
    one = transfer(*roles, tmp_path / "one", include="norm")
    many = transfer(*roles, tmp_path / "many", include=["norm"])
    assert one.tensors == many.tensors
    command = json.loads((tmp_path / "one" / "diffxfer.json").read_bytes())["command"]
    assert command["include"] == ["norm"]


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ((0, 0, 2), "finetuned and base are the same files"),
        ((0, 1, 1), "base and target are the same files"),
        ((0, 1, 0), "finetuned and target are the same files"),
    ],
)
def test_one_model_in_two_roles_is_said(roles, tmp_path, order, says):
    report = transfer(*(roles[role] for role in order), tmp_path / "out")
    assert any(says in warning for warning in report.warnings)


def test_three_models_are_not_remarked_upon(roles, tmp_path):
    assert transfer(*roles, tmp_path / "out").warnings == ()


def test_a_companion_that_changes_during_the_run_is_noticed(roles, tmp_path):
    licence = roles[2] / "LICENSE"
    licence.write_text("as planned")

    def meddle(done, total):
        licence.write_text("another one")

    with pytest.raises(InputChangedError, match="LICENSE: changed during the run"):
        transfer(*roles, tmp_path / "out", progress=meddle)
    assert not (tmp_path / "out").exists()


def test_a_companion_of_a_diff_vector_must_be_the_one_it_names(roles, tmp_path):
    extract_diff(*roles[:2], tmp_path / "diff")
    config = tmp_path / "diff" / "companions" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(
        ArtifactError, match=r"config\.json: is not the file that the manifest names"
    ):
        apply_diff(tmp_path / "diff", roles[2], tmp_path / "out")


def test_a_graft_of_a_diff_vector_knows_what_that_was_made_from(roles, tmp_path):
    extract_diff(*roles[:2], tmp_path / "diff")
    apply_diff(tmp_path / "diff", roles[2], tmp_path / "out")
    sources = json.loads((tmp_path / "out" / "diffxfer.json").read_bytes())["sources"]
    assert sources["diff vector"]["made_from"].keys() == {"finetuned", "base"}


def test_a_name_that_is_nearly_right_is_proposed(roles, tmp_path):
    wrong = roles[1].with_name("bases")
    with pytest.raises(CheckpointError, match=r"did you mean .*base\?"):
        transfer(roles[0], wrong, roles[2], tmp_path / "out")


def test_closed_streams_do_no_harm(roles, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "diffxfer", "transfer", *map(str, roles), "-o", str(out)]
    shell = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    assert subprocess.run(shell, env=os.environ, timeout=60).returncode == 0
    assert (out / "diffxfer.json").exists()
