"""The source of a graft's Δ: two checkpoints, or a diff vector."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.adapter import read_adapter
from diffxfer.checkpoints.adapters.config import is_adapter
from diffxfer.checkpoints.hub.repo_ids import cached_id
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.resolve import find
from diffxfer.diffs.artifact.kind import refuse_diff
from diffxfer.diffs.artifact.license import read_license
from diffxfer.diffs.artifact.manifest import ShardEntry, SourceEntry
from diffxfer.diffs.delta.adapter_remarks import warnings_of_adapter
from diffxfer.diffs.delta.from_adapter import LORA, adapted_checkpoint
from diffxfer.diffs.delta.right_base import note_of_base
from diffxfer.diffs.matching.added import find_added, find_added_buffers
from diffxfer.diffs.matching.match import BaseMatch, Difference, Side
from diffxfer.diffs.matching.names import is_embedding, is_known_vocabulary
from diffxfer.diffs.matching.parts import pair_tensors
from diffxfer.diffs.matching.role import Role, read_role
from diffxfer.diffs.matching.selection import Selection
from diffxfer.diffs.matching.ties import (
    Head,
    HeadState,
    find_head,
    has_head_for_words,
    with_head,
    without_tied_head,
)
from diffxfer.diffs.matching.with_base import match_base
from diffxfer.diffs.soundness.idle import tokenizers_in_use
from diffxfer.diffs.vocab.relate import Vocabulary, relate_to_base
from diffxfer.diffs.vocab.tensors import refuse_ambiguous, sort_tensors
from diffxfer.streaming.plan import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.checkpoints.resolve import Place
    from diffxfer.checkpoints.stored import ShardFile
    from diffxfer.checkpoints.weights import Weights
    from diffxfer.diffs.matching.rename import Rename

COMPANIONS = "companions"
"""The folder of a diff vector that holds finetuned's companions."""

HEAD = "lm_head.weight"
"""The name of an output head that no role stores."""


@dataclass(frozen=True, slots=True)
class Source:
    """Δ, before it is computed or read.

    Attributes:
        operation: how an output tensor is made from it.
        match: the differences, and the other tensors of finetuned and base.
        heads: the state of the output head by role.
        shared_head: the embedding's difference, used as the head's Δ if both roles tie the head.
        vocabulary: its tokens.
        behaviour: the folder of finetuned's companions.
        shards: every shard that it is read from.
        entries: the inputs by role, for the manifest.
        buffers: number of elements of finetuned's and base's buffers, by name.
        checksums: the checksums of a diff vector's tensors, by name.
    """

    operation: Operation
    match: BaseMatch
    heads: Mapping[str, HeadState]
    shared_head: Difference | None
    vocabulary: Vocabulary
    behaviour: Path
    shards: tuple[ShardFile, ...]
    entries: Mapping[str, SourceEntry]
    buffers: Mapping[str, int] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)

    def left_out(self, head: HeadState) -> dict[str, int]:
        """The tensors that the user left out of finetuned; a tied head goes with its embedding.

        Args:
            head: the state of the target's output head.
        """
        found = self.match.left_out
        lost = is_shared(self.heads) and self.shared_head is None
        if head is HeadState.OWN and lost and any(map(is_embedding, found)):
            return found | {HEAD: 0}
        return found


def open_roles(named: Mapping[str, Path | str]) -> dict[str, Checkpoint]:
    """Find and open the model of each role, in a folder or on the Hub; reads no weights.

    Args:
        named: the folders or Hub ids that the user gave, by role.

    Raises:
        DiffxferError: if one is not a sound checkpoint, or is a diff vector.
    """
    return _open({role: find(name, f"the {role} checkpoint") for role, name in named.items()})


def _open(places: Mapping[str, Place]) -> dict[str, Checkpoint]:
    for role, place in places.items():
        refuse_diff(place.folder, role)
    return {role: open_checkpoint(place, role) for role, place in places.items()}


