"""The report of a probe equals what its figures are by definition, computed here by hand."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from diffxfer import probe
from diffxfer.errors import DiffxferError, EvaluationError, OptionError, OutputError
from diffxfer.family import family_folder
from diffxfer.probing import model_memory
from diffxfer.probing.paths import MeasuredPath, SkippedPath
from tests.probing.small_models import make
from tests.probing.test_rows import encoder_tokenizer, words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from diffxfer.probing.report import ProbeReport

FAMILY = family_folder()
THREE = [FAMILY / role for role in ("finetuned", "base", "target")]
ALPHAS = (0.25, 1.0)


def paragraphs(count: int) -> list[str]:
    """Paragraphs of a text, each of 40 to 120 tokens."""
    found = [" ".join(part.split()) for part in (FAMILY / "text.txt").read_text().split("\n\n")]
    return [text for text in found if 40 <= len(ids_of(text)) <= 120][:count]


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FAMILY / "base")


def ids_of(text: str) -> list[int]:
    """A text as `tune` gives it to a model: with the end token."""
    ids: list[int] = tokenizer()(text + tokenizer().eos_token)["input_ids"]
    return ids


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs(4)))
    return path


@pytest.fixture(scope="module")
def report(data: Path) -> Iterator[ProbeReport]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield probe(*THREE, direct=FAMILY / "direct", data=data, alpha=ALPHAS, points=3, device="cpu")
    assert torch.get_num_threads() == 2  # one while it measured
    torch.set_num_threads(before)


@functools.cache
def weights(role: str) -> dict[str, torch.Tensor]:
    if role.startswith("graft"):
        finetuned, base, target = (weights(each) for each in ("finetuned", "base", "target"))
        alpha = float(role.removeprefix("graft "))
        return {
            name: (target[name].double() + alpha * (finetuned[name].double() - base[name].double()))
            .to(target[name].dtype)
            for name in target
        }  # fmt: skip
    return load_file(FAMILY / role / "model.safetensors")


def mixed(a: str, b: str, t: float) -> dict[str, torch.Tensor]:
    return {
        name: ((1 - t) * tensor.double() + t * weights(b)[name].double()).to(tensor.dtype)
        for name, tensor in weights(a).items()
    }


def loaded(tensors: dict[str, torch.Tensor]) -> Any:
    config = AutoConfig.from_pretrained(FAMILY / "target")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    missing = model.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys in ([], ["lm_head.weight"])  # tied
    return model


def loss_of(tensors: dict[str, torch.Tensor]) -> float:
    """The loss per token by transformers' own loss."""
    model = loaded(tensors)
    total = count = 0.0
    with torch.no_grad():
        for text in paragraphs(4):
            ids = torch.tensor([ids_of(text)])
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


def path_of(report: ProbeReport, ends: tuple[str, str], *, control: bool) -> MeasuredPath:
    for path in report.paths or ():
        if path.ends[0] == ends[0] and path.ends[1].startswith(ends[1]) and path.control == control:
            assert isinstance(path, MeasuredPath)
            return path
    raise AssertionError(ends)


@pytest.mark.parametrize("ends", [("finetuned", "direct"), ("graft", "direct"), ("base", "target")])
def test_losses_along_paths(report: ProbeReport, ends: tuple[str, str]) -> None:
    path = path_of(report, ends, control=False)
    a = f"graft {report.graft_alpha}" if ends[0] == "graft" else ends[0]
    losses = [loss_of(mixed(a, ends[1], t)) for t in (0.0, 0.5, 1.0)]
    assert [point.t for point in path.points] == [0.0, 0.5, 1.0]
    assert [point.loss for point in path.points] == pytest.approx(losses, rel=1e-5)
    barrier = max(0.0, losses[1] - (losses[0] + losses[2]) / 2)
    assert path.barrier == pytest.approx(barrier, abs=1e-5)
    assert path.rows == 4
    assert path.tokens == sum(len(ids_of(text)) - 1 for text in paragraphs(4))


