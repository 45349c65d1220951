"""The README of a folder that diffxfer writes: a model card for people and for the Hub."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from diffxfer.checkpoints.hub.repo_ids import read_hub_id
from diffxfer.diffs.artifact.kept import by_layer, share
from diffxfer.diffs.artifact.packed_card import how_to_read, plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diffxfer.diffs.artifact.manifest import Manifest, SourceEntry


_GRAFT = """\
# {title}

A graft: what fine-tuning did to an old base model, carried over to its successor without training
(diff-vector transfer, [arXiv 2503.20110](https://arxiv.org/abs/2503.20110)).

    {formula}
"""

_TUNED = """\
# {title}

A model whose parameters were all trained further on the rows named below.
"""

_DIFF = """\
# {title}

A diff vector: Δ = finetuned − base, what fine-tuning did to a base model, tensor by tensor
(also called a task vector; [arXiv 2503.20110](https://arxiv.org/abs/2503.20110)).
It is not a model. Graft it on a successor of the base:

    diffxfer apply {diff} TARGET -o OUT{brings}
"""

_ADAPTER = """\
# {title}

A LoRA adapter for PEFT: {formula}.
"""

HUB = "https://huggingface.co"
"""The site of links in a card, whichever mirror it is uploaded to."""

KINDS = {
    "graft": ("transformers", "merge", ("merge",), _GRAFT),
    "tuned": ("transformers", "finetune", ("sft",), _TUNED),
    "diff": ("diffxfer", "", ("diff-vector", "task-vector"), _DIFF),
    "adapter": ("peft", "adapter", ("lora",), _ADAPTER),
}
"""By kind of folder: library name, relation to the base model, tags and text."""

_ORDER = ("target", "model", "diff vector", "finetuned", "base", "teacher")
_NO_WEIGHTS = "teacher"
"""A source whose weights are not part of the folder."""

_UNNAMED = {"adapter": ("finetuned", "adapter")}
"""Sources of a kind of folder that are no base model of it."""

_LICENSED_AS = {
    "graft": ("target",),
    "tuned": ("model",),
    "diff": ("finetuned", "base"),
    "adapter": ("finetuned", "adapter", "base"),
}
_URL = re.compile(r"https?://[^\s<>\"]+")


def write_card(title: str, manifest: Manifest) -> bytes:
    """The card of a folder.

    Args:
        title: the folder's name.
        manifest: its manifest.

    Returns:
        The README's bytes: YAML front matter and Markdown.
    """
    library, relation, _, text = KINDS[manifest.kind]
    lines = ["---", f"library_name: {library}", "tags:"]
    lines += [f"- {tag}" for tag in tags(manifest)]
    bases = base_models(manifest)
    if bases:
        lines += ["base_model:", *(f"- {name}" for name in bases)]
        lines += [f"base_model_relation: {relation}"] if relation else []
    # Every JSON string is a valid YAML string.
    for key, value in license_fields(manifest).items():
        lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}")
    lines += ["---", ""]
    body = text.format(
        title=plain(title), formula=formula(manifest), diff="DIFF", brings=brings(manifest)
    )
    how = how_to_read(manifest)
    packed = f"\n{how}" if how else ""
    return ("\n".join(lines) + body + details(manifest) + packed).encode()


def tags(manifest: Manifest) -> list[str]:
    """The tags of a folder on the Hub.

    Args:
        manifest: its manifest.
    """
    kind = KINDS[manifest.kind][2]
    if manifest.command.get("objective") == "mlm":
        kind = ("fill-mask",)
    return ["diffxfer", *kind]


def brings(manifest: Manifest) -> str:
    """The further options of `diffxfer apply` for a diff vector, each after a space.

    Args:
        manifest: its manifest.
    """
    return " --added bring" if manifest.kind == "diff" and manifest.added_tensors else ""


def base_models(manifest: Manifest) -> list[str]:
    """The models on the Hub that a folder was made from, each once, the target first.

    Args:
        manifest: its manifest. A diff vector is replaced by the models that it was made from.
    """
    found = [
        source.name
        for role, source in sources_in_order(manifest)
        if role not in (_NO_WEIGHTS, *_UNNAMED.get(manifest.kind, ()))
        and not source.made_from
        and on_hub(source)
    ]
    return list(dict.fromkeys(found))


def sources_in_order(manifest: Manifest) -> Iterator[tuple[str, SourceEntry]]:
    """Every source with its role; the sources of a diff vector follow it.

    Args:
        manifest: the folder's manifest.
    """

    def place(item: tuple[str, SourceEntry]) -> int:
        return _ORDER.index(item[0]) if item[0] in _ORDER else len(_ORDER)

    for role, source in sorted(manifest.sources.items(), key=place):
        yield role, source
        yield from sorted(source.made_from.items(), key=place)


def on_hub(source: SourceEntry) -> bool:
    """Whether a source is a model on the Hub.

    Args:
        source: a manifest's entry; it is not trusted, so its name is checked to be a Hub id.
    """
    return bool(source.revision) and read_hub_id(source.name) is not None


def formula(manifest: Manifest) -> str:
    """The formula of a graft, or what an adapter approximates, in one line.

    Args:
        manifest: its manifest.
    """
    if manifest.kind == "adapter":
        if manifest.factors is None:
            return "the adapter named below, moved to another base"
        kept = share(manifest.factors)
        return (
            f"finetuned − base, approximated by low rank; it keeps {kept:.2%} of its squared norm"
        )
    delta = "finetuned − base" if "base" in manifest.sources else "diff vector"
    return f"target + {manifest.command.get('alpha', 1.0)} · ({delta})"


def license_fields(manifest: Manifest) -> dict[str, str]:
    """The licence of a folder for its front matter: the target's, or finetuned's for a diff vector.

    Args:
        manifest: the folder's manifest.

    Returns:
        ``license``, ``license_name`` and ``license_link``, as far as they are known.
    """
    role = licensed_by(manifest)
    source = None if role is None else manifest.sources[role]
    if source is None or source.license is None:
        return {}
    stated = source.license
    fields = {
        "license": stated.license,
        "license_name": stated.license_name,
        "license_link": _link(stated.license_link, source, manifest),
    }
    return {key: value for key, value in fields.items() if value}


def licensed_by(manifest: Manifest) -> str | None:
    """The role whose card states the licence of a folder, None if none does.

    Args:
        manifest: the folder's manifest.
    """
    for role in _LICENSED_AS[manifest.kind]:
        source = manifest.sources.get(role)
        if source is not None and source.license is not None:
            return role
    return None


def _link(link: str | None, source: SourceEntry, manifest: Manifest) -> str | None:
    """The link to a licence, valid from this folder; None if it is not known."""
    if link is None or _URL.fullmatch(link):
        return link
    for name in (link, f"companions/{link}"):
        if name in manifest.files:
            return name
    if source.revision is None or not re.fullmatch(r"\w[\w./-]*", link):
        return None
    return f"{HUB}/{source.name}/blob/{source.revision}/{link}"


def details(manifest: Manifest) -> str:
    """How a folder was made: a table of its inputs and options.

    Args:
        manifest: its manifest.
    """
    rows = [("command", f"diffxfer {manifest.command.get('verb', '')}")]
    for role, source in manifest.sources.items():
        rows.append((role, _described(source)))
        rows += [
            (f"{role}: {plain(inner)}", _described(made))
            for inner, made in source.made_from.items()
        ]
    options = [
        (name, _value(value))
        for name, value in manifest.command.items()
        if name != "verb" and value not in ([], {})
    ]
    rows += [*options, ("written by", f"diffxfer {manifest.diffxfer_version}")]
    table = "".join(f"| {name} | {plain(value)} |\n" for name, value in rows)
    closing = "\nChecksums of every tensor, and of every other file, are in `diffxfer.json`.\n"
    return f"\n| | |\n|---|---|\n{table}{_kept(manifest)}{closing}"


def _kept(manifest: Manifest) -> str:
    """What an adapter keeps of each layer."""
    if not manifest.factors:
        return ""
    rows = "".join(
        f"| {plain(layer.layer)} | {layer.kept:.2%} | {layer.ranks[0]} to {layer.ranks[1]} |"
        f" {layer.bytes:,} | {layer.full_bytes:,} |\n"
        for layer in by_layer(manifest.factors)
    )
    head = "| layer | of ‖Δ‖² kept | rank | bytes | bytes of the whole Δ |\n|---|---|---|---|---|\n"
    return f"\nBy layer (rank 0: stored whole or left out):\n\n{head}{rows}"


def _described(source: SourceEntry) -> str:
    """Its name, and what its tensors were decoded from."""
    formats = ", ".join(source.decoded_from)
    return f"{_named(source)}, decoded from {formats}" if formats else _named(source)


def _named(source: SourceEntry) -> str:
    return source.name if source.revision is None else f"{source.name}@{source.revision}"


def _value(value: str | float | list[str] | Mapping[str, float]) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={number}" for key, number in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)
