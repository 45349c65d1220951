"""Buffers: stored tensors that are not weights, because no gradient changes them.

Examples are rotary frequencies, causal masks, position ids, and the counters and statistics of
BatchNorm. Some versions of a library store them and others do not. Their values follow from the
config or from the training data. A graft keeps the target's.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from diffxfer.checkpoints.stored import FLOATS

if TYPE_CHECKING:
    from diffxfer.checkpoints.stored import StoredTensor

_ENDS = (
    *("freq", "cached", "freqs", "bias", "running_mean", "running_var", "tracked", "n_averaged"),
    *("ids", "index", "mask"),
)
"""The endings of all buffer names: a fast test, since most tensors are not buffers."""
_NAMES = re.compile(
    r"(?:^|\.)(?:inv_freq|original_inv_freq|cos_cached|sin_cached|rope\.freqs|masked_bias"
    r"|running_mean|running_var|num_batches_tracked|n_averaged)$"
)
# Trained position embeddings have the same names, but are floats.
_INTEGER_NAMES = re.compile(
    r"(?:^|\.)(?:position_ids|token_type_ids|relative_position_index|num_batches_tracked)$"
)
_MASKS = re.compile(
    r"(?:^|\.)(?:attn|attention|self_attn|self_attention)\.(?:bias|mask|attn_mask)$"
    r"|(?:^|\.)causal_mask$"
)


def is_buffer(name: str, spec: StoredTensor) -> bool:
    """Whether a tensor is a buffer, by its name, its dtype and its shape.

    Args:
        name: its name, without wrappers.
        spec: its dtype and shape.
    """
    if not name.endswith(_ENDS):
        return False
    if _NAMES.search(name):
        return True
    if _INTEGER_NAMES.search(name):
        return spec.dtype not in FLOATS
    return _MASKS.search(name) is not None and _is_mask(spec)


def _is_mask(spec: StoredTensor) -> bool:
    """Whether the shape is ``(1, 1, length, length)``, or ``(length, length)`` without floats.

    A trained attention bias has one dimension, or is not square.
    """
    shape = spec.shape
    if len(shape) == 4:
        return shape[:2] == (1, 1) and shape[2] == shape[3]
    return len(shape) == 2 and shape[0] == shape[1] and spec.dtype not in FLOATS
