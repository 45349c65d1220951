"""Families to measure with: base, finetuned and target of a known model's shapes.

Values are random bfloat16 numbers, never zeros; finetuned and target differ from base in their last
bits, as relatives do. Sparse files have true headers and holes for data: of any size, on any disk.
"""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diffxfer.checkpoints.layout import layout_shard
from diffxfer.checkpoints.writer import index_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt

ROLES = ("base", "finetuned", "target")

_BLOCK_BYTES = 8 << 20
_SHARD_BYTES = 5 * 10**9
_KEPT, _SET, _CHANGED = 0x81FF, 0x3C00, 0x0007
"""Bits of a bfloat16: sign, fraction and two of the exponent's; the rest of it; the last three."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        hidden: width of the model.
        inner: width of a feed-forward layer, or of an expert.
        layers: how many.
        key_value: width of keys and of values.
        vocabulary: how many tokens.
        tied: whether the output head is the embedding.
        experts: how many a layer, 0 for none.
    """

    hidden: int
    inner: int
    layers: int
    key_value: int
    vocabulary: int
    tied: bool = False
    experts: int = 0

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, in the order of the model."""
        width = self.hidden
        yield "model.embed_tokens.weight", (self.vocabulary, width)
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            yield f"{layer}.input_layernorm.weight", (width,)
            yield f"{layer}.post_attention_layernorm.weight", (width,)
            for name, rows in (("q", width), ("k", self.key_value), ("v", self.key_value)):
                yield f"{layer}.self_attn.{name}_proj.weight", (rows, width)
            yield f"{layer}.self_attn.o_proj.weight", (width, width)
            if self.experts:
                yield f"{layer}.mlp.gate.weight", (self.experts, width)
            experts = [f"mlp.experts.{n}" for n in range(self.experts)] or ["mlp"]
            for expert in experts:
                yield f"{layer}.{expert}.gate_proj.weight", (self.inner, width)
                yield f"{layer}.{expert}.up_proj.weight", (self.inner, width)
                yield f"{layer}.{expert}.down_proj.weight", (width, self.inner)
        yield "model.norm.weight", (width,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, width)

    @property
    def parameters(self) -> int:
        """How many elements all tensors have."""
        return sum(math.prod(shape) for _, shape in self.tensors())

    def config(self) -> dict[str, Any]:
        """The config.json of such a model."""
        kind = (
            ("Qwen3MoeForCausalLM", "qwen3_moe") if self.experts else ("LlamaForCausalLM", "llama")
        )
        return {
            "architectures": [kind[0]],
            "model_type": kind[1],
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // min(64, self.key_value),
            "num_key_value_heads": self.key_value // min(64, self.key_value),
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
        }


SHAPES = {
    "tiny": Shape(64, 128, 2, 32, 512, tied=True),  # to try the benchmark itself
    "small": Shape(128, 384, 4, 64, 2048, tied=True),  # 2 MB
    "0.5b": Shape(896, 4864, 24, 128, 151936, tied=True),
    "1.2b": Shape(2048, 8192, 16, 512, 128256, tied=True),
    "3b": Shape(3072, 8192, 28, 1024, 128256, tied=True),
    "8b": Shape(4096, 14336, 32, 1024, 128256),
    "70b": Shape(8192, 28672, 80, 1024, 128256),
    "405b": Shape(16384, 53248, 126, 1024, 128256),
    "moe": Shape(64, 32, 48, 32, 4096, experts=415),  # 60,000 tensors of 4 KiB
    "1t": Shape(7168, 2048, 61, 1024, 163840, experts=384),
}
"""Those of Qwen2.5 0.5B, Llama 3.1 and 3.2, and one like Kimi K2."""


def make_family(folder: Path, shape: Shape, *, sparse: bool) -> None:
    """Write the three roles of a family, unless they are there.

    Args:
        folder: where; each role gets a folder in it.
        shape: the sizes.
        sparse: whether data is left a hole.
    """
    done = folder / "done"
    if done.exists():
        return
    for role in ROLES:
        (folder / role).mkdir(parents=True, exist_ok=True)
        (folder / role / "config.json").write_text(json.dumps(shape.config(), indent=2))
    shards = _shards(shape)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, (name, tensors) in enumerate(shards.items()):
            layout = layout_shard((tensor, "BF16", size) for tensor, size in tensors)
            paths = [folder / role / name for role in ROLES]
            for path in paths:
                with path.open("wb") as file:
                    file.write(layout.header)
                    file.truncate(layout.size)
            starts = range(len(layout.header), layout.size, _BLOCK_BYTES)
            if sparse:
                _tell_apart(paths, layout.starts)
            else:
                jobs = [(paths, (number, at), min(_BLOCK_BYTES, layout.size - at)) for at in starts]
                list(pool.map(lambda job: _fill(*job), jobs))
    if len(shards) > 1:
        names = {name: [tensor for tensor, _ in found] for name, found in shards.items()}
        index = index_json(names, shape.parameters, 2 * shape.parameters)
        for role in ROLES:
            (folder / role / "model.safetensors.index.json").write_bytes(index)
    done.touch()


def _shards(shape: Shape) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """The tensors of each shard, cut at 5 GB as on the Hub."""
    cut: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    taken = 0
    for name, size in shape.tensors():
        nbytes = 2 * math.prod(size)
        if cut[-1] and taken + nbytes > _SHARD_BYTES:
            cut.append([])
            taken = 0
        cut[-1].append((name, size))
        taken += nbytes
    if len(cut) == 1:
        return {"model.safetensors": cut[0]}
    return {
        f"model-{n + 1:05d}-of-{len(cut):05d}.safetensors": found for n, found in enumerate(cut)
    }


def _tell_apart(paths: list[Path], starts: Mapping[str, int]) -> None:
    """Make a head that is all holes differ from the embedding, or it would be tied to it."""
    for path in paths:
        with path.open("r+b", buffering=0) as file:
            for start in (at for name, at in starts.items() if name.startswith("lm_head")):
                file.seek(start)
                file.write(b"\x80\x3f")


def _fill(paths: list[Path], seed: tuple[int, int], size: int) -> None:
    """Write one block of every role's shard; `seed` is the shard's number and the block's start."""
    source = np.random.PCG64(seed)
    words = -(-size // 8)

    def draw() -> npt.NDArray[np.uint16]:
        return source.random_raw(words).view(np.uint16)

    values = (draw() & _KEPT) | _SET
    for path in paths:
        with path.open("r+b", buffering=0) as file:
            file.seek(seed[1])
            file.write(values.tobytes()[:size])
        values = values ^ (draw() & _CHANGED)
