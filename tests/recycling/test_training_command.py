"""Training by a custom command: how it is run, and which output is accepted."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffxfer import iterate
from diffxfer.errors import TrainingError
from diffxfer.recycling.recipe_file import read_recipe
from diffxfer.recycling.training_command import train_by_command
from tests import families, tiny
from tests.recycling.chains import left, weights
from tests.recycling.training import FAMILY

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs a Python program as the command, in a folder with a space in its name."""
    home = tmp_path / "a home"
    home.mkdir()

    def run(program: str, *words: str, model: Path = FAMILY / "target") -> list[str]:
        (home / "trainer.py").write_text(f"import sys, os, shutil\n{program}\n")
        said: list[str] = []
        command = shlex.join([sys.executable, "trainer.py", *words])
        train_by_command(
            *(command, model, tmp_path / "a run" / "model"),
            number=7,
            teacher=FAMILY / "finetuned",
            home=home,
            tell=said.append,
        )
        return said

    return run


COPY = "shutil.copytree(sys.argv[1], sys.argv[2])"


def test_placeholders_are_filled_and_other_braces_left(
    train: Callable[..., list[str]], tmp_path: Path
) -> None:
    program = f"import json; json.dump([os.getcwd(), *sys.argv], open('said', 'w')); {COPY}"
    words = ("{model}", "{output}", "r{round}", "{teacher}", '{"a": {}}', "$HOME", "a b; true")
    assert train(program, *words) == []
    home, model = tmp_path / "a home", tmp_path / "a run" / "model"
    cwd, _, began, output, *rest = json.loads((home / "said").read_text())
    assert (cwd, began, Path(output).parent) == (str(home), str(FAMILY / "target"), model.parent)
    assert rest == ["r7", str(FAMILY / "finetuned"), '{"a": {}}', "$HOME", "a b; true"]
    assert families.contents(model) == families.contents(FAMILY / "target")
    assert sorted(path.name for path in model.parent.iterdir()) == ["model", "model.log"]


@pytest.mark.parametrize("own", [False, True])
def test_a_manifest_that_was_copied_along_is_dropped(
    own: bool, train: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = shutil.copytree(FAMILY / "target", tmp_path / "graft")
    (model / "diffxfer.json").write_text("{}")
    program = f"{COPY}; open(f'{{sys.argv[2]}}/diffxfer.json', 'a').write({' ' * own!r})"
    train(program, "{model}", "{output}", model=model)
    assert (tmp_path / "a run" / "model" / "diffxfer.json").exists() == own


def test_its_output_is_kept(train: Callable[..., list[str]], tmp_path: Path) -> None:
    train(f"print('one', flush=True); os.write(2, b'two\\n'); {COPY}", "{model}", "{output}")
    assert (tmp_path / "a run" / "model.log").read_text() == "one\ntwo\n"


def test_the_tail_of_a_failure_is_shown(train: Callable[..., list[str]], tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "trainer.py").write_text(
        "for i in range(30): print('line', i)\nraise SystemExit(3)"
    )
    command = shlex.join([sys.executable, "trainer.py", "{model}", "{output}"])
    with pytest.raises(
        TrainingError, match="exited with status 3; its last output line is: line 29"
    ) as caught:
        train_by_command(
            *(command, FAMILY / "base", tmp_path / "run" / "model"),
            number=1,
            teacher=None,
            home=tmp_path,
            tell=said.append,
        )
    assert said == [f"  line {number}" for number in range(18, 30)]
    assert str(tmp_path / "run" / "model.log") in str(caught.value)
    assert not (tmp_path / "run" / "model").exists()


def test_a_signal_is_a_failure(train: Callable[..., list[str]]) -> None:
    with pytest.raises(TrainingError, match="was terminated by SIGKILL"):
        train("os.kill(os.getpid(), 9)", "{model}", "{output}")


@pytest.mark.parametrize(
    ("word", "said"), [("nothing-of-the-kind", "No such file"), ("/etc", "Permission denied")]
)
def test_what_cannot_be_run(word: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=rf"{word}: cannot be run in .* \({said}"):
        train_by_command(
            *(f"{word} {{model}} {{output}}", FAMILY / "base", tmp_path / "model"),
            number=1,
            teacher=None,
            home=tmp_path,
            tell=print,
        )


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.0.mlp" in name)
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, path, {"format": "pt"})


