"""Warnings of adapters that are sound, but most likely not what their user thinks they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.checkpoints.header import short
from diffxfer.checkpoints.values import elements, in_float64

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffxfer.checkpoints.adapters.adapter import Adapter, Factors
    from diffxfer.checkpoints.stored import Files, TensorSpec

_BLOCK = 1 << 17


def warnings_of_adapter(adapter: Adapter) -> list[str]:
    """Warn of an adapter that was not trained, and of ranks larger than full rank.

    Of a trained adapter, the values of one factor are read as a rule.

    Args:
        adapter: the adapter, its file on this machine.

    Raises:
        CheckpointError: if it cannot be read, or has changed.
    """
    warnings = []
    others = adapter.whole or adapter.rows or adapter.config.dora
    if not others and not _is_trained(adapter):
        warnings.append(
            "B·A is zero in every module of the adapter: it was not trained, and changes nothing"
        )
    large = list(_too_large(adapter))
    if large:
        module, rank, full = large[0]
        more = f" ({len(large):,} such modules)" if len(large) > 1 else ""
        warnings.append(
            f"the rank of {short(module)} is {rank:,}, and its full rank is {full:,}{more}: the"
            " adapter is larger than it has to be; diffxfer extract --as lora makes a smaller one"
        )
    return warnings


def _every_factors(adapter: Adapter) -> Iterator[Factors]:
    return (factors for found in adapter.factors.values() for factors in found)


def _is_trained(adapter: Adapter) -> bool:
    """Whether a product of factors, or a bias, is not zero."""
    files = one_at_a_time()
    for factors in _every_factors(adapter):
        # PEFT starts an embedding's lora_embedding_A at zero, and lora_B elsewhere.
        started = factors.a if factors.of_embedding else factors.b
        for spec in (started, factors.bias):
            if spec is not None and _has_values(spec, files):
                return True
    return False


def _has_values(spec: TensorSpec, files: Files) -> bool:
    """Whether an element is not zero; stops at the first block that has one."""
    for start in range(0, spec.elements, _BLOCK):
        data = files.read(spec, start, min(_BLOCK, spec.elements - start))
        if in_float64(elements(data, spec.dtype), spec.dtype).any():
            return True
    return False


def _too_large(adapter: Adapter) -> Iterator[tuple[str, int, int]]:
    """Modules with a larger rank than their matrix can have, their rank, and full rank."""
    for factors in _every_factors(adapter):
        assert factors.a is not None
        assert factors.b is not None
        # The factors of fused experts are stacked: their rank is only in the config.
        rank = min(factors.a.shape[0], adapter.config.rank_of(factors.module))
        full = min(math.prod(factors.a.shape[1:]), factors.b.shape[0])
        if rank > full:
            yield factors.module, rank, full
