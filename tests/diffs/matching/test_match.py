"""Which tensor belongs to which: pairing, counting and refusing, on checkpoints made by hand."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffxfer import DiffxferError, apply_diff, extract_diff, transfer
from diffxfer.errors import Culprits, MatchError
from tests import families, oracle
from tests.oracle import Options, prove

ROLES = ("finetuned", "base", "target")
EVERYTHING = ("",)


def values(shape, dtype=torch.bfloat16, seed=0, scale=1.0):
    """Random floats, among them some zeros of either sign."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    zero = torch.rand(shape, generator=generator) < 0.1
    return torch.where(zero, torch.zeros((), dtype=torch.float64) * found.sign(), found).to(dtype)


def layers(seed, count=2, dtype=torch.bfloat16):
    """A model of a few layers."""
    names = [f"model.layers.{i}.{part}.weight" for i in range(count) for part in ("up", "down")]
    return {name: values((3, 4), dtype, seed * 100 + i) for i, name in enumerate(names)}


def save(folder, finetuned, base, target, **settings):
    models = zip(ROLES, (finetuned, base, target), strict=True)
    return [families.save_tensors(folder / role, model, **settings) for role, model in models]


def three(folder, **changes):
    """Three models of the same names; `changes` adds tensors by role, None takes one away."""
    models = []
    for seed, role in enumerate(ROLES):
        model = layers(seed) | changes.get(role, {})
        models.append({name: tensor for name, tensor in model.items() if tensor is not None})
    return save(folder, *models)


class TestMissing:
    GONE = dict.fromkeys([f"model.layers.{i}.up.weight" for i in range(2)])

    def test_message_and_groups(self, tmp_path):
        roles = three(tmp_path, finetuned=self.GONE, base=self.GONE)
        with pytest.raises(MatchError) as caught:
            transfer(*roles, tmp_path / "out")
        assert str(caught.value) == (
            "2 tensors do not fit: model.layers.0.up.weight (2 like model.layers.*.up.weight)"
            " BF16 (3, 4) is in target only; check that the models belong together, or accept"
            " these with --allow-missing 'REGEX'"
        )
        assert caught.value.groups == (
            Culprits(
                role="finetuned",
                pattern="model.layers.*.up.weight",
                names=("model.layers.0.up.weight", "model.layers.1.up.weight"),
                found="nothing",
                expected="BF16 (3, 4)",
                reason="in target only",
                holders=("target",),
            ),
        )
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("lacking", ROLES)
    def test_role_is_named(self, tmp_path, lacking):
        roles = three(tmp_path, **{lacking: self.GONE})
        with pytest.raises(MatchError, match="--allow-missing") as caught:
            transfer(*roles, tmp_path / "out")
        assert lacking in {group.role for group in caught.value.groups}
        assert {name for group in caught.value.groups for name in group.names} == set(self.GONE)

    @pytest.mark.parametrize("lacking", [("base",), ("finetuned",), ("target",), ROLES[:2]])
    def test_a_target_tensor_that_may_be_missing_elsewhere_is_kept(self, tmp_path, lacking):
        roles = three(tmp_path, **dict.fromkeys(lacking, self.GONE))
        graft = prove(tmp_path / "out", *roles, Options(allow_missing=(r"\.up\.",)))
        old, new = oracle.load(roles[2]), oracle.load(graft)
        for name in self.GONE.keys() & old:
            assert oracle.same(new[name], old[name])

    def test_dropped_are_listed(self, tmp_path):
        roles = three(tmp_path, target=self.GONE)
        report = transfer(*roles, tmp_path / "out", allow_missing=(r"\.up\.",))
        assert report.tensors == {"grafted": 2, "dropped": 2}
        (group,) = [group for group in report.plan if group.kind == "dropped"]
        assert (group.pattern, group.tensors, group.parameters, group.why) == (
            *("model.layers.*.up.weight", 2, 24),
            "target has none",
        )

    def test_more_kinds_than_fit_a_line(self, tmp_path):
        extra = {f"{letter}.weight": values((2,)) for letter in "abcde"}
        roles = three(tmp_path, target=extra)
        with pytest.raises(MatchError, match=r"and 2 more groups \(--json lists them\)"):
            transfer(*roles, tmp_path / "out")
        report = transfer(*roles, tmp_path / "out", dry_run=True)
        assert [group.names for group in report.refused] == [(name,) for name in sorted(extra)]
        assert report.tensors["refused"] == 5
        assert not report.written
        assert not (tmp_path / "out").exists()

    def test_shapes(self, tmp_path):
        roles = three(tmp_path, target={"model.layers.0.up.weight": values((4, 4))})
        with pytest.raises(MatchError) as caught:
            transfer(*roles, tmp_path / "out")
        assert str(caught.value) == (
            "1 tensor does not fit: model.layers.0.up.weight is BF16 (4, 4) in target and"
            " BF16 (3, 4) in finetuned; check that the models belong together, or leave these out"
            " with --exclude 'REGEX'"
        )
        prove(tmp_path / "out", *roles, Options(exclude=(r"0\.up",)))

    def test_shape_that_would_broadcast_is_refused(self, tmp_path):
        roles = three(tmp_path, base={"model.layers.0.up.weight": values((1, 4))})
        with pytest.raises(MatchError, match=r"is BF16 \(3, 4\) in finetuned and BF16 \(1, 4\)"):
            extract_diff(*roles[:2], tmp_path / "diff")

    def test_fused_experts_name_the_cause(self, tmp_path):
        single = {
            f"model.layers.0.mlp.experts.{i}.{part}_proj.weight": values((2, 3))
            for i in range(12)
            for part in ("gate", "up")
        }
        fused = {"model.layers.0.mlp.experts.gate_up_proj": values((12, 4, 3))}
        roles = three(tmp_path, finetuned=fused, base=fused, target=single)
        with pytest.raises(MatchError) as caught:
            transfer(*roles, tmp_path / "out")
        assert caught.value.remedy == (
            "one role stores its experts fused, and another stores them one by one:"
            " save all roles with the same version of transformers"
        )
        counts = sorted(len(group.names) for group in caught.value.groups)
        assert counts == [1, 12, 12]

    @pytest.mark.parametrize("left", ["exclude", "include"])
    @pytest.mark.parametrize("lacking", ROLES)
    def test_what_is_left_out_needs_no_counterpart(self, tmp_path, lacking, left):
        roles = three(tmp_path, **{lacking: self.GONE})
        chosen = {"exclude": (r"\.up\.",)} if left == "exclude" else {"include": (r"\.down\.",)}
        transfer(*roles, tmp_path / "out", **chosen)
        expected = oracle.transfer(*map(oracle.load, roles), Options(**chosen))
        oracle.assert_same(oracle.load(tmp_path / "out"), expected)


