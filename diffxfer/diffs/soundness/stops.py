"""Whether generation can stop: the stop ids against the tokenizer and the chat template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.diffs.matching.names import is_embedding
from diffxfer.diffs.soundness.finding import Finding, name_tokens
from diffxfer.diffs.vocab.tokens import stated_roles

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diffxfer.diffs.soundness.model import Model

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_GENERATES = re.compile(r"For(?:CausalLM|ConditionalGeneration|Seq2Seq\w*)$|LMHead")
# The token that ends a turn is recognised by its name. Rendering the template instead would run
# untrusted code.
_END = re.compile(
    r"im_end|end_?of_?turn|turn_end|end_?of_?(?:text|sentence)|end▁of▁sentence"
    r"|(?<![a-z])(?:eot|eom|eos|return|end)(?![a-z_▁])|(?<![a-z])eot_id|^</s>$",
    re.IGNORECASE,
)
_OTHER_END = re.compile(
    r"think|tool|call|header|channel|image|img|video|audio|vision|speech|box|ref|function|code|file"
    r"|fim|system|user|role|message|quad|output|context|doc",
    re.IGNORECASE,
)
_LONGEST = 60


@dataclass(frozen=True, slots=True)
class Stops:
    """The ids at which `generate` stops.

    Attributes:
        file: the file that states them, or should state them.
        ids: the ids; empty if there are none.
        stated: whether they are known; if not, the model's class may have defaults.
    """

    file: str
    ids: tuple[int, ...]
    stated: bool


def stop_ids(model: Model) -> Stops:
    """The ids at which a model stops; if there are generation settings, only those count.

    Args:
        model: any model.
    """
    if model.files.read(_GENERATION) is not None:
        return Stops(_GENERATION, _ids(model.files.document(_GENERATION)), True)
    for part in (model.config, model.text):
        if "eos_token_id" in part:
            return Stops(_CONFIG, _ids(part), True)
    return Stops(_CONFIG, (), False)


def _ids(document: Mapping[str, Any]) -> tuple[int, ...]:
    value = document.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return tuple(i for i in values if type(i) is int and i >= 0)


def stop_findings(model: Model) -> Iterator[Finding]:
    """Find cases in which generation would not stop.

    Args:
        model: any model; one that does not generate has no findings.
    """
    stops = stop_ids(model)
    if model.tokenizer is None or not stops.stated or not _generates(model):
        return
    ends = _ends(model)
    expected = ends if ends or _has_senses(model) else dict.fromkeys(_eos_ids(model), "")
    if not expected or expected.keys() & set(stops.ids) or _has_stop_string(model, expected):
        return
    first = next(iter(expected))
    name = name_tokens([first], model.tokenizer.tokens)
    source = (
        f"the chat template in {expected[first]} ends a turn with {name}"
        if ends
        else f"the tokenizer's eos_token is {name}"
    )
    if stops.ids:
        stated = ", ".join(f"{i} ({model.token(i)!r})" for i in stops.ids[:5])
        value, problem = f"eos_token_id {stated}", f"lacks the stop token ({source})"
    else:
        value, problem = "eos_token_id", f"lacks the stop token ({source})"
    listed = [first, *stops.ids]
    new = str(first) if len(listed) == 1 else str(listed)
    yield Finding(
        "warning",
        stops.file,
        value,
        f"{problem}: generation may never stop",
        f"set eos_token_id to {new} {model.owners.place(stops.file)}",
    )


def _generates(model: Model) -> bool:
    named = model.config.get("architectures")
    names = named if isinstance(named, list) else []
    generation = model.files.read(_GENERATION) is not None
    return generation or any(isinstance(n, str) and _GENERATES.search(n) for n in names)


def _has_senses(model: Model) -> bool:
    """Whether it is multimodal: BLIP-2 stops at a newline, not at its tokenizer's eos."""
    return any(isinstance(value, dict) and "config" in key for key, value in model.config.items())


def _eos_ids(model: Model) -> tuple[int, ...]:
    """The tokenizer's eos ids."""
    assert model.tokenizer is not None
    for _, role, token in stated_roles(model.files):
        if role == "eos" and token in model.tokenizer.tokens:
            return (model.tokenizer.tokens.index(token),)
    return ()


def _ends(model: Model) -> dict[int, str]:
    """The ids of tokens that end a turn in chat templates, each with the template's file."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    found: dict[int, str] = {}
    # Skip tokens without a row: `token_findings` reports them.
    rows = len(tokenizer.tokens) if model.embedding is None else model.embedding.rows
    for file, text in model.templates:
        for i in sorted(tokenizer.special):
            token = tokenizer.tokens[i] or ""
            if i < rows and _is_end(token) and token in text:
                found.setdefault(i, file)
        if re.search(r"\beos_token\b", text):
            found |= {i: file for i in _eos_ids(model) if i not in found}
    return found


def _is_end(token: str) -> bool:
    return (
        len(token) <= _LONGEST
        and _END.search(token) is not None
        and _OTHER_END.search(token) is None
    )


def _has_stop_string(model: Model, expected: Mapping[int, str]) -> bool:
    strings = model.files.document(_GENERATION).get("stop_strings")
    texts = strings if isinstance(strings, list) else [strings]
    return any(model.token(i) in texts for i in expected)


def id_findings(model: Model) -> Iterator[Finding]:
    """Find ids in configs that have no row in the embedding.

    These ids have no token either; `token_findings` reports the ids of tokens.

    Args:
        model: any model; without an embedding there are no findings.
    """
    if model.embedding is None:
        return
    rows, generates = model.embedding.rows, _generates(model)
    places = [(_CONFIG, model.config), (_GENERATION, model.files.document(_GENERATION))]
    if model.text is not model.config:
        places.insert(1, (_CONFIG, model.text))
    for file, document in places:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            value = document.get(key)
            values = value if isinstance(value, list) else [value]
            ids = [i for i in values if type(i) is int and i >= rows]
            ids = [i for i in ids if model.token(i) is None or key == "pad_token_id"]
            finding = _beyond(model, file, key, ids) if ids else None
            # A model that does not generate may keep its class's default ids (CLIP).
            if finding is not None and (generates or finding.severity == "error"):
                yield finding


def _beyond(model: Model, file: str, key: str, ids: list[int]) -> Finding:
    assert model.embedding is not None
    # Models with an embedding of this name pass the id to torch's Embedding, which refuses it.
    made_with = file == _CONFIG and key == "pad_token_id" and is_embedding(model.embedding.name)
    fatal = made_with or key == "decoder_start_token_id"
    several = ", ".join(map(str, ids[:5]))
    return Finding(
        "error" if fatal else "warning",
        file,
        f"{key} {several}",
        f"{'has' if len(ids) == 1 else 'have'} no row in the embedding ({model.rows})",
        f"set {key} to the id of a token"
        + (", or to null" if key != "decoder_start_token_id" else "")
        + f" {model.owners.place(file)}",
    )
