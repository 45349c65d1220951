"""How small and how quick stored fine-tunes are: plain, packed, and by other packages.

The models are bfloat16: the shipped family, and two synthetic fine-tunes, a light and a heavy one.
`zipnn`, `lmzip` and `deltatensors` are measured on the same work if they are installed:

    $ pip install --no-deps zipnn lmzip deltatensors
    $ python examples/packed_sizes.py

Times are of one thread's processor, the least of several runs; speeds count the bytes of the
bfloat16 model. Everything stored is read back, and compared with the fine-tune bit for bit.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from packed_ways import Model, ways
from safetensors.torch import save_file

from diffxfer.family import family_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from packed_ways import Way

UPDATES = {"light": 1e-5, "heavy": 5e-4}
"""The standard deviation of each synthetic update; base's weights have 0.02."""
_MATRICES, _WIDTH = 4, 2048


def synthetic(folder: Path, name: str, elements: int) -> Model:
    """Write a base of random weights, and a fine-tune that moved each a little."""
    random = torch.Generator().manual_seed(7)
    shape = -(-elements // (_MATRICES * _WIDTH)), _WIDTH
    roles: dict[str, dict[str, torch.Tensor]] = {"base": {}, "finetuned": {}}
    for number in range(_MATRICES):
        tensor = f"model.layers.{number}.mlp.up_proj.weight"
        base = (torch.randn(shape, generator=random) * 0.02).bfloat16()
        update = torch.randn(shape, generator=random) * UPDATES[name]
        roles["base"][tensor] = base
        roles["finetuned"][tensor] = (base.float() + update).bfloat16()
    for role, tensors in roles.items():
        (folder / role).mkdir(parents=True)
        (folder / role / "config.json").write_text('{"model_type": "llama"}')
        save_file(tensors, folder / role / "model.safetensors")
    return Model(name, folder / "finetuned", folder / "base")


def entropy(model: Model) -> float:
    """Bits an element of the exact difference, if each value is coded by its frequency."""
    every = torch.cat([delta.reshape(-1) for delta in model.deltas.values()])
    share = np.unique(every.numpy(), return_counts=True)[1] / len(every)
    return float(-(share * np.log2(share)).sum())


def measure(way: Way, runs: int) -> tuple[int, float, float, int]:
    """Bytes stored, seconds to encode and to decode, and elements that did not come back."""
    size = way.encode()  # compiles and loads what it needs
    wrong = way.model.wrong(way.restore(way.decode()))
    return size, least(way.encode, runs), least(way.decode, runs), wrong


def least(work: Callable[[], object], runs: int) -> float:
    """The least processor time of several runs, with that of processes that they start."""
    taken = []
    for _ in range(runs):
        before = _processor_s()
        work()
        taken.append(_processor_s() - before)
    return min(taken)


def _processor_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _amount(wrong: int, elements: int) -> str:
    return f"{wrong / elements:.2%}" if wrong > elements / 10_000 else f"{wrong:,} element(s)"


def row(name: str, model: Model, ideal: float, found: tuple[int, float, float, int]) -> str:
    """A row of the table, in Markdown."""
    size, encoding_s, decoding_s, wrong = found
    bits, model_bytes = 8 * size / model.elements, 2 * model.elements
    cells: list[Any] = [
        *(model.name, name, f"{bits:.2f}", f"{bits / ideal - 1:+.1%}"),
        *(f"{size / model_bytes:.1%}", f"{model_bytes / encoding_s / 1e6:,.0f}"),
        f"{model_bytes / decoding_s / 1e6:,.0f}",
        "yes" if not wrong else f"no: {_amount(wrong, model.elements)}",
    ]
    return f"| {' | '.join(cells)} |"


def main(
    elements: Annotated[int, typer.Option(help="Elements of a synthetic model.")] = 1 << 24,
    runs: Annotated[int, typer.Option(help="Runs; the quickest counts.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where files go for a while.")] = None,
) -> None:
    """Print the table in Markdown."""
    torch.set_num_threads(1)
    print(
        "| fine-tune | stored by | bits an element | over entropy | % of the model"
        " | encoding, MB/s | decoding, MB/s | exact, or what differs |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with TemporaryDirectory(dir=folder) as scratch:
        shipped = family_folder()
        models = [Model("shipped", shipped / "finetuned", shipped / "base")]
        models += [synthetic(Path(scratch) / name, name, elements) for name in UPDATES]
        for model in models:
            ideal = entropy(model)
            print(f"| {model.name} | its entropy | {ideal:.2f} | | {ideal / 16:.1%} | | | |")
            for name, way in ways().items():
                with TemporaryDirectory(dir=scratch) as place:
                    print(
                        row(name, model, ideal, measure(way(model, Path(place)), runs)), flush=True
                    )


if __name__ == "__main__":
    typer.run(main)