class TestCounts:
    def counts(self, report):
        return {(g.kind, g.pattern, g.why): g.tensors for g in report.plan}

    def test_every_tensor_of_every_role_once(self, tmp_path):
        roles = three(
            tmp_path,
            finetuned={
                "model.only_ours": values((2,)),
                "model.left_out": values((2,)),
                "model.steps": torch.tensor([3]),
                "model.old_steps": torch.tensor([3]),
            },
            base={
                "model.left_out": values((2,)),
                "model.only_base": values((2,)),
                "model.base_left_out": values((2,)),
                "model.steps": torch.tensor([3]),
                "model.old_steps": torch.tensor([3]),
            },
            target={
                "model.only_target": values((2,)),
                "model.layers.2.up.weight": values((3, 4)),
                "model.steps": torch.tensor([4]),
            },
        )
        options = {
            "allow_missing": ("only", "old_steps", "layers.2"),
            "exclude": ("left_out", "layers.0.up"),
            "alpha_for": {"layers.1.down": 0.0, "layers.0": 0.5},
        }
        report = transfer(*roles, tmp_path / "out", **options)
        assert self.counts(report) == {
            ("grafted", "model.layers.*.down.weight", "alpha is 0.5"): 1,
            ("grafted", "model.layers.*.up.weight", ""): 1,
            ("copied", "model.layers.*.down.weight", "alpha is 0"): 1,
            ("copied", "model.layers.*.up.weight", "left out"): 1,
            ("copied", "model.layers.*.up.weight", "only the target has it"): 1,
            ("copied", "model.only_target", "only the target has it"): 1,
            ("copied", "model.steps", "I64 is not part of a diff vector"): 1,
            ("dropped", "model.only_ours", "base has none"): 1,
            ("dropped", "model.only_base", "finetuned has none"): 1,
            ("dropped", "model.left_out", "left out"): 1,
            ("dropped", "model.base_left_out", "left out"): 1,
            ("dropped", "model.old_steps", "target has none"): 1,
        }
        assert report.tensors == {"grafted": 2, "copied": 5, "dropped": 5}
        written = oracle.load(tmp_path / "out")
        assert len(written) == report.tensors["grafted"] + report.tensors["copied"]
        sizes = sum(tensor.numel() for tensor in written.values())
        assert report.parameters["grafted"] + report.parameters["copied"] == sizes
        oracle.assert_same(written, oracle.transfer(*map(oracle.load, roles), Options(**options)))

    def test_extract(self, tmp_path):
        roles = three(
            tmp_path,
            finetuned={"a": values((2,)), "left": values((5,)), "n": torch.tensor([1])},
            base={"b": values((2,)), "left": values((5,)), "n": torch.tensor([1])},
        )
        report = extract_diff(
            *roles[:2], tmp_path / "diff", allow_missing=("^[ab]$",), exclude=("left",)
        )
        assert report.tensors == {"extracted": 4, "kept": 1, "dropped": 2, "left out": 1}
        assert report.parameters == {"extracted": 48, "kept": 1, "dropped": 4, "left out": 5}

    def test_tied_heads(self, tmp_path):
        embedding = {f"{role}": values((3, 4), seed=9 + i) for i, role in enumerate(ROLES)}
        both = {
            role: {"model.embed_tokens.weight": e, "lm_head.weight": e.clone()}
            for role, e in embedding.items()
        }
        report = transfer(*three(tmp_path, **both), tmp_path / "out")
        assert report.tensors == {"grafted": 6}
        assert ("grafted", "lm_head.weight", "tied to model.embed_tokens.weight") in self.counts(
            report
        )

    def test_a_head_that_is_left_out_is_dropped(self, tmp_path):
        changes = {
            role: {"model.embed_tokens.weight": values((3, 4), seed=20 + i)}
            for i, role in enumerate(ROLES)
        }
        changes["finetuned"]["lm_head.weight"] = values((3, 4), seed=30)
        roles = three(tmp_path, **changes)
        report = transfer(*roles, tmp_path / "out", exclude=("lm_head",))
        assert report.tensors == {"grafted": 5, "dropped": 1}
        extract_diff(*roles[:2], tmp_path / "diff")
        report = apply_diff(tmp_path / "diff", roles[2], tmp_path / "b", exclude=("lm_head",))
        assert report.tensors == {"grafted": 5, "dropped": 1}


