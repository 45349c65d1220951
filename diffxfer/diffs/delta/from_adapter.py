"""A LoRA adapter as a fine-tuned checkpoint: base's tensors, some of them with a stored Δ.

The result stands for the model that `merge_and_unload` would make, without making it: every tensor
is computed from its factors when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.adapter import odd
from diffxfer.checkpoints.adapters.config import ADAPTER_CONFIG
from diffxfer.checkpoints.companions import read_config
from diffxfer.checkpoints.encodings import low_rank
from diffxfer.checkpoints.encodings.adapted import Adapted, Dora, Scaled
from diffxfer.checkpoints.files import same_values
from diffxfer.checkpoints.reader import Checkpoint
from diffxfer.diffs.delta.adapted_folder import adapted_folder, has_tokenizer
from diffxfer.diffs.delta.adapter_errors import AdapterErrors
from diffxfer.diffs.delta.adapter_layouts import (
    IN_OUT,
    OUT_IN,
    fitting,
    is_fused,
    layout_of_square,
    layouts,
)
from diffxfer.diffs.delta.adapter_names import AdapterNames, find_names
from diffxfer.diffs.delta.adapter_vocabulary import replace_rows, separate_head
from diffxfer.diffs.matching.names import is_head
from diffxfer.diffs.matching.ties import Head, HeadState, find_head

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.adapters.adapter import Adapter, Factors
    from diffxfer.checkpoints.stored import StoredTensor, TensorSpec
    from diffxfer.diffs.delta.loaded_names import Stacked

LORA = "LoRA adapter"
"""The format of the weights of an adapted checkpoint."""


def adapted_checkpoint(adapter: Adapter, base: Checkpoint, *, is_base: bool = True) -> Checkpoint:
    """The fine-tuned checkpoint that an adapter and its base make.

    Args:
        adapter: the adapter.
        base: the model that it is applied to, under the names that matching compares.
        is_base: whether that is the adapter's base; else it is the target of a graft, and what
            needs base is refused.

    Returns:
        The checkpoint. Its folder has base's companions, with the adapter's over them.

    Raises:
        CheckpointError: if a tensor of the adapter does not fit, or needs base.
        MatchError: if names can be paired in two ways.
    """
    return _Adaptation(adapter, base, is_base).run()


def is_without_tokenizer(finetuned: Checkpoint) -> bool:
    """Whether a checkpoint is made of an adapter that has no tokenizer or chat template.

    Args:
        finetuned: the checkpoint.
    """
    return LORA in finetuned.weights.formats and not has_tokenizer(finetuned.weights.shards[0])


@dataclass(slots=True)
class _Adaptation:
    """One call of `adapted_checkpoint`."""

    adapter: Adapter
    base: Checkpoint
    is_base: bool
    _errors: AdapterErrors = field(init=False)
    _found: AdapterNames = field(init=False)
    _names: Mapping[str, str] = field(init=False)
    _tensors: dict[str, StoredTensor] = field(init=False)
    _head: Head = field(init=False)

    def __post_init__(self) -> None:
        self._tensors = dict(self.base.tensors)
        self._head = find_head(self.base.tensors, self.base.config)
        self._found = find_names(self.adapter, self.base, self._head)
        self._names = self._found.names
        self._errors = AdapterErrors(self.adapter, self.base.role, self._found.unknown)

    def run(self) -> Checkpoint:
        base = self.base
        self._add_copies()
        self._add_factors()
        self._add_whole()
        self._add_rows()
        folder = adapted_folder(self.adapter.shard, base.folder, self._resized())
        weights = replace(
            base.weights,
            folder=folder,
            tensors=self._tensors,
            shards=(self.adapter.shard,),
            formats=(LORA,),
        )
        return Checkpoint("finetuned", weights, read_config(folder))

    def _add_copies(self) -> None:
        """Use the embeddings that the adapter stores, if they were resized for more tokens."""
        for name, spec in self.adapter.copies.items():
            known = self._names.get(name)
            module = name.removesuffix(".weight")
            if known is None or (self._is_tied(known) and module not in self.adapter.factors):
                continue
            # A copy of base's size has base's values: PEFT does not train it.
            rows = self._tensor(known).shape[0]
            if self._tensor(known).shape != spec.shape:
                what = f"an embedding of {spec.shape[0]:,} rows, and the target has {rows:,}"
                self._need_base(spec, what)
                self._tensors[known] = replace(spec, name=known)

    def _add_factors(self) -> None:
        for module, found in self.adapter.factors.items():
            if self._add_stacked(module, found):
                continue
            for name, factors in self._parameters(module, found):
                self._tensors[name] = self._adapt(name, factors)
                if factors.bias is not None:
                    bias = self._names.get(f"{module}.bias")
                    self._tensors[bias or ""] = self._add_bias(bias, factors)

    def _add_stacked(self, module: str, found: list[Factors]) -> bool:
        """Whether factors change experts that base stores one by one; if so, they are added."""
        known = self._found.stacked_in(module, self.adapter.config.parameters)
        shapes = {name: stacked.shape for name, stacked in known.items()}
        for factors in found if known else ():
            self._add_experts(known[self._fitting(factors, shapes, found)], factors)
        return bool(known)

    def _add_experts(self, stacked: Stacked, factors: Factors) -> None:
        a, b = factors.a, factors.b
        assert a is not None
        assert b is not None
        fits = layouts(factors, stacked.shape)
        square = IN_OUT if stacked.transposed else OUT_IN
        scaling = self._scaling(stacked.name, factors, stacked.shape)
        for piece in stacked.pieces:
            weight = self._tensors[piece.name]
            delta = low_rank.one_expert(
                piece.name,
                piece.shape,
                a,
                b,
                scaling,
                expert=(piece.expert, stacked.shape[0]),
                row=piece.row,
                is_transposed=(fits[0] if len(fits) == 1 else square) == IN_OUT,
            )
            self._tensors[piece.name] = self._sum(weight, delta)

    def _add_whole(self) -> None:
        """Use the tensors that the adapter stores whole."""
        for name, spec in self.adapter.whole.items():
            self._need_base(spec, "stored whole")
            known = self._names.get(name, name)
            self._tensors[known] = replace(spec, name=known)
        head = separate_head(
            self.adapter, self.base.tensors, self._tensors, self._names, self._head
        )
        if head is not None:
            self._tensors[head.name] = head

    def _add_rows(self) -> None:
        """Replace trained rows of tokens; a head that base ties has those of its embedding."""
        named = {self._name(f"{m}.weight", s): (m, s) for m, s in self.adapter.rows.items()}
        _, embedding = named.get(self._head.embedding or "", (None, None))
        for name, (_, spec) in list(named.items()):
            if embedding is not None and self._is_tied(name) and same_values(spec, embedding):
                del named[name]
        for name, (module, spec) in named.items():
            self._need_base(spec, "rows of tokens")
            self._tensors[name] = replace_rows(
                self.adapter, module, spec, self._tensor(name), self._errors.misfit
            )

    def _is_tied(self, name: str) -> bool:
        """Whether this is a head that base does not store, because it is the embedding."""
        return self._head.state is HeadState.TIED and self._head.name is None and is_head(name)

    def _resized(self) -> tuple[int, int] | None:
        """The numbers of rows of base's embedding and of the new one, if they differ."""
        name = self._head.embedding
        if name is None:
            return None
        before, after = (each[name].shape[0] for each in (self.base.tensors, self._tensors))
        return (before, after) if before != after else None

    def _name(self, name: str, spec: TensorSpec) -> str:
        """Base's name of a tensor."""
        found = self._names.get(name)
        if found is None:
            raise self._errors.unknown(spec, name)
        return found

    def _tensor(self, name: str) -> StoredTensor:
        """The tensor so far; for a head that base ties, its embedding under the head's name."""
        found = self._tensors.get(name)
        if found is None:
            assert is_head(name)
            found = replace(self.base.tensors[self._head.embedding or ""], name=name)
        return found

    def _need_base(self, spec: TensorSpec, what: str) -> None:
        if not self.is_base:
            raise self._errors.needs_base(spec, what)

    def _parameters(self, module: str, found: list[Factors]) -> list[tuple[str, Factors]]:
        """The tensors of a module that its factors change."""
        weight = self._names.get(f"{module}.weight")
        if len(found) == 1 and weight is not None:
            return [(weight, found[0])]
        known = [
            self._names[name]
            for parameter in self.adapter.config.parameters
            for name in [f"{module}.{parameter.rpartition('.')[2]}"]
            if name in self._names
        ]
        first = found[0].a
        assert first is not None
        if not known:
            raise self._errors.unknown(first, module)
        shapes = {name: self.base.tensors[name].shape for name in known}
        return [(self._fitting(factors, shapes, found), factors) for factors in found]

    def _fitting(
        self, factors: Factors, known: Mapping[str, tuple[int, ...]], found: list[Factors]
    ) -> str:
        """The one parameter of a module whose shape its factors fit."""
        assert factors.a is not None
        fits = fitting(factors, found, known)
        if len(fits) == 1:
            return fits[0]
        what = "fits none" if not fits else "fits more than one"
        raise self._errors.misfit(factors.a, f"{what} of {', '.join(known)}")

    def _adapt(self, name: str, factors: Factors) -> StoredTensor:
        """A tensor with its Δ."""
        weight = self._tensor(name)
        a, b = factors.a, factors.b
        assert a is not None
        assert b is not None
        is_transposed = self._layout(name, factors, weight.shape) == IN_OUT
        scaling = self._scaling(name, factors, weight.shape)
        if is_fused(factors, weight.shape):
            delta = low_rank.experts(name, weight.shape, a, b, scaling, is_transposed=is_transposed)
        else:
            make = low_rank.transposed if is_transposed else low_rank.linear
            delta = make(name, weight.shape, a, b, scaling)
        if factors.magnitude is None:
            return self._sum(weight, delta)
        return self._dora(weight, delta, factors.magnitude, by_column=is_transposed)

    def _scaling(self, name: str, factors: Factors, shape: tuple[int, ...]) -> float:
        """The scaling of factors, whose rank must be that of the config."""
        fused, a, config = is_fused(factors, shape), factors.a, self.adapter.config
        assert a is not None
        rank = a.shape[0] // (shape[0] if fused else 1)
        key = self._key(name, factors, fused=fused)
        if rank != config.rank_of(key):
            problem = f"has rank {rank}, and {ADAPTER_CONFIG} says {config.rank_of(key)}"
            raise odd(self.adapter.place, a.name, problem)
        return config.scaling_of(key)

    def _key(self, name: str, factors: Factors, *, fused: bool) -> str:
        """The name that the config's patterns are matched against."""
        full = f"{factors.module}.{name.rpartition('.')[2]}"
        parameters = self.adapter.config.parameters
        named = any(full == each or full.endswith(f".{each}") for each in parameters)
        return full if fused or named else factors.module

    def _layout(self, name: str, factors: Factors, shape: tuple[int, ...]) -> str:
        found = layouts(factors, shape)
        a, b = factors.a, factors.b
        assert a is not None
        assert b is not None
        if not found:
            problem = f"and {b.shape} make no {shape}, the shape of {name} in {self.base.role}"
            raise self._errors.misfit(a, f"{a.shape} {problem}")
        return found[0] if len(found) == 1 else self._layout_of_square(name, factors, shape)

    def _layout_of_square(self, name: str, factors: Factors, shape: tuple[int, ...]) -> str:
        fused = is_fused(factors, shape)
        prefix = name.rpartition(".")[0] + "."
        for other in self.adapter.factors[factors.module] if fused else ():
            # The other parameters of the module are stored in the same way.
            for parameter in self.adapter.config.parameters:
                spec = self.base.tensors.get(prefix + parameter.rpartition(".")[2])
                found = [] if spec is None else layouts(other, spec.shape)
                if len(found) == 1:
                    return found[0]
        return layout_of_square(
            factors.module,
            self.base.config,
            fan_in_fan_out=self.adapter.config.fan_in_fan_out,
            fused=fused,
        )

    def _dora(
        self,
        weight: StoredTensor,
        delta: low_rank.LowRank,
        magnitude: TensorSpec,
        *,
        by_column: bool,
    ) -> StoredTensor:
        self._need_base(magnitude, "DoRA")
        outputs = delta.columns if by_column else delta.rows
        if magnitude.elements != outputs:
            problem = f"has the shape {magnitude.shape}, expected ({outputs},)"
            raise odd(self.adapter.place, magnitude.name, problem)
        made = Dora(
            weight.name, "F64", weight.shape, magnitude.shard, weight, delta, magnitude, by_column
        )
        return self._sum(weight, made)

    def _sum(self, weight: StoredTensor, delta: StoredTensor) -> StoredTensor:
        """A tensor and its Δ, in the tensor's dtype if it is base's; else Δ would lose digits."""
        own = weight.shard == self.adapter.shard and weight.dtype != "F64"
        dtype = "F32" if own else weight.dtype
        return Adapted(weight.name, dtype, weight.shape, weight.shard, weight, delta)

    def _add_bias(self, name: str | None, factors: Factors) -> StoredTensor:
        spec = factors.bias
        assert spec is not None
        if name is None:
            raise self._errors.unknown(spec, f"{factors.module}.bias")
        bias = self._tensors[name]
        if spec.shape != bias.shape:
            raise self._errors.misfit(spec, f"has the shape {spec.shape}, expected {bias.shape}")
        scaling = self.adapter.config.scaling_of(factors.module)
        delta = Scaled(name, "F64", bias.shape, spec.shard, spec, scaling)
        return Adapted(name, bias.dtype, bias.shape, bias.shard, bias, delta)
