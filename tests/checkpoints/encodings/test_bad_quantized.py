"""Quantised checkpoints that contradict themselves: a line that says which, what and what to do."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.errors import CheckpointError
from tests import tiny
from tests.checkpoints.encodings import make_bitsandbytes
from tests.checkpoints.encodings.codings import FP8, INT4, INT8, NF4_BLOCKS, bytes_of, compressed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    Change = Callable[[dict[str, Tensor], dict[str, Any]], object]

UP = "model.layers.0.mlp.up_proj.weight"
NAN = float("nan")


def example(kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A sound checkpoint: its tensors and its config."""
    values = torch.randn(140, 200, generator=torch.Generator().manual_seed(1))
    plain = {"model.norm.weight": torch.ones(4)}
    codings = {"fp8": FP8, "int4": INT4, "int8": INT8, "nf4": NF4_BLOCKS}
    if kind in codings:
        coding = codings[kind]
        return {**coding.encode({UP: values}), **plain}, copy.deepcopy(coding.config)
    if kind == "mxfp4":
        parts = {"e_blocks": (2, 4, 3, 16), "e_scales": (2, 4, 3)}
        made = {name: torch.full(shape, 120, dtype=torch.uint8) for name, shape in parts.items()}
        return {**made, **plain}, {"quantization_config": {"quant_method": "mxfp4"}}
    if kind == "nvfp4":
        made = {
            UP + "_packed": torch.zeros(6, 16, dtype=torch.uint8),
            UP + "_scale": torch.ones(6, 2).to(torch.float8_e4m3fn),
            UP + "_global_scale": torch.ones(1),
        }
        return made, compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16)
    if kind == "int4 groups":
        codes = torch.zeros(6, 8, dtype=torch.int32)
        made = {UP + "_packed": codes, UP + "_scale": torch.ones(6, 2)}
        made[UP + "_shape"] = torch.tensor([6, 64])
        return made, compressed("pack-quantized", num_bits=4, type="int", group_size=32)
    assert kind == "bnb"
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    return load_file(make_bitsandbytes.FILE), config


KINDS = ("fp8", "int4", "int8", "nf4", "mxfp4", "nvfp4", "int4 groups", "bnb")


