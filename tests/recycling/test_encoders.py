"""Training of classifiers and masked language models: results, resumed runs, and refusals."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForPreTraining,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
)

from diffxfer import DiffxferError, transfer
from diffxfer.checkpoints.reader import open_weights
from diffxfer.diffs.artifact.manifest import read_manifest
from diffxfer.errors import DataError, OptionError, TrainingError, VocabularyError
from tests import families, tiny
from tests.recycling import encoders
from tests.recycling.encoders import LABELS, SPECIALS, WORDS, tune_shortly
from tests.recycling.test_resume import launch_two
from tests.recycling.training import FAMILY

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hub.forks import Forks

pytest.importorskip("trl")

HEAD = "classifier.dense.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with dropout, whose random numbers a resumed run must have as well."""
    folder = tmp_path_factory.mktemp("encoders")
    for kind, seed in (("masked", 1), ("bare", 2), ("classifier", 3), ("bert", 4)):
        encoders.save(kind, folder / kind, seed, hidden_dropout_prob=0.1)
    encoders.labelled(folder / "labels.jsonl")
    encoders.labelled(folder / "numbers.jsonl", numbers=True)
    encoders.plain(folder / "texts.jsonl")
    return folder


@pytest.fixture(scope="module")
def tuned(home: Path) -> Path:
    """A classifier made from a masked language model, with a new head."""
    tune_shortly(home / "masked", home / "labels.jsonl", home / "tuned")
    return home / "tuned"


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