@pytest.mark.parametrize("ends", [("finetuned", "direct"), ("graft", "direct"), ("base", "target")])
def test_a_control_has_the_same_ends_and_a_higher_barrier(
    report: ProbeReport, ends: tuple[str, str]
) -> None:
    path, control = (path_of(report, ends, control=which) for which in (False, True))
    for place in (0, -1):
        assert control.points[place].loss == pytest.approx(path.points[place].loss, rel=1e-5)
    assert control.barrier > path.barrier + 0.1


def test_the_alpha_curve(report: ProbeReport) -> None:
    assert report.alphas is not None
    roles = ["target", "direct", "graft 0.25", "graft 1.0"]
    assert [point.model for point in report.alphas] == [role.split()[0] for role in roles]
    assert [point.alpha for point in report.alphas] == [None, None, *ALPHAS]
    expected = [loss_of(weights(role)) for role in roles]
    assert [point.loss for point in report.alphas] == pytest.approx(expected, rel=1e-5)
    assert report.graft_alpha == ALPHAS[int(np.argmin(expected[2:]))]


@functools.cache
def outputs(role: str) -> list[Any]:
    model = loaded(weights(role))
    with torch.no_grad():
        return [
            model(torch.tensor([ids_of(text)]), output_attentions=True, output_hidden_states=True)
            for text in paragraphs(4)
        ]


PAIRS = [("base", "target"), ("finetuned", "direct"), ("finetuned", "base")]


def find_pair(found: Sequence[Any] | None, pair: tuple[str, str]) -> Any:
    (one,) = [each for each in found or () if each.pair == pair]
    return one


@pytest.mark.parametrize("pair", PAIRS)
def test_attention_is_that_of_a_plain_call(report: ProbeReport, pair: tuple[str, str]) -> None:
    similarity: list[list[list[float]]] = []
    for one, other in zip(*(outputs(role) for role in pair), strict=True):
        for layer, (a, b) in enumerate(zip(one.attentions, other.attentions, strict=True)):
            cosines = torch.nn.functional.cosine_similarity(a[0].double(), b[0].double(), dim=-1)
            similarity += [[]] if len(similarity) <= layer else []
            similarity[layer].append(cosines[:, 1:].tolist())  # the first token sees only itself
    layers = [np.concatenate(parts, axis=1).mean(1) for parts in similarity]
    found = find_pair(report.attention, pair)
    assert np.array(found.cosine.layers) == pytest.approx(np.array(layers), abs=1e-5)
    assert found.cosine.mean == pytest.approx(np.mean(layers), abs=1e-5)
    said = found.as_json()
    assert said["layers"] == [list(layer) for layer in found.cosine.layers]
    assert said["mean"] > said["permuted"] > 0
    assert said["mean"] > said["other_heads"]


@pytest.mark.parametrize("pair", PAIRS)
def test_hidden_states_by_linear_cka(report: ProbeReport, pair: tuple[str, str]) -> None:
    found = find_pair(report.hidden, pair)
    ours, theirs = (
        [
            np.concatenate([each.hidden_states[layer][0, 1:].double().numpy() for each in calls])
            for layer in range(len(calls[0].hidden_states))
        ]
        for calls in (outputs(role) for role in pair)
    )
    expected = []
    for x, y in zip(ours, theirs, strict=True):
        x, y = x - x.mean(0), y - y.mean(0)
        norm = np.linalg.norm
        expected.append(norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y)))
    assert list(found.layers) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_agreement_of_predictions(report: ProbeReport, pair: tuple[str, str]) -> None:
    equal = total = 0
    for one, other in zip(*(outputs(role) for role in pair), strict=True):
        same = one.logits.argmax(-1) == other.logits.argmax(-1)
        equal += int(same[0, :-1].sum())
        total += same.shape[1] - 1
    found = find_pair(report.agreement, pair).next_token
    assert (found.equal, found.counted) == (equal, total)


