"""What becomes of each tensor of Δ in an adapter: factors, a whole tensor, or nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from diffxfer.diffs.delta.difference_rows import difference_runs
from diffxfer.diffs.matching.names import (
    is_embedding,
    is_head,
    is_head_name,
    is_in_block,
    is_known_vocabulary,
)
from diffxfer.diffs.matching.ties import HeadState, has_head_for_words
from diffxfer.errors import OptionError
from diffxfer.streaming.plan import RunKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.lora.names import PeftNames
    from diffxfer.diffs.matching.match import Difference
    from diffxfer.streaming.plan import Run

RESTS = ("modules_to_save", "lora", "drop")
_TABLE = re.compile(r"(?:^|[._])(?:embed|wpe|wte|embedding|embeddings|relative_attention_bias)")
"""In the last two parts of a name: an embedding, of positions for example."""
_ROUTER = re.compile(r"(?:^|\.)(?:gate|router|shared_expert_gate)$")
"""Modules that choose experts: small, and no linear layers in transformers."""


class Form(Enum):
    """The form of a tensor of Δ in an adapter."""

    FACTORS = "factors"
    """``lora_A`` and ``lora_B``."""
    EMBEDDING = "embedding factors"
    """``lora_embedding_A`` and ``lora_embedding_B``."""
    WHOLE = "whole"
    """Finetuned's tensor, in a module of ``modules_to_save``."""
    BIAS = "bias"
    """Finetuned's bias of a linear layer."""
    DROPPED = "dropped"
    """Nothing."""
    EXPERT = "expert"
    """A part of a parameter with the experts of a layer, which has factors."""
    IMPOSSIBLE = "impossible"
    """Nothing; the adapter cannot be made unless this Δ is zero."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of Δ, and its form.

    Attributes:
        difference: the tensor of Δ.
        name: its name in the model that PEFT loads; for an expert's, that on disk.
        form: its form.
        transposed: for factors, whether the layer stores its weight as (in, out).
        runs: how its rows pair.
        why: the reason for another form than the user asked for.
        as_parameter: whether PEFT is to find its factors by the parameter, not by the module.
        keeper: the module that is stored whole because of it, if that is not its own.
        shared: whether it is used in several places, as an embedding that is the head too.
    """

    difference: Difference
    name: str
    form: Form
    transposed: bool
    runs: tuple[Run, ...]
    why: str = ""
    as_parameter: bool = False
    keeper: str = ""
    shared: bool = False

    @property
    def module(self) -> str:
        """The name of its module."""
        return self.name.rpartition(".")[0]

    @property
    def seed(self) -> str:
        """Decides the random start of its decomposition."""
        return self.difference.name

    @property
    def dtype(self) -> str:
        """Finetuned's dtype, as safetensors names it."""
        return self.difference.sources[0].dtype

    @property
    def elements(self) -> int:
        """Its number of elements."""
        return self.difference.sources[0].elements

    @property
    def stored_bytes(self) -> int:
        """The bytes to read from finetuned."""
        return self.difference.sources[0].stored_bytes

    @property
    def in_place(self) -> bool:
        """Whether finetuned's rows are base's rows of the same number."""
        return all(run.kind is RunKind.GRAFT and run.rows[0] == run.rows[1] for run in self.runs)


def check_rest(rest: str) -> None:
    """Refuse an unknown value of ``--rest``.

    Raises:
        OptionError: if it is unknown.
    """
    if rest not in RESTS:
        raise OptionError("--rest", f"{rest!r} is unknown", f"use one of {', '.join(RESTS)}")


def sort_parts(
    source: Source, base: Mapping[str, StoredTensor], rest: str, names: PeftNames, *, tied: bool
) -> list[Part]:
    """Sort the tensors of Δ.

    Args:
        source: finetuned and base.
        base: base's tensors.
        rest: what to do with tensors other than the weights of linear layers.
        names: the names that PEFT uses.
        tied: whether the embedding is the head too.
    """
    layouts = _layouts(base)
    is_conv = any(layouts.values())
    parts = []
    for difference in source.match.differences:
        theirs = difference.sources[1].name
        own = is_head(difference.name) and not is_head(theirs)
        name = difference.name if own else theirs
        transposed = layouts.get(name, is_conv)
        runs = difference_runs(source, difference)
        part = Part(difference, names.of(name), Form.FACTORS, transposed, runs)
        if names.is_stacked(name):
            parts.append(replace(part, name=name, form=Form.EXPERT))
        elif not names.has(name):
            why = "transformers does not load it as a tensor of its own"
            parts.append(replace(part, form=Form.IMPOSSIBLE, why=why))
        else:
            shared = (tied and is_embedding(part.name)) or names.is_shared(name)
            parts.append(_formed(replace(part, shared=shared), source, rest))
    return parts