class TestWhatIsWritten:
    def test_a_classifier_with_its_labels(self, tuned: Path, home: Path) -> None:
        config, before = config_of(tuned), config_of(home / "masked")
        assert config["architectures"] == ["RobertaForSequenceClassification"]
        assert config["id2label"] == {"0": "cold", "1": "hot", "2": "mild"}
        assert config["label2id"] == {"cold": 0, "hot": 1, "mild": 2}
        assert config["num_labels"] == 3
        assert config["problem_type"] == "single_label_classification"
        changed = {"architectures", "id2label", "label2id", "num_labels", "problem_type"}
        assert {k: v for k, v in config.items() if k not in changed} == {
            k: v for k, v in before.items() if k != "architectures"
        }
        assert AutoConfig.from_pretrained(tuned).id2label == dict(enumerate(LABELS))
        families.load_whole(tuned, AutoModelForSequenceClassification)

    def test_companions_stay(self, tuned: Path, home: Path) -> None:
        before, after = families.contents(home / "masked"), families.contents(tuned)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert after[name] == before[name]
        assert after.keys() - before.keys() == {
            *("README.md", "diffxfer.json", "training_log.jsonl"),
        }

    def test_the_report_and_the_manifest_name_the_objective(
        self, home: Path, tmp_path: Path
    ) -> None:
        report = tune_shortly(home / "bare", home / "labels.jsonl", tmp_path / "out", steps=1)
        assert report.objective == "classification"
        assert report.as_json()["objective"] == "classification"
        assert report.notes == (
            "the classification head is new, made from seed 0; its labels are cold, hot, mild",
        )
        assert report.warnings == ()
        # The pooler of the encoder is in no classifier of this kind.
        assert report.tensors == {"tuned": 41, "left out": 2}
        manifest = read_manifest(tmp_path / "out")
        assert manifest is not None
        assert manifest.command["objective"] == "classification"
        assert "end_token" not in manifest.command

    def test_numbers_as_labels(self, home: Path, tmp_path: Path) -> None:
        tune_shortly(home / "masked", home / "numbers.jsonl", tmp_path / "out", steps=1)
        assert config_of(tmp_path / "out")["id2label"] == {
            str(n): f"LABEL_{n}" for n in range(len(LABELS))
        }

    @pytest.mark.parametrize("rows", ["labels", "numbers"])
    def test_a_classifier_keeps_its_config(self, rows: str, home: Path, tmp_path: Path) -> None:
        data = home / f"{rows}.jsonl"
        report = tune_shortly(home / "classifier", data, tmp_path / "out", steps=2)
        assert report.notes == ()
        name = "config.json"
        assert (tmp_path / "out" / name).read_bytes() == (home / "classifier" / name).read_bytes()

    def test_names_and_numbers_of_labels_are_the_same(self, home: Path, tmp_path: Path) -> None:
        logs = [
            tune_shortly(home / "classifier", home / f"{rows}.jsonl", tmp_path / rows, steps=2).log
            for rows in ("labels", "numbers")
        ]
        assert logs[0] == logs[1]

    def test_a_masked_language_model_keeps_its_layout(self, home: Path, tmp_path: Path) -> None:
        report = tune_shortly(home / "masked", home / "texts.jsonl", tmp_path / "out")
        assert report.objective == "mlm"
        old, new = (open_weights(f).tensors for f in (home / "masked", tmp_path / "out"))
        assert {n: (t.dtype, t.shape) for n, t in new.items()} == {
            n: (t.dtype, t.shape) for n, t in old.items()
        }
        families.load_whole(tmp_path / "out", AutoModelForMaskedLM)

    def test_shards_and_dtypes_of_a_new_head(self, home: Path, tmp_path: Path) -> None:
        model = AutoModelForMaskedLM.from_pretrained(home / "masked", dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "model", max_shard_size="5KB")
        encoders.tokenizer().save_pretrained(tmp_path / "model")
        tune_shortly(tmp_path / "model", home / "labels.jsonl", tmp_path / "out", steps=1)
        weights = open_weights(tmp_path / "out")
        assert weights.indexed
        assert len(weights.shards) > 1
        assert {spec.dtype for spec in weights.tensors.values()} == {"BF16"}
        families.load_whole(tmp_path / "out", AutoModelForSequenceClassification)

    def test_a_decoder_that_is_stored_twice_stays_a_copy(self, home: Path, tmp_path: Path) -> None:
        model = encoders.save("masked", tmp_path / "model", hidden_dropout_prob=0.0)
        weights = load_file(model / "model.safetensors")
        word = "roberta.embeddings.word_embeddings.weight"
        families.edit_tensors(
            model,
            lm_head__decoder__weight=weights[word].clone(),
            lm_head__decoder__bias=weights["lm_head.bias"].clone(),
            roberta__pooler__dense__weight=torch.ones(16, 16),
        )
        report = tune_shortly(model, home / "texts.jsonl", tmp_path / "out")
        after = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(after["lm_head.decoder.weight"], after[word])
        assert torch.equal(after["lm_head.decoder.bias"], after["lm_head.bias"])
        assert not torch.equal(after[word], weights[word])
        assert torch.equal(after["roberta.pooler.dense.weight"], torch.ones(16, 16))
        assert report.warnings == (
            "kept as it was, since transformers does not load it: roberta.pooler.dense.weight",
        )

    def test_a_graft_of_it_has_the_head(self, tuned: Path, home: Path, tmp_path: Path) -> None:
        target = tmp_path / "target"
        tune_shortly(home / "masked", home / "texts.jsonl", target, seed=9)
        transfer(tuned, home / "masked", target, tmp_path / "graft", added="bring")
        families.load_whole(tmp_path / "graft", AutoModelForSequenceClassification)
        report = tune_shortly(
            *(tmp_path / "graft", home / "labels.jsonl", tmp_path / "both"),
            teacher=tuned,
            hidden_weight=1.0,
        )
        assert {"ce", "kl", "hidden"} <= report.log[0].keys()
        assert config_of(tmp_path / "both")["id2label"] == config_of(tuned)["id2label"]

    def test_a_new_head_has_the_labels_of_the_teacher(self, home: Path, tmp_path: Path) -> None:
        teacher = encoders.save(
            *("classifier", tmp_path / "teacher"),
            id2label={0: "mild", 1: "cold", 2: "hot", 3: "dry"},
            label2id={"mild": 0, "cold": 1, "hot": 2, "dry": 3},
        )
        data, out = home / "labels.jsonl", tmp_path / "out"
        tune_shortly(home / "masked", data, out, steps=1, teacher=teacher)
        assert list(config_of(out)["id2label"].values()) == ["mild", "cold", "hot", "dry"]