def read_all(folder: Path) -> None:
    """Open a checkpoint, and decode it in pieces."""
    for stored in open_checkpoint(folder, "base").tensors.values():
        size = 4 if stored.dtype == "F32" else 2
        stored.read(one_at_a_time(), 0, memoryview(bytearray(size * stored.elements)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_sound_checkpoints_are_read(tmp_path: Path, kind: str) -> None:
    tensors, config = example(kind)
    read_all(tiny.save_model(tmp_path / "m", tensors, config={**tiny.CONFIG, **config}))


def put(name: str, value: Any) -> Change:
    def change(tensors: dict[str, Tensor], config: object) -> None:
        tensors[name] = value

    return change


def drop(*names: str) -> Change:
    def change(tensors: dict[str, Tensor], config: object) -> None:
        for name in names:
            del tensors[name]

    return change


def at(name: str, index: Any, value: float) -> Change:
    def change(tensors: dict[str, Tensor], config: object) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[index] = value

    return change


def cast(name: str, dtype: torch.dtype) -> Change:
    def change(tensors: dict[str, Tensor], config: object) -> None:
        tensors[name] = tensors[name].to(dtype)

    return change


def said(**values: Any) -> Change:
    def change(tensors: object, config: dict[str, Any]) -> None:
        config["quantization_config"].update(values)

    return change


def group(**values: Any) -> Change:
    def change(tensors: object, config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(values)

    return change


def state(**values: Any) -> Change:
    told = {"blocksize": 64, "shape": [140, 200], **values}
    return put(NF4_STATE, bytes_of(told))


def several(*changes: Change) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for each in changes:
            each(tensors, config)

    return change


SCALES = UP + "_scale_inv"
NF4_STATE = UP + ".quant_state.bitsandbytes__nf4"
DOUBLE = "nf4_double.weight"
DOUBLE_STATE = DOUBLE + ".quant_state.bitsandbytes__nf4"
POSITIVE = "expected a positive number"
CASES: list[tuple[str, Change, str]] = [
    # Scales of fp8.
    ("fp8", drop(SCALES), f"{UP} is F8_E4M3 and has no scales, expected {SCALES}"),
    ("fp8", put(SCALES, torch.ones(2, 3)), f"{SCALES} is (2, 3) for {UP} of (140, 200), expected"),
    (  # the right number of them, but transposed
        "fp8",
        several(
            put(UP, torch.ones(140, 600).to(torch.float8_e4m3fn)), put(SCALES, torch.ones(5, 2))
        ),
        f"{SCALES} is (5, 2) for {UP} of (140, 600), expected 2 × 5, one for each block",
    ),
    (
        "fp8",
        put(SCALES, torch.ones(2, 2).double()),
        f"{SCALES} is F64, expected BF16 or F16 or F32",
    ),
    ("fp8", put(SCALES, torch.ones(2, 2).int()), f"{SCALES} is I32, expected BF16 or F16 or F32"),
    ("fp8", at(SCALES, 3, NAN), f"{SCALES} has the scale nan at [1, 1], {POSITIVE}"),
    ("fp8", at(SCALES, 1, 0.0), f"{SCALES} has the scale 0 at [0, 1], {POSITIVE}"),
    ("fp8", at(SCALES, 2, -2.0), f"{SCALES} has the scale -2 at [1, 0], {POSITIVE}"),
    ("fp8", at(SCALES, 2, float("inf")), f"{SCALES} has the scale inf at [1, 0], {POSITIVE}"),
    ("fp8", drop(UP), f"{SCALES} has no weight: {UP} is missing, expected F8_E4M3"),
    ("fp8", cast(UP, torch.bfloat16), f"{SCALES} has no weight: {UP} is BF16, expected F8_E4M3"),
    ("fp8", cast(UP, torch.float8_e5m2), f"{SCALES} has no weight: {UP} is F8_E5M2, expected"),
    (
        "fp8",
        put("a.weight_scale", torch.ones(1)),
        "a.weight_scale has no weight: a.weight is missi",
    ),
    ("fp8", put(UP + "_scale", torch.ones(1)), f"{UP} is F8_E4M3 and has {SCALES} and {UP}_scale"),
    ("fp8", said(weight_block_size=[64, 64]), "expected 3 × 4, one for each block of 64 × 64"),
    ("fp8", said(weight_block_size=[0, 128]), "weight_block_size [0, 128], expected two positive"),
    ("fp8", said(weight_block_size=128), "states weight_block_size 128, expected two positive"),
    (
        "fp8",
        put("model.norm.bias", torch.ones(4).to(torch.float8_e4m3fn)),
        "model.norm.bias is F8_E4M3 and has no scales, expected model.norm.bias_scale_inv",
    ),
    (
        "fp8",
        put("model.embed_tokens.weight", torch.ones(6, 4).to(torch.float8_e5m2)),
        "is quantised (F8_E5M2 elements, according to its tensor model.embed_tokens.weight)",
    ),
    # A config that says something else.
    (
        "fp8",
        several(drop(SCALES), cast(UP, torch.int8)),
        f"has no tensor that is stored as fp8, but config.json says so: {UP} is I8 (140, 200)",
    ),
    (
        "fp8",
        several(drop(SCALES), cast(UP, torch.bfloat16)),
        "has no tensor that is stored as fp8, but config.json says so; if its weights are not",
    ),
    (
        "nf4",
        said(quant_method="fp8"),
        f"{UP} is stored as bitsandbytes, but config.json says fp8",
    ),
    (
        "fp8",
        said(quant_method="bitsandbytes"),
        f"{UP} is stored as fp8 (E4M3) with scales, but config.json says bitsandbytes",
    ),
    (
        "int8",
        said(format="float-quantized"),
        f"{UP} is I8, as in int-quantized or naive-quantized, but config.json says float-quantized",
    ),
    (
        "int8",
        said(format="pack-quantized"),
        f"{UP} is I8, as in int-quantized or naive-quantized, but config.json says pack-quantized",
    ),
    ("int4", said(format="int-quantized"), f"{UP}_packed is I32, as in pack-quantized, but config"),
    ("int4", said(format="zip"), "has the compressed-tensors format zip, expected dense, float-"),
    ("int4", said(format=["zip"]), "has the compressed-tensors format ['zip'], expected dense"),
    # compressed-tensors.
    ("int4", drop(UP + "_scale"), f"{UP}_packed has no scales: {UP}_scale is missing"),
    ("int4", drop(UP + "_shape"), f"{UP}_packed has no shape: {UP}_shape is missing"),
    ("int4", drop(UP + "_packed"), "belongs to no weight: " + UP + " is missing or not quantised"),
    (
        "int4",
        put(UP + "_shape", torch.tensor([140, 300])),
        "has room for 200 columns, but its shape",
    ),
    (
        "int4",
        put(UP + "_shape", torch.tensor([70, 200])),
        "contains (70, 200), expected (140, 200)",
    ),
    (
        "int4",
        put(UP + "_shape", torch.tensor([200])),
        f"{UP}_shape is I64 (1,), expected I64 or I32",
    ),
    ("int4", put(UP + "_scale", torch.ones(139, 1)), f"{UP}_scale is (139, 1) for {UP}_packed of"),
    ("int4", at(UP + "_scale", 4, NAN), f"{UP}_scale has the scale nan at [4, 0], {POSITIVE}"),
    ("int4", put(UP + "_g_idx", torch.zeros(200).int()), f"{UP}_g_idx assigns columns to groups"),
    ("int4", group(num_bits=3), f"{UP}_packed has packed integers of 3 bits, expected 4"),
    ("int4", group(num_bits=[3]), f"{UP}_packed has packed integers of [3] bits, expected 4"),
    (
        "int4",
        put(UP + "_zero_point", torch.zeros(9, 1).int()),
        f"{UP}_zero_point is I32 (9, 1), exp",
    ),
    ("int4", put(UP, torch.ones(140, 200)), f"has {UP} twice, once quantised and once not"),
    ("int4", put("a.weight_shape", torch.ones(2)), "a.weight_shape belongs to no weight"),
    (
        "int4 groups",
        put(UP + "_shape", torch.tensor([6, 60])),
        f"{UP}_shape contains (6, 60), expected (6, 64) by the scales",
    ),
    (
        "int4 groups",
        group(group_size=48),
        f"{UP}_packed has room for 64 columns, but its shape has 96",
    ),
    (
        "int8",
        put(UP + "_zero_point", torch.zeros(140).to(torch.int8)),
        f"{UP}_zero_point is I8 (140,",
    ),
    (
        "int8",
        cast(UP + "_zero_point", torch.float32),
        f"{UP}_zero_point is F32 (140, 1), expected I8",
    ),
    ("nvfp4", drop(UP + "_global_scale"), f"{UP}_global_scale is missing"),
    ("nvfp4", put(UP + "_global_scale", torch.ones(2)), f"{UP}_global_scale has 2 elements, expec"),
    (
        "nvfp4",
        at(UP + "_global_scale", 0, 0.0),
        f"{UP}_global_scale has the scale 0 at [0], {POSITIVE}",
    ),
    ("nvfp4", at(UP + "_global_scale", 0, 1e-45), f"{UP}_scale has the scale inf at [0, 0]"),
    (
        "nvfp4",
        put(UP + "_scale", torch.ones(6, 4).to(torch.float8_e4m3fn)),
        f"{UP}_scale is (6, 4) f",
    ),
    # gpt-oss.
    ("mxfp4", drop("e_scales"), "e_blocks has no scales: e_scales is missing"),
    ("mxfp4", drop("e_blocks"), "e_scales has no weight: e_blocks is missing"),
    ("mxfp4", at("e_scales", 5, 255), "e_scales has the scale nan at [0, 1, 2], " + POSITIVE),
    ("mxfp4", cast("e_scales", torch.float32), "e_scales is F32 (2, 4, 3), expected U8 (2, 4, 3)"),
    (
        "mxfp4",
        put("e_blocks", torch.zeros(2, 4, 48, dtype=torch.uint8)),
        "e_blocks is (2, 4, 48), expected (experts, rows, groups, 16)",
    ),
    # bitsandbytes.
    (
        "nf4",
        put(NF4_STATE, torch.tensor([123], dtype=torch.uint8)),
        "is no JSON object with shape and",
    ),
    (
        "nf4",
        put(NF4_STATE, torch.zeros(70_000, dtype=torch.uint8)),
        "is no JSON object with shape and",
    ),
    (
        "nf4",
        put(NF4_STATE, bytes_of([64])),
        f"{NF4_STATE} is no JSON object with shape and blocksize",
    ),
    ("nf4", state(shape=[140, 201]), f"{UP} has 28000 codes, expected 28140 for (140, 201)"),
    ("nf4", state(shape=[True, 200]), "is no JSON object with shape and blocksize"),
    ("nf4", state(shape=[1] * 65), "is no JSON object with shape and blocksize"),
    ("nf4", state(shape=[1 << 60]), "is no JSON object with shape and blocksize"),
    ("nf4", state(blocksize=0), "is no JSON object with shape and blocksize"),
    ("nf4", state(blocksize=32), f"{UP}.absmax is F32 (438,), expected F32 (875,)"),
    ("nf4", at(UP + ".absmax", 7, NAN), f"{UP}.absmax has the scale nan at [7], {POSITIVE}"),
    ("nf4", at(UP + ".absmax", 7, -1.0), f"{UP}.absmax has the scale -1 at [7], {POSITIVE}"),
    ("nf4", at(UP + ".quant_map", 7, 0.5), f"{UP}.quant_map does not contain the 16 values of nf4"),
    ("nf4", drop(UP + ".absmax"), f"{NF4_STATE} belongs to {UP}.absmax, which is missing"),
    ("nf4", drop(UP), f"{NF4_STATE} belongs to {UP}, which is missing"),
    (
        "nf4",
        drop(NF4_STATE),
        "has no tensor that is stored as bitsandbytes, but config.json says so",
    ),
    (
        "nf4",
        put(
            UP + ".quant_state.bitsandbytes__fp4", bytes_of({"blocksize": 64, "shape": [140, 200]})
        ),
        f"{UP} belongs to two quantised tensors",
    ),
    (
        "nf4",
        put("b.quant_state.bitsandbytes__int3", torch.zeros(1)),
        "b.quant_state.bitsandbytes__int3 is of the kind int3, expected nf4 or fp4",
    ),
    (
        "bnb",
        put(
            DOUBLE_STATE, bytes_of({"blocksize": 64, "shape": [150, 131], "nested_blocksize": 256})
        ),
        f"{DOUBLE_STATE} states no valid nested_blocksize and nested_offset",
    ),
    (
        "bnb",
        put(
            DOUBLE_STATE,
            bytes_of(
                {"blocksize": 64, "shape": [150, 131], "nested_blocksize": 256}
                | {"nested_offset": 10**50}
            ),
        ),
        f"{DOUBLE_STATE} states no valid nested_blocksize and nested_offset",
    ),
    (
        "bnb",
        at(DOUBLE + ".nested_absmax", 1, NAN),
        f"{DOUBLE}.nested_absmax has the scale nan at [1]",
    ),
    (
        "bnb",
        at(DOUBLE + ".nested_quant_map", slice(None), NAN),
        f"{DOUBLE}.absmax has a scale that is",
    ),
    ("bnb", put("int8.SCB", torch.ones(31)), "int8.SCB is F32 (31,), expected F32 (30,)"),
    (
        "bnb",
        at("int8.SCB", 3, -1.0),
        "int8.SCB has the scale -1 at [3], expected a positive number",
    ),
    ("bnb", drop("int8.weight"), "int8.SCB has no weight: int8.weight is missing, expected an I8"),
    (
        "bnb",
        at("int8.weight_format", 0, 2),
        "int8.weight_format says that the codes are not stored",
    ),
]


@pytest.mark.parametrize(("kind", "change", "expected"), CASES, ids=range(len(CASES)))
def test_it_is_refused_in_a_line(tmp_path: Path, kind: str, change: Change, expected: str) -> None:
    tensors, config = example(kind)
    change(tensors, config)
    folder = tiny.save_model(tmp_path / "m", tensors, config={**tiny.CONFIG, **config})
    with pytest.raises(CheckpointError) as caught:
        read_all(folder)
    said = str(caught.value)
    assert expected in said
    assert said.startswith(str(folder))
    assert said.isprintable()
    assert "; " in said


def test_a_block_of_zeros_has_a_scale_of_zero(tmp_path: Path) -> None:
    tensors, config = example("bnb")
    assert tensors["int8.SCB"][7] == 0
    assert tensors["nf4.weight.absmax"][1] == 0
    read_all(tiny.save_model(tmp_path / "m", tensors, config={**tiny.CONFIG, **config}))


def test_a_bias_and_an_embedding_may_be_in_float8(tmp_path: Path) -> None:
    tensors, config = example("fp8")
    bias = torch.tensor([1.0, -2.0, 0.5]).to(torch.float8_e4m3fn)
    tensors |= {"a.bias": bias, "a.bias_scale": torch.tensor(3.0)}
    tensors |= FP8.encode({"model.embed_tokens.weight": torch.randn(6, 4)})
    folder = tiny.save_model(tmp_path / "m", tensors, config={**tiny.CONFIG, **config})
    found = open_checkpoint(folder, "base").tensors
    assert set(found) == {UP, "model.norm.weight", "a.bias", "model.embed_tokens.weight"}
    buffer = bytearray(12)
    found["a.bias"].read(one_at_a_time(), 0, memoryview(buffer))
    assert torch.frombuffer(buffer, dtype=torch.float32).tolist() == [3.0, -6.0, 1.5]


def test_a_transfer_says_it_and_leaves_nothing(tmp_path: Path) -> None:
    tensors, config = example("fp8")
    sound = tiny.save_model(tmp_path / "sound", tensors, config={**tiny.CONFIG, **config})
    tensors[SCALES] = tensors[SCALES].clone()
    tensors[SCALES][1, 1] = NAN
    broken = tiny.save_model(tmp_path / "broken", tensors, config={**tiny.CONFIG, **config})
    done = tiny.run("transfer", sound, broken, sound, "-o", tmp_path / "out")
    assert (done.status, done.out) == (1, "")
    assert f"error: {broken}" in done.err
    assert f"{SCALES} has the scale nan at [1, 1]" in done.err
    assert not list(tmp_path.glob("*out*"))
