"""The model card of a published folder: its sources, how to use it, and its scores.

The card has no local paths and no dates, so the same folder gives the same bytes.
"""

from __future__ import annotations

import keyword
import math
from typing import TYPE_CHECKING, Any

from diffxfer.diffs.artifact.card import (
    HUB,
    KINDS,
    base_models,
    brings,
    details,
    formula,
    license_fields,
    licensed_by,
    on_hub,
    sources_in_order,
    tags,
)
from diffxfer.diffs.artifact.packed_card import how_to_read, plain
from diffxfer.errors import printable
from diffxfer.evaluation.head_labels import is_classifier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffxfer.diffs.artifact.manifest import Manifest, SourceEntry
    from diffxfer.evaluation.scores import TaskScore

_WHOSE = {
    "target": "the target's",
    "model": "the model's",
    "finetuned": "the fine-tuned model's",
    "base": "the base's",
}


def write_model_card(
    repo: str,
    manifest: Manifest,
    config: Mapping[str, Any],
    results: Sequence[TaskScore],
    *,
    license: str | None = None,  # noqa: A002 as the Hub calls it
) -> bytes:
    """Write the model card of a folder.

    Args:
        repo: the repository, ``org/name``.
        manifest: the manifest of the folder.
        config: its ``config.json``; for a diff vector, that of finetuned.
        results: the scores of the model, if they are known.
        license: the id of the licence; None for the one stated by the cards of the sources.

    Returns:
        The content of the README: YAML front matter and Markdown.
    """
    name = repo.split("/")[1]
    licensed = {"license": license} if license else license_fields(manifest)
    text = KINDS[manifest.kind][3].format(
        title=plain(name), formula=formula(manifest), diff=repo, brings=brings(manifest)
    )
    task = "text-classification" if is_classifier(config) else "text-generation"
    parts = [
        f"---\n{_front_matter(name, manifest, licensed, results, task)}\n---\n{text}",
        "" if manifest.kind == "diff" else _how_to_load(repo, config),
        _made_of(manifest),
        _scores(results),
        _license_line(manifest, licensed, given=license is not None),
        how_to_read(manifest),
        f"## Details\n{details(manifest)}",
    ]
    return "\n".join(part for part in parts if part).encode()


def _front_matter(
    name: str,
    manifest: Manifest,
    licensed: Mapping[str, Any],
    results: Sequence[TaskScore],
    task: str,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    library, relation, *_ = KINDS[manifest.kind]
    bases = base_models(manifest)
    more: dict[str, Any] = {"base_model_relation": relation} if relation and bases else {}
    scored = [
        EvalResult(
            task_type=task,
            # PyYAML does not read back every control character that it writes, such as U+0085.
            dataset_type=printable(result.task),
            dataset_name=printable(result.task),
            metric_type=printable(result.metric),
            metric_name=printable(result.label),
            metric_value=result.value,
        )
        for result in results
        if math.isfinite(result.value)
    ]
    data = ModelCardData(
        library_name=library,
        tags=tags(manifest),
        base_model=bases or None,
        # A name is required if there are results, and not allowed otherwise.
        model_name=name if scored else None,
        eval_results=scored or None,
        **more,
        **licensed,
    )
    return data.to_yaml()


def _made_of(manifest: Manifest) -> str:
    sources = sources_in_order(manifest)
    rows = "".join(f"| {role} | {_linked(source)} |\n" for role, source in sources)
    return f"## What it was made of\n\n| | |\n|---|---|\n{rows}"


def _linked(source: SourceEntry) -> str:
    if not on_hub(source):
        return plain(source.name)
    commit = plain(source.revision or "")
    link = f"[{plain(source.name)}]({HUB}/{source.name})"
    return f"{link} at {commit}" if commit else link


def loaders(config: Mapping[str, Any]) -> tuple[str, str]:
    """The classes of transformers that load a model, and what prepares its inputs.

    Args:
        config: the model's ``config.json``.
    """
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else ""
    known = isinstance(named, str) and named.isidentifier() and not keyword.iskeyword(named)
    if known and "auto_map" not in config and not named.endswith("ForCausalLM"):
        return named, "AutoProcessor"
    return "AutoModelForCausalLM", "AutoTokenizer"


def _how_to_load(repo: str, config: Mapping[str, Any]) -> str:
    loader, processor = loaders(config)
    remote = "auto_map" in config
    trust = ", trust_remote_code=True" if remote else ""
    variable = "tokenizer" if processor == "AutoTokenizer" else "processor"
    return (
        "## How to load it\n\n```python\n"
        f"from transformers import {', '.join(sorted((loader, processor)))}\n\n"
        f'model = {loader}.from_pretrained("{repo}", dtype="auto"{trust})\n'
        f'{variable} = {processor}.from_pretrained("{repo}"{trust})\n```\n'
    )


def _scores(results: Sequence[TaskScore]) -> str:
    if not results:
        return ""
    rows = "".join(
        f"| {plain(result.task)} | {plain(result.label)} | {result.value:.4f}"
        + (f" ± {result.stderr:.4f}" if result.stderr is not None else "")
        + f" | {result.n} |\n"
        for result in results
    )
    return (
        "## Evaluation\n\nBy [lm-evaluation-harness](https://github.com/EleutherAI/"
        "lm-evaluation-harness); value ± standard error, and n questions.\n\n"
        f"| task | metric | value | n |\n|---|---|---|---|\n{rows}"
    )


def _license_line(manifest: Manifest, licensed: Mapping[str, str], *, given: bool) -> str:
    if not licensed:
        return ""
    called = plain(licensed.get("license_name") or licensed["license"])
    role = None if given else licensed_by(manifest)
    whose = "" if role is None else f", as {_WHOSE[role]} card states it"
    return f"## Licence\n\n{called}{whose}.\n"