class TestOtherArchitectures:
    """Heads that other families name or tie in their own way."""

    SIZE: ClassVar[dict[str, Any]] = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "pad_token_id": 1,
    }

    def save(self, model: Any, folder: Path) -> Path:
        model.save_pretrained(folder)
        encoders.tokenizer().save_pretrained(folder)
        return folder

    def test_a_head_that_shares_a_layer_with_words(self, home: Path, tmp_path: Path) -> None:
        ends = dict.fromkeys(("cls_token_id", "bos_token_id"), 0)
        ends |= dict.fromkeys(("sep_token_id", "eos_token_id"), 2)
        config = ModernBertConfig(**self.SIZE, **ends)
        model = self.save(ModernBertForMaskedLM(config), tmp_path / "model")
        report = tune_shortly(model, home / "labels.jsonl", tmp_path / "out", steps=1)
        assert report.tensors["left out"] == 1  # the decoder's bias
        families.load_whole(tmp_path / "out", AutoModelForSequenceClassification)

    def test_heads_of_pre_training(self, home: Path, tmp_path: Path) -> None:
        model = self.save(BertForPreTraining(BertConfig(**self.SIZE)), tmp_path / "model")
        report = tune_shortly(model, home / "texts.jsonl", tmp_path / "out", steps=1)
        assert report.objective == "mlm"
        assert len(report.warnings) == 4
        before, after = (load_file(f / "model.safetensors") for f in (model, tmp_path / "out"))
        kept = [name for name in before if torch.equal(before[name], after[name])]
        heads = {"bert.pooler.dense", "cls.seq_relationship"}
        assert {name.rpartition(".")[0] for name in kept} >= heads

    def test_a_decoder_that_classifies(self, home: Path, tmp_path: Path) -> None:
        settings = {name: value for name, value in self.SIZE.items() if name != "pad_token_id"}
        config = LlamaConfig(**settings, num_labels=3)
        model = self.save(LlamaForSequenceClassification(config), tmp_path / "model")
        data = home / "numbers.jsonl"
        whole, parts = (
            tune_shortly(
                *(model, data, tmp_path / str(size)),
                steps=2,
                batch_size=size,
                gradient_accumulation=16 // size,
            )
            for size in (16, 4)
        )
        # Without the padding token, the last token of a padded row would not be found.
        for one, other in zip(whole.log, parts.log, strict=True):
            assert one == pytest.approx(other, rel=1e-3)

    def test_activations_that_cannot_be_recomputed(self, home: Path, tmp_path: Path) -> None:
        model = self.save(MPNetForMaskedLM(MPNetConfig(**self.SIZE)), tmp_path / "model")
        said = "--gradient-checkpointing: is not supported by MPNetForMaskedLM; omit it"
        with pytest.raises(OptionError, match=said):
            tune_shortly(model, home / "texts.jsonl", tmp_path / "out", gradient_checkpointing=True)


class TestTheNewHead:
    def head(self, home: Path, out: Path, **options: Any) -> torch.Tensor:
        # A learning rate this small leaves the head as it began, but for rounding.
        options = {"steps": 1, "learning_rate": 1e-12} | options
        tune_shortly(home / "masked", home / "labels.jsonl", out, **options)
        return load_file(out / "model.safetensors")[HEAD]

    def test_its_seed_decides(self, home: Path, tmp_path: Path) -> None:
        first, same, other = (
            self.head(home, tmp_path / str(number), seed=seed)
            for number, seed in enumerate((7, 7, 8))
        )
        assert torch.equal(first, same)
        assert not torch.allclose(first, other, atol=1e-3)
        assert 0.1 < float(first.std()) < 0.3  # as the config's initializer_range says

    def test_nothing_before_the_run_decides(self, home: Path, tmp_path: Path) -> None:
        torch.manual_seed(1)
        one = self.head(home, tmp_path / "one")
        torch.manual_seed(2)
        assert torch.equal(one, self.head(home, tmp_path / "two"))


