"""What a person gets for input that is not sound: one line that says which, what and what to do.

Every refusal here is checked for the same things: exit status 1, one line on stderr that begins
with ``error: `` and names the place and the remedy, nothing on stdout, and not a file more, less
or other than before; and the same command on the sound family beside it works.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import xxhash
import yaml
from safetensors.torch import load_file, save_file

from diffxfer import transfer
from diffxfer.errors import MatchError
from tests import fuzzing, tiny
from tests.helpers import block_checksum
from tests.tiny import CONFIG, INDEX, OPERANDS, SHARD, SHARDS, UP, Outcome, World, edit_json

if TYPE_CHECKING:
    from collections.abc import Callable

MODELS = frozenset({"finetuned", "base", "target"})
EVERY = MODELS | {"diff"}
AGAIN = "download or save it again"


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """Sound families, by how they are stored; tests break copies of them."""
    root = tmp_path_factory.mktemp("families")
    return {
        "single": tiny.make_world(root / "single"),
        "sharded": tiny.make_world(root / "sharded", sharded=True),
    }


@pytest.fixture
def world(families: dict[str, World], tmp_path: Path) -> World:
    return families["single"].copy(tmp_path)


@pytest.fixture
def sharded(families: dict[str, World], tmp_path: Path) -> World:
    return families["sharded"].copy(tmp_path)


def refused(world: World, argv: list[str], *says: str) -> str:
    """Run a command that must be refused in one line and leave no trace; returns the line."""
    before = tiny.tree(world.root)
    outcome = tiny.run(*argv)
    assert tiny.tree(world.root) == before
    assert outcome.status == 1, outcome
    assert outcome.out == ""
    return one_line(outcome.err, *says)


def one_line(err: str, *says: str) -> str:
    assert err.startswith("error: "), err
    assert err.endswith("\n"), err
    assert err.count("\n") == 1, err
    assert "Error(" not in err
    assert "Traceback" not in err
    for text in says:
        assert text in err, (text, err)
    return err


def passes(argv: list[str], out: Path) -> None:
    """Run a command that must work, and remove what it wrote."""
    outcome = tiny.run(*argv)
    assert outcome == Outcome(0, "", ""), outcome
    shutil.rmtree(out.parent)


@dataclass(frozen=True)
class Fault:
    """Something wrong with one folder of a family.

    Attributes:
        name: of the test.
        inflict: breaks a folder.
        says: what the message must have, beside the folder.
        roles: which roles it may befall.
        family: how that family is stored.
    """

    name: str
    inflict: Callable[[Path], object]
    says: tuple[str, ...]
    roles: frozenset[str] = EVERY
    family: str = "single"


def shard(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / SHARD)


def header(change: Callable[[dict], object]) -> Callable[[Path], object]:
    return lambda folder: tiny.edit_header(folder / SHARD, change)


def entry(**change: object) -> Callable[[Path], object]:
    """Change what a header says of one tensor."""
    return header(lambda found: found[UP].update(change))


def raw(text: bytes, *, length: int | None = None) -> Callable[[Path], object]:
    return lambda folder: tiny.set_header(folder / SHARD, text, length=length)


def edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    return lambda folder: tiny.edit_json(folder / name, change)


def put(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Replace a file by something else."""

    def inflict(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return inflict


def twice(folder: Path) -> None:
    """A header with a duplicate key, the second with different offsets."""
    found: dict[str, object] = {}
    tiny.edit_header(folder / SHARD, found.update)
    text = json.dumps(found)
    more = json.dumps({UP: found[UP]})
    tiny.set_header(folder / SHARD, (text[:-1] + "," + more[1:]).encode())


def begin_early(found: dict) -> None:
    """Let a tensor begin in the middle of the one before it."""
    first = found["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    found[UP]["data_offsets"] = [offset - 8 for offset in found[UP]["data_offsets"]]
    assert found[UP]["data_offsets"][0] == first[1] - 8


def leave_hole(found: dict) -> None:
    last = found["model.norm.weight"]
    last["data_offsets"] = [offset + 2 for offset in last["data_offsets"]]


def reach_out(found: dict, elements: int = 4000) -> None:
    """Let the last tensor end after the file does."""
    last = found["model.norm.weight"]
    last["shape"] = [elements]
    last["data_offsets"][1] = last["data_offsets"][0] + 2 * elements


HEADERS = [
    Fault("empty shard", shard(lambda path: path.write_bytes(b"")), (SHARD, "is empty", AGAIN)),
    Fault(
        "five bytes",
        shard(lambda path: path.write_bytes(b"\x01\0\0\0\0")),
        (SHARD, "has only 5 bytes", AGAIN),
    ),
    Fault(
        "truncated data",
        shard(lambda path: path.write_bytes(path.read_bytes()[:-6])),
        (SHARD, "is truncated", "model.norm.weight", AGAIN),
    ),
    Fault(
        "truncated header",
        shard(lambda path: path.write_bytes(path.read_bytes()[:100])),
        (SHARD, "is truncated", AGAIN),
    ),
    Fault(
        "bytes too many",
        shard(lambda path: path.write_bytes(path.read_bytes() + b"\0")),
        (SHARD, "has 1 bytes that belong to no tensor", AGAIN),
    ),
    Fault("length past the end", raw(b"{}", length=9999), (SHARD, "a header of 9999 bytes", AGAIN)),
    Fault("too large", raw(b"{}", length=1 << 40), (SHARD, "at most 100000000", AGAIN)),
    Fault("largest length", raw(b"{}", length=(1 << 64) - 1), (SHARD, "at most 100000000", AGAIN)),
    Fault("no header", raw(b""), (SHARD, "its header is not a JSON object", AGAIN)),
    Fault("not JSON", raw(b'{"a": oops}'), (SHARD, "its header is not JSON", AGAIN)),
    Fault("not UTF-8", raw(b'{"\xff": 1}'), (SHARD, "its header is not JSON", AGAIN)),
    Fault("an array", raw(b"[1, 2]"), (SHARD, "its header is not a JSON object", AGAIN)),
    Fault("nested", raw(b'{"a":' * 5000), (SHARD, "its header is not JSON", AGAIN)),
    Fault("a pickle", shard(lambda path: path.write_bytes(b"PK\3\4" * 64)), (SHARD, AGAIN)),
    Fault("overlap", header(begin_early), (SHARD, UP, "overlaps", AGAIN)),
    Fault("hole", header(leave_hole), (SHARD, "leaves a hole", AGAIN)),
    Fault("backwards", entry(data_offsets=[48, 24]), (SHARD, UP, "before it begins", AGAIN)),
    Fault("past the end", header(reach_out), (SHARD, "model.norm.weight", "truncated", AGAIN)),
    Fault("far away", entry(data_offsets=[9000, 9024]), (SHARD, "leaves a hole", AGAIN)),
    Fault("negative offset", entry(data_offsets=[-24, 0]), (SHARD, UP, "data_offsets", AGAIN)),
    Fault("offsets as text", entry(data_offsets=["0", "24"]), (SHARD, UP, "data_offsets", AGAIN)),
    Fault("one offset", entry(data_offsets=[0]), (SHARD, UP, "data_offsets", AGAIN)),
    Fault("shape against size", entry(shape=[3, 5]), (SHARD, UP, "takes 30 bytes", AGAIN)),
    Fault("negative size", entry(shape=[-3, -4]), (SHARD, UP, "shape", AGAIN)),
    Fault("2^40 elements", entry(shape=[1 << 40]), (SHARD, UP, "takes 2199023255552 bytes", AGAIN)),
    Fault("2^40 past the end", header(lambda found: reach_out(found, 1 << 40)), (SHARD, AGAIN)),
    Fault("sizes that wrap", entry(shape=[1 << 62, 1 << 62]), (SHARD, UP, AGAIN)),
    Fault("many dimensions", entry(shape=[1] * 999), (SHARD, UP, "shape", AGAIN)),
    Fault("true as a size", entry(shape=[True, 12]), (SHARD, UP, "shape", AGAIN)),
    Fault("unknown dtype", entry(dtype="BF15"), (SHARD, UP, "unknown dtype 'BF15'", AGAIN)),
    Fault("dtype as a list", entry(dtype=["BF16"]), (SHARD, UP, "unknown dtype", AGAIN)),
    Fault(
        "more fields", entry(strides=[4, 1]), (SHARD, UP, "must have exactly dtype, shape", AGAIN)
    ),
    Fault(
        "fewer fields",
        header(lambda found: found[UP].pop("shape")),
        (SHARD, UP, "must have exactly dtype, shape", AGAIN),
    ),
    Fault("duplicate key", twice, (SHARD, UP, "twice", AGAIN)),
    Fault(
        "metadata with numbers",
        header(lambda found: found.update(__metadata__={"format": 1})),
        (SHARD, "__metadata__", AGAIN),
    ),
]

FILES = [
    Fault("shard is a folder", replaced(SHARD, Path.mkdir), (SHARD, "is not a regular file")),
    Fault(
        "shard is a device",
        replaced(SHARD, lambda path: path.symlink_to("/dev/zero")),
        (SHARD, "is not a regular file", "replace it with the shard itself"),
    ),
    Fault(
        "shard links to nothing",
        replaced(SHARD, lambda path: path.symlink_to("gone")),
        (SHARD, "is a broken link", "download the checkpoint again"),
    ),
    Fault(
        "shard links to itself",
        replaced(SHARD, lambda path: path.symlink_to(SHARD)),
        (SHARD, "symbolic link", "check that it can be read"),
    ),
    Fault(
        "shard links to a name too long",
        replaced(SHARD, lambda path: path.symlink_to("x" * 300)),
        (SHARD, "cannot be opened (File name too long)", "check that it can be read"),
    ),
    Fault(
        "index links to a name too long",
        replaced(INDEX, lambda path: path.symlink_to("x" * 300)),
        (INDEX, "is a broken link", "replace the link with the file"),
        MODELS,
        "sharded",
    ),
    Fault(
        "no weights",
        lambda folder: (folder / SHARD).unlink(),
        (f"expected {SHARD} or {INDEX}, found ", "download the whole folder"),
    ),
    Fault(
        "weights of another name",
        lambda folder: (folder / SHARD).rename(folder / "other.safetensors"),
        ("found only ", "other.safetensors", "download the whole folder"),
    ),
]

CONFIGS = [
    Fault(
        "no config",
        lambda folder: (folder / "config.json").unlink(),
        ("has no config.json", "give the folder that contains config.json"),
        MODELS,
    ),
    Fault(
        "config is not JSON",
        put("config.json", '{"vocab_size": 6,\n "hidden_size": }'),
        ("config.json", "is not JSON (line 2)", "download or save the checkpoint again"),
        MODELS,
    ),
    Fault(
        "config is not UTF-8",
        put("config.json", b'{"a": "\xff"}'),
        ("config.json", "not UTF-8", "download or save the checkpoint again"),
        MODELS,
    ),
    Fault("config is empty", put("config.json", ""), ("config.json", "is not JSON"), MODELS),
    Fault(
        "config is an array",
        put("config.json", "[]"),
        ("config.json", "is a JSON array, expected an object", "again"),
        MODELS,
    ),
    Fault(
        "config is nested",
        put("config.json", '{"a":' * 3000 + "1" + "}" * 3000),
        ("config.json", "nested too deeply"),
        MODELS,
    ),
    Fault(
        "config links out",
        replaced("config.json", lambda path: path.symlink_to("/etc/hostname")),
        ("config.json", "points outside the checkpoint", "replace the link with the file"),
        MODELS,
    ),
    Fault(
        "licence links out",
        lambda folder: (folder / "LICENSE").symlink_to("/etc/hostname"),
        ("LICENSE", "points outside the checkpoint", "or delete it"),
        frozenset({"finetuned", "target"}),
    ),
    Fault(
        "template links out",
        lambda folder: (folder / "chat_template.jinja").symlink_to("../secret"),
        ("chat_template.jinja", "link", "replace the link with the file"),
        frozenset({"finetuned", "target"}),
    ),
    Fault(
        "more templates link out",
        lambda folder: (folder / "additional_chat_templates").symlink_to("/etc"),
        ("additional_chat_templates", "points outside the checkpoint", "or delete it"),
        frozenset({"finetuned", "target"}),
    ),
    Fault(
        "tokenizer is nested",
        put("tokenizer.json", '{"model":' * 65 + "1" + "}" * 65),
        ("tokenizer.json", "nested too deeply"),
        MODELS,
    ),
    Fault(
        "tokenizer has an id far away",
        put("tokenizer.json", '{"model": {"vocab": {"a": 0, "b": 4194303}}}'),
        ("tokenizer.json", "the id of 'b' is 4194303, but it has only 2 tokens", "again"),
        MODELS,
    ),
    Fault(
        "tokenizer is not JSON",
        put("tokenizer.json", "<html>"),
        ("tokenizer.json", "is not JSON", "download or save the checkpoint again"),
        MODELS,
    ),
]


def index_entry(place: object) -> Callable[[Path], object]:
    return edit(INDEX, lambda index: index["weight_map"].update({UP: place}))


INDEXES = [
    Fault(
        "names an absent file",
        lambda folder: (folder / SHARDS[1]).unlink(),
        (SHARDS[1], "is missing", "download the checkpoint again"),
        MODELS,
        "sharded",
    ),
    *(
        Fault(
            f"names {place}",
            index_entry(place),
            (INDEX, repr(UP), repr(place), "outside its own folder", "do not trust"),
            MODELS,
            "sharded",
        )
        for place in ("../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors")
    ),
    *(
        Fault(
            f"names {place!r}",
            index_entry(place),
            (INDEX, repr(UP), repr(place), "download it again"),
            MODELS,
            "sharded",
        )
        for place in (7, None, "pytorch_model.bin", "")
    ),
    Fault(
        "names the wrong shard",
        index_entry(SHARDS[1]),
        (INDEX, repr(UP), "in model-0000", "shards again"),
        MODELS,
        "sharded",
    ),
    Fault(
        "leaves a tensor out",
        edit(INDEX, lambda index: index["weight_map"].pop(UP)),
        (INDEX, repr(UP), "shards again"),
        MODELS,
        "sharded",
    ),
    Fault(
        "is not JSON",
        put(INDEX, "{"),
        (INDEX, "is not JSON", "again"),
        MODELS,
        "sharded",
    ),
    Fault(
        "is nested",
        put(INDEX, '{"weight_map":' * 3000 + "1" + "}" * 3000),
        (INDEX, "nested too deeply", "again"),
        MODELS,
        "sharded",
    ),
    Fault(
        "has no weight_map",
        edit(INDEX, lambda index: index.pop("weight_map")),
        (INDEX, "has no weight_map", "download it again"),
        MODELS,
        "sharded",
    ),
    Fault(
        "has an empty weight_map",
        edit(INDEX, lambda index: index["weight_map"].clear()),
        (INDEX, "has no weight_map", "download it again"),
        MODELS,
        "sharded",
    ),
    Fault(
        "is stale",
        lambda folder: save_file({"x": torch.zeros(1)}, folder / SHARD),
        (SHARD, "an index that names other shards", "delete the outdated one"),
        MODELS,
        "sharded",
    ),
    Fault(
        "outside the checkpoint",
        replaced(INDEX, lambda path: path.symlink_to("/etc/hostname")),
        (INDEX, "points outside the checkpoint", "replace the link with the file"),
        MODELS,
        "sharded",
    ),
]


def quantization(method: dict, key: str = "quantization_config") -> Callable[[Path], object]:
    return edit("config.json", lambda config: config.update({key: method}))


def add_tensors(**more: torch.Tensor) -> Callable[[Path], object]:
    """Add tensors under the prefix of the second layer's projection."""

    def inflict(folder: Path) -> None:
        weights = load_file(folder / SHARD)
        stem = UP.removesuffix("weight")
        for name, tensor in more.items():
            weights[stem + name.replace("__", ".")] = tensor
        save_file(weights, folder / SHARD)

    return inflict


def recast(name: str, dtype: torch.dtype) -> Callable[[Path], object]:
    def inflict(folder: Path) -> None:
        weights = load_file(folder / SHARD)
        weights[name] = weights[name].to(dtype)
        save_file(weights, folder / SHARD)

    return inflict


PRECISE = "use the checkpoint in its full precision"

QUANTISED = [
    *(
        Fault(
            f"{said} by config alone",
            quantization({"quant_method": said, **more}),
            ("no tensor that is stored as " + said, "remove quantization_config from config.json"),
            MODELS,
        )
        for said, more in {
            "bitsandbytes": {"load_in_4bit": True},
            "fp8": {"weight_block_size": [128, 128]},
            "compressed-tensors": {},
            "mxfp4": {},
        }.items()
    ),
    *(
        Fault(
            f"{key} without a weight",
            add_tensors(**{key: torch.zeros(4)}),
            (SHARD, UP.removesuffix("weight") + key, "has no weight", UP, dtype, "save it again"),
            MODELS,
        )
        for key, dtype in (("SCB", "expected an I8 matrix"), ("weight_scale_inv", "F8_E4M3"))
    ),
    *(
        Fault(f"{said} by config", inflict, ("is quantised", said, PRECISE), MODELS)
        for said, inflict in {
            "gptq": quantization({"quant_method": "gptq", "bits": 4}),
            "awq": quantization({"quant_method": "awq", "bits": 4}),
            "compression_config": quantization({"format": "x"}, "compression_config"),
            "hqq": edit(
                "config.json",
                lambda c: c.update(text_config={"quantization_config": {"quant_method": "hqq"}}),
            ),
            "hf_quant_config.json": put("hf_quant_config.json", "{}"),
            "quantize_config.json": put("quantize_config.json", "{}"),
        }.items()
    ),
    *(
        Fault(
            f"{said} by {key}",
            add_tensors(**{name.replace(".", "__"): tensor for name, tensor in more.items()}),
            (SHARD, "is quantised", said, UP.removesuffix("weight") + key, PRECISE),
            MODELS,
        )
        for said, key, more in (
            ("bitsandbytes", "weight.absmax", {"weight.absmax": torch.zeros(4)}),
            ("bitsandbytes", "weight.quant_map", {"weight.quant_map": torch.zeros(4)}),
            ("GPTQ or AWQ", "qweight", {"qweight": torch.zeros(4, dtype=torch.int32)}),
            ("GPTQ or AWQ", "g_idx", {"g_idx": torch.zeros(4, dtype=torch.int32)}),
            (
                "compressed-tensors",
                "weight_packed",
                {"weight_packed": torch.zeros(4, dtype=torch.int32)},
            ),
            ("mxfp4", "w_blocks", {"w_blocks": torch.zeros(4), "w_scales": torch.zeros(4)}),
        )
    ),
    Fault(
        "fp8 weights",
        recast(UP, torch.float8_e4m3fn),
        (SHARD, "F8_E4M3", UP, PRECISE),
        MODELS,
    ),
    Fault("int8 weights", recast(UP, torch.int8), (SHARD, "I8 weights", UP, PRECISE), MODELS),
]


class CreatesFile:
    """Once unpickled, a file of this name exists."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def pickled(name: str) -> Callable[[Path], object]:
    def inflict(folder: Path) -> None:
        (folder / SHARD).unlink()
        (folder / name).write_bytes(pickle.dumps(CreatesFile(folder / "ran")))

    return inflict


def lora(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / "config.json").unlink()
    tiny.write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 8})
    save_file(
        {"base_model.model.x.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.safetensors"
    )


KINDS = [
    *(
        Fault(
            name,
            pickled(name),
            ("only pickled weights", name, "save it as safetensors", "save_pretrained"),
            MODELS,
        )
        for name in ("pytorch_model.bin", "model.pt", "last.ckpt")
    ),
    Fault(
        "Meta's own layout",
        pickled("consolidated.00.pth"),
        ("own layout (consolidated.00.pth)", "give the same model in transformers format"),
        MODELS,
    ),
    Fault(
        *("LoRA", lora, ("is a LoRA adapter", "merge it into its base first")),
        ("base", "target"),  # finetuned may be one
    ),
    Fault(
        "a file",
        lambda folder: (shutil.rmtree(folder), folder.write_text("")),
        ("is a file", "give the folder that contains it"),
    ),
    Fault(
        "no folder",
        shutil.rmtree,
        ("no such folder", "a model on the Hub is named org/name, or org/name@revision"),
    ),
]

FAULTS = [*HEADERS, *FILES, *CONFIGS, *INDEXES, *QUANTISED, *KINDS]


def befall(faults: list[Fault]) -> pytest.MarkDecorator:
    """Every fault with every command and every role that it applies to."""
    cases = [
        pytest.param(fault, verb, role, id=f"{fault.name}-{verb}-{role}")
        for fault in faults
        for verb, roles in OPERANDS.items()
        for role in roles
        if role in fault.roles
    ]
    return pytest.mark.parametrize(("fault", "verb", "role"), cases)


@befall(FAULTS)
def test_a_broken_folder_is_refused(
    fault: Fault, verb: str, role: str, families: dict[str, World], tmp_path: Path
) -> None:
    world = families[fault.family].copy(tmp_path)
    fault.inflict(world.folders[role])
    refused(world, world.argv(verb), str(world.folders[role]), *fault.says)


@pytest.mark.parametrize("family", ["single", "sharded"])
@pytest.mark.parametrize("verb", OPERANDS)
def test_the_sound_family_beside_them_passes(
    verb: str, family: str, families: dict[str, World], tmp_path: Path
) -> None:
    world = families[family].copy(tmp_path)
    passes(world.argv(verb), world.out)


def test_the_pickle_would_have_run(tmp_path: Path) -> None:
    """The refusals of pickles above would see the file that this makes."""
    pickle.loads(pickle.dumps(CreatesFile(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(("verb", "role"), [(v, r) for v, roles in OPERANDS.items() for r in roles])
def test_a_hub_id_is_not_fetched_offline(verb: str, role: str, world: World) -> None:
    name = "meta-llama/Llama-3.1-8B"
    world.folders[role] = Path(name)
    says = (f"error: {name}: cannot be fetched: HF_HUB_OFFLINE is set", "does not contain it")
    refused(world, world.argv(verb), *says)


def test_a_name_that_no_folder_can_have(world: World) -> None:
    world.folders["base"] = Path("x" * 300)
    refused(world, world.argv("extract"), "x: cannot be opened", "check the path")


# Tensors that do not fit together.


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / SHARD)
    change(weights)
    save_file(weights, folder / SHARD, metadata={"format": "pt"})


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights[UP]


def add(weights: dict[str, torch.Tensor]) -> None:
    weights["model.extra.weight"] = torch.zeros(2)


def reshape(weights: dict[str, torch.Tensor]) -> None:
    weights[UP] = torch.zeros(3, 5)


def to_integers(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.zeros(4, dtype=torch.int64)


MISFITS = {
    "missing": (drop, (UP, "BF16 (3, 4)", " is in ", " only; ", "--allow-missing 'REGEX'")),
    "extra": (add, ("model.extra.weight", "F32 (2,)", " is in ", " only; ")),
    "shape": (reshape, (UP, "F32 (3, 5)", "BF16 (3, 4)", "--exclude 'REGEX'")),
    "dtype": (to_integers, ("model.norm.weight", "I64 (4,)", "BF16 (4,)", "--exclude 'REGEX'")),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize(
    ("verb", "role"),
    [(v, r) for v, roles in OPERANDS.items() for r in roles if r != "diff"],
)
def test_tensors_that_do_not_fit(misfit: str, verb: str, role: str, world: World) -> None:
    change, says = MISFITS[misfit]
    reweigh(world.folders[role], change)
    err = refused(world, world.argv(verb), "1 tensor does not fit", *says)
    assert any(f" {name}" in err for name in (*OPERANDS["transfer"], "the diff")), err


def test_a_shape_that_differs_names_both_roles(world: World) -> None:
    reweigh(world.folders["base"], reshape)
    says = (f"{UP} is BF16 (3, 4) in finetuned and F32 (3, 5) in base",)
    err = refused(world, world.argv("transfer"), *says)
    assert "missing" not in err


@pytest.mark.parametrize("verb", ["transfer", "extract"])
def test_integers_that_differ(verb: str, world: World) -> None:
    for value, role in enumerate(("base", "finetuned", "target")):
        name, count = "model.steps", torch.full((3,), value)
        reweigh(world.folders[role], lambda weights, n=name, c=count: weights.update({n: c}))
    says = ("model.steps", "I64", "finetuned", "base", "--exclude")
    refused(world, world.argv(verb), *says)


def fuse(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(2, 6, 4)


def unfuse(weights: dict[str, torch.Tensor]) -> None:
    for expert in range(2):
        for part in ("gate_proj", "up_proj"):
            weights[f"model.layers.0.mlp.experts.{expert}.{part}.weight"] = torch.zeros(3, 4)


@pytest.mark.parametrize(("verb", "role"), [("transfer", r) for r in sorted(MODELS)])
def test_fused_experts_against_single_ones(verb: str, role: str, world: World) -> None:
    for other in MODELS:
        reweigh(world.folders[other], fuse if other == role else unfuse)
    says = ("experts", "fused", "one by one", "save all roles with the same version")
    refused(world, world.argv(verb), *says)


# Values that are none.


def put_value(value: float, place: tuple[int, ...]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[UP][place] = value
        weights[UP][2, 3] = value

    return change


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "inf")]
)
@pytest.mark.parametrize(("verb", "role"), [(v, r) for v, roles in OPERANDS.items() for r in roles])
def test_values_that_are_no_numbers(
    value: float, said: str, verb: str, role: str, world: World
) -> None:
    reweigh(world.folders[role], put_value(value, (1, 2)))
    named = "diff vector" if role == "diff" else role
    says = (UP, f"{said}", f" in {named} at [1, 2]", SHARD, "--allow-nonfinite")
    refused(world, world.argv(verb), *says)
    if role == "diff":  # as a diff vector of such values has it
        values = load_file(world.folders[role] / SHARD)[UP]
        edit_json(
            world.folders[role] / "diffxfer.json",
            lambda manifest: manifest["tensors"][UP].update(checksum=block_checksum(values)),
        )
    passes(world.argv(verb, "--allow-nonfinite"), world.out)


OVERFLOWS = {
    "float16 target": (torch.float16, {"finetuned": 4e4, "base": -2e4, "target": 3e4}, (), "F16"),
    "bfloat16 target": (torch.bfloat16, {"finetuned": 3e38, "target": 3e38}, (), "BF16"),
    "float32 target": (torch.float32, {"finetuned": 3e38, "target": 3e38}, (), "F32"),
    "--out-dtype": (torch.bfloat16, {"target": 1e6}, ("--out-dtype", "float16"), "F16"),
    "--alpha": (torch.bfloat16, {}, ("--alpha-for", f"{UP}=1e39"), "BF16"),
}


@pytest.mark.parametrize("verb", ["transfer", "apply"])
@pytest.mark.parametrize("case", OVERFLOWS)
def test_outputs_that_overflow(case: str, verb: str, tmp_path: Path) -> None:
    dtype, values, options, said = OVERFLOWS[case]
    world = tiny.make_world(tmp_path, dtype=dtype)
    for role, value in values.items():
        reweigh(world.folders[role], put_value(value, (1, 2)))
    if verb == "apply":
        shutil.rmtree(world.folders["diff"])
        operands = (world.folders["finetuned"], world.folders["base"])
        made = tiny.run("extract", *operands, "-o", world.folders["diff"])
        assert made.status == 0
    says = (
        f"error: {UP}: overflows {said} in the output at [",
        "--allow-nonfinite",
        "a wider --out-dtype",
    )
    refused(world, world.argv(verb, *options), *says)
    passes(world.argv(verb, *options, "--allow-nonfinite"), world.out)


def test_a_diff_vector_that_overflows(tmp_path: Path) -> None:
    world = tiny.make_world(tmp_path)
    reweigh(world.folders["finetuned"], put_value(1e6, (1, 2)))
    says = (UP, "overflows F16 in the output at [1, 2]", "give a wider --diff-dtype")
    refused(world, world.argv("extract", "--diff-dtype", "float16"), *says)


# Folders of the wrong kind, and manifests that are none.


@pytest.mark.parametrize(
    ("verb", "role"), [(v, r) for v, roles in OPERANDS.items() for r in roles if r != "diff"]
)
def test_a_diff_vector_given_as_a_model(verb: str, role: str, world: World) -> None:
    world.folders[role] = world.folders["diff"]
    says = (f"{world.folders['diff']}: is a diff vector, expected the {role} ", "diffxfer apply")
    refused(world, world.argv(verb), *says)


def test_a_model_given_as_a_diff_vector(world: World) -> None:
    world.folders["diff"] = world.folders["finetuned"]
    says = (f"{world.folders['diff']}: is a model, expected a diff vector", "diffxfer extract")
    refused(world, world.argv("apply"), *says)


def test_a_graft_given_as_a_diff_vector(world: World) -> None:
    assert tiny.run(*into(world.argv("transfer"), world.root / "graft")).status == 0
    world.folders["diff"] = world.root / "graft"
    says = (f"{world.folders['diff']}: is a graft", "expected a diff vector", "extract")
    refused(world, world.argv("apply"), *says)


MANIFEST = "diffxfer.json"
REMAKE = "make or download it again"


def cut_in_half(folder: Path) -> None:
    raw = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(raw[: len(raw) // 2])


def store_integers(folder: Path) -> None:
    """A tensor of integers, in a manifest that knows of it."""
    tiny.edit_header(folder / SHARD, lambda found: found["model.norm.weight"].update(dtype="U16"))
    raw = (folder / SHARD).read_bytes()
    digest = xxhash.xxh3_128_hexdigest(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    stated = {"size": len(raw), "header_xxh3": digest}
    tiny.edit_json(folder / MANIFEST, lambda found: found["shards"].update({SHARD: stated}))


MANIFESTS = {
    "integers": (
        store_integers,
        (SHARD, "'model.norm.weight' is U16, expected a float dtype", REMAKE),
    ),
    "newer format": (
        edit(MANIFEST, lambda found: found.update(diffxfer_format=99)),
        (MANIFEST, "has format 99", "reads only up to 2", "update diffxfer"),
    ),
    "newer format of another layout": (
        put(MANIFEST, json.dumps({"diffxfer_format": 3, "kind": "diff", "tensors": []})),
        (MANIFEST, "has format 3", "update diffxfer"),
    ),
    "no manifest": (
        lambda folder: (folder / MANIFEST).unlink(),
        (f"is a folder without {MANIFEST}", "expected a diff vector", "diffxfer extract"),
    ),
    "cut in half": (cut_in_half, (MANIFEST, "is not a valid manifest", REMAKE)),
    "empty": (put(MANIFEST, b""), (MANIFEST, "is not a valid manifest", REMAKE)),
    "not UTF-8": (
        put(MANIFEST, b'{"kind": "\xff"}'),
        (MANIFEST, "is not a valid manifest", REMAKE),
    ),
    "nested": (put(MANIFEST, b'{"a":' * 5000), (MANIFEST, "is not a valid manifest", REMAKE)),
    "no tensors": (
        edit(MANIFEST, lambda found: found.pop("tensors")),
        (MANIFEST, "tensors", REMAKE),
    ),
    "another kind": (
        edit(MANIFEST, lambda found: found.update(kind="recipe")),
        (MANIFEST, "kind", REMAKE),
    ),
    "another type": (
        edit(MANIFEST, lambda found: found["tensors"][UP].update(checksum=7)),
        (MANIFEST, "tensors", UP, "checksum", REMAKE),
    ),
    "a tensor too few": (
        edit(MANIFEST, lambda found: found["tensors"].pop(UP)),
        ("is damaged", repr(UP), REMAKE),
    ),
    "a tensor too many": (
        edit(MANIFEST, lambda found: found["tensors"].update({"x": found["tensors"][UP]})),
        ("is damaged", "'x'", REMAKE),
    ),
    "a shard of another size": (
        edit(MANIFEST, lambda found: found["shards"][SHARD].update(size=1)),
        (SHARD, "is not the shard that the manifest names", REMAKE),
    ),
    "no shard": (
        edit(MANIFEST, lambda found: found["shards"].clear()),
        (SHARD, "is not the shard that the manifest names", REMAKE),
    ),
    "a link out": (
        replaced(MANIFEST, lambda path: path.symlink_to("/etc/hostname")),
        (MANIFEST, "points outside the checkpoint"),
    ),
    "no companions": (
        lambda folder: shutil.rmtree(folder / "companions"),
        ("companions/config.json", "is missing", REMAKE),
    ),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_cannot_be_used(case: str, world: World) -> None:
    inflict, says = MANIFESTS[case]
    inflict(world.folders["diff"])
    refused(world, world.argv("apply"), str(world.folders["diff"]), *says)


PATHS = ("companions/../../secret.json", "companions//etc/passwd", "companions/../../../x")


@pytest.mark.parametrize("name", [*PATHS, "companions/\0", "companions/" + "x" * 300])
def test_a_manifest_with_paths_in_it(name: str, world: World) -> None:
    """Whatever name it gives a file, nothing outside the diff vector's folder is opened."""
    secret = world.root / "secret.json"
    secret.write_text("{}")
    entry = {"size": 2, "xxh3": xxhash.xxh3_128_hexdigest(b"{}")}
    diff = world.folders["diff"]
    edit(MANIFEST, lambda found: found["files"].update({name: entry}))(diff)
    refused(world, world.argv("apply"), str(diff / "companions"))
    with fuzzing.watched() as touched:
        assert tiny.run(*world.argv("apply")).status == 1
    opened = [Path(os.path.realpath(path)) for event, path in touched if event == "open"]
    assert diff / MANIFEST in opened
    assert not [path for path in opened if path in (secret, Path("/etc/passwd"))]


@pytest.mark.parametrize("name", ["../secret.json", "/etc/passwd", "../diff/../secret.json"])
def test_a_manifest_that_names_files_elsewhere(name: str, world: World) -> None:
    """Only the names of companions and of the shards that are there mean anything."""
    (world.root / "secret.json").write_text("{}")
    diff = world.folders["diff"]
    one = {"size": 2, "xxh3": "0", "header_xxh3": "0"}
    edit(MANIFEST, lambda found: [found[k].update({name: one}) for k in ("files", "shards")])(diff)
    with fuzzing.watched() as touched:
        outcome = tiny.run(*world.argv("apply"))
    assert outcome == Outcome(0, "", "")
    assert {os.path.realpath(path) for _, path in touched}.isdisjoint(
        {str(world.root / "secret.json"), "/etc/passwd"}
    )
    written = [path.name for path in world.out.rglob("*")]
    assert sorted(written) == ["README.md", "config.json", MANIFEST, SHARD]


def test_a_manifest_of_an_output_that_is_a_link_is_not_ours(world: World) -> None:
    (world.root / "secret.json").write_bytes((world.folders["diff"] / MANIFEST).read_bytes())
    world.out.mkdir(parents=True)
    (world.out / MANIFEST).symlink_to(world.root / "secret.json")
    with fuzzing.watched() as touched:
        refused(world, world.argv("transfer", "--overwrite"), "has no diffxfer.json by diffxfer")
    assert ("open", str(world.out / MANIFEST)) not in touched


CARD = "x | <img src=x onerror=1>\n---\nlicense: none\n[red]`"


def test_a_card_of_sources_that_mean_harm(world: World) -> None:
    def name_it(found: dict) -> None:
        made = found["sources"]
        made[CARD] = {**made["base"], "name": CARD, "revision": CARD}

    edit(MANIFEST, name_it)(world.folders["diff"])
    assert tiny.run(*world.argv("apply")) == Outcome(0, "", "")
    text = (world.out / "README.md").read_text("utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "tags": ["diffxfer", "merge"],
    }
    (row,) = [line for line in body.splitlines() if "img" in line]
    name = r"x \| \<img src=x onerror=1\>?---?license: none?\[red\]\`"
    assert row == rf"| diff vector: {name} | {name}@{name} |"


# Names in errors, and sizes.


def test_an_error_is_a_line_that_no_terminal_obeys(world: World) -> None:
    name = "\x1b[2J\n\u202e[red]\x9b" + "x" * 100_000
    reweigh(world.folders["base"], lambda weights: weights.update({name: torch.zeros(2)}))
    with pytest.raises(MatchError) as caught:
        transfer(*(world.folders[role] for role in OPERANDS["transfer"]), world.out)
    said = str(caught.value)
    assert said.isprintable()
    assert r"\x1b[2J\n\u202e[red]\x9bxxx" in said
    assert said.endswith("accept these with --allow-missing 'REGEX'")
    assert len(said) < 10_000
    assert caught.value.groups[0].names == (name,)


def sparse(folder: Path, shape: list[int]) -> None:
    """A model of one bf16 tensor that takes no disk."""
    size = 2 * math.prod(shape)
    entry = {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}
    text = json.dumps({"model.embed_tokens.weight": entry}).encode()
    folder.mkdir()
    tiny.write_json(folder / "config.json", CONFIG)
    with (folder / SHARD).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + size)
        except OSError:
            pytest.skip("this file system has no files of 2 TiB")


SIZES = {
    "2^40 elements": ([2, 1 << 39], ""),
    "2^40 rows": ([1 << 40, 1], "has 1099511627776 rows, more than any vocabulary"),
    "2^40 rows of nothing": ([1 << 40, 0], ""),
}


@pytest.mark.parametrize("verb", ["transfer", "extract"])
@pytest.mark.parametrize("size", SIZES)
def test_a_tensor_of_2_to_the_40(size: str, verb: str, tmp_path: Path) -> None:
    shape, said = SIZES[size]
    world = World(tmp_path, {role: tmp_path / role for role in sorted(MODELS)})
    for folder in world.folders.values():
        sparse(folder, shape)
    tracemalloc.start()
    try:
        if said:
            refused(world, world.argv(verb, "--dry-run"), SHARD, said, AGAIN)
        else:
            outcome = tiny.run(*world.argv(verb, "--dry-run"))
            assert outcome.status == 0, outcome
            assert f"{math.prod(shape):,}" in outcome.out
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_header_of_many_tensors(count: int, tmp_path: Path) -> None:
    """A million tensors make a header of 85 MB."""
    entries = {
        f"model.layers.{place}.w": {
            "dtype": "BF16",
            "shape": [1],
            "data_offsets": [2 * place, 2 * place + 2],
        }
        for place in range(count)
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    tiny.write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + bytes(2 * count))
    del entries
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from diffxfer.checkpoints.reader import open_checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "found = open_checkpoint(Path(sys.argv[1]), 'base')\n"
        "print(len(found.tensors), (peak() - before) * 1024)"
    )
    # Started by sh, since a child's peak includes the pages of its parent when it was forked.
    command = ["sh", "-c", '"$@"', "sh", sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tensors, taken = map(int, done.stdout.split())
    assert tensors == count
    assert taken < 30 * len(text)


# Outputs that must not be written.


def into(argv: list[str], out: Path) -> list[str]:
    place = argv.index("-o") + 1
    return [*argv[:place], str(out), *argv[place + 1 :]]


OTHER = "choose another -o"


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize(("verb", "role"), [(v, r) for v, roles in OPERANDS.items() for r in roles])
class TestOutputsThatTouchAnInput:
    def test_is_one(self, verb: str, role: str, overwrite: tuple[str, ...], world: World) -> None:
        out = world.folders[role]
        refused(world, into(world.argv(verb, *overwrite), out), f"{out}: is the input", OTHER)

    def test_inside(self, verb: str, role: str, overwrite: tuple[str, ...], world: World) -> None:
        out = world.folders[role] / "made" / "out"
        refused(world, into(world.argv(verb, *overwrite), out), f"{out}: is inside", OTHER)

    def test_linked(self, verb: str, role: str, overwrite: tuple[str, ...], world: World) -> None:
        link = world.root / "link"
        link.symlink_to(world.folders[role])
        refused(world, into(world.argv(verb, *overwrite), link), "is the input", OTHER)
        refused(world, into(world.argv(verb, *overwrite), link / "out"), "is inside", OTHER)

    def test_input_linked(
        self, verb: str, role: str, overwrite: tuple[str, ...], world: World
    ) -> None:
        out = world.folders[role]
        world.folders[role] = world.root / "link"
        world.folders[role].symlink_to(out)
        refused(world, into(world.argv(verb, *overwrite), out), "is the input", OTHER)
        refused(world, into(world.argv(verb, *overwrite), out / ".." / role), "is the input", OTHER)


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("verb", OPERANDS)
def test_an_output_around_the_inputs(verb: str, overwrite: tuple[str, ...], world: World) -> None:
    refused(world, into(world.argv(verb, *overwrite), world.root), "contains the input", OTHER)


@pytest.mark.parametrize("verb", OPERANDS)
class TestOutputsThatExist:
    def test_a_folder(self, verb: str, world: World) -> None:
        world.out.mkdir(parents=True)
        says = (str(world.out), "exists already", "--overwrite")
        refused(world, world.argv(verb), *says)
        passes(world.argv(verb, "--overwrite"), world.out)

    def test_a_folder_of_theirs(self, verb: str, world: World) -> None:
        world.out.mkdir(parents=True)
        (world.out / "thesis.tex").write_text("years of work")
        says = (str(world.out), "no diffxfer.json by diffxfer", "remove it yourself")
        refused(world, world.argv(verb, "--overwrite"), *says)

    def test_a_folder_of_ours(self, verb: str, world: World) -> None:
        assert tiny.run(*world.argv(verb)).status == 0
        refused(world, world.argv(verb), str(world.out), "exists already", "--overwrite")
        passes(world.argv(verb, "--overwrite"), world.out)

    @pytest.mark.parametrize("options", [(), ("--overwrite",)])
    def test_a_file(self, verb: str, options: tuple[str, ...], world: World) -> None:
        world.out.parent.mkdir()
        world.out.write_text("")
        refused(world, world.argv(verb, *options), str(world.out), OTHER)

    @pytest.mark.parametrize("options", [(), ("--overwrite",)])
    def test_a_link_to_nothing(self, verb: str, options: tuple[str, ...], world: World) -> None:
        world.out.parent.mkdir()
        world.out.symlink_to("gone")
        refused(world, world.argv(verb, *options), str(world.out), OTHER)

    def test_below_a_file(self, verb: str, world: World) -> None:
        world.out.parent.write_text("")
        says = (f"cannot be created: {world.out.parent} is not a folder", OTHER)
        refused(world, world.argv(verb), str(world.out), *says)
        refused(world, world.argv(verb, "--dry-run"), str(world.out), *says)


@pytest.mark.parametrize("verb", ["transfer", "extract"])
def test_a_disk_that_is_too_small(verb: str, tmp_path: Path) -> None:
    """Sparse files larger than the disk: none of their data may be read or written."""
    elements = shutil.disk_usage(tmp_path).free // 2 + (1 << 28)
    world = World(tmp_path)
    for role in MODELS:
        folder = world.folders[role] = tmp_path / role
        folder.mkdir()
        tiny.write_json(folder / "config.json", CONFIG)
        entry = {"dtype": "BF16", "shape": [elements], "data_offsets": [0, elements * 2]}
        text = json.dumps({UP: entry}).encode()
        with (folder / SHARD).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            try:
                file.truncate(8 + len(text) + elements * 2)
            except OSError:
                pytest.skip("no file of this file system can be larger than the disk")
    says = (str(world.out), "needs ", " GB are free", "free disk space, or choose another -o")
    refused(world, world.argv(verb), *says)


# In a separate process, because a bug would block forever or kill pytest.


def process(world: World, argv: list[str], *says: str) -> None:
    before = tiny.tree(world.root)
    command = [sys.executable, "-m", "diffxfer", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert tiny.tree(world.root) == before
    assert done.returncode == 1, done
    assert done.stdout == ""
    one_line(done.stderr, *says)


@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json", MANIFEST, "tokenizer.json"])
def test_a_fifo_is_not_waited_for(name: str, world: World) -> None:
    folder = world.folders["target"]
    replaced(name, os.mkfifo)(folder)
    process(world, world.argv("transfer"), str(folder / name), "is not a regular file", "replace")


def test_a_fifo_in_a_diff_vector_is_not_waited_for(world: World) -> None:
    folder = world.folders["diff"]
    replaced(SHARD, os.mkfifo)(folder)
    process(world, world.argv("apply"), str(folder / SHARD), "is not a regular file", "replace")


@pytest.mark.parametrize(
    "fault",
    [fault for fault in FAULTS if fault.name in ("nested", "truncated data", "pytorch_model.bin")],
    ids=lambda fault: fault.name,
)
def test_a_broken_folder_in_a_process(fault: Fault, world: World) -> None:
    fault.inflict(world.folders["base"])
    process(world, world.argv("extract"), str(world.folders["base"]), *fault.says)


class TestInputsByLinks:
    def test_a_shard_that_links_into_out_is_an_input(self, world, tmp_path):
        out = tmp_path / "out"
        operands = [world.folders[role] for role in ("finetuned", "base", "target")]
        assert tiny.run("transfer", *operands, "-o", out) == Outcome(0, "", "")
        patched = tmp_path / "patched"
        patched.mkdir()
        (patched / "config.json").write_bytes((operands[0] / "config.json").read_bytes())
        (patched / "model.safetensors").symlink_to(out / "model.safetensors")
        before = (out / "model.safetensors").read_bytes()
        done = tiny.run("transfer", patched, *operands[1:], "-o", out, "--overwrite")
        assert done.status == 1
        assert "contains the input" in done.err
        assert (out / "model.safetensors").read_bytes() == before