INTEGERS = [
    torch.tensor([[1, 2], [3, 4]]),
    torch.tensor([True, False]),
    torch.tensor(7, dtype=torch.int32),
    torch.zeros(0, dtype=torch.uint8),
]


class TestIntegers:
    @pytest.mark.parametrize("buffer", INTEGERS, ids=lambda buffer: str(buffer.dtype))
    def test_the_targets_is_kept(self, tmp_path, buffer):
        ours, theirs = {"model.buffer": buffer}, {"model.buffer": buffer.clone()}
        mine = {"model.buffer": ~buffer if buffer.dtype == torch.bool else buffer + 1}
        roles = three(tmp_path, finetuned=ours, base=theirs, target=mine)
        graft = prove(tmp_path / "out", *roles, Options(out_dtype=torch.float32))
        assert oracle.same(oracle.load(graft)["model.buffer"], mine["model.buffer"])

    def test_difference_is_an_error_that_names_it(self, tmp_path):
        roles = three(
            tmp_path,
            finetuned={"model.buffer": torch.tensor([1, 2])},
            base={"model.buffer": torch.tensor([1, 3])},
            target={"model.buffer": torch.tensor([1, 2])},
        )
        message = "model.buffer has different I64 values in finetuned and base"
        with pytest.raises(MatchError, match=message):
            transfer(*roles, tmp_path / "out")
        with pytest.raises(MatchError, match=message):
            extract_diff(*roles[:2], tmp_path / "diff")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "diff").exists()
        transfer(*roles, tmp_path / "out", exclude=("buffer",))

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (torch.tensor([1]), torch.tensor([1], dtype=torch.int32)),
            (torch.tensor([1]), torch.tensor([1.0])),
            (torch.tensor([1.0]), torch.tensor([1])),
            (torch.tensor([1]), torch.tensor([1, 1])),
        ],
    )
    def test_another_kind_in_base_is_refused(self, tmp_path, ours, theirs):
        roles = three(tmp_path, finetuned={"n": ours}, base={"n": theirs}, target={"n": ours})
        with pytest.raises(MatchError, match=r"n is .* in finetuned and .* in base") as caught:
            transfer(*roles, tmp_path / "out")
        same = ours.dtype == theirs.dtype
        assert ("shape" in caught.value.groups[0].reason) == same

    @pytest.mark.parametrize("floats", [True, False])
    def test_another_kind_in_the_target_is_refused(self, tmp_path, floats):
        both = [torch.tensor([1.0]), torch.tensor([1])]
        ours, mine = both if floats else both[::-1]
        roles = three(tmp_path, finetuned={"n": ours}, base={"n": ours}, target={"n": mine})
        with pytest.raises(MatchError, match=r"n is .* in target and .* in finetuned"):
            transfer(*roles, tmp_path / "out")
        extract_diff(*roles[:2], tmp_path / "diff")
        with pytest.raises(MatchError, match=r"n is .* in target and .* in finetuned"):
            apply_diff(tmp_path / "diff", roles[2], tmp_path / "out")

    def test_one_that_the_target_lacks_is_missing(self, tmp_path):
        buffer = {"n": torch.tensor([1])}
        roles = three(tmp_path, finetuned=buffer, base=buffer)
        extract_diff(*roles[:2], tmp_path / "diff")
        for graft in (
            lambda **options: transfer(*roles, tmp_path / "out", **options),
            lambda **options: apply_diff(
                tmp_path / "diff", roles[2], tmp_path / "applied", **options
            ),
        ):
            with pytest.raises(MatchError, match="n an integer tensor is in "):
                graft()
            assert graft(allow_missing=("^n$",)).tensors == {"grafted": 4, "dropped": 1}

    def test_one_that_only_the_target_has_is_missing(self, tmp_path):
        roles = three(tmp_path, target={"n": torch.tensor([1])})
        with pytest.raises(MatchError, match=r"n I64 \(1,\) is in target only"):
            transfer(*roles, tmp_path / "out")
        prove(tmp_path / "out", *roles, Options(allow_missing=("^n$",)))