def test_the_forecast_is_of_activations(report: ProbeReport) -> None:
    assert report.forecast is not None
    assert report.activations is not None
    assert report.forecast.basis == "activations"
    assert report.forecast.ratio == report.activations.mean
    assert report.notes == []


def test_json_has_the_keys_of_the_contract(report: ProbeReport) -> None:
    value = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert {"low", "high", "ratio"} <= value["forecast"].keys()
    for path in value["paths"]:
        assert path.keys() >= {"ends", "control", "points", "barrier", "interval"}
        assert path["points"][0].keys() >= {"t", "loss", "loss_stderr", "scores"}
    assert value["attention"][0].keys() >= {"pair", "layers", "mean", "other_heads"}
    assert len(value["agreement"]) == 5


def test_numbers_that_json_lacks_are_null(report: ProbeReport) -> None:
    assert report.alphas is not None
    broken = replace(report.alphas[0], loss=float("nan"), loss_stderr=float("inf"))
    value = replace(report, alphas=[broken]).as_json()
    assert value["alphas"][0]["loss"] is value["alphas"][0]["loss_stderr"] is None


def test_without_direct_what_needs_it_is_left_out_and_said(data: Path) -> None:
    found = probe(*THREE, data=data, points=2, rows=1, device="cpu")
    assert {path.ends[0] for path in found.paths or ()} == {"base"}
    assert [each.pair for each in found.attention or ()] == [
        ("base", "target"),
        ("finetuned", "base"),
        ("graft", "finetuned"),
    ]
    assert found.notes[0].startswith("Without --direct, two paths ")
    assert found.paths
    assert all(isinstance(path, MeasuredPath) and path.interval is None for path in found.paths)


def test_forward_alone_measures_activations_alone() -> None:
    found = probe(*THREE, forward=True, device="cpu")
    assert found.forecast is not None
    assert found.forecast.basis == "activations"
    assert (found.paths, found.attention, found.alphas, found.graft_alpha) == (None,) * 4


def test_nothing_to_graft(data: Path) -> None:
    base = FAMILY / "base"
    found = probe(base, base, FAMILY / "target", data=data, points=2, rows=1, device="cpu")
    assert found.forecast is None
    assert found.alphas is not None
    assert found.alphas[0].loss == found.alphas[1].loss


def test_alpha_0_is_the_target(data: Path) -> None:
    found = probe(*THREE, data=data, points=2, rows=2, alpha=0, device="cpu")
    assert found.alphas is not None
    assert found.alphas[0].loss == found.alphas[1].loss
    assert find_pair(found.agreement, ("graft", "finetuned")).next_token.share < 1


@pytest.mark.slow
def test_adapters_stand_for_models(data: Path, tmp_path: Path) -> None:
    found = probe(
        *(FAMILY / "adapter", *THREE[1:]),
        direct=FAMILY / "adapter",
        data=data,
        points=2,
        rows=1,
        device="cpu",
        output=tmp_path / "page",
    )
    # The graft is the target with the adapter, which is what direct is here.
    assert found.alphas is not None
    assert found.alphas[1].loss == found.alphas[2].loss
    assert find_pair(found.attention, ("graft", "direct")).cosine.mean == pytest.approx(1)
    assert (tmp_path / "page" / "probe.html").is_file()


def encoders(kind: str, folder: Path, **changes: Any) -> list[Path]:
    """Finetuned, base, target and direct, each a step from the one before."""
    base = make(kind, **changes)
    generator = torch.Generator().manual_seed(5)
    steps: dict[str, dict[str, torch.Tensor]] = {"base": base.state_dict()}
    for role, of in (("target", "base"), ("finetuned", "base"), ("direct", "target")):
        steps[role] = {
            name: t + 0.05 * torch.randn(t.shape, generator=generator)
            if t.is_floating_point()
            else t
            for name, t in steps[of].items()
        }
    for role, tensors in steps.items():
        base.load_state_dict(tensors)
        base.save_pretrained(folder / role)
        encoder_tokenizer(unk_token="[PAD]", eos_token="[SEP]").save_pretrained(folder / role)
    return [folder / role for role in ("finetuned", "base", "target", "direct")]


