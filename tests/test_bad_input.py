"""What a person gets for input that is not sound: one line that says which, what and what to do.

Every refusal here is checked for the same things: exit status 1, one line on stderr that begins
with ``error: `` and names the place and the remedy, nothing on stdout, and not a file more, less
or other than before; and the same command on the sound family beside it works.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.tiny import CONFIG, INDEX, OPERANDS, SHARD, SHARDS, UP, Outcome, World

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
    """Run a command that must be refused in one line, without a trace; that line."""
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
    """Put something else in the place of a file."""

    def inflict(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return inflict


def twice(folder: Path) -> None:
    """A header with one key two times, the second with other offsets."""
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


def reach_out(found: dict) -> None:
    """Let the last tensor end after the file does."""
    last = found["model.norm.weight"]
    last["shape"] = [4000]
    last["data_offsets"][1] = last["data_offsets"][0] + 8000


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
    Fault("sizes that wrap", entry(shape=[1 << 62, 1 << 62]), (SHARD, UP, AGAIN)),
    Fault("many dimensions", entry(shape=[1] * 999), (SHARD, UP, "shape", AGAIN)),
    Fault("true as a size", entry(shape=[True, 12]), (SHARD, UP, "shape", AGAIN)),
    Fault("unknown dtype", entry(dtype="BF15"), (SHARD, UP, "unknown dtype 'BF15'", AGAIN)),
    Fault("dtype as a list", entry(dtype=["BF16"]), (SHARD, UP, "unknown dtype", AGAIN)),
    Fault("more fields", entry(strides=[4, 1]), (SHARD, UP, "is not described by", AGAIN)),
    Fault(
        "fewer fields",
        header(lambda found: found[UP].pop("shape")),
        (SHARD, UP, "is not described by", AGAIN),
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
        (SHARD, "is not a regular file", "replace it by the shard itself"),
    ),
    Fault(
        "shard links to nothing",
        replaced(SHARD, lambda path: path.symlink_to("gone")),
        (SHARD, "is a link to nothing", "download the checkpoint again"),
    ),
    Fault(
        "shard links to itself",
        replaced(SHARD, lambda path: path.symlink_to(SHARD)),
        (SHARD, "symbolic link", "download"),
    ),
    Fault(
        "no weights",
        replaced(SHARD, lambda path: None),
        (f"expected {SHARD} or {INDEX}, found none", "download the whole folder"),
    ),
    Fault(
        "weights of another name",
        lambda folder: (folder / SHARD).rename(folder / "consolidated.safetensors"),
        ("found only consolidated.safetensors", "download the whole folder"),
    ),
]

CONFIGS = [
    Fault(
        "no config",
        lambda folder: (folder / "config.json").unlink(),
        ("no config.json", "name the folder that holds config.json"),
        MODELS,
    ),
    Fault(
        "config is not JSON",
        put("config.json", '{"vocab_size": 6,\n "hidden_size": }'),
        ("config.json", "is not JSON (line 2)", "fetch or save the checkpoint again"),
        MODELS,
    ),
    Fault(
        "config is not UTF-8",
        put("config.json", b'{"a": "\xff"}'),
        ("config.json", "not UTF-8", "fetch or save the checkpoint again"),
        MODELS,
    ),
    Fault("config is empty", put("config.json", ""), ("config.json", "is not JSON"), MODELS),
    Fault(
        "config is an array",
        put("config.json", "[]"),
        ("config.json", "holds a JSON array where an object is expected", "again"),
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
        ("config.json", "is a link out of the checkpoint", "put the file itself there"),
        MODELS,
    ),
    Fault(
        "licence links out",
        lambda folder: (folder / "LICENSE").symlink_to("/etc/hostname"),
        ("LICENSE", "is a link out of the checkpoint", "or delete the link"),
        frozenset({"finetuned", "target"}),
    ),
    Fault(
        "template links out",
        lambda folder: (folder / "chat_template.jinja").symlink_to("../secret"),
        ("chat_template.jinja", "is a link", "put the file itself there"),
        frozenset({"finetuned", "target"}),
    ),
    Fault(
        "tokenizer is not JSON",
        put("tokenizer.json", "<html>"),
        ("tokenizer.json", "is not JSON", "fetch or save the checkpoint again"),
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
        (INDEX, repr(UP), SHARDS[1], "which does not have it", "shards again"),
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
        (SHARD, "an index that names other shards", "remove the one that is stale"),
        MODELS,
        "sharded",
    ),
    Fault(
        "is a link out",
        replaced(INDEX, lambda path: path.symlink_to("/etc/hostname")),
        (INDEX, "is a link out of the checkpoint", "put the file itself there"),
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
U8, I32 = torch.zeros(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32)

QUANTISED = [
    *(
        Fault(f"{said} by config", inflict, ("is quantised", said, PRECISE), MODELS)
        for said, inflict in {
            "bitsandbytes": quantization({"quant_method": "bitsandbytes", "load_in_4bit": True}),
            "gptq": quantization({"quant_method": "gptq", "bits": 4}),
            "awq": quantization({"quant_method": "awq", "bits": 4}),
            "fp8": quantization({"quant_method": "fp8", "weight_block_size": [128, 128]}),
            "compressed-tensors": quantization({"quant_method": "compressed-tensors"}),
            "mxfp4": quantization({"quant_method": "mxfp4"}),
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
            ("bitsandbytes", "SCB", {"SCB": torch.zeros(4)}),
            ("GPTQ or AWQ", "qweight", {"qweight": I32, "qzeros": I32}),
            ("GPTQ or AWQ", "g_idx", {"g_idx": I32}),
            ("fp8", "weight_scale_inv", {"weight_scale_inv": torch.zeros(1)}),
            ("compressed-tensors", "weight_packed", {"weight_packed": I32}),
            ("mxfp4", "w_blocks", {"w_blocks": U8, "w_scales": U8}),
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
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")


KINDS = [
    *(
        Fault(
            name,
            pickled(name),
            ("pickled weights only", name, "save it as safetensors", "save_pretrained"),
            MODELS,
        )
        for name in ("pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt")
    ),
    Fault("LoRA", lora, ("is a LoRA adapter", "merge it into its base first"), MODELS),
    Fault(
        "a file",
        lambda folder: (shutil.rmtree(folder), folder.write_text("")),
        ("is a file", "give the folder that holds it"),
    ),
    Fault(
        "no folder",
        shutil.rmtree,
        ("no such folder", "hf download org/name --local-dir"),
    ),
]

FAULTS = [*HEADERS, *FILES, *CONFIGS, *INDEXES, *QUANTISED, *KINDS]


def befall(faults: list[Fault]) -> pytest.MarkDecorator:
    """Every fault with every command and every role that it may befall."""
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