class TestOddTensors:
    SHAPES = ((), (0,), (1,), (2, 0, 3), (2, 3, 4), (5,))
    DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

    def model(self, seed, dtypes=DTYPES):
        return {
            f"odd.{i}.{j}": values(shape, dtype, seed * 100 + 10 * i + j)
            for i, shape in enumerate(self.SHAPES)
            for j, dtype in enumerate(dtypes)
        }

    def test_shapes_and_dtypes(self, tmp_path):
        models = [self.model(0), self.model(1, self.DTYPES[::-1]), self.model(2)]
        roles = save(tmp_path, *models, cuts=(3, 9))
        prove(tmp_path / "out", *roles, Options(alpha=-0.3))

    def test_embedding_without_rows(self, tmp_path):
        name = "model.embed_tokens.weight"
        roles = three(tmp_path, **{role: {name: torch.zeros(0, 4)} for role in ROLES})
        prove(tmp_path / "out", *roles)

    def test_names_that_are_not_ascii(self, tmp_path):
        name = "modèle.poids “é”\n.weight"
        roles = three(tmp_path, **{r: {name: values((2,), seed=i)} for i, r in enumerate(ROLES)})
        prove(tmp_path / "out", *roles)


class TestPrefixes:
    def test_collision_is_an_error(self, tmp_path):
        roles = three(
            tmp_path,
            finetuned={"model.x": values((2,)), "language_model.x": values((2,))},
            base={"model.x": values((2,)), "language_model.x": values((2,))},
            target={"model.language_model.x": values((2,))},
        )
        with pytest.raises(MatchError, match="cannot be paired by name: without their prefixes"):
            transfer(*roles, tmp_path / "out")

    def test_equal_names_need_no_prefix(self, tmp_path):
        both = {"model.x": values((2,)), "language_model.x": values((3,))}
        prove_roles = three(tmp_path, **dict.fromkeys(ROLES, both))
        report = transfer(*prove_roles, tmp_path / "out")
        assert report.tensors == {"grafted": 6}

    def test_options_speak_of_the_targets_names(self, tmp_path):
        models = [layers(seed) for seed in range(3)]
        models[2] = {f"language_model.{name}": tensor for name, tensor in models[2].items()}
        roles = save(tmp_path, *models)
        options = Options(exclude=(r"^language_model\..*\.up",), alpha_for={"language_model": 2})
        graft = prove(tmp_path / "out", *roles, options)
        assert oracle.load(graft).keys() == models[2].keys()
        with pytest.raises(DiffxferError, match=r"'\^model' matches none of the"):
            transfer(*roles, tmp_path / "other", exclude=("^model",))


