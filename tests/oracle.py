"""The expected results of transfer, extract and apply, computed for whole checkpoints in memory.

It is written from the design, not from the code: every tensor is loaded with safetensors; names,
ties and tokens are paired in plain dictionaries; the arithmetic is numpy's float64, element by
element; only the last cast is torch's. The test states how tokens pair.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "transformer.",
    "model.",
)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
BLOCK = 262144


class RefusedError(Exception):
    """The oracle has no answer: the verb must refuse."""


@dataclass
class Roles:
    """How the tokens of three roles pair: `None` for no tokenizer, else tokens by id.

    `mode` is "ids" or "tokens", for either step.
    """

    finetuned: list[str | None] | None = None
    base: list[str | None] | None = None
    target: list[str | None] | None = None
    mode: str = "ids"
    base_mode: str = "ids"
    vocabulary: tuple[str, ...] = (EMBEDDING, HEAD, "lm_head.bias", "wte.weight")


@dataclass
class Options:
    """The options that shape a result, as the library takes them."""

    alpha: float = 1.0
    alpha_for: dict[str, float] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_missing: tuple[str, ...] = ()
    out_dtype: torch.dtype | None = None

    def selects(self, name: str) -> bool:
        wanted = not self.include or any(re.search(regex, name) for regex in self.include)
        return wanted and not any(re.search(regex, name) for regex in self.exclude)

    def alpha_of(self, name: str) -> float:
        alpha = self.alpha
        for regex, scale in self.alpha_for.items():
            if re.search(regex, name):
                alpha = scale
        return alpha

    def missing_is_fine(self, name: str) -> bool:
        return any(re.search(regex, name) for regex in self.allow_missing)


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by its name on disk."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def bare(name: str) -> str:
    """A name without its container."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers: −0.0 is not 0.0, and NaN is itself."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit."""
    alike = left.dtype == right.dtype and left.shape == right.shape
    return alike and torch.equal(bits(left), bits(right))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two checkpoints are equal, tensor by tensor and bit by bit."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not same(found[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} differ, such as {different[0]}"


def _ties(model: dict[str, Tensor]) -> bool:
    embedding, head = model.get(EMBEDDING), model.get(HEAD)
    return embedding is not None and (head is None or same(embedding, head))


def _by_bare_name(model: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {bare(name): tensor for name, tensor in model.items()}
    assert len(found) == len(model), "two names are one without their containers"
    return found


def _wide(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def _cast(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(values.shape).to(dtype)


def _delta(finetuned: np.ndarray, base: np.ndarray, stored: torch.dtype | None) -> np.ndarray:
    delta = np.asarray(finetuned - base)
    return delta if stored is None else _wide(_cast(delta, stored))


def base_rows(roles: Roles) -> dict[int, int]:
    """Finetuned's token ids to base's; a slot that finetuned renamed keeps its id."""
    ours, theirs = roles.finetuned or [], roles.base or []
    if roles.base_mode == "ids":
        count = min(len(ours), len(theirs))
        return {i: i for i in range(count) if ours[i] is not None and theirs[i] is not None}
    at = {token: i for i, token in enumerate(theirs) if token is not None}
    return {i: at[token] for i, token in enumerate(ours) if token in at}


def added_tokens(roles: Roles) -> dict[int, str]:
    """The tokens that finetuned brings whole, by its ids."""
    paired, known = base_rows(roles), set(roles.base or [])
    return {
        i: token
        for i, token in enumerate(roles.finetuned or [])
        if token is not None and token not in known and i not in paired
    }


def target_rows(roles: Roles) -> tuple[dict[int, int], dict[int, int]]:
    """Output rows to finetuned's rows: those to graft, and those to bring whole."""
    ours, theirs = roles.finetuned or [], roles.target or []
    new = added_tokens(roles)
    at = {token: i for i, token in enumerate(theirs) if token is not None}
    if roles.mode == "ids":
        count = min(len(ours), len(theirs))
        grafted = {i: i for i in range(count) if ours[i] is not None and theirs[i] is not None}
    else:
        grafted = {at[token]: i for i, token in enumerate(ours) if token in at}
    brought: dict[int, int] = {}
    for i, token in new.items():
        grafted = {row: j for row, j in grafted.items() if j != i}
        if token in at:
            grafted.pop(at[token], None)
        else:
            brought[len(theirs) + len(brought)] = i
    return grafted, brought