KILLED = """
import os, signal, sys
from tests.recycling.encoders import tune_shortly
model, data, out = sys.argv[1:]

def kill(done, *_):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)

tune_shortly(model, data, out, steps=7, save_every=2, gradient_accumulation=2, batch_size=3,
             progress=kill)
"""


@pytest.mark.parametrize(
    ("model", "rows"), [("masked", "texts"), ("masked", "labels"), ("bert", "texts")]
)
def test_a_killed_run_ends_as_an_undisturbed_one(
    warm: Forks, model: str, rows: str, home: Path, tmp_path: Path
) -> None:
    data, out = home / f"{rows}.jsonl", tmp_path / "killed" / "out"
    done = warm.run_code(KILLED, home / model, data, out, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    options = {"steps": 7, "save_every": 2, "gradient_accumulation": 2, "batch_size": 3}
    report = tune_shortly(home / model, data, out, **options)
    assert report.continued_from == 4
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    whole = tune_shortly(home / model, data, tmp_path / "whole" / "out", **options)
    assert report.log == whole.log
    assert families.contents(out) == families.contents(whole.output)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["texts", "labels"])
def test_two_processes_are_as_one(rows: str, home: Path, tmp_path: Path) -> None:
    model, data = encoders.save("masked", tmp_path / "model"), home / f"{rows}.jsonl"
    argv = [model, "--data", data, "-o", tmp_path / "two", "--steps", 3, "--batch-size", 4]
    argv += ["--gradient-accumulation", 2, "--warmup", 0, "--learning-rate", encoders.RATE]
    done = launch_two(*argv, "--json")
    assert done.returncode == 0, done.stderr
    # All rows are in every step, so that only the order in which they are summed differs.
    alone = tune_shortly(model, data, tmp_path / "alone", steps=3, batch_size=16)
    for one, other in zip(json.loads(done.stdout)["log"], alone.log, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


class TestMasks:
    def batch(self, length: int, numbers: list[int]) -> dict[str, torch.Tensor]:
        """Rows of words between ``<s>`` and ``</s>``; each second one is padded."""
        ids = torch.full((len(numbers), length), 1)
        for place, number in enumerate(numbers):
            kept = length - number % 2
            ids[place, :kept] = 5 + (torch.arange(kept) + number) % 45
            ids[place, 0], ids[place, kept - 1] = 0, 2
        special = (ids < len(SPECIALS)).long()
        mask = (ids != 1).long()
        rows = torch.tensor(numbers)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "special_tokens_mask": special,
            "row": rows,
        }

    def apply(self, batch: dict[str, torch.Tensor], *, seed: int = 0, step: int = 0) -> Any:
        from diffxfer.recycling.encoder_trainer import Masks

        found = Masks(encoders.tokenizer(), seed).apply(batch, step)
        assert found.keys() == {"input_ids", "attention_mask", "labels"}
        return found

    def test_shares(self) -> None:
        batch = self.batch(400, list(range(100)))
        found = self.apply(batch)
        ids, labels = found["input_ids"], found["labels"]
        chosen = labels != -100
        words = batch["special_tokens_mask"] == 0
        assert bool((~chosen | words).all())  # neither special tokens nor padding
        assert torch.equal(labels[chosen], batch["input_ids"][chosen])
        assert torch.equal(ids[~chosen], batch["input_ids"][~chosen])
        assert int(chosen.sum()) / int(words.sum()) == pytest.approx(0.15, abs=0.01)
        hidden = (ids[chosen] == WORDS.index("<mask>")).float().mean()
        assert float(hidden) == pytest.approx(0.8, abs=0.02)
        kept = (ids[chosen] == labels[chosen]).float().mean()
        assert float(kept) == pytest.approx(0.1, abs=0.02)

    def test_those_of_a_row_depend_on_seed_step_and_row_alone(self) -> None:
        whole = self.apply(self.batch(40, [0, 1, 2, 3]))
        alone = self.apply(self.batch(40, [2]))
        for name in ("input_ids", "labels"):
            assert torch.equal(whole[name][2], alone[name][0])
        for other in (
            self.apply(self.batch(40, [2]), seed=1),
            self.apply(self.batch(40, [2]), step=1),
        ):
            assert not torch.equal(other["labels"], alone["labels"])
        assert not torch.equal(whole["labels"][0] == -100, whole["labels"][2] == -100)


