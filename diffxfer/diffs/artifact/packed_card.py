"""How the card says that packed tensors are read without diffxfer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffxfer.diffs.artifact.manifest import Manifest

_PACKED = """\
## Reading it without diffxfer

The tensors are exact, and packed: each one is a U8 tensor under its name, compressed by zstd in
blocks of 262,144 elements; its shape is in `diffxfer.json`. This fills an array of zeros of that
shape, `out`, with the tensor whose bytes are `raw`:

```python
import numpy as np, zstandard
def unpack(raw, out):
    at, w = 16 + -(-out.size // 2**18) * 4, np.lib.stride_tricks.sliding_window_view(raw, 8)
    for k, size in enumerate(raw[16:at].view("<u4").tolist()):
        p, d, q, at = out.reshape(-1)[k << 18 :][: 2**18], raw[at:][:size], 8 * at + 40, at + size
        x = np.frombuffer(zstandard.decompress(d[5 + d[1:5].view("<u4")[0] :].tobytes()), "u1")
        if d[0]&3 > 2: p[:] = x.reshape(-1, p.size).T.copy().view(f"f{len(x)//p.size}").T; continue
        g, n, L = x[-1536:].view("<i2").reshape(3, -1)[:, x[-(-p.size // 8) : -1536]].astype("i8")
        v = w[(q := L.cumsum() - L + q) // 8].view("<i8")[:, 0] >> q % 8 & (1 << L) - 1
        p[np.unpackbits(x, count=p.size) > 0] = np.ldexp((v | 1 | 1 << n) * (1 - v % 2 * 2.0), g)
```

`safetensors.numpy.load_file` gives the bytes. float64 holds every value exactly; so does the dtype
in `diffxfer.json`. Tensors without a shape there are stored as they are. Elements of the fine-tune
that base + difference does not give back, such as −0.0 from 1.0, are listed at the end of a block;
`diffxfer apply` on the base puts them in.
"""

_LOSSY = """\
## Reading it without diffxfer

The tensors are rounded to {form}, with a scale for each row, and packed: each one is a U8 tensor
under its name, compressed by zstd in blocks of 262,144 elements; its shape is in `diffxfer.json`.
This fills an array of zeros of that shape, `out`, with the tensor whose bytes are `raw`:

```python
import numpy as np, zstandard
def unpack(raw, out):
    flat, w, at = out.reshape(-1), (1, *out.shape)[-1], 16 + -(-out.size // 2**18) * 4
    for k, size in enumerate(raw[16:at].view("<u4").tolist()):
        p, data, at = flat[k << 18 :][: 2**18], raw[at : at + size].tobytes(), at + size
        x = np.frombuffer(zstandard.decompress(data[5:]), "u1")
        if data[0] & 127 == 3: p[:] = x.reshape(8, -1).T.copy().view("<f8")[:, 0]; continue
        row = ((k << 18) % w + np.arange(len(p))) // w
        s, q = np.split(x, [2 * row[-1] + 2]){unpacked}
        p[:] = (q - {zero}) * (s.view("<u2").astype("u4") << 16).view("f4")[row]
```

`safetensors.numpy.load_file` gives the bytes. float64 holds every value exactly; so does the dtype
in `diffxfer.json`. Tensors without a shape there are stored as they are.

‖stored Δ − Δ‖ is {error} of ‖Δ‖, and at most {worst}, in {tensor}. `diffxfer.json` has
`error_norm`, ‖stored Δ − Δ‖, of every rounded tensor; the others, such as vectors, are exact.
"""
_CODES = {
    "int8": {"unpacked": "", "zero": "128.0"},
    "int4": {"unpacked": "; q = np.c_[q & 15, q >> 4].ravel()[: len(p)]", "zero": "8.0"},
}


def how_to_read(manifest: Manifest) -> str:
    """How the tensors of a folder are read without diffxfer; empty if they are plain.

    Args:
        manifest: its manifest.
    """
    if manifest.lossy is None:
        return "" if manifest.packing is None else _PACKED
    lost = manifest.lossy
    return _LOSSY.format(
        form=lost.form,
        **_CODES[lost.form],
        error=f"{lost.error:.2%}",
        worst=f"{lost.worst:.2%}",
        tensor=plain(lost.worst_tensor),
    )


def plain(text: str) -> str:
    """Escape text so that neither Markdown nor a terminal interprets it.

    Args:
        text: any text.
    """
    printable = "".join(char if char.isprintable() else "?" for char in text)
    for char in "\\`*_[]<>|":
        printable = printable.replace(char, "\\" + char)
    return printable
