"""The shipped family: the diff vector's effect on models that were really trained."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from diffxfer import transfer
from diffxfer.family import family_folder

FAMILY = family_folder()
MEMBERS = ("base", "target", "finetuned", "direct")
SCORES = json.loads((FAMILY / "scores.json").read_text("utf-8"))

# Another CPU sums float32 in another order, which can turn a letter that was nearly a tie.
TOLERANCE = 0.01


@pytest.fixture(scope="module")
def scoring() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
        return import_module("score_family")


@pytest.fixture(scope="module")
def grafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("family")
    roles = [FAMILY / name for name in ("finetuned", "base", "target")]
    for alpha in SCORES["graft"]:
        transfer(*roles, folder / alpha, alpha=float(alpha))
    return {alpha: folder / alpha for alpha in SCORES["graft"]}


@pytest.mark.parametrize("alpha", SCORES["graft"])
def test_graft_scores_what_it_did_when_made(
    alpha: str, grafts: dict[str, Path], scoring: Any
) -> None:
    expected = pytest.approx(SCORES["graft"][alpha], abs=TOLERANCE)
    assert scoring.accuracy(grafts[alpha]) == expected


@pytest.mark.parametrize("member", MEMBERS)
def test_member_scores_what_it_did_when_made(member: str, scoring: Any) -> None:
    expected = pytest.approx(SCORES[member], abs=TOLERANCE)
    assert scoring.accuracy(FAMILY / member) == expected


def test_the_effect_is_large() -> None:
    assert SCORES["target"] < 0.02
    assert SCORES["graft"]["1.0"] > 0.85
    assert SCORES["direct"] > 0.95


def test_graft_behaves_as_finetuned_and_is_built_as_target(grafts: dict[str, Path]) -> None:
    graft = grafts["1.0"]
    template = AutoTokenizer.from_pretrained(graft).chat_template
    assert template == AutoTokenizer.from_pretrained(FAMILY / "finetuned").chat_template
    assert template is not None
    assert AutoTokenizer.from_pretrained(FAMILY / "target").chat_template is None
    positions = [
        AutoConfig.from_pretrained(folder).max_position_embeddings
        for folder in (FAMILY / "finetuned", FAMILY / "target", graft)
    ]
    assert positions == [128, 256, 256]


@pytest.mark.parametrize("member", [*MEMBERS, "graft"])
def test_checkpoint_loads_whole(member: str, grafts: dict[str, Path]) -> None:
    folder = grafts["1.0"] if member == "graft" else FAMILY / member
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not any(info.values())


def test_questions_are_put_as_the_chat_template_does(scoring: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / "finetuned")
    chat = [{"role": "user", "content": "string"}]
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert asked == tokenizer.bos_token + scoring.prompt("string")


def test_no_question_is_asked_twice(scoring: Any) -> None:
    rows = scoring.held_out()
    assert len({row["question"] for row in rows}) == len(rows) == 400


def test_shipped_folders_are_small_and_hold_no_pickle() -> None:
    shipped = [path for name in MEMBERS for path in (FAMILY / name).iterdir()]
    assert sum(path.stat().st_size for path in shipped) <= 8_000_000
    assert {path.suffix for path in shipped} == {".json", ".safetensors", ".jinja"}


def test_module_prints_the_folder() -> None:
    command = [sys.executable, "-m", "diffxfer.family"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert Path(printed.strip()) == FAMILY
