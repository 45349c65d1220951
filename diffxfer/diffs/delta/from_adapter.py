"""A LoRA adapter as a fine-tuned checkpoint: base's tensors, some of them with a stored Δ.

The result stands for the model that `merge_and_unload` would make, without making it: every tensor
is computed from its factors when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.config import ADAPTER_WEIGHTS
from diffxfer.checkpoints.encodings import low_rank
from diffxfer.checkpoints.encodings.adapted import Adapted, Dora, ReplacedRows, Scaled
from diffxfer.checkpoints.header import short
from diffxfer.checkpoints.reader import Checkpoint
from diffxfer.diffs.delta.adapted_folder import adapted_folder, has_tokenizer
from diffxfer.diffs.delta.adapter_layouts import (
    IN_OUT,
    fitting,
    is_fused,
    layout_of_square,
    layouts,
)
from diffxfer.diffs.matching.names import is_head, pair_names
from diffxfer.diffs.matching.ties import HeadState, find_head
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.adapters.adapter import Adapter, Factors
    from diffxfer.checkpoints.stored import StoredTensor, TensorSpec

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
    _names: Mapping[str, str] = field(default_factory=dict)

    def run(self) -> Checkpoint:
        adapter, base = self.adapter, self.base
        tensors: dict[str, StoredTensor] = dict(base.tensors)
        self._names = self._pair()
        for module, found in adapter.factors.items():
            for name, factors in self._parameters(module, found):
                tensors[name] = self._adapt(name, factors, tensors)
                if factors.bias is not None:
                    bias = self._name(f"{module}.bias", factors.bias)
                    tensors[bias] = self._add_bias(bias, factors, tensors)
        for name, spec in adapter.whole.items():
            self._need_base(spec, "stored whole")
            known = self._names.get(name, name)
            tensors[known] = replace(spec, name=known)
        for module, spec in adapter.rows.items():
            self._need_base(spec, "rows of tokens")
            name = self._name(f"{module}.weight", spec)
            tensors[name] = self._replace_rows(name, module, spec, tensors[name])
        weights = replace(
            base.weights,
            folder=adapted_folder(adapter.shard, base.folder),
            tensors=tensors,
            shards=(adapter.shard,),
            formats=(LORA,),
        )
        return Checkpoint("finetuned", weights, base.config)

    def _pair(self) -> dict[str, str]:
        """Base's name of each tensor that the adapter changes."""
        adapter = self.adapter
        wanted = [f"{module}.{leaf}" for module in adapter.factors for leaf in ("weight", "bias")]
        wanted += [f"{module}.weight" for module in adapter.rows]
        wanted += [
            f"{module}.{parameter.rpartition('.')[2]}"
            for module in adapter.factors
            for parameter in adapter.config.parameters
        ]
        names = dict.fromkeys((*wanted, *adapter.whole))
        return pair_names(names, self._known(), ("the adapter", self.base.role))

    def _known(self) -> dict[str, None]:
        """Base's names, with the head that a tied embedding stands for."""
        names = dict.fromkeys(self.base.tensors)
        head = find_head(self.base.tensors, self.base.config)
        if head.state is HeadState.TIED and head.name is None:
            names["lm_head.weight"] = None
        return names

    def _odd(self, spec: TensorSpec, problem: str) -> CheckpointError:
        where = f"{self.adapter.place.label}/{ADAPTER_WEIGHTS}"
        stated = self.adapter.config.base
        made = f", which was made for {stated}" if stated else ""
        return CheckpointError(
            where, f"{short(spec.name)} {problem}", f"give the base of this adapter{made}"
        )

    def _name(self, name: str, spec: TensorSpec) -> str:
        """Base's name of a tensor."""
        found = self._names.get(name)
        if found is None:
            raise self._odd(spec, f"changes {name}, and {self.base.role} has no such tensor")
        return found

    def _tensor(self, name: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
        """Base's tensor; for a head that base ties, its embedding under the head's name."""
        found = tensors.get(name)
        if found is None:
            assert is_head(name)
            head = find_head(self.base.tensors, self.base.config)
            found = replace(self.base.tensors[head.embedding or ""], name=name)
        return found

    def _need_base(self, spec: TensorSpec, what: str) -> None:
        if self.is_base:
            return
        raise CheckpointError(
            f"{self.adapter.place.label}/{ADAPTER_WEIGHTS}",
            f"{short(spec.name)} ({what}) has a Δ that depends on the adapter's base",
            "give base too: diffxfer transfer ADAPTER BASE TARGET -o OUT",
        )

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
            raise self._odd(first, f"changes {module}, and {self.base.role} has no such tensor")
        return [(self._fitting(factors, known, found), factors) for factors in found]

    def _fitting(self, factors: Factors, known: list[str], found: list[Factors]) -> str:
        """The one parameter of a module whose shape its factors fit."""
        assert factors.a is not None
        fits = fitting(factors, found, {name: self.base.tensors[name].shape for name in known})
        if len(fits) == 1:
            return fits[0]
        what = "fits none" if not fits else "fits more than one"
        raise self._odd(factors.a, f"{what} of {', '.join(known)}")

    def _adapt(
        self, name: str, factors: Factors, tensors: Mapping[str, StoredTensor]
    ) -> StoredTensor:
        """A tensor with its Δ."""
        weight = self._tensor(name, tensors)
        a, b = factors.a, factors.b
        assert a is not None
        assert b is not None
        layout = self._layout(name, factors, weight.shape)
        fused = is_fused(factors, weight.shape)
        rank = a.shape[0] // (weight.shape[0] if fused else 1)
        config = self.adapter.config
        key = self._key(name, factors, fused=fused)
        if rank != config.rank_of(key):
            stated = config.rank_of(key)
            raise self._odd(a, f"has rank {rank}, and adapter_config.json says {stated}")
        scaling = config.scaling_of(key)
        is_transposed = layout == IN_OUT
        if fused:
            delta = low_rank.experts(name, weight.shape, a, b, scaling, is_transposed=is_transposed)
        else:
            make = low_rank.transposed if is_transposed else low_rank.linear
            delta = make(name, weight.shape, a, b, scaling)
        if factors.magnitude is None:
            return Adapted(name, weight.dtype, weight.shape, weight.shard, weight, delta)
        return self._dora(weight, delta, factors.magnitude, by_column=is_transposed)

    def _key(self, name: str, factors: Factors, *, fused: bool) -> str:
        """The name that the config's patterns are matched against."""
        return f"{factors.module}.{name.rpartition('.')[2]}" if fused else factors.module

    def _layout(self, name: str, factors: Factors, shape: tuple[int, ...]) -> str:
        found = layouts(factors, shape)
        a, b = factors.a, factors.b
        assert a is not None
        assert b is not None
        if not found:
            problem = f"and {b.shape} make no {shape}, the shape of {name} in {self.base.role}"
            raise self._odd(a, f"{a.shape} {problem}")
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
            raise self._odd(magnitude, f"has the shape {magnitude.shape}, expected ({outputs},)")
        made = Dora(
            weight.name, "F64", weight.shape, magnitude.shard, weight, delta, magnitude, by_column
        )
        return Adapted(weight.name, weight.dtype, weight.shape, weight.shard, weight, made)

    def _add_bias(
        self, name: str, factors: Factors, tensors: Mapping[str, StoredTensor]
    ) -> StoredTensor:
        bias, spec = tensors[name], factors.bias
        assert spec is not None
        if spec.shape != bias.shape:
            raise self._odd(spec, f"has the shape {spec.shape}, expected {bias.shape}")
        scaling = self.adapter.config.scaling_of(factors.module)
        delta = Scaled(name, "F64", bias.shape, spec.shard, spec, scaling)
        return Adapted(name, bias.dtype, bias.shape, bias.shard, bias, delta)

    def _replace_rows(
        self, name: str, module: str, spec: TensorSpec, weight: StoredTensor
    ) -> StoredTensor:
        found = self.adapter.config.token_indices
        keys = [key for key in found if key and (module == key or module.endswith(f".{key}"))]
        indices = found.get(keys[0] if keys else "", ())
        expected = (len(indices), *weight.shape[1:])
        if spec.shape != expected or len(set(indices)) != len(indices):
            problem = f"has the shape {spec.shape}, expected {expected} for the trained tokens"
            raise self._odd(spec, problem)
        if indices and max(indices) >= weight.shape[0]:
            problem = f"has a row for token {max(indices)}, and {name} has {weight.shape[0]} rows"
            raise self._odd(spec, problem)
        order = tuple(sorted(range(len(indices)), key=indices.__getitem__))
        dtype = "F64" if "F64" in (spec.dtype, weight.dtype) else "F32"
        ordered = tuple(indices[i] for i in order)
        return ReplacedRows(name, dtype, weight.shape, weight.shard, weight, spec, ordered, order)