class TestLength:
    def test_long_rows_are_cut_and_told_of(self, home: Path, tmp_path: Path) -> None:
        long = {"text": " ".join(WORDS[5:50])}
        for rows in ([long, {"text": "w1 w2"}], [long | {"label": 0}, {"text": "w1", "label": 1}]):
            data = encoders.write(tmp_path / "rows.jsonl", rows)
            # RoBERTa's positions begin at 2, so 34 of them are places for 32 tokens.
            report = tune_shortly(home / "masked", data, tmp_path / "out", steps=1, overwrite=True)
            assert report.warnings == ("rows truncated to 32 tokens: 1",)

    def test_the_teacher_reads_less(self, home: Path, tmp_path: Path) -> None:
        texts = encoders.texts(2)
        long = {"text": " ".join(texts * 4), "label": "hot"}
        rows = [{"text": text, "label": label} for text, label in zip(texts, LABELS, strict=False)]
        data = encoders.write(tmp_path / "rows.jsonl", [long, *rows])
        teacher = encoders.save("classifier", tmp_path / "teacher", max_position_embeddings=14)
        report = tune_shortly(home / "masked", data, tmp_path / "out", steps=1, teacher=teacher)
        assert report.warnings == ("rows truncated to 12 tokens: 1",)

    def test_rows_without_a_token_to_predict(self, home: Path, tmp_path: Path) -> None:
        rows = [{"text": " "}, {"text": "w1 w2 w3"}]
        data = encoders.write(tmp_path / "rows.jsonl", rows)
        report = tune_shortly(home / "masked", data, tmp_path / "out", steps=1)
        assert report.warnings == ("rows dropped, since they have no token to predict: 1",)
        data = encoders.write(tmp_path / "rows.jsonl", rows[:1])
        with pytest.raises(DataError, match="no row has a token to predict within 32 tokens"):
            tune_shortly(home / "masked", data, tmp_path / "none", steps=1)

    def test_a_step_without_masks_changes_nothing(self, home: Path, tmp_path: Path) -> None:
        data = encoders.write(tmp_path / "rows.jsonl", [{"text": "w1"}])
        report = tune_shortly(home / "masked", data, tmp_path / "out", steps=6)
        assert any(entry["loss"] == 0 for entry in report.log)
        assert any(entry["loss"] > 0 for entry in report.log)