def read_roles(named: Mapping[str, Path | str], renames: Sequence[Rename] = ()) -> dict[str, Role]:
    """Open the model of each role and give its tensors the names that matching compares.

    Args:
        named: the folders or Hub ids that the user gave, by role.
        renames: the user's renames, of any role.

    Raises:
        DiffxferError: if one is not a sound checkpoint, or is a diff vector, or two of its
            tensors get the same name.
    """
    places = {role: find(name, f"the {role} checkpoint") for role, name in named.items()}
    place = places.get("finetuned")
    if place is None or not is_adapter(place):
        return {role: read_role(found, renames) for role, found in _open(places).items()}
    adapter = read_adapter(place)
    others = {role: place for role, place in places.items() if role != "finetuned"}
    roles = {role: read_role(found, renames) for role, found in _open(others).items()}
    made = adapted_checkpoint(adapter, roles["base"].checkpoint)
    note = note_of_base(adapter.config.base, places["base"])
    notes, warnings = () if note is None else (note,), tuple(warnings_of_adapter(adapter))
    return {"finetuned": Role(made, {}, {}, 0, 0, notes, warnings), **roles}


def from_checkpoints(
    finetuned: Role,
    base: Role,
    selection: Selection,
    label: Callable[[str], str],
    vocab: str,
    added: str = "refuse",
) -> Source:
    """Δ as the difference of two checkpoints, finetuned − base.

    Args:
        finetuned: the fine-tuned checkpoint.
        base: its base.
        selection: the tensors that the user selected.
        label: gives the name of a tensor that the selection's patterns are matched against.
        vocab: how rows of tokens pair: ``"auto"``, ``"ids"`` or ``"tokens"``.
        added: what to do with tensors that only finetuned has: ``"bring"``, ``"drop"`` or
            ``"refuse"``.

    Raises:
        DiffxferError: if their names or tokens cannot be paired.
    """
    roles = finetuned.checkpoint, base.checkpoint
    heads = _heads(*roles, added)
    sides = _sides(*roles, heads)
    keeps_words = has_head_for_words(roles[0].config)
    unchanged = _unchanged(*roles)
    match = match_base(*sides, selection, label, added, unchanged, keeps_words=keeps_words)
    brought = _bring_buffers(match, finetuned)
    ours, theirs, left_out = tokenizers_in_use(*roles)
    vocabulary = relate_to_base(
        ours,
        theirs,
        vocab,
        same_rows=all(d.sources[0].shape == d.sources[1].shape for d in match.differences),
        rows=_rows_gained(match),
    )
    if vocabulary.base_pairing and not vocabulary.base_pairing.in_place:
        ambiguous = sides[0].ambiguous | sides[1].ambiguous
        for difference in match.differences:
            if not difference.vocabulary and any(s.name in ambiguous for s in difference.sources):
                refuse_ambiguous(difference.name, added=False)
    return Source(
        Operation.TRANSFER,
        match,
        {role: head.state for role, head in heads.items()},
        _shared_head(*roles, heads),
        replace(vocabulary, warnings=(*left_out, *vocabulary.warnings)),
        roles[0].folder,
        (*roles[0].weights.shards, *roles[1].weights.shards),
        {c.role: source_entry(c.weights) for c in roles},
        {
            name: spec.elements
            for role in (base, finetuned)
            for name, spec in role.buffers.items()
            if name not in brought
        },
    )


def _unchanged(finetuned: Checkpoint, base: Checkpoint) -> frozenset[str]:
    """The tensors of base that an adapter does not change."""
    if LORA not in finetuned.weights.formats:
        return frozenset()
    tensors = finetuned.tensors
    return frozenset(name for name, spec in base.tensors.items() if tensors.get(name) is spec)


def _bring_buffers(match: BaseMatch, finetuned: Role) -> frozenset[str]:
    """Bring the buffers of the tensors that finetuned brings: a head needs its own buffers."""
    added = [spec.name for spec in match.added]
    others = finetuned.checkpoint.tensors.keys() - set(added)
    names = find_added_buffers(finetuned.buffers, added, others)
    match.added += [finetuned.buffers[name] for name in sorted(names)]
    return names


