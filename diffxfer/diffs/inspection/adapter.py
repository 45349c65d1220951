"""What a LoRA adapter says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    @property
    def needs_base(self) -> bool:
        """Whether its Δ depends on its base, so that `apply` does not suffice."""
        return self.dora or bool(self.whole) or self.token_rows > 0


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
    )
