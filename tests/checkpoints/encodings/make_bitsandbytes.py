"""Make `bitsandbytes.safetensors`: tensors of bitsandbytes, and digests of what it decodes.

    python -m tests.checkpoints.encodings.make_bitsandbytes

The library is not needed to run the tests: if it is installed, peft imports it, which takes every
process two seconds. The file was made by bitsandbytes 0.50.2 on a CPU.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file

FILE = Path(__file__).with_name("bitsandbytes.safetensors")
SHAPES = {False: (37, 35), True: (150, 131)}
"""With double quantisation there are more than 256 blocks of 64, so that two share a scale."""


def digest(values: torch.Tensor) -> str:
    """The SHA-256 of values in float32."""
    return hashlib.sha256(values.float().contiguous().numpy().tobytes()).hexdigest()


def main() -> None:
    import bitsandbytes.functional as bnb

    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    digests: dict[str, str] = {}
    for kind in ("nf4", "fp4"):
        for double, shape in SHAPES.items():
            values = torch.randn(shape, generator=generator) * 0.02
            values.view(-1)[64:128] = 0  # a block whose scale is zero
            codes, state = bnb.quantize_4bit(
                values, blocksize=64, quant_type=kind, compress_statistics=double
            )
            name = f"{kind}{'_double' if double else ''}.weight"
            tensors[name] = codes
            parts = state.as_dict(packed=True)
            tensors |= {f"{name}.{part}": tensor.clone() for part, tensor in parts.items()}
            digests[name] = digest(bnb.dequantize_4bit(codes, state))
    values = torch.randn(30, 45, generator=generator).half()
    values[7] = 0
    codes, scales, _ = bnb.int8_vectorwise_quant(values)
    tensors |= {"int8.weight": codes, "int8.SCB": scales}
    tensors["int8.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    digests["int8.weight"] = digest(bnb.int8_vectorwise_dequant(codes, scales))
    save_file(tensors, FILE, metadata=digests)


if __name__ == "__main__":
    main()
