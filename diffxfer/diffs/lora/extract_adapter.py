"""Extracting an adapter: Δ = finetuned − base, approximated by factors that PEFT loads."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.checkpoints.hub.repo_ids import cached_id
from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.checkpoints.stored import BITS
from diffxfer.diffs.artifact.kept import share
from diffxfer.diffs.artifact.manifest import FactorEntry, TensorEntry
from diffxfer.diffs.jobs.job import do
from diffxfer.diffs.jobs.report import listed
from diffxfer.diffs.lora.factorise import factorise
from diffxfer.diffs.lora.held import Held, Holder
from diffxfer.diffs.lora.parts import Form, Part, is_shared, sort_parts
from diffxfer.diffs.lora.peft_config import Stored, make_config, model_prefix
from diffxfer.diffs.lora.read_delta import DeltaReader
from diffxfer.diffs.lora.report import with_factors
from diffxfer.diffs.matching.match import ADDED, REST, UNCHANGED, Fate
from diffxfer.diffs.matching.names import is_embedding
from diffxfer.errors import MatchError
from diffxfer.streaming.plan import Operation, Run, RunKind, TensorTask, whole
from diffxfer.streaming.run import default_threads

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.artifact.manifest import Manifest
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.jobs.job import Finish, Job, RunOptions
    from diffxfer.diffs.jobs.report import Report
    from diffxfer.diffs.lora.factorise import Factorisation
    from diffxfer.diffs.lora.options import LoraOptions
    from diffxfer.diffs.matching.role import Role
    from diffxfer.streaming.statistics import TensorResult

PREFIX = "base_model.model."
"""The beginning of every name in an adapter."""
_TURNS = {Form.IMPOSSIBLE: 0, Form.FACTORS: 1, Form.EMBEDDING: 1}
"""The order of the parts: what cannot be stored is found before anything long is computed, and the
name of a bias depends on whether its layer has factors."""
_LARGE = 0.5
"""The share of an adapter's bytes at which whole tensors are worth a warning."""