@pytest.mark.parametrize(
    ("kind", "predicted"), [("bert", "masked_token"), ("bert classifier", "label")]
)
def test_encoders(kind: str, predicted: str, tmp_path: Path) -> None:
    *three, direct = encoders(kind, tmp_path)
    rows = [{"text": words(40, start), "label": start % 3} for start in range(3)]
    path = tmp_path / "rows.jsonl"
    keys = ("text", "label") if kind == "bert classifier" else ("text",)
    path.write_text("".join(json.dumps({k: row[k] for k in keys}) + "\n" for row in rows))
    found = probe(
        *three, direct=direct, data=path, points=3, device="cpu", output=tmp_path / "page"
    )
    assert found.paths is not None
    assert len(found.paths) == 6
    assert all(isinstance(path, MeasuredPath) for path in found.paths)
    for each in found.agreement or ():
        assert getattr(each, predicted) is not None
        assert each.next_token is None
    assert all(each.cosine is not None for each in found.attention or ())
    assert found.alphas is not None
    assert all(point.loss is not None for point in found.alphas)
    assert (tmp_path / "page" / "probe.html").is_file()


def test_a_classifier_of_a_base_without_labels(tmp_path: Path) -> None:
    masked, classifier = tmp_path / "masked", tmp_path / "classifier"
    _, base, target, _ = encoders("bert", masked)
    finetuned = encoders("bert classifier", classifier)[0]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"text": words(40, n), "label": n % 3}) + "\n" for n in (1, 2))
    )
    found = probe(
        *(finetuned, base, target), added="bring", data=path, points=2, device="cpu"
    )  # fmt: skip
    assert found.alphas is not None
    assert [point.loss is None for point in found.alphas] == [True, False]
    assert any(note.startswith("target has no loss") for note in found.notes)
    (path_found, _) = found.paths or ()
    assert isinstance(path_found, SkippedPath)
    said = "base predicts masked tokens, and the rows are for a model that predicts labels"
    assert path_found.reason == said


def changed(role: str, folder: Path, **files: Any) -> Path:
    """A model of the family with other files."""
    folder.mkdir()
    for path in (FAMILY / role).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name, change in files.items():
        path = folder / f"{name}.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
    return folder


def test_tokenizers_that_differ_are_said(data: Path, tmp_path: Path) -> None:
    def swap(value: Any) -> None:
        vocabulary = value["model"]["vocab"]
        one, other = "e", "t"
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    target = changed("target", tmp_path / "target", tokenizer=swap)
    found = probe(*THREE[:2], target, data=data, vocab="ids", points=2, rows=1, device="cpu")
    said = "the tokenizers of base and target give different tokens for the "
    path = (found.paths or ())[0]
    assert isinstance(path, SkippedPath)
    assert path.reason.startswith(said)
    for part in (found.attention, found.hidden, found.agreement):
        assert find_pair(part, ("base", "target")).reason.startswith(said)
    assert find_pair(found.hidden, ("finetuned", "base")).reason is None


@pytest.mark.slow
def test_a_target_with_more_rows_of_vocabulary(data: Path, tmp_path: Path) -> None:
    tensors = load_file(FAMILY / "target" / "model.safetensors")
    more = tensors["model.embed_tokens.weight"].shape[0] + 8
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        tensors[name] = torch.cat((tensors[name], tensors[name][:8] * 0.5))
    target = changed("target", tmp_path / "target", config=lambda c: c.update(vocab_size=more))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    found = probe(*THREE[:2], target, data=data, points=2, rows=1, device="cpu")
    path = (found.paths or ())[0]
    assert isinstance(path, SkippedPath)
    assert " in base and (267, 128) in target" in path.reason
    assert find_pair(found.attention, ("base", "target")).cosine.mean > 0.5