def _lose(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.norm.weight")
    save_file(tensors, path, {"format": "pt"})


WRONG = {
    "nothing": ("pass", r"succeeded, but wrote no folder \{output\}"),
    "a file": ("open(sys.argv[2], 'w')", r"wrote no folder \{output\}"),
    "an empty folder": ("os.mkdir(sys.argv[2])", r"wrote no valid checkpoint to \{output\}"),
    "an adapter": (
        f"{COPY}; os.remove(sys.argv[2] + '/model.safetensors'); "
        "open(sys.argv[2] + '/adapter_config.json', 'w').write('{}'); "
        "open(sys.argv[2] + '/adapter_model.safetensors', 'w')",
        r"wrote no valid checkpoint to \{output\} \(.*adapter",
    ),
    "a pickle": (
        f"{COPY}; os.rename(sys.argv[2] + '/model.safetensors', sys.argv[2] + '/model.bin')",
        r"wrote no valid checkpoint to \{output\}",
    ),
    "no tokenizer": (
        f"{COPY}; os.remove(sys.argv[2] + '/tokenizer.json')",
        r"wrote no tokenizer to \{output\}; save the tokenizer, too",
    ),
    "another shape": (
        "shutil.copytree('../cut', sys.argv[2])",
        r"model\.layers\.0\.mlp\.\w+\.weight is \(\d+, \d+\) in .* and \(1, \d+\) in its output",
    ),
    "a tensor less": (
        "shutil.copytree('../less', sys.argv[2])",
        r"model\.norm\.weight is \(128,\) in .* and nothing in its output",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_such_model_is_refused(
    name: str, train: Callable[..., list[str]], tmp_path: Path
) -> None:
    for folder, spoil in (("cut", _cut), ("less", _lose)):
        spoil(shutil.copytree(FAMILY / "target", tmp_path / folder))
    program, said = WRONG[name]
    with pytest.raises(TrainingError, match=said) as caught:
        train(program, "{model}", "{output}")
    assert str(tmp_path / "a run" / "model.log") in str(caught.value)
    assert not (tmp_path / "a run" / "model").exists()
    # The output of the failed run does not block the next one.
    train(COPY, "{model}", "{output}")
    assert sorted(left(tmp_path / "a run")) == []
    assert weights(tmp_path / "a run" / "model") == weights(FAMILY / "target")


def test_a_tied_head_may_be_left_out(train: Callable[..., list[str]], tmp_path: Path) -> None:
    """transformers does not save a tied head, even if the original model stores it."""
    model = shutil.copytree(FAMILY / "target", tmp_path / "tied")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    tiny.edit_json(model / "config.json", lambda config: config.update(tie_word_embeddings=True))
    program = (
        f"{COPY}; from safetensors.torch import *; p = sys.argv[2] + '/model.safetensors'; "
        "t = load_file(p); t.pop('lm_head.weight'); save_file(t, p, {'format': 'pt'})"
    )
    train(program, "{model}", "{output}", model=model)
    made = load_file(tmp_path / "a run" / "model" / "model.safetensors")
    assert torch.equal(made["model.norm.weight"], tensors["model.norm.weight"])
    assert "lm_head.weight" not in made


def test_the_trainer_of_the_examples(tmp_path: Path) -> None:
    program, rows = (ROOT / "examples" / name for name in ("train_command.py", "words.jsonl"))
    words = [sys.executable, str(program), "--model", "{model}", "--output", "{output}"]
    words += ["--round", "{round}", "--data", str(rows), "--steps", "1"]
    train_by_command(
        *(shlex.join(words), FAMILY / "finetuned", tmp_path / "model"),
        number=2,
        teacher=None,
        home=tmp_path,
        tell=print,
    )
    made, began = (families.contents(path) for path in (tmp_path / "model", FAMILY / "finetuned"))
    # The config says which transformers wrote it.
    assert {name for name in began if made[name] != began[name]} <= {
        *("model.safetensors", "config.json", "generation_config.json")
    }
    assert made["model.safetensors"] != began["model.safetensors"]
    families.load_whole(tmp_path / "model")
    log = (tmp_path / "model.log").read_text().splitlines()
    assert log[0] == f"round 2: {FAMILY / 'finetuned'}"
    assert log[-1].startswith("step 1: loss 0.")


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    """The recipe in examples, on the shipped family, with less to do."""
    home = tmp_path / "examples"
    shutil.copytree(ROOT / "examples", home)
    text = (home / "chain.yaml").read_text()
    asked = {"../diffxfer/family": str(FAMILY), "python": sys.executable, "limit: 100": "limit: 8"}
    for known, new in {**asked, "--steps 20": "--steps 2"}.items():
        assert known in text
        text = (
            text.replace(f" {known} ", f" {new} ")
            if known == "python"
            else text.replace(known, new)
        )
    (home / "chain.yaml").write_text(text)
    report = iterate(home / "chain.yaml", tmp_path / "run")
    last = report.rounds[-1]
    measure = report.measures[0]
    assert last.alpha == 1.2
    values = {name: rows[0]["value"] for name, rows in last.scores.items()}
    assert values["base"] == values["direct"] == 0.0
    assert values["tuned"] > 0.5
    assert measure[0] == "pig_latin"
    for name in ("model", "direct"):
        made = tmp_path / "run" / "round-02" / name
        families.load_whole(made)
        began = tmp_path / "run/round-02/graft" if name == "model" else FAMILY / "target"
        assert weights(made) != weights(began)
        for companion in ("tokenizer.json", "tokenizer_config.json"):
            assert (made / companion).read_bytes() == (began / companion).read_bytes()
        log = (tmp_path / "run" / "round-02" / f"{name}.log").read_text()
        assert "round 2: " in log
        assert "step 2: loss" in log


def test_the_example_names_what_is_there() -> None:
    plan = read_recipe(ROOT / "examples" / "chain.yaml")
    assert all(Path(base).is_dir() for base in plan.bases)
    held = {json.loads(line)["answer"] for line in (FAMILY / "task.jsonl").read_text().splitlines()}
    rows = (ROOT / "examples" / "words.jsonl").read_text().splitlines()
    assert held.isdisjoint(json.loads(row)["completion"] for row in rows)