class TestRefused:
    """A refused run leaves nothing on disk, and says one line."""

    def refused(
        self, kind: type[DiffxferError], said: str, model: Path, data: Path, **options: Any
    ) -> None:
        out = data.parent / "refused" / "out"
        with pytest.raises(kind) as caught:
            tune_shortly(model, data, out, **options)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not out.parent.exists()

    def rows(self, folder: Path, *rows: dict[str, Any]) -> Path:
        return encoders.write(folder / "rows.jsonl", rows)

    def test_objectives(self, home: Path) -> None:
        data = home / "texts.jsonl"
        cases: list[tuple[str, str, str]] = [
            (
                *("classifier", "causal"),
                "is a classifier (RobertaForSequenceClassification), expected a causal language"
                " model for --objective causal; give another model, or another --objective",
            ),
            ("classifier", "mlm", "expected a masked language model for --objective mlm"),
            ("masked", "causal", "is a masked language model (RobertaForMaskedLM), expected a"),
            ("bare", "mlm", "is a bare model without a head (RobertaModel), expected a masked"),
        ]
        for model, objective, said in cases:
            self.refused(TrainingError, said, home / model, data, objective=objective)
        said = "is a causal language model (LlamaForCausalLM), expected a"
        for objective in ("mlm", "classification"):
            self.refused(TrainingError, said, FAMILY / "target", data, objective=objective)
        said = "--objective: 'clm' is unknown; give one of causal, classification, mlm"
        self.refused(OptionError, said, home / "masked", data, objective="clm")
        said = "is a bare encoder, which has no head that predicts tokens; give rows with text and"
        self.refused(TrainingError, said, home / "bare", data)
        said = "--no-end-token: has no effect on --objective mlm"
        self.refused(OptionError, said, home / "masked", data, end_token=False)

    def test_a_value_that_the_first_row_lacks(self, home: Path, tmp_path: Path) -> None:
        """It would be ignored silently, and the objective be another one."""
        first, full = {"text": "w1", "label": "hot"}, {"text": "w2", "label": "cold"}
        rows = self.rows(tmp_path, first, full | {"text_pair": "w3"})
        said = "line 2 has 'text_pair', which line 1 lacks; give all rows the same format"
        self.refused(DataError, said, home / "masked", rows)
        rows = self.rows(tmp_path, first | {"label": None}, full)
        self.refused(DataError, "line 2 has 'label', which line 1 lacks", home / "masked", rows)
        tune_shortly(home / "masked", rows, tmp_path / "mlm", objective="mlm", steps=1)

    def test_rows_of_another_objective(self, home: Path, tmp_path: Path) -> None:
        asked = self.rows(tmp_path, {"prompt": "w1", "completion": "w2"})
        said = (
            "line 1 has the keys 'prompt', 'completion', from which a classifier cannot learn;"
            " give every row text and text_pair and label, or text and label"
        )
        self.refused(DataError, said, home / "classifier", asked)
        said = "line 1 has only 'text', from which a classifier cannot learn"
        self.refused(DataError, said, home / "classifier", home / "texts.jsonl")
        said = "from which a masked language model cannot learn; give every row"
        self.refused(DataError, said, home / "masked", asked)
        said = (
            "is a causal language model (LlamaForCausalLM), but the rows have text and label,"
            " which train a classifier; give a classifier, a masked language model or a bare"
            " encoder, or --objective causal to train on the text"
        )
        self.refused(TrainingError, said, FAMILY / "target", home / "labels.jsonl")
        tune_shortly(
            *(FAMILY / "target", home / "labels.jsonl", tmp_path / "out"),
            steps=1,
            objective="causal",
        )

    @pytest.mark.parametrize(
        ("label", "said"),
        [
            (None, "line 2 lacks 'label', which the first row has; give all rows the same format"),
            (3, "line 2 has a number for 'label', and line 1 has text"),
            ("", "line 2 has '' for 'label', expected a name, or a whole number from 0 on"),
            (1.5, "line 2 has 1.5 for 'label', expected a name, or a whole number from 0 on"),
            (True, "line 2 has True for 'label', expected a name"),
            (-1, "line 2 has -1 for 'label', expected a name"),
            (
                ["hot"],
                "has ['hot'] for 'label', expected a name, or a whole number from 0 on; give",
            ),
        ],
    )
    def test_labels_of_rows(self, label: object, said: str, home: Path, tmp_path: Path) -> None:
        rows = self.rows(tmp_path, {"text": "w1", "label": "hot"}, {"text": "w2", "label": label})
        self.refused(DataError, said, home / "masked", rows)

    def test_labels_that_are_not_shared(self, home: Path, tmp_path: Path) -> None:
        rows = self.rows(tmp_path, {"text": "w1", "label": "hot"}, {"text": "w2", "label": "dry"})
        said = (
            f"has the labels 'dry', 'hot', of which {home / 'classifier'} lacks 'dry': it has"
            " 'cold', 'hot', 'mild'"
        )
        self.refused(DataError, said, home / "classifier", rows)
        rows = self.rows(tmp_path, {"text": "w1", "label": 0}, {"text": "w2", "label": 3})
        self.refused(DataError, "lacks 3: it has 'cold', 'hot', 'mild'", home / "classifier", rows)
        said = "has labels up to 3, but none is 1; number the labels from 0 on, or give names"
        self.refused(DataError, said, home / "masked", rows)
        rows = self.rows(tmp_path, {"text": "w1", "label": "hot"})
        self.refused(DataError, "has only one label, 'hot'", home / "masked", rows)

    def test_classifiers_of_another_kind(self, home: Path, tmp_path: Path) -> None:
        data = encoders.labelled(tmp_path / "labels.jsonl")
        for kind in ("multi_label_classification", "regression"):
            model = encoders.save("classifier", tmp_path / kind, problem_type=kind)
            said = f"is a classifier of problem_type '{kind}', expected 'single_label"
            self.refused(TrainingError, said, model, data)
        model = encoders.save(
            "classifier", tmp_path / "one", id2label={0: "hot"}, label2id={"hot": 0}
        )
        self.refused(TrainingError, "has one label, so it is a regression", model, data)
        model = encoders.save("classifier", tmp_path / "other")
        names = {str(number): name for number, name in enumerate((*LABELS, "dry"))}
        tiny.edit_json(model / "config.json", lambda c: c.update(id2label=names))
        said = (
            "classifier.out_proj.weight is (3, 16), but config.json has 4 labels: 'cold', 'hot',"
            " 'mild', 'dry'; correct id2label in config.json"
        )
        self.refused(TrainingError, said, model, data)
        student = home / "classifier"
        self.refused(TrainingError, said, student, data, teacher=model)

    def test_teachers(self, home: Path, tmp_path: Path) -> None:
        data = encoders.labelled(tmp_path / "labels.jsonl")
        other = encoders.save(
            *("classifier", tmp_path / "teacher"),
            id2label={0: "hot", 1: "cold", 2: "mild"},
            label2id={"hot": 0, "cold": 1, "mild": 2},
        )
        said = (
            "has the labels 'hot', 'cold', 'mild', but the model to train has 'cold', 'hot',"
            " 'mild'; give a teacher with the same labels"
        )
        self.refused(VocabularyError, said, home / "classifier", data, teacher=other)
        few = encoders.save(
            *("classifier", tmp_path / "few"),
            id2label={0: "hot", 1: "cold"},
            label2id={"hot": 0, "cold": 1},
        )
        said = "lacks 'mild': it has 'hot', 'cold'"
        self.refused(DataError, said, home / "masked", data, teacher=few)
        said = "is a masked language model (RobertaForMaskedLM), expected a classifier, since the"
        self.refused(VocabularyError, said, home / "classifier", data, teacher=home / "masked")
        texts = encoders.plain(tmp_path / "texts.jsonl")
        said = "is a classifier (RobertaForSequenceClassification), expected a masked language"
        self.refused(VocabularyError, said, home / "masked", texts, teacher=other)

    def test_tokenizers(self, home: Path, tmp_path: Path) -> None:
        texts, labels = (
            make(tmp_path / f"{make.__name__}.jsonl")
            for make in (encoders.plain, encoders.labelled)
        )
        for token, data in (("mask_token", texts), ("pad_token", labels)):
            model = encoders.save("masked", tmp_path / token)
            path = model / "tokenizer_config.json"
            settings = json.loads(path.read_text())
            del settings[token]
            path.write_text(json.dumps(settings))
            said = f"has a tokenizer without the {token.split('_')[0]}"
            self.refused(TrainingError, said, model, data)
        model = encoders.save("masked", tmp_path / "large", vocab_size=40)
        said = "has a tokenizer of 50 tokens, but its embedding has 40 rows"
        self.refused(TrainingError, said, model, texts)
        said = "--max-length: 2 leaves no room for text beside 2 special tokens; give 3 or more"
        self.refused(OptionError, said, home / "masked", texts, max_length=2)
