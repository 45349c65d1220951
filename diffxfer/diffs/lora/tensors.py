"""The tensors of an adapter in the making: computed, measured, and turned into tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.diffs.lora.compute import factorise_all
from diffxfer.diffs.lora.experts import Expert, StackedFactors, experts_of, read_expert
from diffxfer.diffs.lora.held import Held
from diffxfer.diffs.lora.output import PREFIX, AdapterOutput
from diffxfer.diffs.lora.parts import Form, Part
from diffxfer.diffs.lora.read_delta import DeltaReader
from diffxfer.diffs.matching.match import ADDED, REST, Fate
from diffxfer.errors import MatchError
from diffxfer.streaming.plan import Run, RunKind, whole

if TYPE_CHECKING:
    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.jobs.job import RunOptions
    from diffxfer.diffs.lora.factorise import Factorisation
    from diffxfer.diffs.lora.names import PeftNames

__all__ = ["PREFIX", "AdapterTensors"]


@dataclass(slots=True, kw_only=True)
class AdapterTensors(AdapterOutput):
    """The tensors of an adapter in the making.

    Attributes:
        source: finetuned and base.
        run: how the job is run.
        tied: whether the embedding is the head too.
        resized: modules with other rows than base, with finetuned's and base's number.
        fallen_back: tensors that have another form than the user asked for, by the reason.
    """

    source: Source
    run: RunOptions
    tied: bool
    resized: dict[str, tuple[int, int]] = field(default_factory=dict)
    fallen_back: dict[str, list[str]] = field(default_factory=dict)
    _reader: DeltaReader = field(default_factory=lambda: DeltaReader(one_at_a_time()))

    def add_all(self, parts: list[Part], names: PeftNames) -> None:
        """Compute every part, and take the tensors that finetuned added.

        Args:
            parts: the tensors of Δ.
            names: the names that PEFT uses.

        Raises:
            DiffxferError: if a tensor cannot be read, or no adapter can have it.
        """
        matrices = [part for part in parts if part.form in (Form.FACTORS, Form.EMBEDDING)]
        experts = experts_of(parts, names.loaded)
        stacked = StackedFactors(self, names.loaded, experts)
        apart = (Form.FACTORS, Form.EMBEDDING, Form.EXPERT)
        others = [part for part in parts if part.form not in apart]
        # What cannot be stored is found before anything long is computed.
        others.sort(key=lambda part: part.form is not Form.IMPOSSIBLE)
        count = sum(part.form is Form.IMPOSSIBLE for part in others)
        progress, how = _Progress(parts, self.run), (self.options, self.run)
        for part in others[:count]:
            self._add(part)
        if self.run.dry_run:
            for part in matrices:
                self._plan(part)
            stacked.plan()
        else:
            for part, found, squares in factorise_all(matrices, DeltaReader.matrix, *how):
                self._hold(part, found, squares)
                progress.add(part)
            for expert, found, squares in factorise_all(experts, read_expert, *how):
                stacked.add(expert, found, squares)
                progress.add(expert)
        stacked.finish()
        # The name of a bias depends on whether its layer has factors.
        for group in _together(others[count:]):
            self._add_group(group)
            for part in group:
                progress.add(part)
        order = {part.name: place for place, part in enumerate(parts)}
        self.entries = dict(sorted(self.entries.items(), key=lambda item: order.get(item[0], 0)))
        for spec in self.source.match.added:
            name = names.of(spec.name)
            self._store(name, spec, whole(RunKind.COPY, 1), spec.shape)
            self.stored.whole.append(name.rpartition(".")[0])
            self.fates.append(Fate("brought", spec.name, spec.elements, ADDED))

    def _add_group(self, parts: list[Part]) -> None:
        """Add parts that are stored together: all of them, if one has changed."""
        if not parts[0].keeper:
            self._add(parts[0])
            return
        sizes = [(1.0, True) if self.run.dry_run else self._reader.measure(part) for part in parts]
        for part, (squares, _) in zip(parts, sizes, strict=True):
            if not any(changed for _, changed in sizes):
                self.leave(part)
                continue
            self._take(part)
            self._enter(part, 0, squares, 1.0, part.elements)

    def _add(self, part: Part) -> None:
        squares, changed = (1.0, True) if self.run.dry_run else self._reader.measure(part)
        if not changed:
            self.leave(part)
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

    def _plan(self, part: Part) -> None:
        """The factors of a part as far as they are known without reading it."""
        rank = min(self.options.ranks.most, *part.difference.shape)
        self._store_rank(part, rank)
        self.extracted(part)
        for leaf, shape in _shapes(part, rank).items():
            shard = part.difference.sources[0].shard
            held = Held(PREFIX + part.module + leaf, "F32", shape, shard, -1, 0, "")
            self.write(held.name, held, whole(RunKind.COPY, 1), shape, self.dtype(part))

    def _hold(self, part: Part, found: Factorisation, squares: float) -> None:
        """Hold the factors of a part."""
        if not found.rank:
            self.leave(part)
            return
        left, right = found.left, found.right
        a, b = (left.T, right.T) if part.transposed else (right, left)
        shard = part.difference.sources[0].shard
        for leaf, values in zip(_shapes(part, found.rank), (a, b), strict=True):
            held = self.holder.hold(PREFIX + part.module + leaf, values, shard)
            self.write(held.name, held, whole(RunKind.COPY, 1), held.shape, self.dtype(part))
        self._store_rank(part, found.rank)
        self.stored.transposed |= part.transposed and part.form is Form.FACTORS
        self.extracted(part)
        elements = found.left.size + found.right.size
        self._enter(part, found.rank, squares, found.kept, elements)

    def _store_rank(self, part: Part, rank: int) -> None:
        if part.as_parameter:
            self.stored.parameters[part.name] = rank
        else:
            self.stored.ranks[part.module] = rank

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
            if (
                part.module in self.stored.ranks
                or f"{part.module}.weight" in self.stored.parameters
            ):
                name = f"{part.module}.base_layer.bias"
        elif not part.shared:
            # PEFT would wrap the embedding alone, and the head would keep base's values. A tensor
            # of a module that the config does not name replaces base's own, and the head with it;
            # PEFT itself stores resized embeddings so.
            self.stored.whole.append(part.keeper or part.module)
        if part.why:
            self.fallen_back.setdefault(part.why, []).append(part.name)
        self.write(PREFIX + name, inputs, runs, shape, self.dtype(part))
        self.fates.append(Fate("brought", part.name, ours.elements, "stored whole"))

    def _store(
        self, name: str, spec: StoredTensor, runs: tuple[Run, ...], shape: tuple[int, ...]
    ) -> None:
        self.write(PREFIX + name, spec, runs, shape, self.options.dtype or spec.dtype)

    def _enter(self, part: Part, rank: int, squares: float, kept: float, elements: int) -> None:
        self.entries[part.name] = self.entry(part, rank, squares, kept, elements)


class _Progress:
    """Tells how much of Δ has been computed."""

    def __init__(self, parts: list[Part], run: RunOptions) -> None:
        self._total = sum(part.stored_bytes for part in parts)
        self._done = 0
        self._tell = None if run.dry_run else run.progress

    def add(self, part: Part | Expert) -> None:
        """Count a part."""
        self._done += part.stored_bytes
        if self._tell is not None:
            self._tell(self._done, max(self._total, 1))


def _shapes(part: Part, rank: int) -> dict[str, tuple[int, int]]:
    """The endings and shapes of a part's two factors, A first."""
    rows, columns = max(s.shape[0] for s in part.difference.sources), part.difference.shape[1]
    if part.form is Form.EMBEDDING:
        return {".lora_embedding_A": (rank, rows), ".lora_embedding_B": (columns, rank)}
    out, inner = (columns, rows) if part.transposed else (rows, columns)
    return {".lora_A.weight": (rank, inner), ".lora_B.weight": (out, rank)}


def _together(parts: list[Part]) -> list[list[Part]]:
    """Parts that one module keeps, in one list; each other part in its own."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.keeper or f"{part.name}:", []).append(part)
    return [*groups.values()]


def _impossible(part: Part) -> MatchError:
    shape = part.difference.shape
    what = "holds fused experts" if "expert" in part.name else "is no weight or bias of a module"
    what = f"has no counterpart in PEFT, since {part.why}" if part.why else what
    return MatchError(
        (),
        f"{part.name} {shape} {what}, and finetuned changed it: an adapter cannot have its Δ",
        f"give --exclude '{part.name}' to leave it out, or extract a diff vector (--as diff)",
    )
