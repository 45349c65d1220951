"""Tuning the shipped family, with and without a teacher: what is written and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from diffxfer import DiffxferError, TuneReport, transfer
from diffxfer.checkpoints.reader import open_weights
from diffxfer.diffs.artifact.kind import require_diff
from diffxfer.diffs.artifact.manifest import read_manifest
from diffxfer.errors import (
    ArtifactError,
    DataError,
    NonFiniteError,
    OptionError,
    OutputExistsError,
    TrainingError,
    VocabularyError,
)
from diffxfer.recycling.training_options import TuneOptions
from tests import families, tiny
from tests.helpers import block_checksum
from tests.recycling.training import FAMILY, RATE, tune_shortly, write_rows

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("trl")

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graft") / "graft"
    transfer(FAMILY / "finetuned", FAMILY / "base", FAMILY / "target", out)
    return out


@pytest.fixture(scope="module")
def tuned(
    graft: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TuneReport]:
    out = tmp_path_factory.mktemp("tuned") / "new" / "out"
    return out, tune_shortly(graft, data, out)


def losses(report: TuneReport) -> list[float]:
    return [entry["loss"] for entry in report.log]


class TestTheFourArms:
    @pytest.mark.parametrize("taught", [False, True])
    @pytest.mark.parametrize("grafted", [False, True])
    def test_each_learns_and_leaves_its_inputs_alone(
        self, grafted: bool, taught: bool, graft: Path, data: Path, tmp_path: Path
    ) -> None:
        model = graft if grafted else FAMILY / "target"
        before = families.fingerprints(model, FAMILY / "finetuned")
        teacher = {"teacher": FAMILY / "finetuned", "hidden_weight": 0.1} if taught else {}
        seen: list[tuple[int, int, float]] = []
        report = tune_shortly(
            *(model, data, tmp_path / "out"),
            **({"steps": 8} | teacher),
            progress=lambda *step: seen.append(step),
        )
        found = losses(report)
        assert families.fingerprints(model, FAMILY / "finetuned") == before
        assert seen == [(step, 8, loss) for step, loss in enumerate(found, 1)]
        assert [entry["step"] for entry in report.log] == list(range(1, 9))
        # The graft already knows the task; the target does not.
        assert (found[0] < 0.5) if grafted else (found[-1] < 0.7 * found[0])
        assert ({"ce", "kl", "hidden"} <= report.log[0].keys()) == taught
        families.load_whole(tmp_path / "out")

    def test_the_loss_is_the_sum_of_its_terms(self, data: Path, tmp_path: Path) -> None:
        teacher = FAMILY / "finetuned"
        weights = {"distill_weight": 0.3, "temperature": 2.0, "hidden_weight": 0.5}
        report = tune_shortly(
            FAMILY / "target", data, tmp_path / "out", steps=2, teacher=teacher, **weights
        )
        for entry in report.log:
            total = 0.7 * entry["ce"] + 0.3 * 4 * entry["kl"] + 0.5 * 0.5 * entry["hidden"]
            assert entry["loss"] == pytest.approx(total, rel=1e-5)

    def test_rows_are_cut_to_what_the_teacher_reads(self, data: Path, tmp_path: Path) -> None:
        teacher = shutil.copytree(FAMILY / "finetuned", tmp_path / "teacher")
        config = json.loads((teacher / "config.json").read_text())
        config["max_position_embeddings"] = 12
        (teacher / "config.json").write_text(json.dumps(config))
        report = tune_shortly(FAMILY / "target", data, tmp_path / "out", steps=1, teacher=teacher)
        assert "rows truncated to 12 tokens" in report.warnings[0]

    def test_no_weight_is_no_teacher(self, data: Path, tmp_path: Path) -> None:
        plain = tune_shortly(FAMILY / "target", data, tmp_path / "plain")
        taught = tune_shortly(
            *(FAMILY / "target", data, tmp_path / "taught"),
            teacher=FAMILY / "finetuned",
            distill_weight=0.0,
        )
        assert losses(taught) == pytest.approx(losses(plain), rel=1e-4)

    @pytest.mark.parametrize("taught", [False, True])
    def test_accumulated_batches_are_one(self, taught: bool, data: Path, tmp_path: Path) -> None:
        teacher = {"teacher": FAMILY / "finetuned", "hidden_weight": 0.1} if taught else {}
        whole, parts = (
            tune_shortly(
                *(FAMILY / "target", data, tmp_path / str(size)),
                **{"steps": 2, "batch_size": size, "gradient_accumulation": 32 // size, **teacher},
            )
            for size in (32, 8)
        )
        for one, other in zip(whole.log, parts.log, strict=True):
            assert one == pytest.approx(other, rel=1e-3)


class TestWhatIsWritten:
    def test_a_checkpoint_like_the_one_before(
        self, tuned: tuple[Path, TuneReport], graft: Path
    ) -> None:
        before, after = families.contents(graft), families.contents(tuned[0])
        assert after.keys() - before.keys() == {"training_log.jsonl"}
        assert before.keys() <= after.keys()
        same = before.keys() - {"model.safetensors", "diffxfer.json", "README.md"}
        assert {name: after[name] for name in same} == {name: before[name] for name in same}
        old, new = (open_weights(folder).tensors for folder in (graft, tuned[0]))
        assert {n: (t.dtype, t.shape) for n, t in new.items()} == {
            n: (t.dtype, t.shape) for n, t in old.items()
        }

    def test_nothing_else_is_left(self, tuned: tuple[Path, TuneReport]) -> None:
        assert [path.name for path in tuned[0].parent.iterdir()] == ["out"]

    def test_manifest_card_and_log(self, tuned: tuple[Path, TuneReport]) -> None:
        out, report = tuned
        manifest = read_manifest(out)
        assert manifest is not None
        assert manifest.kind == "tuned"
        assert manifest.command["steps"] == 4
        assert manifest.command["data"] == "train.jsonl"
        assert manifest.sources.keys() == {"model"}
        weights = load_file(out / "model.safetensors")
        checksums = {name: entry.checksum for name, entry in manifest.tensors.items()}
        assert checksums == {name: block_checksum(tensor) for name, tensor in weights.items()}
        card = (out / "README.md").read_text()
        assert "| steps | 4 |" in card
        assert "- sft" in card
        lines = (out / "training_log.jsonl").read_text().splitlines()
        assert tuple(map(json.loads, lines)) == report.log

    def test_it_is_no_diff_vector(self, tuned: tuple[Path, TuneReport]) -> None:
        with pytest.raises(ArtifactError, match="is a tuned model, expected a diff vector"):
            require_diff(tuned[0])

    def test_the_same_again_is_the_same(
        self, tuned: tuple[Path, TuneReport], graft: Path, data: Path, tmp_path: Path
    ) -> None:
        tune_shortly(graft, data, tmp_path / "out")
        assert families.contents(tmp_path / "out") == families.contents(tuned[0])

    def test_an_output_is_replaced_only_with_overwrite(
        self, graft: Path, data: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        tune_shortly(graft, data, out, steps=1)
        with pytest.raises(OutputExistsError, match="exists already"):
            tune_shortly(graft, data, out, steps=2)
        tune_shortly(graft, data, out, steps=2, overwrite=True)
        assert len((out / "training_log.jsonl").read_text().splitlines()) == 2


TINY = {
    "tied": (families.llama, {"tie_word_embeddings": True}, "1GB"),
    "sharded": (families.llama, {}, "10KB"),
    "experts": (families.qwen3_moe, {}, "1GB"),
    "mixtral": (families.mixtral, {"output_router_logits": True}, "20KB"),
}


class TestWarmUp:
    @pytest.mark.parametrize(
        ("warmup", "steps", "found"),
        [(0, 20, 0), (3, 20, 3), (0.1, 20, 2), (0.1, 9, 0), (0.29, 100, 29), (0.05, 20, 1)],
    )
    def test_a_share_is_rounded_down(self, warmup: float, steps: int, found: int) -> None:
        names = [field.name for field in dataclasses.fields(TuneOptions)]
        options = dict.fromkeys(names, 1) | {"warmup": warmup, "steps": steps}
        assert TuneOptions(**options).warmup_steps == found  # type: ignore[arg-type]

    def test_the_rate_rises_from_zero_and_the_manifest_says_so(
        self, data: Path, tmp_path: Path
    ) -> None:
        report = tune_shortly(FAMILY / "target", data, tmp_path / "out", steps=4, warmup=0.5)
        rates = [entry["learning_rate"] / RATE for entry in report.log]
        assert rates == pytest.approx([0, 0.5, 1, 0.5])
        manifest = read_manifest(tmp_path / "out")
        assert manifest is not None
        assert manifest.command["warmup"] == 2

    def test_an_end_token_of_a_text_stays(self, tmp_path: Path) -> None:
        texts = ("w1 w2 w3", "w1 w2 w3 <eos>")
        logs = []
        for name, text in zip(("without", "with"), texts, strict=True):
            model = TestEveryLayout().save("sharded", tmp_path / name)
            rows = tmp_path / f"{name}.jsonl"
            rows.write_text(f"{json.dumps({'text': text})}\n")
            report = tune_shortly(
                model, rows, tmp_path / f"{name}-out", steps=1, batch_size=1, end_token=False
            )
            logs.append(report.log[0]["loss"])
        ended = tune_shortly(model, tmp_path / "without.jsonl", tmp_path / "e", steps=1)
        assert logs[1] == pytest.approx(ended.log[0]["loss"], rel=1e-6)
        assert logs[0] != pytest.approx(logs[1], rel=1e-3)


class TestEveryLayout:
    def save(self, kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
        make, changes, size = TINY[kind]
        config = make(**changes)
        families.save_model(folder, config, 1, dtype=dtype, max_shard_size=size)
        specials = ["<eos>"]
        return families.save_tokenizer(
            folder, families.fast_tokenizer(specials), template=TEMPLATE, eos_token="<eos>"
        )

    def rows(self, folder: Path, form: str = "text") -> Path:
        text = "w1 w2 w3 w4 w5"
        row: dict[str, Any] = {"text": text}
        if form == "messages":
            row = {"messages": [{"role": "user", "content": text}]}
        path = folder / "rows.jsonl"
        path.write_text(f"{json.dumps(row)}\n" * 4)
        return path

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("kind", TINY)
    def test_names_shards_and_dtypes_stay(
        self, kind: str, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        model = self.save(kind, tmp_path / "model", dtype)
        rows = self.rows(tmp_path, "messages")
        teacher = {"teacher": model} if dtype == torch.float32 else {}
        report = tune_shortly(model, rows, tmp_path / "out", steps=2, **teacher)
        old, new = (open_weights(folder) for folder in (model, tmp_path / "out"))
        for name, spec in old.tensors.items():
            other = new.tensors[name]
            assert (other.dtype, other.shape) == (spec.dtype, spec.shape)
            assert other.shard.path.name == spec.shard.path.name
        assert old.tensors.keys() == new.tensors.keys()
        assert old.indexed == new.indexed == (TINY[kind][2] != "1GB")
        assert report.tensors == {"tuned": len(old.tensors)}
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
            for folder in (model, tmp_path / "out")
        )
        # Embedding rows of absent tokens and experts that are not selected have no gradient.
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert any("embed" in name for name in changed)
        assert any("layers.1" in name for name in changed)

    def test_rounded_once_from_float32(self, tmp_path: Path) -> None:
        halves = self.save("tied", tmp_path / "halves")
        floats = self.save("tied", tmp_path / "floats", torch.float32)
        weights = load_file(halves / "model.safetensors")
        wide = {name: tensor.float() for name, tensor in weights.items()}
        save_file(wide, floats / "model.safetensors", {"format": "pt"})
        rows = self.rows(tmp_path)
        for model in (halves, floats):
            tune_shortly(model, rows, tmp_path / f"{model.name}-out", steps=3)
        narrow = load_file(tmp_path / "halves-out" / "model.safetensors")
        exact = load_file(tmp_path / "floats-out" / "model.safetensors")
        for name, tensor in narrow.items():
            assert torch.equal(tensor, exact[name].bfloat16()), name

    def test_a_tied_head_on_disk_stays_a_copy(self, tmp_path: Path) -> None:
        model = self.save("tied", tmp_path / "model")
        head = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
        families.edit_tensors(model, lm_head__weight=head.clone())
        tune_shortly(model, self.rows(tmp_path), tmp_path / "out", steps=2)
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
        assert not torch.equal(weights["lm_head.weight"], head)

    def test_gradient_checkpointing_changes_nothing(self, tmp_path: Path) -> None:
        model, rows = self.save("sharded", tmp_path / "model"), self.rows(tmp_path)
        plain, saving = (
            tune_shortly(model, rows, tmp_path / str(saves), gradient_checkpointing=saves)
            for saves in (False, True)
        )
        assert losses(plain) == pytest.approx(losses(saving), rel=1e-5)

    def test_long_rows_are_cut_and_told_of(self, tmp_path: Path) -> None:
        model = self.save("sharded", tmp_path / "model")
        rows = [{"prompt": "w1 " * n, "completion": "w2 w3"} for n in (2, 5, 90)]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        report = tune_shortly(model, path, tmp_path / "out", steps=1, max_length=6)
        assert report.warnings == (
            "rows truncated to 6 tokens: 2",
            "rows dropped, since they have no token to predict: 1",
        )
        report = tune_shortly(model, path, tmp_path / "context", steps=1)
        assert report.warnings[0] == "rows truncated to 64 tokens: 1"
        with pytest.raises(DataError, match="no row has a token to predict within 2 tokens"):
            tune_shortly(model, path, tmp_path / "none", steps=1, max_length=2)

    def test_integers_and_what_is_not_loaded_are_kept(self, tmp_path: Path) -> None:
        model = self.save("tied", tmp_path / "model")
        # An old buffer that transformers computes instead.
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        families.edit_tensors(model, **{name.replace(".", "__"): torch.arange(4.0)})
        report = tune_shortly(model, self.rows(tmp_path), tmp_path / "out", steps=1)
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(weights[name], torch.arange(4.0))
        assert report.tensors["copied"] == 1
        assert report.warnings == (f"kept as it was, since transformers does not load it: {name}",)


class TestRefused:
    """A refused run leaves nothing on disk."""

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"steps": 0}, "--steps: 0 is too small"),
            ({"batch_size": 0}, "--batch-size: 0 is too small"),
            ({"gradient_accumulation": 0}, "--gradient-accumulation: 0 is too small"),
            ({"max_length": 1}, "--max-length: 1 is too small"),
            ({"save_every": 0}, "--save-every: 0 is too small"),
            ({"seed": -1}, "--seed: -1 is too small"),
            ({"seed": 1 << 32}, "--seed: 4294967296 is too large"),
            ({"learning_rate": 0.0}, "--learning-rate: 0.0 is not a number above 0"),
            ({"learning_rate": float("nan")}, "--learning-rate: nan is not a number above 0"),
            ({"warmup": -1.0}, "--warmup: -1.0 is neither a number of steps nor a share of them"),
            ({"warmup": 1.5}, "--warmup: 1.5 is neither a number of steps nor a share of them"),
            ({"warmup": float("nan")}, "--warmup: nan is neither a number of steps nor a share"),
            ({"warmup": 4}, "--warmup: 4 is not less than the number of steps, 4"),
            ({"teacher": "x", "temperature": 0.0}, "--temperature: 0.0 is not a number above 0"),
            ({"teacher": "x", "distill_weight": 1.5}, "--distill-weight: 1.5 is not between"),
            ({"teacher": "x", "hidden_weight": -1.0}, "--hidden-weight: -1.0 is not a number of"),
            ({"distill_weight": 0.1}, "--distill-weight: has no effect without a teacher"),
            ({"hidden_weight": 1.0}, "--hidden-weight: has no effect without a teacher"),
            ({"device": "tpu"}, "device: 'tpu' is unknown"),
        ],
    )
    def test_options(self, options: dict[str, Any], said: str, data: Path, tmp_path: Path) -> None:
        with pytest.raises(OptionError) as caught:
            tune_shortly(FAMILY / "target", data, tmp_path / "out", **options)
        assert str(caught.value).startswith(said)
        assert list(tmp_path.iterdir()) == []

    def refused(
        self, kind: type[DiffxferError], said: str, model: Path, data: Path, **options: Any
    ) -> None:
        out = model.parent / "refused" / "out"
        with pytest.raises(kind) as caught:
            tune_shortly(model, data, out, **options)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not out.parent.exists()

    def copy(self, member: str, folder: Path) -> Path:
        shutil.copytree(FAMILY / member, folder)
        return folder

    def test_inputs(self, data: Path, tmp_path: Path) -> None:
        model = self.copy("target", tmp_path / "model")
        refuse = self.refused
        refuse(DataError, "no such file", model, tmp_path / "absent.jsonl")
        with pytest.raises(OutputExistsError, match="is inside the input"):
            tune_shortly(model, data, model / "out")
        messages = tmp_path / "messages.jsonl"
        messages.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
        refuse(TrainingError, "has no chat template, but the rows of messages", model, messages)
        said = "--no-end-token: has no effect on rows of messages"
        refuse(OptionError, said, model, messages, end_token=False)
        chatty = self.copy("finetuned", tmp_path / "chatty")
        (chatty / "chat_template.jinja").write_text("{{ raise_exception('no hi') }}")
        refuse(
            DataError, "row 1 is rejected by the model's chat template (no hi)", chatty, messages
        )

    def test_models(self, data: Path, tmp_path: Path) -> None:
        model = self.copy("target", tmp_path / "extra")
        families.edit_tensors(model, extra__weight=torch.ones(2))
        said = "has tensors that transformers ignores, so a different model would be trained: extra"
        self.refused(TrainingError, said, model, data)
        model = self.copy("target", tmp_path / "lacking")
        weights = load_file(model / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        self.refused(TrainingError, "lacks tensors that transformers expects", model, data)
        model = self.copy("target", tmp_path / "wordless")
        for path in model.glob("tokenizer*"):
            path.unlink()
        self.refused(TrainingError, "has no tokenizer that transformers can load", model, data)
        model = self.copy("target", tmp_path / "unknown")
        tiny.edit_json(model / "config.json", lambda c: c.update(model_type="unheard-of"))
        self.refused(TrainingError, "cannot be loaded by transformers", model, data)

    def test_teachers(self, data: Path, tmp_path: Path) -> None:
        student = FAMILY / "target"
        teacher = self.copy("finetuned", tmp_path / "teacher")
        text = (teacher / "tokenizer.json").read_text()
        swapped = text.replace('"A":', '"\0":').replace('"B":', '"A":').replace('"\0":', '"B":')
        assert swapped != text
        (teacher / "tokenizer.json").write_text(swapped)
        with pytest.raises(VocabularyError, match=r"has the token 'B' with id .* token 'A'"):
            tune_shortly(student, data, tmp_path / "out", teacher=teacher)
        deep = self.copy("finetuned", tmp_path / "deep")
        tiny.edit_json(deep / "config.json", lambda c: c.update(num_hidden_layers=3))
        with pytest.raises(VocabularyError, match="has 3 layers, but the model to train has 4"):
            tune_shortly(student, data, tmp_path / "out", teacher=deep, hidden_weight=1.0)
        wide = self.copy("finetuned", tmp_path / "wide")
        tiny.edit_json(wide / "config.json", lambda c: c.update(vocab_size=300))
        with pytest.raises(VocabularyError, match="has 300 logits per token"):
            tune_shortly(student, data, tmp_path / "out", teacher=wide)

    def test_a_loss_that_is_no_number(self, data: Path, tmp_path: Path) -> None:
        model = self.copy("target", tmp_path / "model")
        weights = load_file(model / "model.safetensors")
        weights["lm_head.weight"][5] = float("nan")
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        self.refused(TrainingError, "the loss is nan at step 1; give a smaller", model, data)

    def test_a_result_that_overflows(self, data: Path, tmp_path: Path) -> None:
        model = self.copy("target", tmp_path / "model")
        weights = load_file(model / "model.safetensors")
        half = {name: tensor.half() for name, tensor in weights.items()}
        half["lm_head.weight"][3] = 65504.0
        half["lm_head.weight"][3, 64:] = -65504.0
        save_file(half, model / "model.safetensors", {"format": "pt"})
        out = tmp_path / "out"
        with pytest.raises(NonFiniteError, match="overflow"):
            tune_shortly(model, data, out, learning_rate=100.0, steps=1)
        assert not out.exists()


def test_without_trl(data: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *_: None if name == 'trl' else find(name, *_)\n"
        "from diffxfer.cli.main import main; main()"
    )
    argv = ["tune", FAMILY / "target", "--data", data, "-o", tmp_path / "out", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: tuning needs TRL, which is not installed; pip install 'diffxfer[tune]',"
        " or pipx inject diffxfer trl\n"
    )