NAMES = ("embed_tokens.weight", "layers.0.a", "layers.0.b", "layers.1.a", "norm.weight", "gate")
SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 3, 2)])
FLOATS = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
PREFIX = st.sampled_from(["", "model.", "language_model.model.", "model.language_model."])


@st.composite
def families_of_three(draw):
    """Models by role, and how each is cut: names, shapes, dtypes, prefixes, gaps, buffers."""
    shapes = {name: draw(SHAPES) for name in draw(st.sets(st.sampled_from(NAMES), min_size=1))}
    absent = draw(st.sets(st.tuples(st.sampled_from(ROLES), st.sampled_from(NAMES)), max_size=3))
    buffer = draw(st.booleans())
    models, cuts = [], []
    for number, role in enumerate(ROLES):
        prefix, seed = draw(PREFIX), draw(st.integers(0, 5)) + 10 * number
        scale = draw(st.sampled_from([1.0, 1e-3, 1e-6, 30.0]))
        model = {
            prefix + name: values(shape, draw(FLOATS), seed * 100 + i, scale)
            for i, (name, shape) in enumerate(shapes.items())
            if (role, name) not in absent
        }
        if buffer or not model:
            model[prefix + "steps"] = torch.tensor([number // 2])
        models.append(model)
        cuts.append(draw(st.lists(st.integers(1, 5), max_size=2)))
    return models, cuts


PATTERNS = st.sampled_from(["layers", r"\.a$", "weight", "1", "embed", "^model"])
SCALES = st.sampled_from([0.0, 1.0, 0.5, -1.0, 0.3, -2.5])


def used(regex, model):
    return any(re.search(regex, name) for name in model)


@settings(max_examples=40)
@given(
    three=families_of_three(),
    alpha=SCALES,
    alpha_for=st.dictionaries(PATTERNS, SCALES, max_size=2),
    exclude=st.lists(PATTERNS, max_size=1),
    include=st.lists(PATTERNS, max_size=1),
    out_dtype=st.none() | st.sampled_from([torch.float32, torch.bfloat16]),
    max_shard_size=st.none() | st.sampled_from(["20B", "200B"]),
    threads=st.integers(1, 3),
)
def test_small_checkpoints(
    tmp_path_factory,
    three,
    alpha,
    alpha_for,
    exclude,
    include,
    out_dtype,
    max_shard_size,
    threads,
):
    folder = tmp_path_factory.mktemp("small")
    models, cuts = three
    # A pattern that matches nothing is refused, which is not what this is about.
    chosen = [regex for regex in {*alpha_for, *exclude, *include} if used(regex, models[2])]
    options = Options(
        alpha,
        {regex: scale for regex, scale in alpha_for.items() if regex in chosen},
        tuple(regex for regex in include if regex in chosen),
        tuple(regex for regex in exclude if regex in chosen),
        EVERYTHING,
        out_dtype,
    )
    roles = [
        families.save_tensors(folder / role, model, cuts=cut)
        for role, model, cut in zip(ROLES, models, cuts, strict=True)
    ]
    expected = oracle.transfer(*models, options)
    how = {"max_shard_size": max_shard_size, "threads": threads}
    report = transfer(*roles, folder / "out", **oracle.keywords(options), **how)
    oracle.assert_same(oracle.load(folder / "out"), expected)
    counted = report.tensors.get("grafted", 0) + report.tensors.get("copied", 0)
    assert counted == len(expected)
    bare = [{oracle.bare(name) for name in model} for model in models]
    chosen = {oracle.bare(name) for name in models[2] if options.selects(name)}
    lost = (bare[0] - bare[2]) | (bare[0] & chosen - bare[1]) | (bare[1] - bare[0])
    assert report.tensors.get("dropped", 0) == len(lost)
    if not (bare[0] & bare[1]) - {"steps"}:
        return
    extracting = {"allow_missing": EVERYTHING, "diff_dtype": "float64", **how}
    extract_diff(*roles[:2], folder / "diff", **extracting)
    apply_diff(folder / "diff", roles[2], folder / "applied", **oracle.keywords(options), **how)
    oracle.assert_same(oracle.load(folder / "applied"), expected)
