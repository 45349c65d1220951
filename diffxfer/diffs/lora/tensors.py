"""The tensors of an adapter in the making: computed, measured, and turned into tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.config import ADAPTER_WEIGHTS
from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.checkpoints.stored import BITS
from diffxfer.diffs.artifact.manifest import FactorEntry
from diffxfer.diffs.lora.compute import factorise_all
from diffxfer.diffs.lora.held import Held, Holder
from diffxfer.diffs.lora.parts import Form, Part
from diffxfer.diffs.lora.peft_config import Stored
from diffxfer.diffs.lora.read_delta import DeltaReader
from diffxfer.diffs.matching.match import ADDED, REST, UNCHANGED, Fate
from diffxfer.diffs.matching.names import is_embedding
from diffxfer.errors import MatchError
from diffxfer.streaming.plan import Operation, Run, RunKind, TensorTask, whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.jobs.job import RunOptions
    from diffxfer.diffs.lora.factorise import Factorisation
    from diffxfer.diffs.lora.options import LoraOptions

PREFIX = "base_model.model."
"""The beginning of every name in an adapter."""


@dataclass(slots=True)
class AdapterTensors:
    """The tensors of an adapter in the making.

    Attributes:
        source: finetuned and base.
        options: what the adapter is like.
        run: how the job is run.
        holder: holds factors until the job is run.
        tied: whether the embedding is the head too.
        stored: what the adapter stores, for its config.
        tasks: one for each tensor of the adapter.
        fates: the fates of the tensors of Δ.
        entries: what the adapter keeps of each tensor of Δ.
        resized: modules with other rows than base, with finetuned's and base's number.
        fallen_back: tensors that have another form than the user asked for, by the reason.
    """

    source: Source
    options: LoraOptions
    run: RunOptions
    holder: Holder
    tied: bool
    stored: Stored = field(default_factory=Stored)
    tasks: list[TensorTask] = field(default_factory=list)
    fates: list[Fate] = field(default_factory=list)
    entries: dict[str, FactorEntry] = field(default_factory=dict)
    resized: dict[str, tuple[int, int]] = field(default_factory=dict)
    fallen_back: dict[str, list[str]] = field(default_factory=dict)
    _reader: DeltaReader = field(default_factory=lambda: DeltaReader(one_at_a_time()))

    def add_all(self, parts: list[Part], prefix: str) -> None:
        """Compute every part, and take the tensors that finetuned added.

        Args:
            parts: the tensors of Δ.
            prefix: the beginning of names of tensors that finetuned added.

        Raises:
            DiffxferError: if a tensor cannot be read, or no adapter can have it.
        """
        matrices = [part for part in parts if part.form in (Form.FACTORS, Form.EMBEDDING)]
        others = [part for part in parts if part not in matrices]
        # What cannot be stored is found before anything long is computed.
        others.sort(key=lambda part: part.form is not Form.IMPOSSIBLE)
        count = sum(part.form is Form.IMPOSSIBLE for part in others)
        progress = _Progress(parts, self.run)
        for part in others[:count]:
            self._add(part)
        for part in matrices if self.run.dry_run else ():
            self._plan(part)
        for part, found, squares in self._factors(matrices):
            self._hold(part, found, squares)
            progress.add(part)
        # The name of a bias depends on whether its layer has factors.
        for part in others[count:]:
            self._add(part)
            progress.add(part)
        order = {part.name: place for place, part in enumerate(parts)}
        self.entries = dict(sorted(self.entries.items(), key=lambda item: order[item[0]]))
        for spec in self.source.match.added:
            self._store(prefix + spec.name, spec, whole(RunKind.COPY, 1), spec.shape)
            self.stored.whole.append(prefix + spec.name.rpartition(".")[0])
            self.fates.append(Fate("brought", spec.name, spec.elements, ADDED))

    def _add(self, part: Part) -> None:
        squares, changed = (1.0, True) if self.run.dry_run else self._reader.measure(part)
        if not changed:
            self._leave(part)
            return
        if part.form is Form.IMPOSSIBLE:
            if self.run.dry_run:
                return
            raise _impossible(part)
        if part.form is Form.DROPPED:
            self._enter(part, 0, squares, 0.0, 0)
            elements = part.difference.sources[0].elements
            self.fates.append(Fate("dropped", part.name, elements, REST))
            return
        self._take(part)
        self._enter(part, 0, squares, 1.0, part.difference.sources[0].elements)

    def _factors(self, parts: list[Part]) -> Iterator[tuple[Part, Factorisation, float]]:
        return iter(()) if self.run.dry_run else factorise_all(parts, self.options, self.run)

    def _plan(self, part: Part) -> None:
        """The factors of a part as far as they are known without reading it."""
        elements = part.difference.sources[0].elements
        rank = min(self.options.ranks.most, *part.difference.shape)
        self.stored.ranks[part.module] = rank
        self.fates.append(Fate("extracted", part.name, elements))
        for leaf, shape in _shapes(part, rank).items():
            shard = part.difference.sources[0].shard
            held = Held(PREFIX + part.module + leaf, "F32", shape, shard, -1, 0, "")
            self._write(held.name, held, whole(RunKind.COPY, 1), shape, self._dtype(part))

    def _hold(self, part: Part, found: Factorisation, squares: float) -> None:
        """Hold the factors of a part."""
        if not found.rank:
            self._leave(part)
            return
        left, right = found.left, found.right
        a, b = (left.T, right.T) if part.transposed else (right, left)
        shard = part.difference.sources[0].shard
        for leaf, values in zip(_shapes(part, found.rank), (a, b), strict=True):
            held = self.holder.hold(PREFIX + part.module + leaf, values, shard)
            self._write(held.name, held, whole(RunKind.COPY, 1), held.shape, self._dtype(part))
        self.stored.ranks[part.module] = found.rank
        self.stored.transposed |= part.transposed and part.form is Form.FACTORS
        self.fates.append(Fate("extracted", part.name, part.difference.sources[0].elements))
        elements = found.left.size + found.right.size
        self._enter(part, found.rank, squares, found.kept, elements)

    def _take(self, part: Part) -> None:
        """Store finetuned's own tensor, with base's padding rows if finetuned lacks them."""
        ours, theirs = part.difference.sources
        runs, shape = whole(RunKind.COPY, 1), ours.shape
        inputs: tuple[StoredTensor, ...] = (ours,)
        if ours.shape != theirs.shape and ours.shape:
            rows = ours.shape[0], theirs.shape[0]
            if rows[0] < rows[1] and part.difference.vocabulary:
                added = Run(RunKind.ADD, 0, rows[0], (0, -1))
                runs = (added, Run(RunKind.COPY, rows[0], rows[1] - rows[0], (-1, rows[0])))
                inputs, shape = (ours, theirs), theirs.shape
            else:
                self.resized[part.module] = rows
        name = part.name
        if part.form is Form.BIAS:
            self.stored.biases = True
            if part.module in self.stored.ranks:
                name = f"{part.module}.base_layer.bias"
        elif not (self.tied and is_embedding(part.name)):
            # PEFT would wrap the embedding alone, and the head would keep base's values. A tensor
            # of a module that the config does not name replaces base's own, and the head with it;
            # PEFT itself stores resized embeddings so.
            self.stored.whole.append(part.module)
        if part.why:
            self.fallen_back.setdefault(part.why, []).append(part.name)
        self._write(PREFIX + name, inputs, runs, shape, self._dtype(part))
        self.fates.append(Fate("brought", part.name, ours.elements, "stored whole"))

    def _store(
        self, name: str, spec: StoredTensor, runs: tuple[Run, ...], shape: tuple[int, ...]
    ) -> None:
        self._write(PREFIX + name, spec, runs, shape, self.options.dtype or spec.dtype)

    def _write(
        self,
        name: str,
        inputs: StoredTensor | tuple[StoredTensor, ...],
        runs: tuple[Run, ...],
        shape: tuple[int, ...],
        dtype: str,
    ) -> None:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        task = TensorTask(
            name=name,
            operation=Operation.BRING,
            inputs=given,
            dtype=dtype,
            shape=shape,
            runs=runs,
            shard=ADAPTER_WEIGHTS,
        )
        self.tasks.append(task)

    def _dtype(self, part: Part) -> str:
        return self.options.dtype or part.difference.sources[0].dtype

    def _leave(self, part: Part) -> None:
        elements = part.difference.sources[0].elements
        self.fates.append(Fate("left out", part.name, elements, UNCHANGED))

    def _enter(self, part: Part, rank: int, squares: float, kept: float, elements: int) -> None:
        size = BITS[self._dtype(part)] // 8
        self.entries[part.name] = FactorEntry(
            form=part.form.value,
            rank=rank,
            kept=kept,
            delta_norm=math.sqrt(squares),
            bytes=elements * size,
            full_bytes=part.difference.sources[0].elements * size,
        )


class _Progress:
    """Tells how much of Δ has been computed."""

    def __init__(self, parts: list[Part], run: RunOptions) -> None:
        self._total = sum(part.difference.sources[0].stored_bytes for part in parts)
        self._done = 0
        self._tell = None if run.dry_run else run.progress

    def add(self, part: Part) -> None:
        """Count a part."""
        self._done += part.difference.sources[0].stored_bytes
        if self._tell is not None:
            self._tell(self._done, max(self._total, 1))


def _shapes(part: Part, rank: int) -> dict[str, tuple[int, int]]:
    """The endings and shapes of a part's two factors, A first."""
    rows, columns = max(s.shape[0] for s in part.difference.sources), part.difference.shape[1]
    if part.form is Form.EMBEDDING:
        return {".lora_embedding_A": (rank, rows), ".lora_embedding_B": (columns, rank)}
    out, inner = (columns, rows) if part.transposed else (rows, columns)
    return {".lora_A.weight": (rank, inner), ".lora_B.weight": (out, rank)}


def _impossible(part: Part) -> MatchError:
    shape = part.difference.shape
    what = "holds fused experts" if "expert" in part.name else "is no weight or bias of a module"
    return MatchError(
        (),
        f"{part.name} {shape} {what}, and finetuned changed it: an adapter cannot have its Δ",
        f"give --exclude '{part.name}' to leave it out, or extract a diff vector (--as diff)",
    )
