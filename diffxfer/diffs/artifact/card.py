"""The README of a folder that we write: a model card for people and for the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.diffs.artifact.manifest import Manifest, SourceEntry

_GRAFT = """\
# {title}

A graft: what fine-tuning did to an old base model, carried over to its successor without training
(diff-vector transfer, [arXiv 2503.20110](https://arxiv.org/abs/2503.20110)).

    {formula}
"""

_TUNED = """\
# {title}

A model that was trained further, all its parameters, on the rows named below.
"""

_DIFF = """\
# {title}

A diff vector: Δ = finetuned − base, what fine-tuning did to a base model, tensor by tensor
(also called a task vector; [arXiv 2503.20110](https://arxiv.org/abs/2503.20110)).
It is not a model. Graft it on a successor of the base:

    diffxfer apply DIFF TARGET -o OUT
"""

# The library that opens a folder, what it is to its base model, tags and text.
_KINDS = {
    "graft": ("transformers", "merge", ("merge",), _GRAFT),
    "tuned": ("transformers", "finetune", ("sft",), _TUNED),
    "diff": ("diffxfer", "", ("diff-vector", "task-vector"), _DIFF),
}


def write_card(title: str, manifest: Manifest) -> bytes:
    """The card of a folder.

    Args:
        title: the folder's name.
        manifest: what it is.

    Returns:
        The README's bytes: YAML front matter and Markdown.
    """
    library, relation, tags, text = _KINDS[manifest.kind]
    lines = ["---", f"library_name: {library}", "tags:"]
    lines += [f"- {tag}" for tag in ("diffxfer", *tags)]
    hub = [
        source.name
        for role, source in manifest.sources.items()
        if source.revision is not None and role != "teacher"  # it gave no weights
    ]
    if hub:
        lines += ["base_model:", *(f"- {name}" for name in hub)]
        lines += [f"base_model_relation: {relation}"] if relation else []
    lines += ["---", ""]
    delta = "finetuned − base" if "base" in manifest.sources else "diff vector"
    formula = f"target + {manifest.command.get('alpha', 1.0)} · ({delta})"
    body = text.format(title=_plain(title), formula=formula)
    return ("\n".join(lines) + body + _details(manifest)).encode()


def _details(manifest: Manifest) -> str:
    rows = [("command", f"diffxfer {manifest.command.get('verb', '')}")]
    for role, source in manifest.sources.items():
        rows.append((role, _named(source)))
        rows += [
            (f"{role}: {_plain(inner)}", _named(made)) for inner, made in source.made_from.items()
        ]
    options = [
        (name, _value(value))
        for name, value in manifest.command.items()
        if name != "verb" and value not in ([], {})
    ]
    rows += [*options, ("written by", f"diffxfer {manifest.diffxfer_version}")]
    table = "".join(f"| {name} | {_plain(value)} |\n" for name, value in rows)
    closing = "\nChecksums of every tensor, and of every other file, are in `diffxfer.json`.\n"
    return f"\n| | |\n|---|---|\n{table}{closing}"


def _named(source: SourceEntry) -> str:
    return source.name if source.revision is None else f"{source.name}@{source.revision}"


def _value(value: str | float | list[str] | Mapping[str, float]) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={number}" for key, number in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def _plain(text: str) -> str:
    """Text that neither Markdown nor a terminal takes for anything else."""
    printable = "".join(char if char.isprintable() else "?" for char in text)
    for char in "\\`*_[]<>|":
        printable = printable.replace(char, "\\" + char)
    return printable