def extract_adapter(
    job: Job,
    source: Source,
    companions: Mapping[str, bytes | Path],
    roles: Sequence[Role],
    options: LoraOptions,
    run: RunOptions,
) -> Report:
    """Write the adapter of a fine-tuned model and its base.

    Args:
        job: the job without its tasks, and with the fates of tensors that are not in Δ.
        source: finetuned and base.
        companions: finetuned's companions, without code.
        roles: finetuned and base.
        options: what the adapter is like.
        run: how to run the job.

    Returns:
        What was done.

    Raises:
        MatchError: if Δ is zero, or has a tensor that no adapter can have.
        DiffxferError: for every other known failure; nothing is at the output then.
    """
    if job.problems:
        return do(job, run)
    finetuned, base = (role.checkpoint for role in roles)
    prefix = model_prefix(base.config, base.tensors.keys())
    parts = sort_parts(source, base.tensors, options.rest, prefix)
    shards = [shard for shard in source.shards if not run.stream]
    if not run.dry_run:
        fetch_shards(shards, run.progress, out=job.out)
    with Holder(job.out) as holder, _torch_threads(run.threads):
        made = _Extraction(source, options, run, holder)
        made.add_all(parts, prefix)
        made.refuse_nothing()
        modules = {
            prefix + name.removesuffix(".weight")
            for name, spec in base.tensors.items()
            if name.endswith(".weight") and len(spec.shape) > 1
        }
        hub = cached_id(base.weights.shards[0].path.parent)
        config = make_config(
            made.stored,
            modules,
            base=hub.repo if hub else str(base.folder.resolve()),
            revision=hub.revision if hub else None,
            config=finetuned.config,
        )
        files = {name: file for name, file in companions.items() if name != "config.json"}
        report = do(
            replace(
                job,
                tasks=made.tasks,
                indexed=False,
                files={**files, ADAPTER_CONFIG: config},
                command={**job.command, **options.command()},
                fates=[*made.fates, *job.fates],
                finish=_finish(made.entries, options),
                warnings=[*job.warnings, *made.warnings()],
                notes=[*job.notes, *made.notes()],
            ),
            replace(run, device="cpu"),
        )
    return with_factors(report, {} if run.dry_run else made.entries)


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """Let torch use as many threads as the command does."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or default_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(slots=True)
class _Extraction:
    """The tensors of an adapter in the making."""

    source: Source
    options: LoraOptions
    run: RunOptions
    holder: Holder
    stored: Stored = field(default_factory=Stored)
    tasks: list[TensorTask] = field(default_factory=list)
    fates: list[Fate] = field(default_factory=list)
    entries: dict[str, FactorEntry] = field(default_factory=dict)
    resized: dict[str, tuple[int, int]] = field(default_factory=dict)
    fallen_back: dict[str, list[str]] = field(default_factory=dict)
    _reader: DeltaReader = field(default_factory=lambda: DeltaReader(one_at_a_time()))

    @property
    def _device(self) -> str:
        """Where torch computes."""
        import torch

        if self.run.device != "auto":
            return self.run.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def add_all(self, parts: list[Part], prefix: str) -> None:
        """Compute every part, and take the tensors that finetuned added."""
        total = sum(part.difference.sources[0].stored_bytes for part in parts)
        done = 0
        for part in sorted(parts, key=lambda part: _TURNS.get(part.form, 2)):
            self._add(part)
            done += part.difference.sources[0].stored_bytes
            if self.run.progress is not None and not self.run.dry_run:
                self.run.progress(done, max(total, 1))
        order = {part.name: place for place, part in enumerate(parts)}
        self.entries = dict(sorted(self.entries.items(), key=lambda item: order[item[0]]))
        for spec in self.source.match.added:
            self._store(prefix + spec.name, spec, whole(RunKind.COPY, 1), spec.shape)
            self.stored.whole.append(prefix + spec.name.rpartition(".")[0])
            self.fates.append(Fate("brought", spec.name, spec.elements, ADDED))

    def _add(self, part: Part) -> None:
        if part.form in (Form.FACTORS, Form.EMBEDDING):
            self._factorise(part)
            return
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

    def _factorise(self, part: Part) -> None:
        """Compute the factors of a part, and hold them."""
        if self.run.dry_run:
            self._plan(part)
            return
        matrix, squares = self._reader.matrix(part)
        if not squares:
            self._leave(part)
            return
        found = factorise(
            matrix,
            self.options.ranks,
            seed=part.difference.name,
            exact=self.options.exact,
            device=self._device,
        )
        self._hold(part, found)
        elements = found.left.size + found.right.size
        self._enter(part, found.rank, squares, found.kept, elements)

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

    def _hold(self, part: Part, found: Factorisation) -> None:
        left, right = found.left, found.right
        a, b = (left.T, right.T) if part.transposed else (right, left)
        shard = part.difference.sources[0].shard
        for leaf, values in zip(_shapes(part, found.rank), (a, b), strict=True):
            held = self.holder.hold(PREFIX + part.module + leaf, values, shard)
            self._write(held.name, held, whole(RunKind.COPY, 1), held.shape, self._dtype(part))
        self.stored.ranks[part.module] = found.rank
        self.stored.transposed |= part.transposed and part.form is Form.FACTORS
        self.fates.append(Fate("extracted", part.name, part.difference.sources[0].elements))

    def _take(self, part: Part) -> None:
        """Store finetuned's own tensor, with base's padding rows if finetuned lacks them."""
        ours, theirs = part.difference.sources
        runs, inputs, shape = whole(RunKind.COPY, 1), (ours,), ours.shape
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
        elif not (is_shared(self.source) and is_embedding(part.name)):
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

    def refuse_nothing(self) -> None:
        """Refuse an adapter without tensors.

        Raises:
            MatchError: if finetuned is base, or all that differs is dropped.
        """
        if self.tasks:
            return
        if self.entries:
            raise MatchError(
                (),
                "finetuned differs from base only in tensors that --rest drop leaves out:"
                f" {listed([*self.entries])}",
                "give --rest modules_to_save",
            )
        raise MatchError(
            (),
            "finetuned and base are equal in every tensor, so that the adapter would be empty",
            "check that the first folder is the fine-tuned model",
        )

    def warnings(self) -> list[str]:
        """What a user should know."""
        said = []
        lost = {n: e for n, e in self.entries.items() if e.form == Form.DROPPED.value}
        if lost:
            part = 1 - share(
                {
                    n: e.model_copy(update={"kept": 1.0 - (n in lost)})
                    for n, e in self.entries.items()
                }
            )
            said.append(
                f"--rest {self.options.rest} leaves out {part:.2%} of the squared norm of Δ:"
                f" {listed([*lost])}"
            )
        entire = {n: e for n, e in self.entries.items() if e.form == Form.WHOLE.value}
        size, total = (sum(e.bytes for e in group.values()) for group in (entire, self.entries))
        if total and size / total > _LARGE:
            said.append(
                f"tensors stored whole take {gigabytes(size)} of {gigabytes(total)}:"
                f" {listed([*entire])}; --rest lora stores factors, --rest drop nothing of them"
            )
        return said

    def notes(self) -> list[str]:
        """What a user may want to know."""
        said = [
            f"stored whole, since {why}: {listed(names)}" for why, names in self.fallen_back.items()
        ]
        for module, (rows, before) in self.resized.items():
            said.append(
                f"{module} has {rows:,} rows and base {before:,}: before PEFT loads this adapter,"
                f" call model.resize_token_embeddings({rows})"
            )
        if self.stored.whole or self.stored.biases:
            said.append("vLLM loads adapters without modules_to_save and biases only: --rest lora")
        return said


def _shapes(part: Part, rank: int) -> dict[str, tuple[int, int]]:
    """The endings and shapes of a part's two factors, A first."""
    rows, columns = max(s.shape[0] for s in part.difference.sources), part.difference.shape[1]
    if part.form is Form.EMBEDDING:
        return {".lora_embedding_A": (rank, rows), ".lora_embedding_B": (columns, rank)}
    out, inner = (columns, rows) if part.transposed else (rows, columns)
    return {".lora_A.weight": (rank, inner), ".lora_B.weight": (out, rank)}


def _impossible(part: Part) -> MatchError:
    shape = part.difference.shape
    what = "are fused experts" if len(shape) == 3 else "is no weight or bias of a module"
    return MatchError(
        (),
        f"{part.name} {shape} {what}, and differs from base: an adapter cannot have its Δ",
        f"give --exclude '{part.name}' to leave it out, or extract a diff vector (--as diff)",
    )


def _finish(entries: Mapping[str, FactorEntry], options: LoraOptions) -> Finish:
    """The `Finish` of an adapter: what it keeps, in the manifest."""

    def finish(
        manifest: Manifest, results: Mapping[str, TensorResult], silent: Mapping[str, str]
    ) -> tuple[Manifest, Iterable[tuple[str, TensorEntry]], dict[str, bytes]]:
        del silent
        tensors = ((name, TensorEntry(checksum=r.checksum)) for name, r in results.items())
        update = {"kind": "adapter", "dtype": options.diff_dtype, "factors": dict(entries)}
        return manifest.model_copy(update=update), tensors, {}

    return finish