def _rows(
    finetuned: Tensor,
    base: Tensor,
    target: Tensor,
    roles: Roles,
    alpha: float,
    out: torch.dtype,
    stored: torch.dtype | None,
) -> Tensor:
    """A tensor whose rows belong to tokens, row by row."""
    grafted, brought = target_rows(roles)
    brought = {row: i for row, i in brought.items() if i < len(finetuned)}
    theirs = base_rows(roles)
    rows = max(len(target), *(row + 1 for row in brought)) if brought else len(target)
    result = []
    for row in range(rows):
        i = grafted.get(row)
        j = theirs.get(i) if i is not None else None
        if row in brought:
            whole = finetuned[brought[row]]
            result.append((whole if stored is None else whole.to(stored)).to(out))
        elif alpha and i is not None and j is not None and i < len(finetuned) and j < len(base):
            delta = _delta(_wide(finetuned[i]), _wide(base[j]), stored)
            result.append(_cast(np.asarray(_wide(target[row]) + delta * alpha), out))
        else:
            result.append(target[row].to(out))
    return torch.stack(result)


def transfer(
    finetuned: dict[str, Tensor],
    base: dict[str, Tensor],
    target: dict[str, Tensor],
    options: Options | None = None,
    roles: Roles | None = None,
    *,
    diff_dtype: torch.dtype | str | None = None,
) -> dict[str, Tensor]:
    """The graft, by the target's names.

    With `diff_dtype`, D is rounded once to it ("source": to finetuned's own dtype), as where a
    diff vector is stored in between.
    """
    options, roles = options or Options(), roles or Roles()
    ours, theirs = _by_bare_name(finetuned), _by_bare_name(base)
    names = {bare(name): name for name in target}
    mine = _by_bare_name(target)
    tied = _ties(mine)
    if tied:
        own = any(HEAD in model and not _ties(model) for model in (ours, theirs))
        if own and options.selects(names.get(HEAD, HEAD)):
            raise RefusedError("a head of its own where the target ties")
        for model in (ours, theirs):
            model.pop(HEAD, None)
    else:
        for model in (ours, theirs):
            if HEAD in mine and HEAD not in model and EMBEDDING in model:
                model[HEAD] = model[EMBEDDING]
    for key in (*ours, *theirs):
        label = names.get(key, key)
        everywhere = key in ours and key in theirs and (key in mine)
        if not (everywhere or options.selects(label) is False or options.missing_is_fine(label)):
            raise RefusedError(f"{key} is not in every role")
    result = {}
    for key, old in mine.items():
        name = names[key]
        out = options.out_dtype if options.out_dtype and old.dtype in FLOATS else old.dtype
        if tied and key == HEAD:
            continue
        if not options.selects(name) or old.dtype not in FLOATS or key not in ours.keys() & theirs:
            allowed = key in ours and key in theirs
            if options.selects(name) and not allowed and not options.missing_is_fine(name):
                raise RefusedError(f"only the target has {name}")
            result[name] = old.to(out)
            continue
        stored = ours[key].dtype if diff_dtype == "source" else diff_dtype
        assert not isinstance(stored, str)
        alpha = options.alpha_of(name)
        if key in roles.vocabulary and roles.finetuned is not None and old.dim():
            result[name] = _rows(ours[key], theirs[key], old, roles, alpha, out, stored)
        elif ours[key].shape != old.shape or theirs[key].shape != old.shape:
            raise RefusedError(f"{name} has another shape")
        elif alpha == 0:
            result[name] = old.to(out)
        else:
            delta = _delta(_wide(ours[key]), _wide(theirs[key]), stored)
            result[name] = _cast(np.asarray(_wide(old) + delta * alpha), out)
    if tied and HEAD in mine:
        result[names[HEAD]] = result[names[EMBEDDING]]
    return result


@dataclass
class Stored:
    """A tensor of the diff vector, and what its manifest says of it."""

    values: Tensor
    delta_norm: float
    base_norm: float
    inexact: int
    base: np.ndarray
    """Base's elements in the order of the diff vector; NaN where no base element has a part."""
    unchanged: int
    """Elements of one value in finetuned and base; the tests have no zeros that differ in sign."""


def extract(
    finetuned: dict[str, Tensor],
    base: dict[str, Tensor],
    dtype: torch.dtype | None = None,
    roles: Roles | None = None,
) -> dict[str, Stored]:
    """The diff vector by finetuned's names; `None` is "source". Neither role ties its head here
    unless both do."""
    roles = roles or Roles()
    theirs = _by_bare_name(base)
    result = {}
    for name, ours in finetuned.items():
        if ours.dtype not in FLOATS:
            continue
        old = theirs[bare(name)]
        rows = bare(name) in roles.vocabulary and roles.finetuned is not None
        result[name] = _stored(ours, old, dtype or ours.dtype, roles if rows else None)
    return result


