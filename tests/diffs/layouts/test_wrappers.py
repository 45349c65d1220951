"""Wrappers of training in names: in any role, anywhere in a name, and nested."""

import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from diffxfer import apply_diff, extract_diff, transfer, verify
from diffxfer.errors import MatchError
from tests.diffs.layouts import models
from tests.families import llama

WRAPPERS = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "the other way": lambda name: f"module._orig_mod.{name}",
    "fsdp": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "checkpointing": lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."),
    "one in the other": lambda name: (
        "_fsdp_wrapped_module."
        + name.replace("self_attn.", "_fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.")
    ),
    "inner module": lambda name: name.replace("layers.1.", "layers.1.module."),
}


@pytest.fixture(scope="module")
def roles(tmp_path_factory):
    root = tmp_path_factory.mktemp("llamas")
    return models.save_roles(root, *[(LlamaForCausalLM, llama())] * 3)


@pytest.fixture(scope="module")
def expected(roles):
    finetuned, base, target = map(models.load, roles)
    return {name: models.graft_of(finetuned[name], base[name], target[name]) for name in target}


def wrapped(roles, root, which, new_name):
    folders = []
    for role, folder in zip(models.ROLES, roles, strict=True):
        shutil.copytree(folder, root / role)
        folders.append(root / role)
        if role in which:
            models.rename(root / role, new_name)
    return folders


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("which", [("finetuned",), ("base",), ("target",), ("base", "target")])
def test_any_role(roles, expected, tmp_path, wrapper, which):
    folders = wrapped(roles, tmp_path, which, WRAPPERS[wrapper])
    report = transfer(*folders, tmp_path / "out")
    models.assert_equal(models.load(tmp_path / "out"), expected)
    models.load_clean(LlamaForCausalLM, tmp_path / "out")
    assert report.tensors == {"grafted": len(expected)}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_through_a_diff_vector(roles, expected, tmp_path, wrapper):
    folders = wrapped(roles, tmp_path, ("finetuned", "target"), WRAPPERS[wrapper])
    extract_diff(*folders[:2], tmp_path / "diff", diff_dtype="float64")
    apply_diff(tmp_path / "diff", folders[2], tmp_path / "out")
    found = models.load(tmp_path / "out")
    if wrapper != "inner module":  # all have it: it may be the model's own
        models.assert_equal(found, expected)
        models.load_clean(LlamaForCausalLM, tmp_path / "out")
    assert verify(tmp_path / "diff", base=folders[1], finetuned=folders[0]).restored


def test_a_module_that_all_roles_have_is_the_models_own(roles, tmp_path):
    folders = wrapped(roles, tmp_path, models.ROLES, WRAPPERS["inner module"])
    transfer(*folders, tmp_path / "out")
    assert models.load(tmp_path / "out").keys() == models.load(folders[2]).keys()


def test_an_average_of_weights_counts_its_steps(roles, expected, tmp_path):
    """`torch.optim.swa_utils.AveragedModel` stores ``module.…`` and ``n_averaged``."""
    folders = wrapped(roles, tmp_path, ("finetuned",), WRAPPERS["parallel"])
    models.edit(folders[0], lambda tensors: tensors | {"n_averaged": torch.tensor(7)})
    transfer(*folders, tmp_path / "out")
    models.assert_equal(models.load(tmp_path / "out"), expected)


def test_how_many_are_counted_in_a_line(roles, tmp_path):
    folders = wrapped(roles, tmp_path, ("finetuned", "target"), WRAPPERS["compiled"])
    count = len(models.load(roles[0]))
    (note,) = transfer(*folders, tmp_path / "out", dry_run=True).notes
    assert note == (
        f"names from which training wrappers were removed: {count} of finetuned, {count} of target"
    )


def test_two_tensors_of_one_name_are_refused(roles, tmp_path):
    folders = wrapped(roles, tmp_path, (), str)
    name = "model.norm.weight"
    models.edit(folders[0], lambda t: t | {f"_orig_mod.{name}": t[name] + 1})
    with pytest.raises(MatchError, match=rf"are both named {name} once the wrappers of training"):
        transfer(*folders, tmp_path / "out")
