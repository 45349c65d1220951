"""Tiny models under the names that the documentation uses for large ones."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

import diffxfer
from diffxfer.family import family_folder
from tests.documented.pages import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hub.server import Hub

NAMES = {
    **dict.fromkeys(("llama-3.0", "BASE", "m1", "roberta-base", "my-law-llama"), "base"),
    **dict.fromkeys(("llama-3.0-sft", "FINETUNED", "INSTRUCT", "m1-sft"), "finetuned"),
    **dict.fromkeys(("llama-3.1", "TARGET", "YOURS", "m2", "m3", "roberta-newer"), "target"),
    **dict.fromkeys(("llama-3.1-instruct", "llama-3.1-sft", "llama-3.1-grafted"), "direct"),
    **dict.fromkeys(("sft-diff", "DIFF", "chat-skills"), "diff"),
    **dict.fromkeys(("GRAFT", "MODEL", "PATH", "graft"), "graft"),
    **dict.fromkeys(("my-roberta-classifier", "CLASSIFIER"), "classifier"),
    "wrapped-sft": "wrapped",
    **dict.fromkeys(("ADAPTER", "my-adapter"), "adapter"),
    "OLD-FLUX": "pipeline-base",
    "MY-FLUX": "pipeline-finetuned",
    "NEW-FLUX": "pipeline-target",
    "tasks": "tasks",
    "train.jsonl": "train.jsonl",
    "chain.yaml": "chain.yaml",
}
"""The model or file for each name in the documentation."""

ON_THE_HUB = {
    "meta-llama/Meta-Llama-3-8B": "base",
    "meta-llama/Llama-3.1-8B": "target",
    "meta-llama/Llama-3.1-8B-Instruct": "direct",
    "me/llama-3.0-sft": "finetuned",
    "deepseek-ai/DeepSeek-V3-Base": "base",
    "deepseek-ai/DeepSeek-V3.1-Base": "target",
    "deepseek-ai/DeepSeek-R1": "finetuned",
}

TASKS = ("gsm8k", "ifeval")
"""Tasks of lm-eval's own, whose questions are on the Hub: these are asked in their place."""


def make_stock(folder: Path) -> Path:
    """Make every model and file once.

    Args:
        folder: a new one.
    """
    family = family_folder()
    folder.mkdir()
    (folder / "adapter").symlink_to(family / "adapter")
    for role in ("base", "finetuned", "target", "direct"):
        (folder / role).symlink_to(family / role)
        _save(folder / f"pipeline-{role}" / "transformer", seed=len(role))
    base, finetuned, target = (folder / role for role in ("base", "finetuned", "target"))
    diffxfer.extract_diff(finetuned, base, folder / "diff")
    diffxfer.transfer(finetuned, base, target, folder / "graft")
    weights = load_file(finetuned / "model.safetensors")
    renamed = {name.replace("model.", "backbone.", 1): t for name, t in weights.items()}
    _variant(finetuned, folder / "wrapped", renamed)
    weights.pop("lm_head.weight")
    weights["score.weight"] = torch.ones(2, 128, dtype=torch.bfloat16)
    kind: dict[str, object] = {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "negative", "1": "positive"},
    }
    _variant(finetuned, folder / "classifier", weights, kind)
    _make_tasks(folder / "tasks", family / "tasks")
    rows = (ROOT / "examples" / "words.jsonl").read_text("utf-8").splitlines()[:8]
    (folder / "train.jsonl").write_text("\n".join(rows))
    recipe = {"bases": ["m1", "m2"], "finetuned": "m1-sft"}
    (folder / "chain.yaml").write_text(json.dumps(recipe))
    return folder


def publish_stock(hub: Hub, stock: Path) -> None:
    """Upload the models that have an id to the tests' Hub.

    Args:
        hub: which.
        stock: what was made.
    """
    for repo, name in ON_THE_HUB.items():
        hub.add(repo, (stock / name).resolve())


def _save(folder: Path, seed: int) -> None:
    """A component of a pipeline."""
    torch.manual_seed(0)
    weights = {f"conv.{i}.weight": 1 + torch.randn(4, 4, 3, 3) / 100 for i in range(3)}
    torch.manual_seed(seed)
    weights = {name: value + torch.randn_like(value) / 1000 for name, value in weights.items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')


def _variant(
    like: Path,
    folder: Path,
    weights: dict[str, torch.Tensor],
    config: dict[str, object] | None = None,
) -> None:
    """A model like another, with other weights, and other entries of its config."""
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    stated = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**stated, **(config or {})}))


def _make_tasks(folder: Path, family: Path) -> None:
    shutil.copytree(family, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("task.jsonl", "text.txt"):
        shutil.copy(family.parent / name, folder.parent / name)
    text = (family / "pig_latin_choice.yaml").read_text("utf-8")
    for name in TASKS:
        named = text.replace("task: pig_latin_choice", f"task: {name}")
        (folder / f"{name}.yaml").write_text(named)