def _layouts(base: Mapping[str, StoredTensor]) -> dict[str, bool]:
    """Whether a layer with a bias stores its weight as (in, out), as the bias's size says."""
    found = {}
    for name, spec in base.items():
        bias = base.get(f"{name.removesuffix('weight')}bias")
        if name.endswith(".weight") and len(spec.shape) == 2 and bias is not None:
            rows, columns = spec.shape
            if rows != columns and bias.shape in ((rows,), (columns,)):
                found[name] = bias.shape == (columns,)
    return found


def _formed(part: Part, source: Source, rest: str) -> Part:
    """A part with its form."""
    shape, leaf = part.difference.shape, part.name.rpartition(".")[2]
    if leaf not in ("weight", "bias"):
        drop = rest == "drop" and len(shape) < 3
        return replace(part, form=Form.DROPPED if drop else Form.IMPOSSIBLE)
    if _is_linear(part.difference, part.name):
        return part
    if rest == "drop":
        return replace(part, form=Form.DROPPED)
    if leaf == "bias" and _is_beside_factors(part, source):
        return replace(part, form=Form.BIAS if rest == "modules_to_save" else Form.DROPPED)
    if rest == "modules_to_save":
        return replace(part, form=Form.WHOLE)
    return _as_factors(part, source)


def _is_linear(difference: Difference, name: str) -> bool:
    """Whether a tensor is the weight of a linear layer, as far as its name and shape say."""
    module = name.rpartition(".")[0]
    return (
        len(difference.shape) == 2
        and not difference.vocabulary
        and not is_known_vocabulary(name)
        and not _TABLE.search(".".join(module.split(".")[-2:]))
        and not _ROUTER.search(module)
        and (is_in_block(name) or not is_head_name(name))
    )


def _is_beside_factors(part: Part, source: Source) -> bool:
    """Whether a bias belongs to a linear layer, not to a norm or a head."""
    wanted = f"{part.difference.name.removesuffix('bias')}weight"
    found = next((d for d in source.match.differences if d.name == wanted), None)
    return found is None or _is_linear(found, wanted)


def _as_factors(part: Part, source: Source) -> Part:
    """A part of the rest as factors, if it can have some."""
    if len(part.difference.shape) < 2:
        return replace(part, form=Form.DROPPED)
    if len(part.difference.shape) > 2:
        return replace(part, form=Form.WHOLE, why="it is no matrix")
    own = set(source.heads.values()) == {HeadState.OWN, HeadState.TIED}
    if own and is_known_vocabulary(part.name):
        why = "one model ties its head and the other does not"
        return replace(part, form=Form.WHOLE, why=why)
    if not part.in_place:
        why = "its rows are not those of base: tokens were added or moved"
        return replace(part, form=Form.WHOLE, why=why)
    if _ROUTER.search(part.module):
        return replace(part, form=Form.WHOLE, why="it chooses experts, and is no linear layer")
    if is_known_vocabulary(part.name) and is_head_name(part.name):
        return replace(part, form=Form.FACTORS, transposed=False)
    if is_head_name(part.name):
        return replace(part, form=Form.WHOLE, why="PEFT stores task heads whole")
    if part.shared:
        # PEFT 0.21 adds the Δ of tied factors twice when it merges, and that of untied ones to the
        # embedding alone when it runs.
        why = "the head is the embedding, and PEFT has no factors that fit both"
        return replace(part, form=Form.WHOLE, why=why)
    return replace(part, form=Form.EMBEDDING, transposed=True)


def is_shared(source: Source, configs: Iterable[Mapping[str, Any]]) -> bool:
    """Whether finetuned and base both use the embedding as their head.

    Args:
        source: finetuned and base.
        configs: their ``config.json``.
    """
    states = set(source.heads.values())
    if states == {HeadState.ABSENT}:  # GPT2LMHeadModel has the name of a bare model
        return all(
            has_head_for_words(config) and config.get("tie_word_embeddings", True)
            for config in configs
        )
    return states == {HeadState.TIED}
