"""The options of an adapter, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.diffs.lora.parts import check_rest
from diffxfer.errors import OptionError

if TYPE_CHECKING:
    from diffxfer.diffs.lora.factorise import Ranks
    from diffxfer.streaming.distribute import Cluster

FORMS = ("diff", "lora")
_RANK, _MOST = 32, 128
"""The rank if no option says one, and the largest for ``--energy``."""


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """What an adapter is like.

    Attributes:
        ranks: how ranks are chosen.
        rest: what to do with tensors other than the weights of linear layers.
        exact: whether factors are computed to the last digits.
        diff_dtype: the dtype as the user gave it.
        dtype: of the adapter, as safetensors names it; None for finetuned's own dtypes.
    """

    ranks: Ranks
    rest: str
    exact: bool
    diff_dtype: str
    dtype: str | None

    def command(self) -> dict[str, str | float | list[str] | dict[str, float]]:
        """The options for the manifest."""
        ranks: dict[str, str | float | list[str] | dict[str, float]] = (
            {"rank": self.ranks.most}
            if self.ranks.energy is None
            else {"energy": self.ranks.energy, "max_rank": self.ranks.most}
        )
        return {"as": "lora", **ranks, "rest": self.rest, "exact": str(self.exact).lower()}


def check_form(as_: str) -> None:
    """Refuse an unknown value of ``--as``.

    Raises:
        OptionError: if it is unknown.
    """
    if as_ not in FORMS:
        raise OptionError("--as", f"{as_!r} is unknown", f"use one of {', '.join(FORMS)}")


def refuse_cluster(cluster: Cluster | None) -> None:
    """Refuse a cluster for factors, which are computed in this process.

    Args:
        cluster: where the work is to be done; None for this process.

    Raises:
        OptionError: if there is one.
    """
    if cluster is not None:
        problem = "has no use here: an adapter's factors are computed on this machine"
        raise OptionError("--ray", problem, "leave it out")


def check_apply_as(as_: str, diff: str, *, is_adapter: bool) -> bool:
    """Check the value of ``--as`` of `apply_diff`.

    Args:
        as_: the value.
        diff: the diff vector or the adapter, for messages.
        is_adapter: whether it is an adapter.

    Returns:
        Whether an adapter is to be written.

    Raises:
        OptionError: if the value is unknown, or does not fit.
    """
    if as_ not in ("model", "lora"):
        raise OptionError("--as", f"{as_!r} is unknown", "use one of model, lora")
    if as_ == "lora" and not is_adapter:
        problem = f"lora moves an adapter, and {diff} is a diff vector"
        raise OptionError("--as", problem, "make one: diffxfer extract FINETUNED BASE --as lora")
    return as_ == "lora"


def check_lora_options(
    as_: str,
    *,
    rank: int | None,
    energy: float | None,
    max_rank: int | None,
    rest: str,
    exact: bool,
    diff_dtype: str,
    dtype: str | None,
    max_shard_size: str | None,
) -> LoraOptions | None:
    """Check the options of an adapter.

    Args:
        as_: ``"diff"`` or ``"lora"``.
        rank: the rank of every matrix.
        energy: the share of the energy that decides ranks.
        max_rank: the largest rank then.
        rest: what to do with other tensors.
        exact: whether factors are computed to the last digits.
        diff_dtype: the dtype as the user gave it.
        dtype: the same as safetensors names it.
        max_shard_size: the largest shard, which an adapter does not have.

    Returns:
        The options; None for a diff vector.

    Raises:
        OptionError: if an option is invalid, or does not fit another.
    """
    check_form(as_)
    check_rest(rest)
    if as_ != "lora":
        _refuse_alone(rank=rank, energy=energy, max_rank=max_rank, rest=rest, exact=exact)
        return None
    for option, value in (("--rank", rank), ("--max-rank", max_rank)):
        if value is not None and value < 1:
            raise OptionError(option, f"{value} is no rank", "give a number from 1, such as 32")
    if energy is not None and not 0 < energy <= 1:
        raise OptionError("--energy", f"{energy} is no share", "give one such as 0.95")
    if rank is not None and energy is not None:
        raise OptionError("--rank", "contradicts --energy, which chooses ranks", "give one of them")
    if max_rank is not None and energy is None:
        raise OptionError("--max-rank", "needs --energy", "give --rank for a fixed rank")
    if max_shard_size is not None:
        raise OptionError(
            "--max-shard-size", "has no effect on an adapter: one file", "leave it out"
        )
    from diffxfer.diffs.lora.factorise import Ranks

    ranks = Ranks(rank or _RANK) if energy is None else Ranks(max_rank or _MOST, energy)
    return LoraOptions(ranks, rest, exact, diff_dtype, dtype)


def _refuse_alone(
    *, rank: int | None, energy: float | None, max_rank: int | None, rest: str, exact: bool
) -> None:
    given = {
        "--rank": rank is not None,
        "--energy": energy is not None,
        "--max-rank": max_rank is not None,
        "--rest": rest != "modules_to_save",
        "--exact": exact,
    }
    for option, is_given in given.items():
        if is_given:
            raise OptionError(option, "belongs to an adapter", "give --as lora too")
