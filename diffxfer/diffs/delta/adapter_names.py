"""Base's names of the tensors that an adapter changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.diffs.delta.loaded_names import LoadedNames, Stacked, loaded_names, may_differ
from diffxfer.diffs.matching.names import pair_names
from diffxfer.diffs.matching.ties import Head, HeadState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from diffxfer.checkpoints.adapters.adapter import Adapter
    from diffxfer.checkpoints.reader import Checkpoint


@dataclass(frozen=True, slots=True)
class AdapterNames:
    """Base's names of the tensors that an adapter changes.

    Attributes:
        names: base's name by the adapter's.
        stacked: the parameters of the adapter that base stores expert by expert, by name.
        unknown: whether base's names change when transformers loads it, and it is not known how.
    """

    names: Mapping[str, str]
    stacked: Mapping[str, Stacked]
    unknown: bool = False

    def stacked_in(self, module: str, parameters: Iterable[str]) -> dict[str, Stacked]:
        """The parameters of a module that base stores expert by expert.

        Args:
            module: the module.
            parameters: parameters that the adapter's config names.
        """
        leaves = [f"{module}.{parameter.rpartition('.')[2]}" for parameter in parameters]
        return {name: self.stacked[name] for name in leaves if name in self.stacked}


def find_names(adapter: Adapter, base: Checkpoint, head: Head) -> AdapterNames:
    """Pair the names of an adapter with those of its base.

    Args:
        adapter: the adapter.
        base: the model that it is applied to.
        head: base's head.

    Returns:
        The names.

    Raises:
        MatchError: if names can be paired in two ways.
    """
    wanted = dict.fromkeys((*_wanted(adapter), *adapter.whole))
    names = pair_names(wanted, _known(base, head), ("the adapter", base.role))
    if not _is_lacking(adapter, names) or not may_differ(base):
        return AdapterNames(names, {})
    loaded = loaded_names(base)
    if loaded is None:
        return AdapterNames(names, {}, unknown=True)
    names = {**_renamed(wanted, loaded), **names}
    stacked = {name: loaded.stacked[name] for name in wanted if name in loaded.stacked}
    return AdapterNames(names, stacked)


def _wanted(adapter: Adapter) -> list[str]:
    """The names of the tensors that an adapter may change, as it names them."""
    wanted = [f"{module}.{leaf}" for module in adapter.factors for leaf in ("weight", "bias")]
    wanted += [f"{module}.weight" for module in adapter.rows]
    leaves = dict.fromkeys(each.rpartition(".")[2] for each in adapter.config.parameters)
    return wanted + [f"{module}.{leaf}" for module in adapter.factors for leaf in leaves]


def _known(base: Checkpoint, head: Head) -> dict[str, None]:
    """Base's names, with the head that a tied embedding stands for."""
    names = dict.fromkeys(base.tensors)
    if head.state is HeadState.TIED and head.name is None:
        names["lm_head.weight"] = None
    return names


def _is_lacking(adapter: Adapter, names: Mapping[str, str]) -> bool:
    """Whether a module of the adapter has no name in base."""
    leaves = ["weight", *(each.rpartition(".")[2] for each in adapter.config.parameters)]
    return (
        any(not any(f"{m}.{leaf}" in names for leaf in leaves) for m in adapter.factors)
        or any(f"{module}.weight" not in names for module in adapter.rows)
        or any(name not in names for name in adapter.whole)
    )


def _renamed(wanted: Iterable[str], loaded: LoadedNames) -> dict[str, str]:
    on_disk = loaded.on_disk
    return {name: on_disk[name] for name in wanted if name in on_disk}
