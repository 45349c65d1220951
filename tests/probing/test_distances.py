"""What `measure_distances` says, against numpy's float64 on whole tensors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffxfer.errors import (
    CheckpointError,
    DiffxferError,
    HeaderError,
    MatchError,
    OptionError,
    VocabularyError,
)
from diffxfer.family import family_folder
from diffxfer.probing.distances import measure_distances
from diffxfer.probing.pair_direct import add_direct
from diffxfer.probing.pair_options import pair_options
from diffxfer.probing.pairing import pair_models
from diffxfer.streaming.completed import Completed
from diffxfer.streaming.engine import Engine
from diffxfer.streaming.plan import BLOCK_ELEMENTS, make_plan
from tests import families
from tests.helpers import DTYPES, to_bits, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from diffxfer.probing.distances import Distances
    from diffxfer.probing.figures import Figures

ROLES = ("finetuned", "base", "target", "direct")
UP = "model.layers.{}.mlp.up_proj.weight"
Q = "model.layers.{}.self_attn.q_proj.weight"
NORM, EMPTY = "model.norm.weight", "model.none"
SHAPES = ((600, 500), (60, 50), (800, 700), (60, 50))
"""Of a matrix in each layer; some have more than one block."""


def moved(tensor: Tensor, dtype: str, seed: int) -> Tensor:
    """A relative in another dtype: a third is equal, a tenth turned."""
    step = values("F64", tuple(tensor.shape), seed)
    place = torch.arange(tensor.numel()).reshape(tensor.shape) + seed
    made = tensor.double() + step * 0.125 * (place % 3 > 0)
    return torch.where(place % 10 == 0, -made, made).to(DTYPES[dtype])


def family() -> dict[str, dict[str, Tensor]]:
    """Four models: each layer has its own mix of dtypes, the norm is a scalar, one is empty."""
    mixes = (
        ("BF16",) * 4,
        ("F16", "BF16", "F32", "F16"),
        ("F32",) * 4,
        ("F32", "F64", "F64", "BF16"),
    )
    models: dict[str, dict[str, Tensor]] = {role: {} for role in ROLES}
    for layer, (shape, mix) in enumerate(zip(SHAPES, mixes, strict=True)):
        for name, size, seed in ((UP, shape, 10), (Q, (3, 4, 5), 20)):
            base = values(mix[1], size, seed + layer)
            for number, (role, dtype) in enumerate(zip(ROLES, mix, strict=True)):
                made = base if role == "base" else moved(base, dtype, 100 * number + layer)
                models[role][name.format(layer)] = made
    for number, role in enumerate(ROLES):
        models[role][NORM] = torch.tensor(1.0 + number / 8)
        models[role][EMPTY] = torch.zeros(3, 0)
        models[role]["model.steps"] = torch.tensor([7])
    models["target"][Q.format(3)] = models["base"][Q.format(3)].clone()
    models["finetuned"][Q.format(2)] = models["base"][Q.format(2)].clone()
    return models


MODELS = family()
FLOATS = [name for name in MODELS["base"] if name != "model.steps"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models, each cut into shards at other places."""
    root = tmp_path_factory.mktemp("models")
    cuts = {"finetuned": [2, 5], "base": [3], "target": [], "direct": [1, 6, 8]}
    return {
        role: families.save_tensors(root / role, MODELS[role], cuts=cuts[role]) for role in ROLES
    }


@pytest.fixture(scope="module")
def found(folders: dict[str, Path]) -> Distances:
    return measure(*(folders[role] for role in ROLES), threads=2)


def measure(
    *models: Path,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Distances:
    """The distances of three or four models, with the options of the command."""
    return measure_distances(
        *models,
        options=pair_options(**options, direct=len(models) == 4),
        threads=threads,
        progress=progress,
    )


def flat(tensors: Iterable[Tensor]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(t.double().numpy().ravel() for t in tensors)])


def equal_share(pairs: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """Bit for bit, or by value if the dtypes differ."""
    same = [
        to_bits(a) == to_bits(b) if a.dtype == b.dtype else (a.double() == b.double()).reshape(-1)
        for a, b in pairs
    ]
    every = torch.cat(same) if same else torch.zeros(0)
    return float(every.double().mean()) if len(every) else None


def cosine(one: np.ndarray, other: np.ndarray) -> float | None:
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / norms) if norms else None


