"""Moving the rows of tokens in an adapter's factors to the places of the target's tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from diffxfer.checkpoints.encodings.adapted import in_float64
from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.diffs.companions.inherit import diff_companions, inherit_companions
from diffxfer.diffs.matching.names import is_known_vocabulary
from diffxfer.diffs.vocab.relate import relate_to_base, relate_to_target
from diffxfer.diffs.vocab.tokens import read_tokenizer
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffxfer.checkpoints.adapters.adapter import Adapter
    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.checkpoints.stored import TensorSpec
    from diffxfer.diffs.lora.factorise import Matrix
    from diffxfer.diffs.vocab.pair_target import TargetPairing


@dataclass(frozen=True, slots=True)
class TokenMove:
    """How the tokens of an adapter move.

    Attributes:
        target: the target's folder.
        pairing: how its tokens pair with the target's; None if nothing says so.
        modules: the modules whose rows move, with the rows of the target's tensor and whether they
            are columns of ``lora_embedding_A``, not rows of ``lora_B``.
        mode: how rows pair.
        warnings: what a user should know.
    """

    target: Path
    pairing: TargetPairing | None = None
    modules: Mapping[str, tuple[int, bool]] = field(default_factory=dict)
    mode: str = "rows"
    warnings: tuple[str, ...] = ()

    @property
    def dropped(self) -> tuple[str, ...]:
        """The tokens without a place in the target."""
        return self.pairing.dropped if self.pairing and self.modules else ()

    def values(self, module: str, spec: TensorSpec) -> Matrix | None:
        """A factor with its rows or columns moved; None if it stays as it is.

        Args:
            module: its module.
            spec: the factor.

        Raises:
            CheckpointError: if it cannot be read.
        """
        if module not in self.modules or self.pairing is None:
            return None
        rows, by_column = self.modules[module]
        is_a = spec.name.removesuffix(".weight").removesuffix(".default").endswith("_A")
        if by_column:
            return self._moved(spec, rows, 1) if is_a else None
        return None if is_a else self._moved(spec, rows, 0)  # lora_B, or its bias

    def _moved(self, spec: TensorSpec, rows: int, axis: int) -> Matrix:
        assert self.pairing is not None
        old = in_float64(one_at_a_time(), spec, 0, spec.elements).reshape(spec.shape)
        shape = list(spec.shape)
        shape[axis] = rows
        ids = self.pairing.finetuned_ids[:rows]
        places = np.flatnonzero((ids >= 0) & (ids < spec.shape[axis]))
        made = np.zeros(shape, np.float32)
        if axis:
            made[:, places] = old[:, ids[places]]
        else:
            made[places] = old[ids[places]]
        return made

    def companions(self, behaviour: Path, *, has_own: bool) -> dict[str, bytes | Path]:
        """The companions of the moved adapter.

        Args:
            behaviour: the adapter's companions over the target's.
            has_own: whether the adapter has a tokenizer or a chat template.

        Raises:
            CompanionError: if one is unsafe or broken.
        """
        if not has_own:
            return {}
        if self.pairing is None or self.pairing.in_place:
            files = dict(diff_companions(behaviour).files)
        else:
            pairing = self.pairing
            made = inherit_companions(
                self.target,
                behaviour,
                translate=pairing.translate,
                additions=pairing.names,
                added_source=pairing.additions,
                renamed=pairing.renamed,
                vocab_size=None,
                dtype=None,
            )
            files = {name: file for name, file in made.files.items() if not name.endswith(".py")}
        return {name: file for name, file in files.items() if name != "config.json"}


def move_tokens(adapter: Adapter, target: Checkpoint, mode: str) -> TokenMove:
    """Find how the tokens of an adapter move to the target's.

    Args:
        adapter: the adapter; its own tokenizer is that of its base.
        target: the target.
        mode: ``"auto"``, ``"ids"`` or ``"tokens"``.

    Raises:
        VocabularyError: if tokens cannot be paired.
        CheckpointError: if a factor of a vocabulary tensor does not fit the target's.
    """
    sizes = _sizes(adapter, target)
    ours = read_tokenizer(adapter.place.folder)
    if ours is None or not sizes:
        return TokenMove(target.folder)
    same_rows = all(rows == others for rows, others, _ in sizes.values())
    vocabulary = relate_to_base(ours, ours, "ids", same_rows=True)
    theirs = read_tokenizer(target.folder)
    pairing, warnings = relate_to_target(vocabulary, theirs, mode, same_rows=same_rows)
    if pairing is None or (same_rows and pairing.in_place):
        return TokenMove(target.folder, pairing, {}, "ids" if pairing else "rows", warnings)
    modules = {name: (others, by_column) for name, (_, others, by_column) in sizes.items()}
    return TokenMove(target.folder, pairing, modules, pairing.mode, warnings)


def _sizes(adapter: Adapter, target: Checkpoint) -> dict[str, tuple[int, int, bool]]:
    """Rows in the adapter and in the target of vocabulary tensors, and where the tokens are."""
    found = {}
    by_leaf = {
        name.removesuffix(".weight").rpartition(".")[2]: spec
        for name, spec in target.tensors.items()
        if is_known_vocabulary(name) and name.endswith(".weight")
    }
    for module, several in adapter.factors.items():
        factors = several[0]
        leaf = module.rpartition(".")[2]
        spec = by_leaf.get(leaf) or (by_leaf.get("embed_tokens") if leaf == "lm_head" else None)
        if spec is None or not is_known_vocabulary(f"{module}.weight"):
            continue
        a, b = factors.a, factors.b
        assert a is not None
        assert b is not None
        rows, width = (a.shape[1], b.shape[0]) if factors.of_embedding else (b.shape[0], a.shape[1])
        if width != spec.shape[1]:
            raise CheckpointError(
                adapter.place.label,
                f"{a.name} is for a width of {width}, and {spec.name} has {spec.shape[1]} in the"
                " target",
                "give a target of the same family",
            )
        found[module] = rows, spec.shape[0], factors.of_embedding
    return found
