"""The card of a published folder is complete and correct, and escapes hostile names."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from diffxfer.diffs.artifact.card import base_models, write_card
from diffxfer.diffs.artifact.manifest import LicenseEntry, Manifest, SourceEntry
from diffxfer.errors import printable
from diffxfer.evaluation.scores import TaskScore
from diffxfer.publishing.model_card import write_model_card

COMMIT = "c" * 40
LLAMA = LicenseEntry(license="llama3.1", license_link="LICENSE")
CAUSAL = {"architectures": ["LlamaForCausalLM"]}


def source(name: str, *, hub: bool = True, **more: Any) -> SourceEntry:
    return SourceEntry(name=name, revision=COMMIT if hub else None, shards={}, **more)


def manifest(kind: Any, sources: dict[str, SourceEntry], **more: Any) -> Manifest:
    return Manifest(
        diffxfer_format=1,
        kind=kind,
        diffxfer_version="1",
        command={"verb": "transfer", "alpha": 0.8},
        checksum="c",
        sources=sources,
        shards={},
        files={},
        tensors={},
        **more,
    )


def split(card: bytes) -> tuple[dict[str, Any], str]:
    _, front, body = card.decode().split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found, body


ROLES = {
    "finetuned": source("me/sft"),
    "base": source("org/base"),
    "target": source("org/target", license=LLAMA),
}


def test_a_graft() -> None:
    scores = TaskScore("gsm8k", "exact_match", "strict-match", 0.75, 0.01, 100)
    front, body = split(write_model_card("me/graft", manifest("graft", ROLES), CAUSAL, [scores]))
    (index,) = front.pop("model-index")
    assert front == {
        "base_model": ["org/target", "me/sft", "org/base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "llama3.1",
        "license_link": f"https://huggingface.co/org/target/blob/{COMMIT}/LICENSE",
        "tags": ["diffxfer", "merge"],
    }
    assert index["name"] == "graft"
    (result,) = index["results"]
    assert result["dataset"] == {"type": "gsm8k", "name": "gsm8k"}
    (metric,) = result["metrics"]
    assert metric["value"] == 0.75
    assert metric["name"] == "exact_match (strict-match)"
    assert "target + 0.8 · (finetuned − base)" in body
    assert 'AutoModelForCausalLM.from_pretrained("me/graft", dtype="auto")' in body
    assert f"| target | [org/target](https://huggingface.co/org/target) at {COMMIT} |" in body
    assert "| gsm8k | exact\\_match (strict-match) | 0.7500 ± 0.0100 | 100 |" in body


def test_a_diff_vector_says_how_to_apply_it() -> None:
    roles = {role: ROLES[role] for role in ("finetuned", "base")}
    front, body = split(write_model_card("me/diff", manifest("diff", roles), {}, []))
    assert front["library_name"] == "diffxfer"
    assert front["base_model"] == ["me/sft", "org/base"]
    assert not {"base_model_relation", "license", "model-index"} & front.keys()
    assert "    diffxfer apply me/diff TARGET -o OUT\n" in body
    assert "from_pretrained" not in body


def test_a_diff_vector_with_a_head_is_applied_with_it() -> None:
    roles = {role: ROLES[role] for role in ("finetuned", "base")}
    made = manifest("diff", roles, added_tensors=["score.weight"])
    for card in (write_model_card("me/diff", made, {}, []), write_card("diff", made)):
        assert b"TARGET -o OUT --added bring\n" in card


def test_a_masked_language_model_is_not_tagged_as_fine_tuned() -> None:
    made = manifest("tuned", {"model": source("org/roberta")})
    made.command["objective"] = "mlm"
    for card in (write_model_card("me/roberta", made, {}, []), write_card("roberta", made)):
        assert split(card)[0]["tags"] == ["diffxfer", "fill-mask"]


def test_the_scores_of_a_classifier_are_of_its_task() -> None:
    config = {"architectures": ["RobertaForSequenceClassification"]}
    scores = TaskScore("reviews", "acc", "none", 0.75, 0.01, 100)
    made = manifest("tuned", {"model": source("org/roberta")})
    front, _ = split(write_model_card("me/roberta", made, config, [scores]))
    assert front["model-index"][0]["results"][0]["task"]["type"] == "text-classification"


def test_a_tuned_model_is_no_model_of_its_teacher() -> None:
    roles = {"model": source("me/graft", license=LLAMA), "teacher": source("me/sft")}
    front, _ = split(write_model_card("me/tuned", manifest("tuned", roles), CAUSAL, []))
    assert front["base_model"] == ["me/graft"]
    assert front["base_model_relation"] == "finetune"
    assert front["license"] == "llama3.1"


def test_a_graft_by_way_of_a_diff_vector_is_of_the_same_models() -> None:
    inner = {role: ROLES[role] for role in ("finetuned", "base")}
    roles = {"diff vector": source("me/diff", made_from=inner), "target": ROLES["target"]}
    assert base_models(manifest("graft", roles)) == base_models(manifest("graft", ROLES))
    front, _ = split(write_card("graft", manifest("graft", roles)))
    assert front["base_model"] == ["org/target", "me/sft", "org/base"]


def test_folders_are_no_models_of_the_hub() -> None:
    roles = {**ROLES, "target": source("my-folder", hub=False), "base": source("../../etc")}
    front, body = split(write_model_card("me/graft", manifest("graft", roles), CAUSAL, []))
    assert front["base_model"] == ["me/sft"]
    assert "license" not in front
    assert "| target | my-folder |" in body


@pytest.mark.parametrize(("role", "whose"), [("finetuned", "fine-tuned model"), ("base", "base")])
def test_whose_card_states_the_licence_of_a_diff_vector(role: str, whose: str) -> None:
    roles = {name: ROLES[name] for name in ("finetuned", "base")}
    roles[role] = roles[role].model_copy(update={"license": LLAMA})
    front, body = split(write_model_card("me/diff", manifest("diff", roles), {}, []))
    assert front["license"] == "llama3.1"
    assert f"llama3.1, as the {whose}'s card states it." in body


def test_a_licence_of_the_user() -> None:
    card = write_model_card("me/g", manifest("graft", ROLES), CAUSAL, [], license="mit")
    assert split(card)[0]["license"] == "mit"
    assert "license_link" not in split(card)[0]


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"architectures": ["LlavaForConditionalGeneration"]}, "import AutoProcessor, Llava"),
        ({"architectures": ["os; import sys"]}, "import AutoModelForCausalLM, AutoTokenizer"),
        ({"architectures": [3], "auto_map": {}}, "trust_remote_code=True"),
        ({}, "import AutoModelForCausalLM, AutoTokenizer"),
    ],
)
def test_how_it_is_loaded(config: dict[str, Any], line: str) -> None:
    assert line in write_model_card("me/g", manifest("graft", ROLES), config, []).decode()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.text(max_size=10))
@pytest.mark.parametrize("hub", [True, False])
def test_hostile_names(hub: bool, name: str, word: str) -> None:
    text = "".join(char for char in name if char.isprintable())
    hostile = LicenseEntry(license=f"a\n---\n{text}", license_name=text, license_link=text)
    roles = {**ROLES, "target": source(f"{name}\n---\nlicense: mit", hub=hub, license=hostile)}
    score = TaskScore(f"{word}|\n---", word, word, 0.5, None, 1)
    card = write_model_card("me/g", manifest("graft", roles), CAUSAL, [score])
    front = card.decode().split("\n---\n", 1)[0].removeprefix("---\n")
    found = yaml.safe_load(front)
    assert found["license"] == hostile.license
    assert found["base_model"] == ["me/sft", "org/base"]
    assert found["model-index"][0]["results"][0]["dataset"]["type"] == printable(score.task)
    rows = [line for line in card.decode().splitlines() if line.startswith("| target |")]
    assert len(rows) == 2
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)
