"""Ways to store a fine-tune whose base is known: diffxfer's and other packages'.

A way has the bytes that it stores in `encode`, and `decode` gives them back; what is not part of
the work, such as adding a difference to base in memory, is in `restore`.
"""

from __future__ import annotations

import contextlib
import io
from abc import ABC, abstractmethod
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from diffxfer import apply_diff, extract_diff
from diffxfer.checkpoints.encodings.packing import BLOCK, BlockEncoder, decode

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray


class Model:
    """A fine-tune and its base, bfloat16.

    Args:
        name: what to call it.
        finetuned: the fine-tune's folder.
        base: base's folder.

    Attributes:
        ours: the values of the fine-tune's tensors.
        theirs: base's.
        deltas: their exact differences, in float64.
    """

    def __init__(self, name: str, finetuned: Path, base: Path) -> None:
        self.name, self.finetuned, self.base = name, finetuned, base
        self.ours, self.theirs = (
            load_file(folder / "model.safetensors") for folder in (finetuned, base)
        )
        self.deltas = {k: v.double() - self.theirs[k].double() for k, v in self.ours.items()}

    @property
    def singles(self) -> dict[str, torch.Tensor]:
        """The differences in float32: nearly all are exact."""
        return {name: delta.float() for name, delta in self.deltas.items()}

    @property
    def elements(self) -> int:
        """The number of elements."""
        return sum(tensor.numel() for tensor in self.ours.values())

    def restored(self, deltas: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Base with differences added, in bfloat16."""
        return {k: (v.double() + deltas[k].double()).bfloat16() for k, v in self.theirs.items()}

    def wrong(self, back: Mapping[str, torch.Tensor]) -> int:
        """The number of elements that are not the fine-tune's, bit for bit."""
        pairs = [(back[k].reshape(v.shape), v) for k, v in self.ours.items()]
        return sum(int((bits(a) != bits(b)).sum()) for a, b in pairs)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a bfloat16 tensor."""
    assert tensor.dtype == torch.bfloat16
    return tensor.view(torch.int16)


class Way(ABC):
    """A way to store a fine-tune.

    Args:
        model: the fine-tune.
        scratch: an empty folder.
    """

    def __init__(self, model: Model, scratch: Path) -> None:
        self.model, self.scratch = model, scratch

    @abstractmethod
    def encode(self) -> int:
        """Store it; returns the number of bytes."""

    @abstractmethod
    def decode(self) -> Any:
        """Read what was stored last."""

    @abstractmethod
    def restore(self, decoded: Any) -> Mapping[str, torch.Tensor]:
        """The tensors that `decode` gives back."""

    def fresh(self, name: str) -> Path:
        """A path in the scratch folder where nothing is."""
        taken = sum(path.name.startswith(name) for path in self.scratch.iterdir())
        return self.scratch / f"{name}{taken}"


class Extracted(Way):
    """`extract` and `apply`, as library calls from folder to folder."""

    options: Mapping[str, Any] = {}

    def encode(self) -> int:
        """Extract the difference."""
        self.diff = self.fresh("diff")
        extract_diff(self.model.finetuned, self.model.base, self.diff, threads=1, **self.options)
        return sum(path.stat().st_size for path in self.diff.glob("model*.safetensors"))

    def decode(self) -> Path:
        """Apply it to base."""
        back = self.fresh("back")
        apply_diff(self.diff, self.model.base, back, threads=1)
        return back

    def restore(self, decoded: Path) -> Mapping[str, torch.Tensor]:
        """The graft's tensors."""
        return load_file(decoded / "model.safetensors")


class Packed(Extracted):
    """The same with `--pack`."""

    options = {"pack": True}  # noqa: RUF012 as in the class above


class Blocks(Way):
    """The coding of `--pack` alone: blocks of Δ in memory."""

    def __init__(self, model: Model, scratch: Path) -> None:
        super().__init__(model, scratch)
        self.blocks = []
        for delta in model.deltas.values():
            flat = delta.reshape(-1)
            for at in range(0, len(flat), BLOCK):
                block = flat[at : at + BLOCK]
                single = block.float()
                is_exact = torch.equal(single.double(), block)
                self.blocks.append((single if is_exact else block).numpy())
        self.coder = BlockEncoder(1)

    def encode(self) -> int:
        """Code every block."""
        self.coded = [self.coder.encode(block) for block in self.blocks]
        return sum(map(len, self.coded))

    def decode(self) -> list[NDArray[Any]]:
        """Decode every block."""
        counts = map(len, self.blocks)
        return [decode(memoryview(c), n) for c, n in zip(self.coded, counts, strict=True)]

    def restore(self, decoded: list[NDArray[Any]]) -> Mapping[str, torch.Tensor]:
        """Base with the differences added."""
        return self.model.restored(split(np.concatenate(decoded), self.model))


class ZipNN(Way):
    """`zipnn`: the bytes of Δ in float32, in memory."""

    def __init__(self, model: Model, scratch: Path) -> None:
        super().__init__(model, scratch)
        self.coder = import_module("zipnn").ZipNN(bytearray_dtype="float32", threads=1)
        self.data = joined(model.singles)

    def encode(self) -> int:
        """Compress a copy, since it works in place."""
        self.coded = self.coder.compress(bytes(self.data))
        return len(self.coded)

    def decode(self) -> bytes:
        """Decompress."""
        return bytes(self.coder.decompress(self.coded))

    def restore(self, decoded: bytes) -> Mapping[str, torch.Tensor]:
        """Base with the differences added."""
        return self.model.restored(split(np.frombuffer(decoded, np.float32), self.model))


class ZipNNDelta(Way):
    """`zipnn` with its delta compression: the fine-tune's bytes XOR base's, in memory."""

    def __init__(self, model: Model, scratch: Path) -> None:
        super().__init__(model, scratch)
        options = {"bytearray_dtype": "bfloat16", "threads": 1, "delta_compressed_type": "byte"}
        self.coder = import_module("zipnn").ZipNN(**options)
        self.pair = joined(model.ours), joined(model.theirs)

    def encode(self) -> int:
        """Compress a copy, since it works in place."""
        self.coded = self.coder.compress(bytes(self.pair[0]), delta_second_data=self.pair[1])
        return len(self.coded)

    def decode(self) -> bytes:
        """Decompress."""
        return bytes(self.coder.decompress(self.coded, delta_second_data=self.pair[1]))

    def restore(self, decoded: bytes) -> Mapping[str, torch.Tensor]:
        """The tensors whose bytes these are."""
        return split(np.frombuffer(decoded, np.int16), self.model, torch.bfloat16)


class LmZip(Way):
    """`lmzip`: a safetensors file of Δ in float32, from file to file."""

    def __init__(self, model: Model, scratch: Path) -> None:
        super().__init__(model, scratch)
        self.lmz = import_module("lmz")
        self.plain = scratch / "delta.safetensors"
        save_file(model.singles, self.plain)

    def encode(self) -> int:
        """Compress the file."""
        self.archive = self.fresh("archive")
        self.lmz.compress(str(self.plain), str(self.archive), workers=1)
        return self.archive.stat().st_size

    def decode(self) -> Path:
        """Decompress it."""
        back = self.fresh("back")
        self.lmz.decompress(str(self.archive), str(back), workers=1)
        return back

    def restore(self, decoded: Path) -> Mapping[str, torch.Tensor]:
        """Base with the differences added."""
        return self.model.restored(load_file(decoded))


class LmZipBeside(Way):
    """`lmzip`: the fine-tune appended to an archive of base, which codes what differs."""

    def __init__(self, model: Model, scratch: Path) -> None:
        super().__init__(model, scratch)
        self.lmz = import_module("lmz")
        self.first = scratch / "base.lmz"
        self.lmz.compress(str(model.base / "model.safetensors"), str(self.first), workers=1)
        self.plain = scratch / "finetuned.safetensors"
        self.plain.write_bytes((model.finetuned / "model.safetensors").read_bytes())

    def encode(self) -> int:
        """Append the fine-tune; what the archive grows by is what it takes."""
        self.archive = self.fresh("archive")
        self.archive.write_bytes(self.first.read_bytes())
        self.lmz.append(str(self.archive), str(self.plain), workers=1)
        return self.archive.stat().st_size - self.first.stat().st_size

    def decode(self) -> Path:
        """Extract the fine-tune."""
        back = self.fresh("back")
        self.lmz.extract(str(self.archive), self.plain.name, str(back), workers=1)
        return back

    def restore(self, decoded: Path) -> Mapping[str, torch.Tensor]:
        """The fine-tune's tensors."""
        return load_file(decoded)


class DeltaTensors(Way):
    """`deltatensors` with its default of 4 bits, from tensors in memory to a file and back."""

    def __init__(self, model: Model, scratch: Path) -> None:
        super().__init__(model, scratch)
        self.package = import_module("deltatensors")
        self.pair = [
            {k: v.float().numpy() for k, v in m.items()} for m in (model.ours, model.theirs)
        ]

    def encode(self) -> int:
        """Save the difference."""
        self.file = self.fresh("delta")
        with contextlib.redirect_stdout(io.StringIO()):
            self.package.save_delta(self.file, *self.pair, strategy="int4")
        return self.file.stat().st_size

    def decode(self) -> Any:
        """Load it with base."""
        with contextlib.redirect_stdout(io.StringIO()):
            return self.package.load_delta(self.file, self.pair[1])

    def restore(self, decoded: Any) -> Mapping[str, torch.Tensor]:
        """The tensors, rounded to bfloat16."""
        return {k: torch.as_tensor(v).bfloat16() for k, v in decoded.items()}


def joined(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of all tensors."""
    return b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors.values())


def split(
    values: NDArray[Any], model: Model, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """All elements of a model, as tensors; their bits may be those of another dtype."""
    whole, found, at = torch.from_numpy(values.copy()), {}, 0
    for name, tensor in model.ours.items():
        part = whole[at : at + tensor.numel()]
        found[name] = (part if dtype is None else part.view(dtype)).reshape(tensor.shape)
        at += tensor.numel()
    return found


def ways() -> dict[str, type[Way]]:
    """Every way that can be measured here, by what the table calls it."""
    found: dict[str, type[Way]] = {
        "diffxfer extract": Extracted,
        "diffxfer extract --pack": Packed,
        "its coding alone, in memory": Blocks,
    }
    peers: dict[str, dict[str, type[Way]]] = {
        "zipnn": {"Δ in float32": ZipNN, "XOR with base": ZipNNDelta},
        "lmzip": {"Δ in float32": LmZip, "beside base": LmZipBeside},
        "deltatensors": {"int4": DeltaTensors},
    }
    modules = {"lmzip": "lmz"}
    for package, kinds in peers.items():
        if find_spec(modules.get(package, package)):
            name = f"{package} {version(package)}"
            found |= {f"{name}, {kind}": way for kind, way in kinds.items()}
    return found
