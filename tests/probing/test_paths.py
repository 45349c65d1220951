"""Paths between two models, against mixtures and losses computed here."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffxfer.errors import OptionError
from diffxfer.family import family_folder
from diffxfer.models.checkpoint import checkpoint_source
from diffxfer.models.graft import transfer_source
from diffxfer.probing.paths import MeasuredPath, SkippedPath, measure_control, measure_path
from diffxfer.probing.row_data import ProbeRows, read_probe_rows
from tests.families import randomize
from tests.probing.test_permute import SIZES
from tests.probing.test_rows import encoder_tokenizer, words, write

if TYPE_CHECKING:
    from pathlib import Path

FAMILY = family_folder()
CONFIG = json.loads((FAMILY / "base" / "config.json").read_text())
TASK = [json.loads(line) for line in (FAMILY / "task.jsonl").read_text().splitlines()[:24]]


@pytest.fixture
def rows(tmp_path: Path) -> ProbeRows:
    asked = [{"prompt": f"[{row['question']}]=", "completion": row["answer"]} for row in TASK]
    return read_probe_rows(write(tmp_path / "rows.jsonl", asked), [CONFIG])


def measured(found: MeasuredPath | SkippedPath) -> MeasuredPath:
    assert isinstance(found, MeasuredPath), found
    return found


def mixture_losses(ends: tuple[str, str], t: float) -> tuple[list[float], list[int]]:
    """The sum of the losses, and the tokens, of each row, given by itself."""
    a, b = (load_file(FAMILY / end / "model.safetensors") for end in ends)
    model = AutoModelForCausalLM.from_pretrained(FAMILY / ends[0], dtype=torch.float32)
    mixed = {name: (a[name].double() * (1 - t) + b[name].double() * t).bfloat16() for name in a}
    model.load_state_dict({name: tensor.float() for name, tensor in mixed.items()})
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / ends[0])
    sums, counts = [], []
    for row in TASK:
        asked = tokenizer(f"[{row['question']}]=")["input_ids"]
        ids = torch.tensor([*asked, *tokenizer.encode(row["answer"], add_special_tokens=False), 2])
        with torch.inference_mode():
            logits = model(input_ids=ids[None]).logits[0].double()
        chosen = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[len(asked) - 1 :]
        sums.append(-chosen.sum().item())
        counts.append(len(chosen))
    return sums, counts


def test_losses_and_barrier_are_those_of_mixtures_made_by_hand(rows: ProbeRows) -> None:
    ends = "finetuned", "direct"
    a, b = (checkpoint_source(FAMILY / end) for end in ends)
    found = measured(measure_path(a, b, rows, points=5))
    by_hand = [mixture_losses(ends, t) for t in (0, 0.25, 0.5, 0.75, 1)]
    means = [sum(sums) / sum(counts) for sums, counts in by_hand]
    assert [point.t for point in found.points] == [0, 0.25, 0.5, 0.75, 1]
    assert [point.loss for point in found.points] == pytest.approx(means, rel=1e-4, abs=1e-6)
    line = [means[0] + (means[-1] - means[0]) * t for t in (0, 0.25, 0.5, 0.75, 1)]
    assert found.barrier == pytest.approx(max(np.subtract(means, line)), rel=1e-4)
    assert found.interval is not None
    assert found.interval[0] < found.barrier < found.interval[1]
    assert (found.rows, found.tokens) == (24, sum(by_hand[0][1]))
    assert found.ends == (a.label, b.label)
    assert found.note is None


def test_the_control_has_the_same_ends_and_a_higher_barrier(rows: ProbeRows) -> None:
    a, b = (checkpoint_source(FAMILY / end) for end in ("finetuned", "direct"))
    path = measured(measure_path(a, b, rows, points=3))
    control = measured(measure_control(a, b, rows, points=3))
    assert (path.control, control.control) == (False, True)
    for place in (0, -1):
        loss = path.points[place].loss
        assert control.points[place].loss == pytest.approx(loss, rel=1e-3, abs=1e-6)
    assert path.interval is not None
    assert control.interval is not None
    assert control.interval[0] > 5 * path.interval[1]


def test_json_has_the_agreed_keys_and_each_point_is_scored(rows: ProbeRows) -> None:
    a, b = (checkpoint_source(FAMILY / end) for end in ("finetuned", "direct"))
    models, steps = [], []

    def score(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        models.append(model)
        weight = model.model.norm.weight[0].item()
        return [{"task": tokenizer.eos_token, "value": weight}]

    found = measured(
        measure_path(a, b, rows, points=2, score=score, progress=lambda *step: steps.append(step))
    )
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told.keys() >= {"ends", "control", "points", "barrier", "interval"}
    assert [point["scores"][0]["value"] for point in told["points"]] == [
        source.tensor("model.norm.weight")[0].item() for source in (a, b)
    ]
    assert told["points"][0].keys() >= {"t", "loss", "loss_stderr", "scores"}
    assert (told["ends"], told["barrier"]) == ([a.label, b.label], 0)
    assert models[0] is models[1]
    assert steps == [(1, 2), (2, 2)]


def test_values_that_are_no_numbers_are_null_in_json() -> None:
    path = MeasuredPath(("a", "b"), False, (), float("nan"), (0.0, float("inf")), 1, 1)
    told = path.as_json()
    assert (told["barrier"], told["interval"]) == (None, [0.0, None])


def copy(name: str, folder: Path) -> Path:
    shutil.copytree(FAMILY / name, folder)
    return folder


class TestWhatIsLeftOut:
    def test_another_tokenizer(self, rows: ProbeRows, tmp_path: Path) -> None:
        other = copy("direct", tmp_path / "other") / "tokenizer.json"
        table = json.loads(other.read_text())
        vocabulary = table["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        other.write_text(json.dumps(table))
        found = measure_path(
            checkpoint_source(FAMILY / "finetuned"), checkpoint_source(other.parent), rows
        )
        assert isinstance(found, SkippedPath)
        assert "give different tokens for the rows" in found.reason
        assert found.as_json() == {
            "ends": list(found.ends),
            "control": False,
            "reason": found.reason,
        }

    def test_another_vocabulary_size(self, rows: ProbeRows, tmp_path: Path) -> None:
        other = copy("direct", tmp_path / "other")
        model = AutoModelForCausalLM.from_pretrained(other)
        model.resize_token_embeddings(261, mean_resizing=False)
        model.save_pretrained(other)
        found = measure_path(
            checkpoint_source(FAMILY / "finetuned"), checkpoint_source(other), rows
        )
        assert isinstance(found, SkippedPath)
        assert "(261, 128)" in found.reason
        assert "(259, 128)" in found.reason

    def test_a_model_without_a_tokenizer(self, rows: ProbeRows, tmp_path: Path) -> None:
        other = copy("direct", tmp_path / "other")
        (other / "tokenizer.json").unlink()
        (other / "tokenizer_config.json").unlink()
        a, b = checkpoint_source(FAMILY / "finetuned"), checkpoint_source(other)
        found = measure_path(a, b, rows)
        assert isinstance(found, SkippedPath)
        assert found.reason == f"{b.label} has no tokenizer"

    def test_a_control_of_an_unknown_architecture(self, rows: ProbeRows, tmp_path: Path) -> None:
        config = transformers.MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=1)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
        a, b = checkpoint_source(FAMILY / "finetuned"), checkpoint_source(tmp_path / "other")
        found = measure_control(a, b, rows)
        assert isinstance(found, SkippedPath)
        assert found.control
        assert "were recognised" in found.reason


def test_ends_whose_configs_compute_differently_are_noted(rows: ProbeRows, tmp_path: Path) -> None:
    other = copy("direct", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20000.0
    (other / "config.json").write_text(json.dumps(config))
    a, b = checkpoint_source(FAMILY / "finetuned"), checkpoint_source(other)
    found = measured(measure_path(a, b, rows, points=2))
    assert found.note is not None
    assert found.note.startswith("the configs differ in rope_parameters; ")


def test_fewer_than_two_points_are_refused(rows: ProbeRows) -> None:
    a = checkpoint_source(FAMILY / "base")
    with pytest.raises(OptionError, match="points: 1 is less than the two ends"):
        measure_path(a, a, rows, points=1)


@pytest.mark.parametrize(
    ("kind", "config"), [("MaskedLM", "RobertaConfig"), ("SequenceClassification", "BertConfig")]
)
def test_encoders_have_paths_and_controls(kind: str, config: str, tmp_path: Path) -> None:
    sources = []
    for seed in (0, 1):
        made = getattr(transformers, f"AutoModelFor{kind}").from_config(
            getattr(transformers, config)(**SIZES, pad_token_id=1)
        )
        randomize(made, seed)
        made.save_pretrained(tmp_path / str(seed))
        encoder_tokenizer(model_max_length=40).save_pretrained(tmp_path / str(seed))
        sources.append(checkpoint_source(tmp_path / str(seed)))
    data = [{"text": words(10 + place, place), "label": place % 2} for place in range(12)]
    config_json = json.loads((tmp_path / "0" / "config.json").read_text())
    rows = read_probe_rows(write(tmp_path / "rows.jsonl", data), [config_json])
    path = measured(measure_path(*sources, rows, points=3))
    control = measured(measure_control(*sources, rows, points=3))
    assert path.points[-1].loss == pytest.approx(control.points[-1].loss, rel=1e-4)
    assert path.points[1].loss != pytest.approx(control.points[1].loss, rel=1e-4)
    assert path.tokens == (12 if kind == "SequenceClassification" else 7 * 2 + 5 * 3)


def test_a_graft_is_an_end_without_being_written(rows: ProbeRows) -> None:
    members = [FAMILY / name for name in ("finetuned", "base", "target")]
    with transfer_source(*members) as graft:
        found = measured(measure_path(graft, checkpoint_source(FAMILY / "direct"), rows, points=3))
        control = measured(measure_control(graft, graft, rows, points=3))
    assert found.points[0].accuracy > 0.95
    assert 0 < found.barrier < control.barrier / 5
    assert control.points[0].loss == pytest.approx(found.points[0].loss)
