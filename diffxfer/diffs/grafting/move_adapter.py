"""Moving an adapter to another base: the same factors, under the names and tokens of the target."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.adapters.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from diffxfer.checkpoints.companions import companion_path, read_object
from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.checkpoints.hub.repo_ids import cached_id
from diffxfer.checkpoints.output_place import refuse_unsafe_output
from diffxfer.diffs.artifact.manifest import TensorEntry
from diffxfer.diffs.delta.adapted_folder import has_tokenizer
from diffxfer.diffs.delta.adapter_remarks import warnings_of_adapter
from diffxfer.diffs.delta.from_adapter import adapted_checkpoint
from diffxfer.diffs.delta.from_checkpoints import HEAD, source_entry
from diffxfer.diffs.delta.right_base import stated_base
from diffxfer.diffs.grafting.move_checks import (
    compare_bases,
    fixed_part,
    refuse_bound,
    refuse_choices,
    refuse_scale_of_dora,
    warn_of_dora,
)
from diffxfer.diffs.grafting.move_tokens import TokenMove, move_tokens
from diffxfer.diffs.jobs.job import Job, do
from diffxfer.diffs.lora.held import Holder
from diffxfer.diffs.lora.peft_config import model_prefix, refuse_unknown_names, target_modules
from diffxfer.diffs.lora.tensors import PREFIX
from diffxfer.diffs.matching.match import LEFT_OUT, Fate
from diffxfer.diffs.matching.names import is_head, pair_names
from diffxfer.errors import MatchError, OptionError
from diffxfer.streaming.plan import Operation, RunKind, TensorTask, whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from diffxfer.checkpoints.adapters.adapter import Adapter, Factors
    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.checkpoints.stored import StoredTensor, TensorSpec
    from diffxfer.diffs.artifact.manifest import Manifest, SourceEntry
    from diffxfer.diffs.grafting.options import GraftOptions
    from diffxfer.diffs.jobs.report import Report
    from diffxfer.diffs.matching.role import Role
    from diffxfer.streaming.statistics import TensorResult

_WHOLE = 2.0**53
"""Larger numbers are no exact integers."""


def move_adapter(adapter: Adapter, target: Role, out: Path, options: GraftOptions) -> Report:
    """Write an adapter for another base.

    Args:
        adapter: the adapter.
        target: the base to move it to.
        out: the folder to create.
        options: the options of `apply_diff`.

    Returns:
        What was done.

    Raises:
        CheckpointError: if a tensor of the adapter does not fit the target, or holds values of
            the adapter's own base.
        DiffxferError: for every other known failure; nothing is at `out` then.
    """
    refuse_bound(adapter)
    refuse_choices(adapter, options)
    refuse_unknown_names(target.checkpoint, "graft it without --as lora")
    checkpoint = target.checkpoint
    inputs = [adapter.place.folder, checkpoint.folder, adapter.shard.path]
    inputs += [shard.path for shard in checkpoint.weights.shards]
    refuse_unsafe_output(out, inputs, overwrite=options.run.overwrite)
    moved = move_tokens(adapter, checkpoint, options.vocab)
    base = stated_base(adapter.config.base)
    kinship = compare_bases(base, target, allow_unrelated=options.allow_unrelated)
    # The tensors whose tokens do not move are checked as those of a graft are.
    fixed = fixed_part(adapter, base, moved)
    overlay = adapted_checkpoint(fixed, checkpoint, is_base=False).folder
    warnings = [*moved.warnings, *warn_of_dora(adapter, moved), *kinship.warnings]
    with Holder(out) as holder:
        made = _Move(adapter, target, options, holder, moved)
        made.run()
        files = moved.companions(overlay, has_own=has_tokenizer(adapter.shard))
        files[ADAPTER_CONFIG] = made.config()
        fetch_shards([] if options.run.stream else [adapter.shard], options.run.progress)
        job = Job(
            verb="apply",
            out=out,
            tasks=made.tasks,
            inputs=(adapter.shard,),
            indexed=False,
            files=files,
            command={**options.command, "as": "lora"},
            sources={
                "adapter": _entry(adapter, checkpoint),
                "target": source_entry(checkpoint.weights),
            },
            fates=made.fates,
            problems=[],
            finish=_finish,
            vocabulary=moved.mode,
            dropped_tokens=moved.dropped,
            warnings=[*warnings_of_adapter(adapter), *warnings],
            notes=made.notes(is_compared=bool(kinship.relations)),
            relations=kinship.relations,
            began=options.began,
        )
        return do(job, replace(options.run, device="cpu", max_shard_bytes=None))


def _entry(adapter: Adapter, target: Checkpoint) -> SourceEntry:
    weights = replace(target.weights, folder=adapter.place.folder, shards=(adapter.shard,))
    return source_entry(weights)


@dataclass(slots=True)
class _Move:
    """One call of `move_adapter`."""

    adapter: Adapter
    target: Role
    options: GraftOptions
    holder: Holder
    moved: TokenMove
    tasks: list[TensorTask] = field(default_factory=list)
    fates: list[Fate] = field(default_factory=list)
    _alphas: dict[str, float] = field(default_factory=dict)
    _ranks: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Make the tasks."""
        tensors = self.target.checkpoint.tensors
        prefix = model_prefix(self.target.checkpoint.config, tensors.keys())
        names = self._names()
        selection = self.options.selection
        selection.refuse_unused({*names.values()})
        for module, several in self.adapter.factors.items():
            known = names[module]
            elements = tensors[known].elements if known in tensors else 0
            alpha = selection.alpha_of(known)
            if self.adapter.config.dora and selection.selects(known):
                refuse_scale_of_dora(alpha)
            if not selection.selects(known) or not alpha:
                self.fates.append(Fate("left out", known, elements, LEFT_OUT))
                continue
            new = known.rpartition(".")[0]
            new = prefix + new if known in tensors and not is_head(known) else new
            for factors in several:
                self._add(module, new, factors)
            first = several[0].a
            assert first is not None
            self._ranks[new] = first.shape[0]
            self._alphas[new] = self._alpha(module) * alpha
            self.fates.append(Fate("moved", known, elements))
        if not self.tasks:
            remedy = "check --include, --exclude and --alpha-for"
            raise MatchError((), "no tensor of the adapter is left", remedy)

    def _names(self) -> dict[str, str]:
        """The target's name of the tensor that the factors of each module change.

        Experts that the target stores one by one keep the adapter's name of their parameter.
        """
        known = dict.fromkeys(self.target.checkpoint.tensors)
        if not any(map(is_head, known)):
            known[HEAD] = None
        parameters = [name.rpartition(".")[2] for name in self.adapter.config.parameters]
        leaves = ("weight", *parameters)
        wanted = [f"{module}.{leaf}" for module in self.adapter.factors for leaf in leaves]
        pairs = pair_names(dict.fromkeys(wanted), known, ("the adapter", "the target"))
        return {
            module: next(
                (pairs[f"{module}.{leaf}"] for leaf in leaves if f"{module}.{leaf}" in pairs),
                f"{module}.{leaves[-1]}",
            )
            for module in self.adapter.factors
        }

    def _alpha(self, module: str) -> float:
        config = self.adapter.config
        return config.scaling_of(module) * self._divisor(module)

    def _divisor(self, module: str) -> float:
        rank = self.adapter.config.rank_of(module)
        return float(rank**0.5) if self.adapter.config.rank_stabilized else float(rank)

    def _add(self, module: str, new: str, factors: Factors) -> None:
        for spec in (factors.a, factors.b, factors.bias, factors.magnitude):
            if spec is None:
                continue
            found = self.moved.values(module, spec)
            stored: StoredTensor = spec
            if found is not None:
                stored = self.holder.hold(spec.name, found, spec.shard)
            self._write(spec, module, new, stored)

    def _write(self, spec: TensorSpec, module: str, new: str, stored: StoredTensor) -> None:
        name = spec.name.removeprefix(PREFIX)
        beginning = f"{module}." if name.startswith(f"{module}.") else ""
        rest = name.removeprefix(beginning) if beginning else _after(name, module)
        task = TensorTask(
            name=f"{PREFIX}{new}.{rest}",
            operation=Operation.MOVE,
            inputs=(stored,),
            dtype=self.options.dtype or spec.dtype,
            shape=stored.shape,
            runs=whole(RunKind.COPY, 1),
            shard=ADAPTER_WEIGHTS,
        )
        self.tasks.append(task)

    def config(self) -> bytes:
        """The config of the moved adapter."""
        path = companion_path(self.adapter.place.folder, ADAPTER_CONFIG)
        assert path is not None, "it was read before"
        raw = read_object(path)
        checkpoint = self.target.checkpoint
        hub = cached_id(checkpoint.weights.shards[0].path.parent)
        raw |= {
            "base_model_name_or_path": hub.repo if hub else str(checkpoint.folder.resolve()),
            "revision": hub.revision if hub else None,
            "modules_to_save": None,
            "trainable_token_indices": None,
        }
        alpha = self.options.selection.alpha
        if self.adapter.config.parameters:
            raw["lora_alpha"] = _plain(self.adapter.config.alpha * alpha)
            raw["alpha_pattern"] = {
                pattern: _plain(value * alpha)
                for pattern, value in self.adapter.config.alphas.values.items()
            }
        else:
            raw |= self._patterns(alpha)
        return (json.dumps(raw, indent=2, sort_keys=True) + "\n").encode()

    def _patterns(self, alpha: float) -> dict[str, Any]:
        """The keys of the config that name modules."""
        config, tensors = self.adapter.config, self.target.checkpoint.tensors
        prefix = model_prefix(self.target.checkpoint.config, tensors.keys())
        every = {
            prefix + name.removesuffix(".weight")
            for name, spec in tensors.items()
            if name.endswith(".weight") and len(spec.shape) > 1
        }
        usual = _plain(config.alpha * alpha)
        longest_first = sorted(self._ranks, key=lambda name: (-len(name), name))
        ranks = {n: self._ranks[n] for n in longest_first if self._ranks[n] != config.rank}
        alphas = {n: _plain(self._alphas[n]) for n in longest_first}
        return {
            "lora_alpha": usual,
            "rank_pattern": ranks,
            "alpha_pattern": {name: value for name, value in alphas.items() if value != usual},
            "target_modules": target_modules([*self._ranks], every),
            "layers_to_transform": None,
            "layers_pattern": None,
            "exclude_modules": None,
        }

    def notes(self, *, is_compared: bool) -> list[str]:
        """What a user may want to know; also whether base was compared with the target."""
        stated = self.adapter.config.base
        made = f" ({stated})" if stated else ""
        lacking = f"whether the target is a successor of the adapter's base{made} was not checked"
        said = [] if is_compared else [lacking]
        if self.adapter.copies:
            said.append(f"copies of base's embeddings left out: {', '.join(self.adapter.copies)}")
        return said


def _after(name: str, module: str) -> str:
    """The end of a stored name after its module, whose wrappers are ignored."""
    parts, left = name.split("."), module.split(".")
    while left:
        part = parts.pop(0)
        if part == left[0]:
            left.pop(0)
    return ".".join(parts)


def _plain(value: float) -> float | int:
    """A number as PEFT's configs write it, without the errors of its last digit."""
    if not math.isfinite(value):
        raise OptionError("--alpha", "makes lora_alpha infinite", "give a smaller one")
    rounded = float(f"{value:.15g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < _WHOLE else rounded


def _finish(
    manifest: Manifest, results: Mapping[str, TensorResult], silent: Mapping[str, str]
) -> tuple[Manifest, Iterable[tuple[str, TensorEntry]], dict[str, bytes]]:
    """Complete the manifest of an adapter."""
    del silent
    tensors = ((name, TensorEntry(checksum=result.checksum)) for name, result in results.items())
    return manifest.model_copy(update={"kind": "adapter"}), tensors, {}
