"""The shipped family: the effect of the diff vector on trained models."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from diffxfer import transfer
from diffxfer.family import family_folder

if TYPE_CHECKING:
    from collections.abc import Iterable

FAMILY = family_folder()
MEMBERS = ("base", "target", "finetuned", "direct")
SCORES = json.loads((FAMILY / "scores.json").read_text("utf-8"))

ACCURACY, BITS = SCORES["accuracy"], SCORES["bits_per_character"]
ALPHAS = list(ACCURACY["graft"])

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
    for alpha in ALPHAS:
        transfer(*roles, folder / alpha, alpha=float(alpha))
    return {alpha: folder / alpha for alpha in ALPHAS}


def slow_but(quick: str, names: Iterable[str]) -> list[Any]:
    """One of them is scored in every run, the others take 3 to 10 s each."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if name == quick else slow) for name in names]


@pytest.mark.parametrize("alpha", slow_but("1.0", ALPHAS))
def test_graft_scores_what_it_did_when_made(
    alpha: str, grafts: dict[str, Path], scoring: Any
) -> None:
    graft = grafts[alpha]
    right, bits = ACCURACY["graft"][alpha], BITS["graft"][alpha]
    assert scoring.accuracy(graft) == pytest.approx(right, abs=TOLERANCE)
    assert scoring.bits_per_character(graft) == pytest.approx(bits, abs=TOLERANCE)


# Those of target and direct are also those of lm-eval, in test_family_tasks.py.
@pytest.mark.parametrize("member", slow_but("target", MEMBERS))
def test_member_scores_what_it_did_when_made(member: str, scoring: Any) -> None:
    folder = FAMILY / member
    assert scoring.accuracy(folder) == pytest.approx(ACCURACY[member], abs=TOLERANCE)
    assert scoring.bits_per_character(folder) == pytest.approx(BITS[member], abs=TOLERANCE)


def test_the_effect_is_large() -> None:
    assert ACCURACY["target"] < 0.02
    assert ACCURACY["graft"]["1.0"] > 0.85
    assert ACCURACY["direct"] > 0.95


def test_graft_keeps_most_of_what_the_successor_learned() -> None:
    graft = BITS["graft"]["1.0"]
    assert BITS["target"] < graft < BITS["base"]
    assert graft - BITS["target"] < BITS["base"] - graft


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


def test_held_out_text_has_a_character_a_token(scoring: Any) -> None:
    text = scoring.held_out_text()
    assert text.isascii()
    assert len(AutoTokenizer.from_pretrained(FAMILY / "base").tokenize(text)) == len(text)
    assert len(text) == 220 * scoring.CONTEXT  # whole windows, below 30 kB


def test_shipped_files_are_small_and_hold_no_pickle() -> None:
    shipped = [path for name in MEMBERS for path in (FAMILY / name).iterdir()]
    assert {path.suffix for path in shipped} == {".json", ".safetensors", ".jinja"}
    shipped += [FAMILY / name for name in ("task.jsonl", "text.txt", "scores.json")]
    assert sum(path.stat().st_size for path in shipped) <= 8_000_000


def test_module_prints_the_folder() -> None:
    command = [sys.executable, "-m", "diffxfer.family"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert Path(printed.strip()) == FAMILY