def _heads(finetuned: Checkpoint, base: Checkpoint, added: str) -> dict[str, Head]:
    """The output heads of the two roles.

    If fine-tuning replaced the output head by a task head, finetuned's is absent, tied or not. A
    value head does not replace it.
    """
    heads = {c.role: find_head(c.tensors, c.config) for c in (finetuned, base)}
    head = heads["finetuned"]
    if added == "refuse" or head.name is not None or has_head_for_words(finetuned.config):
        return heads
    ours, theirs = (
        {
            name: None if is_known_vocabulary(name) else spec.shape
            for name, spec in c.tensors.items()
        }
        for c in (finetuned, base)
    )
    pairs = pair_tensors(ours, theirs, ("finetuned", "base"))
    lonely = [name for name in finetuned.tensors if name not in pairs]
    known = {*pairs, *(base.tensors.keys() - set(pairs.values()))}
    if find_added(lonely, pairs.keys(), known):
        heads["finetuned"] = Head(HeadState.ABSENT, None, head.embedding)
    return heads


def _sides(finetuned: Checkpoint, base: Checkpoint, heads: Mapping[str, Head]) -> tuple[Side, Side]:
    own = any(head.state is HeadState.OWN for head in heads.values())
    head_name = heads["finetuned"].name or heads["base"].name or HEAD

    def side(checkpoint: Checkpoint) -> Side:
        head = heads[checkpoint.role]
        if own:
            tensors = with_head(checkpoint.tensors, head, head_name)
        else:
            tensors = without_tied_head(checkpoint.tensors, head)
        return Side(checkpoint.role, tensors, *sort_tensors(tensors, checkpoint.config))

    return side(finetuned), side(base)


def _rows_gained(match: BaseMatch) -> tuple[int, int] | None:
    """Finetuned's and base's row counts if finetuned was resized for more tokens, else None."""
    rows = [
        (d.sources[0].shape[0], d.sources[1].shape[0]) for d in match.differences if d.vocabulary
    ]
    grown = [(ours, theirs) for ours, theirs in rows if ours > theirs]
    return (max(n for n, _ in grown), min(n for _, n in grown)) if grown else None


def is_shared(heads: Mapping[str, HeadState]) -> bool:
    """Whether both finetuned and base tie the head to the embedding."""
    return set(heads.values()) == {HeadState.TIED}


def _shared_head(
    finetuned: Checkpoint, base: Checkpoint, heads: Mapping[str, Head]
) -> Difference | None:
    """The embedding's difference under the head's name, even if the user left the embedding out."""
    if not is_shared({role: head.state for role, head in heads.items()}):
        return None

    def side(checkpoint: Checkpoint) -> Side:
        embedding = checkpoint.tensors[heads[checkpoint.role].embedding or ""]
        return Side(checkpoint.role, {HEAD: embedding}, frozenset({HEAD}))

    match = match_base(side(finetuned), side(base), Selection(), str)
    return next(iter(match.differences), None)


def source_entry(
    weights: Weights, made_from: Mapping[str, SourceEntry] | None = None
) -> SourceEntry:
    """The manifest's entry for an input.

    Args:
        weights: the input.
        made_from: for a diff vector, the entries of its own inputs.
    """
    shards = {
        shard.path.name: ShardEntry(size=shard.size, header_xxh3=shard.header_hash)
        for shard in weights.shards
    }
    # An adapted checkpoint's folder is a temporary one; its shard is in the adapter's.
    folder = weights.shards[0].path.parent if weights.shards else weights.folder
    stated = read_license(folder)
    inner = dict(made_from or {})
    hub = cached_id(folder)
    if hub is not None:
        name, revision = hub.repo, hub.revision
    else:
        # A file name may not be valid UTF-8, but a manifest must be.
        name = folder.resolve().name.encode("utf-8", "backslashreplace").decode()
        revision = None
    return SourceEntry(
        name=name,
        revision=revision,
        shards=shards,
        license=stated,
        made_from=inner,
        decoded_from=quantised_formats(weights),
    )


def quantised_formats(weights: Weights) -> list[str]:
    """The formats that the tensors of an input are decoded from; none if it is not quantised.

    Args:
        weights: the input.
    """
    return [name for name in weights.formats if name != LORA]


def notes_of_formats(roles: Iterable[Checkpoint]) -> list[str]:
    """A line for each input that is quantised.

    Args:
        roles: the inputs.
    """
    found = ((role.role, quantised_formats(role.weights)) for role in roles)
    return [f"{role} is decoded from {' and '.join(formats)}" for role, formats in found if formats]