@pytest.mark.slow
def test_models_that_cannot_be_permuted_have_no_control(tmp_path: Path) -> None:
    *three, direct = encoders("mamba", tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": words(40)}) + "\n")
    found = probe(*three, direct=direct, data=path, points=2, device="cpu")
    assert [isinstance(path, SkippedPath) for path in found.paths or ()] == [False, True] * 3
    for skipped in (found.paths or ())[1::2]:
        value = skipped.as_json()
        assert value["points"] == []
        assert value["barrier"] is value["interval"] is None
        assert value["reason"].startswith("no attention heads or MLP units were recognised")
    assert all(each.reason for each in found.attention or ())


@pytest.mark.slow
def test_rows_of_messages_where_only_finetuned_has_a_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    finetuned = changed(
        "finetuned",
        tmp_path / "finetuned",
        tokenizer_config=lambda c: c.update(chat_template=template),
    )
    bare = [
        changed(role, tmp_path / role, tokenizer_config=lambda c: c.pop("chat_template", None))
        for role in ("base", "target")
    ]
    turns = [
        {"role": "user", "content": "wisdom " * 40},
        {"role": "assistant", "content": "isdomway"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    found = probe(finetuned, *bare, data=path, points=2, device="cpu")
    assert all(isinstance(path, MeasuredPath) for path in found.paths or (None,))


def test_a_refusal_for_memory_comes_before_anything_is_loaded(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_memory, "free_memory_on", lambda _: 1_000_000)
    said: list[str] = []
    with pytest.raises(EvaluationError) as caught:
        probe(*THREE, data=data, device="cpu", stage=said.append)
    assert "two models and a half need 4.11 MB of memory on cpu" in str(caught.value)
    assert "1.00 MB are free" in str(caught.value)
    assert not said


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"points": 1}, "--points: 1 is below 2"),
        ({"rows": 0}, "--rows: 0 is below 1"),
        ({"alpha": ()}, "--alpha: names no scale"),
        ({"alpha": float("nan")}, "--alpha: nan is not a finite number"),
        ({"alpha": 0.5}, "--alpha: applies only where --data or --tasks is given"),
        ({"points": 5}, "--points: applies only where --data or --tasks is given"),
        ({"rows": 5, "forward": True}, "--rows: applies only where --data or --tasks is given"),
        ({"limit": 5}, "--limit: applies only where --tasks is given"),
        ({"device": "cpu"}, "--device: applies only where --data, --tasks or --forward is given"),
        ({"forward": True, "device": "abacus"}, "--device: 'abacus' is not a device"),
        ({"forward": True, "stream": True}, "--stream: the models are loaded"),
        ({"tasks": ""}, "--tasks: names no task"),
    ],
)
def test_options_that_are_invalid_or_do_nothing(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError) as caught:
        probe("nothing", "nothing", "nothing", **options)
    assert str(caught.value).replace('"', "'").startswith(problem)


def test_the_folder_of_the_page_is_checked_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "page"):
        with pytest.raises(OutputError, match="is not a folder"):
            probe(*THREE, output=output)
    with pytest.raises(OutputError, match="is the input"):
        probe(*THREE, output=THREE[0])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_missing_file_of_rows_is_found_before_the_work(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(DiffxferError, match=r"nothing\.jsonl"):
        probe(*THREE, data=tmp_path / "nothing.jsonl", stage=said.append)
    assert not said


def test_a_model_without_a_tokenizer_reads_no_text(tmp_path: Path) -> None:
    base = changed("base", tmp_path / "base")
    for path in base.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(EvaluationError, match="base: has no tokenizer"):
        probe(THREE[0], base, THREE[2], forward=True, device="cpu")


def test_tasks_are_for_models_that_predict_the_next_token(tmp_path: Path) -> None:
    *three, _ = encoders("bert", tmp_path)
    with pytest.raises(EvaluationError, match="finetuned predicts masked tokens"):
        probe(*three, tasks="pig_latin", include_path=FAMILY / "tasks", device="cpu")
