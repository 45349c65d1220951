"""What a LoRA adapter says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.diffs.delta.right_base import is_resized, stated_base

if TYPE_CHECKING:
    from diffxfer.checkpoints.adapters.adapter import Adapter


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """The description of a LoRA adapter.

    Attributes:
        base: the model that it was made for, as its config names it; empty if it does not.
        modules: number of modules with factors.
        ranks: their ranks, each once, ascending.
        scalings: the factors of B·A, each once, ascending: alpha / rank, or alpha / √rank.
        alpha: the alpha of modules that no pattern matches.
        dora: whether it is a DoRA.
        targets: the last parts of the modules' names, each once, sorted.
        whole: tensors that it stores whole, sorted.
        token_rows: number of rows of tokens that it replaces.
        embedding_rows: rows of the embedding of base that it stores beside its factors; 0 if it
            stores none.
        resized: whether that embedding has other rows than base's, since tokens were added; None
            if it stores one and base is not on this machine.
    """

    base: str
    modules: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    alpha: float
    dora: bool
    targets: tuple[str, ...]
    whole: tuple[str, ...]
    token_rows: int
    embedding_rows: int
    resized: bool | None

    @property
    def needs_base(self) -> bool:
        """Whether its Δ depends on its base, so that `apply` does not suffice."""
        return self.dora or bool(self.whole) or self.token_rows > 0 or bool(self.resized)


def adapter_facts(adapter: Adapter) -> AdapterFacts:
    """Describe a LoRA adapter.

    Args:
        adapter: the adapter.
    """
    config, modules = adapter.config, sorted(adapter.factors)
    return AdapterFacts(
        base=config.base,
        modules=len(modules),
        ranks=tuple(sorted({config.rank_of(module) for module in modules})),
        scalings=tuple(sorted({config.scaling_of(module) for module in modules})),
        alpha=config.alpha,
        dora=config.dora,
        targets=tuple(sorted({module.rpartition(".")[2] for module in modules})),
        whole=tuple(sorted(adapter.whole)),
        token_rows=sum(spec.shape[0] for spec in adapter.rows.values()),
        embedding_rows=max((spec.shape[0] for spec in adapter.copies.values()), default=0),
        resized=_is_resized(adapter),
    )


def _is_resized(adapter: Adapter) -> bool | None:
    """Whether an embedding that the adapter stores has another size than base's."""
    if not adapter.copies:
        return False
    base = stated_base(adapter.config.base)
    if base is None:
        return None
    return is_resized(adapter, base)