def agreement(one: np.ndarray, other: np.ndarray) -> float | None:
    both = (one != 0) & (other != 0)
    return float((np.sign(one) == np.sign(other))[both].mean()) if both.any() else None


def oracle(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """The figures of some tensors, each given by role, from all their elements at once."""
    f, b, t = (flat(each[role] for each in tensors) for role in ROLES[:3])
    delta, shift, norm = f - b, t - b, np.linalg.norm

    def over(above: Any, below: Any) -> float | None:
        return float(above / below) if below else None

    expected: dict[str, Any] = {
        "tensors": len(tensors),
        "parameters": b.size,
        "finetuned_norm": norm(f),
        "base_norm": norm(b),
        "target_norm": norm(t),
        "delta_norm": norm(delta),
        "shift_norm": norm(shift),
        "ratio": over(norm(shift), norm(delta)),
        "relative_delta": over(norm(delta), norm(b)),
        "relative_shift": over(norm(shift), norm(b)),
        "cosine_base_target": cosine(b, t),
        "cosine_delta_shift": cosine(delta, shift),
        "sign_agreement": agreement(delta, shift),
        "unchanged_finetuned": equal_share((each["finetuned"], each["base"]) for each in tensors),
        "unchanged_target": equal_share((each["target"], each["base"]) for each in tensors),
        "direct": None,
    }
    four = [each for each in tensors if "direct" in each and each["base"].numel()]
    if four:
        f, b, t, d = (flat(each[role] for each in four) for role in ROLES)
        expected["direct"] = {
            "parameters": b.size,
            "direct_norm": norm(d),
            "gain_norm": norm(d - t),
            "cosine_delta_gain": cosine(f - b, d - t),
            "sign_agreement": agreement(f - b, d - t),
            "unchanged": equal_share((each["direct"], each["target"]) for each in four),
        }
    return expected


def check(figures: Figures | None, expected: Mapping[str, Any]) -> None:
    assert figures is not None
    compare(figures.as_json(), expected)


def compare(told: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert told.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            compare(told[name], value)
        elif value is None:
            assert told[name] is None, name
        else:
            assert told[name] == pytest.approx(value, rel=5e-9, abs=5e-9), name


def named(names: Iterable[str], roles: Sequence[str] = ROLES) -> list[dict[str, Tensor]]:
    return [{role: MODELS[role][name] for role in roles} for name in names]


class TestTheFigures:
    def test_of_every_tensor(self, found: Distances) -> None:
        assert {tensor.name for tensor in found.tensors} == {*FLOATS}
        for tensor in found.tensors:
            check(tensor.figures, oracle(named([tensor.name])))
        by_name = {tensor.name: tensor.figures for tensor in found.tensors}
        same = by_name[Q.format(2)]
        assert same is not None
        assert (same.ratio, same.unchanged_finetuned, same.sign_agreement) == (None, 1.0, None)

    def test_in_all_and_by_place(self, found: Distances) -> None:
        check(found.total, oracle(named(FLOATS)))
        assert [(cell.layer, cell.kind) for cell in found.cells] == [
            *((None, kind) for kind in ("none", "norms")),
            *((layer, kind) for layer in range(4) for kind in ("q", "up")),
        ]
        for cell in found.cells:
            other = {"none": EMPTY, "norms": NORM}.get(cell.kind or "", UP)
            name = (Q if cell.kind == "q" else other).format(cell.layer)
            check(cell.figures, oracle(named([name])))
        for layer in found.layers:
            names = [UP.format(layer.layer), Q.format(layer.layer)]
            check(layer.figures, oracle(named(names)))
        for kind in found.kinds:
            names = {"none": [EMPTY], "norms": [NORM]}.get(
                kind.kind or "", [(Q if kind.kind == "q" else UP).format(n) for n in range(4)]
            )
            check(kind.figures, oracle(named(names)))

    def test_direct_changes_no_figure_of_the_others(
        self, found: Distances, folders: dict[str, Path]
    ) -> None:
        alone = measure(*(folders[role] for role in ROLES[:3]))
        check(alone.total, oracle(named(FLOATS, ROLES[:3])))
        for with_it, without in zip(found.tensors, alone.tensors, strict=True):
            assert with_it.figures is not None
            assert without.figures is not None
            told = with_it.figures.as_json() | {"direct": None}
            assert told == without.figures.as_json()

    def test_json_has_all_but_single_tensors(self, found: Distances) -> None:
        value = json.loads(json.dumps(found.as_json(), allow_nan=False))
        assert value["total"] == found.total.as_json()
        assert "tensors" not in value
        assert len(value["cells"]) == len(found.cells)
        assert value["cells"][-1]["kind"] == "up"
        assert value["layers"][0]["stack"] == "layers"

    def test_integers_are_not_measured_and_said(self, found: Distances) -> None:
        assert [(g.pattern, g.tensors) for g in found.not_measured] == [("model.steps", 1)]

    def test_nearly_equal_models_keep_the_digits_of_their_angle(self, tmp_path: Path) -> None:
        """1 − cosine is 5e-9 here."""
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(100_000, generator=generator, dtype=torch.float64)
        step = torch.randn(100_000, generator=generator, dtype=torch.float64) * 1e-4
        sides = {"f": base + 1, "b": base, "t": base + step}
        made = [families.save_tensors(tmp_path / n, {"x": t}) for n, t in sides.items()]
        total = measure(*made).total
        assert total.cosine_base_target is not None
        assert 1 - total.cosine_base_target == pytest.approx(5e-9, rel=0.02)


@settings(max_examples=6)
@given(threads=st.integers(1, 5), blocks=st.integers(1, 3))
def test_threads_and_chunks_change_no_bit(
    folders: dict[str, Path], threads: int, blocks: int
) -> None:
    once, again = (sums_of(folders, *how) for how in ((1, 1), (threads, blocks)))
    assert once == again
    assert len(once) == len(FLOATS)


def sums_of(folders: Mapping[str, Path], threads: int, blocks: int) -> list[tuple[float, ...]]:
    options = pair_options()
    pairing = pair_models({role: folders[role] for role in ROLES[:3]}, options)
    tasks = add_direct(folders["direct"], folders["target"], pairing, options).tasks
    plan, chunk = make_plan(tasks, ()), blocks * BLOCK_ELEMENTS
    engine = Engine(
        *(plan, {}, {}, Completed(plan, chunk, None)), chunk_elements=chunk, allow_nonfinite=True
    )
    return [result.sums for result in engine.run(threads, None, None)]


def save(root: Path, **models: Mapping[str, Tensor]) -> list[Path]:
    return [families.save_tensors(root / role, tensors) for role, tensors in models.items()]


class TestWhatIsNotFinite:
    @pytest.mark.parametrize("role", ROLES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_is_in_no_figure(self, tmp_path: Path, role: str, bad: float) -> None:
        models = {
            each: {"bad": torch.ones(3), "good": torch.tensor([3.0, 4.0 + number])}
            for number, each in enumerate(ROLES)
        }
        models[role]["bad"] = torch.tensor([1.0, bad, 2.0])
        found = measure(*save(tmp_path, **models))
        assert found.nonfinite == ("bad",)
        assert found.total == {t.name: t.figures for t in found.tensors}["good"]
        assert (found.total.tensors, found.total.finetuned_norm) == (1, 5.0)
        assert any("NaN or infinity are left out of all figures: bad" in w for w in found.warnings)
        json.dumps(found.as_json(), allow_nan=False)

    def test_infinities_of_both_signs(self, tmp_path: Path) -> None:
        """Products of +infinity in one block and −infinity in another have no sum."""
        long = torch.ones(BLOCK_ELEMENTS + 1)
        ours, onto = long * 2, long * 2
        ours[0], ours[-1], onto[-1] = math.inf, math.inf, -math.inf
        found = measure(*save(tmp_path, f={"x": ours}, b={"x": long}, t={"x": onto}))
        assert (found.nonfinite, found.total.tensors) == (("x",), 0)


WORDS = [f"w{n}" for n in range(20)]
CONFIG = {"vocab_size": 24, "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLES = {
    "base": WORDS,
    "finetuned": [*WORDS, "<new>"],
    "target": [*WORDS[::-1][:17], "x0", "x1", "x2", "x3"],
    "direct": [*WORDS[::-1][:17], "x0", "x1", "x2"],
}
"""The tokens of each model: the target has another order, and lacks w0, w1 and w2."""


def vocabularies(root: Path, *, tied: Sequence[str] = ()) -> dict[str, dict[str, Tensor]]:
    models = {}
    for number, (role, table) in enumerate(TABLES.items()):
        rows = len(table)
        models[role] = {
            EMBED: values("BF16", (rows, 6), number),
            UP.format(0): values("F32", (4, 6), 10 + number),
            HEAD: values("BF16", (rows, 6), 20 + number),
        }
        if role in tied:
            models[role][HEAD] = models[role][EMBED].clone()
        config = {**CONFIG, "vocab_size": rows}
        families.save_tensors(root / role, models[role], config)
        families.save_tokenizer(root / role, families.fast_tokenizer(words=table))
    return models


def rows_by_token(models: Mapping[str, Mapping[str, Tensor]], name: str) -> list[dict[str, Tensor]]:
    """The rows that the three models have, and those that direct has besides."""
    with_direct = [t for t in WORDS if all(t in TABLES[role] for role in ROLES)]
    return [
        {role: models[role][name][[TABLES[role].index(t) for t in with_direct]] for role in ROLES}
    ]


class TestRowsOfTokens:
    def test_pair_by_token(self, tmp_path: Path) -> None:
        models = vocabularies(tmp_path)
        found = measure(*(tmp_path / role for role in ROLES), vocab="tokens")
        assert found.vocabulary == "tokens"
        by_name = {tensor.name: tensor.figures for tensor in found.tensors}
        for name in (EMBED, HEAD):
            check(by_name[name], oracle(rows_by_token(models, name)))
        assert found.rows_left_out == {
            name: {"finetuned": 4, "base": 3, "target": 4} for name in (EMBED, HEAD)
        }

    def test_rows_that_direct_lacks_are_measured_without_it(self, tmp_path: Path) -> None:
        """By id, the three models have 20 rows, and direct has the first 17 of them."""
        models = vocabularies(tmp_path)
        fewer = {n: t[:17].clone() if n != UP.format(0) else t for n, t in models["direct"].items()}
        short = families.save_tensors(tmp_path / "short", fewer, {**CONFIG, "vocab_size": 17})
        families.save_tokenizer(short, families.fast_tokenizer(words=WORDS[:17]))
        same = {}
        for role in ROLES[:3]:
            cut = {n: t[:20].clone() if n != UP.format(0) else t for n, t in models[role].items()}
            same[role] = families.save_tensors(tmp_path / f"{role} 20", cut, CONFIG)
            families.save_tokenizer(same[role], families.fast_tokenizer(words=WORDS))
        found = measure(*same.values(), allow_missing=["none"])
        with_it = measure(*same.values(), short, vocab="tokens")
        alone = {t.name: t.figures for t in found.tensors}
        for tensor in with_it.tensors:
            assert tensor.figures is not None
            assert tensor.figures.direct is not None
            expected = alone[tensor.name]
            assert expected is not None
            compare(tensor.figures.as_json() | {"direct": None}, expected.as_json())
            rows = tensor.name in (EMBED, HEAD)
            four = {
                role: models[role][tensor.name][:17] if rows else models[role][tensor.name]
                for role in ROLES
            }
            compare(tensor.figures.as_json()["direct"], oracle([four])["direct"])

    def test_added_tokens_need_no_room(self, tmp_path: Path) -> None:
        """A graft that leaves out the embedding has no row for a token that finetuned added."""
        vocabularies(tmp_path)
        folders = [tmp_path / role for role in ROLES[:3]]
        found = measure(*folders, vocab="tokens", exclude=["embed_tokens"])
        assert {tensor.name for tensor in found.tensors} == {HEAD, UP.format(0)}

    def test_a_tied_target_has_one_tensor_for_both(self, tmp_path: Path) -> None:
        models = vocabularies(tmp_path, tied=ROLES)
        found = measure(*(tmp_path / role for role in ROLES), vocab="tokens")
        assert {t.name for t in found.tensors} == {EMBED, UP.format(0)}
        figures = {tensor.name: tensor.figures for tensor in found.tensors}[EMBED]
        check(figures, oracle(rows_by_token(models, EMBED)))

    def test_the_embedding_of_a_tied_model_is_its_head(self, tmp_path: Path) -> None:
        models = vocabularies(tmp_path, tied=("finetuned", "base"))
        found = measure(*(tmp_path / role for role in ROLES), vocab="tokens")
        by_name = {tensor.name: tensor.figures for tensor in found.tensors}
        assert by_name.keys() == {EMBED, HEAD, UP.format(0)}
        for name in (EMBED, HEAD):
            check(by_name[name], oracle(rows_by_token(models, name)))


class TestWhatDoesNotPair:
    def shapes(self, tmp_path: Path, **changed: Mapping[str, Tensor]) -> list[Path]:
        models = {role: {"a": torch.ones(2, 3), "b": torch.ones(4)} for role in ROLES}
        return save(
            tmp_path, **{role: {**t, **changed.get(role, {})} for role, t in models.items()}
        )

    def test_another_shape_is_an_error_as_in_transfer(self, tmp_path: Path) -> None:
        made = self.shapes(tmp_path, target={"a": torch.ones(3, 3)})
        with pytest.raises(MatchError, match=r"a is F32 \(3, 3\) in target and .* in finetuned"):
            measure(*made[:3])
        assert measure(*made[:3], exclude=["^a$"]).total.parameters == 4

    def test_a_missing_tensor_needs_allow_missing(self, tmp_path: Path) -> None:
        made = self.shapes(tmp_path, target={"extra": torch.ones(5)})
        with pytest.raises(MatchError, match=r"extra .* is in target only.*--allow-missing"):
            measure(*made[:3])
        found = measure(*made[:3], allow_missing=["extra"])
        assert [(g.pattern, g.why) for g in found.not_measured] == [
            ("extra", "only the target has it")
        ]

    def test_an_error_of_direct_names_direct(self, tmp_path: Path) -> None:
        made = self.shapes(tmp_path, direct={"a": torch.ones(3, 3)})
        with pytest.raises(
            MatchError, match=r"a is F32 \(3, 3\) in direct and .* in target"
        ) as exc:
            measure(*made)
        assert exc.value.groups[0].role == "direct"
        with pytest.raises(CheckpointError, match="no such folder"):
            measure(*made[:3], tmp_path / "nothing")
        more = families.save_tensors(tmp_path / "more", {"a": torch.ones(2, 3)})
        with pytest.raises(MatchError, match=r"b .* is in target only"):
            measure(*made[:3], more)
        found = measure(*made[:3], more, allow_missing=["^b$"])
        assert found.total.direct is not None
        assert (found.total.parameters, found.total.direct.parameters) == (10, 6)
        assert "direct is not compared in 1 tensors: b" in found.warnings

    def test_names_of_direct_can_be_changed(self, tmp_path: Path) -> None:
        made = self.shapes(tmp_path)
        other = {"net.a": torch.ones(2, 3), "net.b": torch.ones(4)}
        odd = families.save_tensors(tmp_path / "odd", other)
        found = measure(*made[:3], odd, rename=[r"direct:^net\.="])
        assert found.total.direct is not None
        assert found.total.direct.unchanged == 1.0
        with pytest.raises(OptionError, match=r"'direct' in .* is not a role of this command"):
            measure(*made[:3], rename=[r"direct:^net\.="])

    def test_options_are_checked_first(self) -> None:
        for options in ({"threads": 0}, {"vocab": "x"}, {"added": "x"}, {"include": ["*"]}):
            with pytest.raises(OptionError):
                measure(Path("no"), Path("such"), Path("folder"), **options)

    def test_a_pattern_that_matches_nothing_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="matches none of the"):
            measure(*self.shapes(tmp_path)[:3], include=["zzz"])

    def test_a_token_in_use_that_the_target_lacks(self, tmp_path: Path) -> None:
        vocabularies(tmp_path)
        families.save_tokenizer(
            tmp_path / "finetuned",
            families.fast_tokenizer(words=TABLES["finetuned"]),
            template="{{ 'w0' }}",
            eos_token="w0",
        )
        with pytest.raises(VocabularyError, match="does not have 'w0', which finetuned uses"):
            measure(*(tmp_path / role for role in ROLES[:3]), vocab="tokens")

    def test_a_broken_file(self, folders: dict[str, Path], tmp_path: Path) -> None:
        broken = families.save_tensors(tmp_path / "broken", MODELS["target"])
        shard = broken / "model.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(HeaderError, match="truncated"):
            measure(folders["finetuned"], folders["base"], broken)


class TestUnrelatedModels:
    def test_are_no_error_but_said(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        base, step, other = (torch.randn(20, 64, 64, generator=generator) for _ in range(3))
        near = base + step * 0.01
        made = save(
            tmp_path,
            **{
                role: {UP.format(layer): of[layer].clone() for layer in range(20)}
                for role, of in zip(ROLES, (near, base, other, base), strict=True)
            },
        )
        found = measure(*made)
        text = " ".join(found.warnings)
        assert "base and target are unrelated: the cosine of" in text
        assert "direct and target are unrelated: the cosine of" in text
        assert "finetuned and base" not in text
        assert [r.roles for r in found.relations] == [("finetuned", "base"), ("base", "target")]

    def test_swapped_arguments_are_suspected(self) -> None:
        family = family_folder()
        found = measure(family / "base", family / "finetuned", family / "direct")
        assert any("are finetuned and base swapped" in line for line in found.warnings)


class TestAdapters:
    def test_as_finetuned_gives_its_own_delta_with_all_digits(self) -> None:
        from safetensors.torch import load_file

        family = family_folder()
        found = measure(family / "adapter", family / "base", family / "target")
        base, target = (load_file(family / r / "model.safetensors") for r in ("base", "target"))
        factors = load_file(family / "adapter" / "adapter_model.safetensors")
        config = json.loads((family / "adapter" / "adapter_config.json").read_text())
        scaling = config["lora_alpha"] / config["r"]
        name = Q.format(1)
        a, b = (factors[f"base_model.model.{name[:-7]}.lora_{x}.weight"].double() for x in "AB")
        delta = (b @ a * scaling).numpy().ravel()
        shift = flat([target[name]]) - flat([base[name]])
        by_name = {tensor.name: tensor.figures for tensor in found.tensors}
        figures = by_name[name]
        assert figures is not None
        assert figures.delta_norm == pytest.approx(np.linalg.norm(delta), rel=1e-8)
        assert figures.cosine_delta_shift == pytest.approx(cosine(delta, shift), abs=1e-8)
        assert figures.sign_agreement == pytest.approx(agreement(delta, shift), abs=1e-4)

    def test_tensors_that_it_leaves_alone_are_compared(self) -> None:
        family = family_folder()
        names = [family / role for role in ("adapter", "base", "target", "direct")]
        found = measure(*names)
        assert len(found.tensors) == 39
        by_name = {tensor.name: tensor.figures for tensor in found.tensors}
        whole = measure(family / "finetuned", *names[1:])
        frozen = [n for n, f in by_name.items() if f is not None and f.delta_norm == 0]
        assert frozen
        for tensor in whole.tensors:
            other = by_name[tensor.name]
            assert other is not None
            assert tensor.figures is not None
            assert other.shift_norm == tensor.figures.shift_norm
        assert by_name[frozen[0]].unchanged_finetuned == 1.0  # type: ignore[union-attr]

    def test_as_direct(self) -> None:
        """Base and an adapter of base in the places of target and direct: the gain is Δ."""
        family = family_folder()
        found = measure(family / "adapter", family / "base", family / "base", family / "adapter")
        total = found.total
        assert total.direct is not None
        assert (total.shift_norm, total.direct.cosine_delta_gain) == (0.0, 1.0)
        assert total.direct.gain_norm == total.delta_norm


def test_inputs_are_left_as_they_are_and_progress_is_told(folders: dict[str, Path]) -> None:
    before = families.fingerprints(*folders.values())
    told: list[tuple[int, int]] = []
    found = measure(*folders.values(), progress=lambda done, total: told.append((done, total)))
    assert families.fingerprints(*folders.values()) == before
    assert told[-1] == (found.bytes_read, found.bytes_read)


def test_nothing_to_measure_is_said(tmp_path: Path) -> None:
    made = save(tmp_path, **{role: {"a": torch.arange(3)} for role in ROLES[:3]})
    found = measure(*made)
    assert (found.total.tensors, found.total.ratio, found.cells) == (0, None, ())
    assert any("nothing was measured" in line for line in found.warnings)


def test_neither_torch_nor_a_model_is_loaded() -> None:
    code = (
        "import sys; from diffxfer.probing.distances import measure_distances;"
        f"f = {str(family_folder())!r};"
        "measure_distances(f + '/finetuned', f + '/base', f + '/target', f + '/direct');"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_error_is_one_of_ours(tmp_path: Path) -> None:
    with pytest.raises(DiffxferError):
        measure(tmp_path, tmp_path, tmp_path)
