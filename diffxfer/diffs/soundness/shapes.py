"""Comparing the sizes in a config with the shapes of the tensors.

A simple rule would refuse many sound layouts, so each rule needs more than one sign. Mllama's
embedding has eight more rows than its vocabulary, ALBERT's and OPT's are narrower than their
layers, DeepSeek V3 has one more layer than its config counts. A model with custom code may
interpret its config differently, so errors become warnings there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.stored import FLOATS
from diffxfer.diffs.matching.names import is_in_block, is_known_vocabulary
from diffxfer.diffs.soundness.finding import Finding
from diffxfer.diffs.soundness.model import numbers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diffxfer.diffs.soundness.finding import Severity
    from diffxfer.diffs.soundness.model import Model

_CONFIG = "config.json"
_AGAIN = "or save the model again with save_pretrained"
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
# The embeddings of ALBERT, OPT, ELECTRA and others have a separate width.
_OWN_WIDTH = re.compile(r"emb\w*_(?:size|dim|rank)$|^(?:emb_dim|d_emb\w*)$")
_OTHER_SENSES = re.compile(
    r"vis|image|img|audio|speech|video|siglip|clip|projector|perceiver|resampler|abstractor|merger"
    r"|talker|token2wav|code2wav|mtp|nextn|medusa|eagle"
)
_LAYER = re.compile(r"^(\D*?(?:layers?|blocks?|(?<![^.])h))\.(\d+)\.")
# Models with several kinds of attention, each with its own number of heads.
_OWN_HEADS = re.compile(r"linear_|qk_|v_head|global_|swa_|sliding_head|lora|per_layer|gate|query")
_FEWER = ("num_hidden_groups", "num_loops", "num_recurrences", "share_layers")


def shape_findings(model: Model) -> Iterator[Finding]:
    """Find sizes in the config that differ from the tensors' shapes.

    Args:
        model: a whole model.
    """
    if not any(map(is_in_block, model.tensors)):
        return  # without layers it is not a whole model, and its config may describe another part
    severity: Severity = "warning" if has_code(model.config) else "error"
    yield from _vocabulary(model, severity)
    yield from _width(model, severity)
    yield from _layers(model, severity)
    yield from _heads(model, severity)


def has_code(config: Mapping[str, Any]) -> bool:
    """Whether a model has custom code."""
    return "auto_map" in config


def _vocabulary(model: Model, severity: Severity) -> Iterator[Finding]:
    stated = model.text.get("vocab_size", model.config.get("vocab_size"))
    if model.embedding is not None and model.embedding.rows == stated:
        return
    rows = {
        spec.shape[0]: name
        for name, spec in model.tensors.items()
        if is_known_vocabulary(name) and len(spec.shape) == 2
    }
    if type(stated) is not int or model.embedding is None or not rows:
        return
    sizes = set(numbers(model.config, "vocab_size"))
    multiple = model.text.get("pad_vocab_size_multiple")
    if type(multiple) is int and multiple > 0:
        sizes.add(-(-stated // multiple) * multiple)
    sizes |= {
        size + more for size in sizes for more in numbers(model.config, "additional_vocab_size")
    }
    if sizes & {*rows, model.embedding.rows}:
        return
    yield Finding(
        # The config may state the head's size, and a bare model has no head: the embeddings of
        # Mllama and Moshi have a few more rows.
        "warning" if _is_bare(model) else severity,
        _CONFIG,
        f"vocab_size {stated:,}",
        f"does not match the weights: {model.rows}",
        f"set vocab_size to {model.embedding.rows} there, {_AGAIN}",
    )


def _is_bare(model: Model) -> bool:
    named = model.config.get("architectures")
    names = named if isinstance(named, list) else []
    return any(isinstance(name, str) and name.endswith("Model") for name in names)


def _width(model: Model, severity: Severity) -> Iterator[Finding]:
    embedding = model.embedding
    key = next((key for key in _WIDTHS if type(model.text.get(key)) is int), None)
    if key is None or embedding is None or model.tensors[embedding.name].dtype not in FLOATS:
        return
    stated = model.text[key]
    if stated == embedding.width:
        return
    own = any(_OWN_WIDTH.search(k) and v == embedding.width for k, v in model.text.items())
    norms = {s.shape for name, s in model.tensors.items() if re.search("norm|ln", name, re.I)}
    if own or not norms or (stated,) in norms:
        return
    yield Finding(
        severity,
        _CONFIG,
        f"{key} {stated:,}",
        f"does not match the weights: {embedding.name} has width {embedding.width:,}",
        f"set {key} to {embedding.width} there, {_AGAIN}",
    )


def _layers(model: Model, severity: Severity) -> Iterator[Finding]:
    key = next((key for key in _LAYERS if type(model.text.get(key)) is int), None)
    if key is None or _has_two_stacks(model):
        return
    stacks: dict[str, int] = defaultdict(int)
    for name in model.tensors:
        found = _LAYER.match(name)
        # Longer numbers are not layers, and slow to parse.
        if found is not None and not _OTHER_SENSES.search(found[1]) and len(found[2]) < 7:
            stacks[found[1]] = max(stacks[found[1]], int(found[2]) + 1)
    stated, counts = model.text[key], set(stacks.values())
    more = sum(numbers(model.text, "nextn_predict_layers"))
    # EfficientNet and HRM count their layers differently.
    if model.embedding is None or len(stacks) != 1 or counts & {stated, stated + more}:
        return
    ((most, count),) = stacks.items()
    what = f"{key} {stated:,}"
    if count < stated and not any(fewer in model.text for fewer in _FEWER):
        problem = f"is more than the layers in the weights: {most} ends with layer {count - 1}"
        remedy = (
            f"set {key} to {count} there if it has no more, or download or save the model again"
        )
        yield Finding(severity, _CONFIG, what, problem, remedy)
    elif count > stated:
        problem = f"leaves out layers in the weights: {most} ends with layer {count - 1}"
        remedy = f"set {key} to {count} there to use them"
        yield Finding("warning", _CONFIG, what, problem, remedy)


def _has_two_stacks(model: Model) -> bool:
    """Whether it has an encoder and a decoder, whose layers are counted by separate keys."""
    parts = (model.config, model.text)
    return any(part.get("is_encoder_decoder") or "encoder_layers" in part for part in parts)


def _heads(model: Model, severity: Severity) -> Iterator[Finding]:
    """Check head counts if every layer has query and key projections of the same shape."""
    if _has_two_stacks(model) or any(map(_OWN_HEADS.search, model.text)):
        return
    for key, projection in (("num_attention_heads", "q_proj"), ("num_key_value_heads", "k_proj")):
        heads, rows = model.text.get(key), _rows_of(model, projection)
        if type(heads) is not int or heads < 1 or rows is None:
            continue
        size = _head_size(model)
        # Qwen3-Next's query projection includes a gate of the same size.
        twice = projection == "q_proj" and size is not None and rows == 2 * heads * size
        if (rows % heads == 0 and size in (None, rows // heads)) or twice:
            continue
        of = "" if size is None else f" of {size}"
        fitting = rows // size if size is not None and rows % size == 0 else None
        remedy = f"set {key} to {fitting} there" if fitting else "correct it there"
        yield Finding(
            severity,
            _CONFIG,
            f"{key} {heads:,}",
            f"does not fit the weights: {rows:,} rows of {projection} are not {heads:,} heads{of}",
            f"{remedy}, {_AGAIN}",
        )


def _head_size(model: Model) -> int | None:
    """The size of a head, if it is stated or determined; None if any size is possible."""
    stated = model.text.get("head_dim")
    if type(stated) is int and stated > 0:
        return stated
    queries, heads = _rows_of(model, "q_proj"), model.text.get("num_attention_heads")
    if queries is None or type(heads) is not int or heads < 1 or queries % heads:
        return None
    return queries // heads


def _rows_of(model: Model, projection: str) -> int | None:
    """The rows of a projection if they are the same in all layers of the language model."""
    end = f"self_attn.{projection}.weight"
    rows = {
        name: spec.shape[0]
        for name, spec in model.tensors.items()
        if name.endswith(end)
        and not _OTHER_SENSES.search(name)
        and len(spec.shape) == 2
        and spec.dtype in FLOATS
    }
    # An audio codec or encoder has layers too, but not beside the token embedding.
    embedding = "" if model.embedding is None else model.embedding.name
    body = "".join(f"{segment}." for segment in embedding.split(".")[:-2])
    if not any(name.startswith(body) for name in rows) or len({*rows.values()}) != 1:
        return None
    return next(iter(rows.values()))
