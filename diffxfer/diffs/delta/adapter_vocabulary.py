"""What an adapter does to embeddings and heads: rows of tokens, and a head that is tied no more."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.adapter import odd
from diffxfer.checkpoints.adapters.config import ADAPTER_CONFIG
from diffxfer.checkpoints.encodings.adapted import ReplacedRows
from diffxfer.diffs.matching.names import is_head
from diffxfer.diffs.matching.ties import HeadState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diffxfer.checkpoints.adapters.adapter import Adapter
    from diffxfer.checkpoints.stored import StoredTensor, TensorSpec
    from diffxfer.diffs.matching.ties import Head
    from diffxfer.errors import CheckpointError


def separate_head(
    adapter: Adapter,
    base: Mapping[str, StoredTensor],
    tensors: Mapping[str, StoredTensor],
    names: Mapping[str, str],
    head: Head,
) -> StoredTensor | None:
    """The head of a base that ties it, if the adapter trained the embedding alone.

    PEFT trains a copy of an embedding in ``modules_to_save``, and the head keeps base's values,
    unless ``ensure_weight_tying`` is set. Its merge writes both, and says that they are not tied.

    Args:
        adapter: the adapter.
        base: base's tensors.
        tensors: the adapted tensors so far.
        names: base's name of each tensor that the adapter changes.
        head: base's head.

    Returns:
        Base's embedding under the name of the head; None if the head is none of its own.
    """
    embedding = head.embedding
    if embedding is None or head.state is not HeadState.TIED or any(map(is_head, tensors)):
        return None
    saved = [
        name
        for name in adapter.whole
        if names.get(name, name) == embedding and adapter.config.saves(name.removesuffix(".weight"))
    ]
    # The head of an embedding that was resized has more rows than base's, and is stored itself.
    if not saved or adapter.config.ties or tensors[embedding].shape != base[embedding].shape:
        return None
    return replace(base[embedding], name="lm_head.weight")


def replace_rows(
    adapter: Adapter,
    module: str,
    spec: TensorSpec,
    weight: StoredTensor,
    unfit: Callable[[TensorSpec, str], CheckpointError],
) -> StoredTensor:
    """A tensor with the trained rows of an adapter's tokens.

    Args:
        adapter: the adapter.
        module: the module of the rows.
        spec: the rows, in the order of the config's ids.
        weight: the tensor.
        unfit: makes the error for a tensor of the adapter that does not fit base.

    Raises:
        CheckpointError: if the rows do not fit the ids or the tensor.
    """
    name, found = weight.name, adapter.config.token_indices
    keys = [key for key in found if key and (module == key or module.endswith(f".{key}"))]
    indices = found.get(keys[0] if keys else "", ())
    expected = (len(indices), *weight.shape[1:])
    if len(set(indices)) != len(indices):
        problem = f"has two rows for one token of trainable_token_indices in {ADAPTER_CONFIG}"
        raise odd(adapter.place, spec.name, problem)
    if spec.shape != expected:
        problem = f"has the shape {spec.shape}, expected {expected} for the trained tokens"
        raise odd(adapter.place, spec.name, problem)
    if indices and max(indices) >= weight.shape[0]:
        problem = f"has a row for token {max(indices)}, and {name} has {weight.shape[0]} rows"
        raise unfit(spec, problem)
    order = tuple(sorted(range(len(indices)), key=indices.__getitem__))
    dtype = "F64" if "F64" in (spec.dtype, weight.dtype) else "F32"
    ordered = tuple(indices[i] for i in order)
    return ReplacedRows(name, dtype, weight.shape, weight.shard, weight, spec, ordered, order)
