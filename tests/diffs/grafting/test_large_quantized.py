"""Plans of large fp8 checkpoints, whose files are sparse: only headers and scales are stored."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, MIDDLE, EXPERTS = 7168, 2048, 256
SIZES = {"F8_E4M3": 1, "F32": 4, "BF16": 2}
DENSE = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    scales = -(-rows // 128), -(-columns // 128)
    weight = f"{name}.weight"
    return {weight: ("F8_E4M3", (rows, columns)), f"{weight}_scale_inv": ("F32", scales)}


def sparse(folder: Path, layers: list[dict[str, tuple[str, tuple[int, ...]]]]) -> Path:
    """Write a checkpoint of one shard for each layer, with scales of 1 and holes for weights."""
    folder.mkdir(parents=True)
    where = {}
    for number, tensors in enumerate(layers, 1):
        name = f"model-{number:05d}-of-{len(layers):05d}.safetensors"
        header, end = {}, 0
        for tensor, (dtype, shape) in tensors.items():
            size = SIZES[dtype] * shape[0] * (shape[1] if len(shape) > 1 else 1)
            place = [end, end + size]
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": place}
            where[tensor], end = name, end + size
        raw = json.dumps(header, separators=(",", ":")).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + end)
            for entry in header.values():
                if entry["dtype"] == "F32":
                    first, last = entry["data_offsets"]
                    file.seek(8 + len(raw) + first)
                    file.write(struct.pack("<f", 1.0) * ((last - first) // 4))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": stated}))
    return folder


def dense(layers: int) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """The shapes of an 8B Llama's layers."""
    made = []
    for number in range(layers):
        prefix = f"model.layers.{number}."
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            f"{prefix}input_layernorm.weight": ("BF16", (4096,))
        }
        for name, (rows, columns) in DENSE.items():
            found |= linear(f"{prefix}self_attn.{name}_proj", rows, columns)
        found |= linear(f"{prefix}mlp.gate_proj", 14336, 4096)
        found |= linear(f"{prefix}mlp.up_proj", 14336, 4096)
        found |= linear(f"{prefix}mlp.down_proj", 4096, 14336)
        made.append(found)
    return made


def experts(layers: int) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """The shapes of DeepSeek-V3's experts."""
    made = []
    for number in range(layers):
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for expert in range(EXPERTS):
            prefix = f"model.layers.{number}.mlp.experts.{expert}."
            found |= linear(f"{prefix}gate_proj", MIDDLE, HIDDEN)
            found |= linear(f"{prefix}up_proj", MIDDLE, HIDDEN)
            found |= linear(f"{prefix}down_proj", HIDDEN, MIDDLE)
        made.append(found)
    return made


def dry_run(folders: list[Path], *options: str) -> tuple[dict[str, int], int]:
    """The report of a dry run in a process of its own, and its peak memory in MB."""
    code = (
        "import resource, sys\n"
        "from diffxfer.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)"
    )
    argv = ["transfer", *map(str, folders), "-o", str(folders[0].parent / "out"), "--dry-run"]
    argv += ["--json", "--allow-unrelated", *options]
    # From a process that has not imported PyTorch: its pages would count as the child's.
    command = [sys.executable, "-c", code, *argv]
    shell = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"]
    done = subprocess.run([*shell, *command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout), int(done.stderr.splitlines()[-1])


def test_a_family_of_8b(tmp_path: Path) -> None:
    roles = [sparse(tmp_path / role, dense(32)) for role in ("finetuned", "base", "target")]
    report, megabytes = dry_run(roles)
    weights = 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 4096)
    assert report["parameters"] == {"grafted": weights}
    assert report["bytes_to_write"] > 2 * weights
    assert megabytes < 250


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--requantize",)])
def test_experts_of_deepseek_v3(tmp_path: Path, options: tuple[str, ...]) -> None:
    roles = [sparse(tmp_path / role, experts(61)) for role in ("finetuned", "base", "target")]
    report, megabytes = dry_run(roles, *options)
    assert report["tensors"] == {"grafted": 61 * EXPERTS * 3}
    assert megabytes < 500