def _stored(ours: Tensor, theirs: Tensor, dtype: torch.dtype, roles: Roles | None) -> Stored:
    if roles is None:
        pairs, whole = None, set()
        old = _wide(theirs)
    else:
        pairs, whole = base_rows(roles), set(added_tokens(roles))
        # Beyond both tokenizers, padding meets padding.
        start = max(len(roles.finetuned or []), len(roles.base or []))
        pairs |= {i: i for i in range(start, len(ours))}
        old = np.full(ours.shape, np.nan)
        for i, j in pairs.items():
            if i < len(ours) and j < len(theirs):
                old[i] = _wide(theirs[j])
    delta = np.asarray(_wide(ours) - old)
    values = _cast(delta, dtype)
    back = _cast(np.asarray(_wide(values) + old), ours.dtype)
    if pairs is not None:
        unpaired = [i for i in range(len(ours)) if np.isnan(old[i]).all()]
        for i in unpaired:
            values[i] = ours[i].to(dtype) if i in whole else torch.zeros_like(values[i])
            back[i] = values[i].to(ours.dtype) if i in whole else ours[i]
    inexact = int(torch.count_nonzero(bits(back) != bits(ours)))
    paired = ~np.isnan(old)
    return Stored(
        values,
        float(np.sqrt(np.sum(np.square(delta[paired])))),
        float(np.sqrt(np.sum(np.square(old[paired])))),
        inexact,
        old,
        int(np.count_nonzero(delta[paired] == 0)),
    )


def checksum(tensor: Tensor) -> str:
    """A tensor's checksum: the digest of the digests of its blocks."""
    data, step = bits(tensor).reshape(-1).numpy().tobytes(), BLOCK * tensor.element_size()
    digests = [
        xxhash.xxh3_128_digest(data[start : start + step]) for start in range(0, len(data), step)
    ]
    return xxhash.xxh3_128_hexdigest(b"".join(digests))


def tokens_of(folder: Path) -> list[str | None]:
    """Tokens by id, as a `tokenizer.json` of a plain vocabulary and added tokens has them."""
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    by_id = {i: token for token, i in document["model"]["vocab"].items()}
    by_id |= {entry["id"]: entry["content"] for entry in document["added_tokens"]}
    return [by_id.get(i) for i in range(max(by_id) + 1)]


def keywords(options: Options, *, extracting: bool = False) -> dict[str, object]:
    """The options as the library's keyword arguments."""
    chosen: dict[str, object] = {"allow_missing": options.allow_missing}
    if not extracting:
        chosen |= {"alpha": options.alpha, "alpha_for": options.alpha_for}
        chosen |= {"include": options.include, "exclude": options.exclude}
        if options.out_dtype is not None:
            chosen["out_dtype"] = str(options.out_dtype).removeprefix("torch.")
    return chosen


def prove(
    out: Path,
    finetuned: Path,
    base: Path,
    target: Path,
    options: Options | None = None,
    roles: Roles | None = None,
) -> Path:
    """Make a graft in every way there is, and compare each with the oracle, bit for bit.

    Returns:
        The folder that `transfer` made; the others stand beside it.
    """
    from diffxfer import apply_diff, extract_diff
    from diffxfer import transfer as transfer_folders

    options = options or Options()
    models = load(finetuned), load(base), load(target)
    graft = out / "graft"
    transfer_folders(finetuned, base, target, graft, **keywords(options))
    assert_same(load(graft), transfer(*models, options, roles))
    for dtype in ("float64", "float32", "source"):
        diff, applied = out / f"diff-{dtype}", out / dtype / "graft"
        extracting = keywords(options, extracting=True)
        extract_diff(finetuned, base, diff, diff_dtype=dtype, **extracting)
        apply_diff(diff, target, applied, **keywords(options))
        stored = "source" if dtype == "source" else getattr(torch, dtype)
        expected = transfer(*models, options, roles, diff_dtype=stored)
        assert_same(load(applied), expected)
        if dtype == "float64":
            assert_same(load(applied), load(graft))
        written = {"README.md", "diffxfer.json"}
        ours, theirs = _companions(graft, written), _companions(applied, written)
        assert ours == theirs
    return graft


def _companions(folder: Path, without: set[str]) -> dict[str, bytes]:
    names = {path.name for path in folder.iterdir() if path.suffix != ".safetensors"} - without
    return {name: (folder / name).read_bytes() for name in sorted(names)}
