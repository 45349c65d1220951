"""A role's tensors under the names that matching compares: unwrapped, renamed, without buffers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diffxfer.diffs.matching.buffers import is_buffer
from diffxfer.diffs.matching.names import is_known_vocabulary
from diffxfer.diffs.matching.rename import renamed
from diffxfer.diffs.matching.wrappers import unwrapped
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.matching.rename import Rename


@dataclass(frozen=True, slots=True)
class Role:
    """A checkpoint as matching sees it.

    Attributes:
        checkpoint: the checkpoint, its tensors under the compared names and without buffers.
        buffers: its buffers, under compared names too.
        stored: the name that a tensor gets in the output, where it differs from the compared name.
        unwrapped: number of names that had wrappers.
        renamed: number of names that `--rename` changed.
        notes: what else a user may want to know of it, one line each.
        warnings: what is most likely a mistake, one line each.
    """

    checkpoint: Checkpoint
    buffers: Mapping[str, StoredTensor]
    stored: Mapping[str, str]
    unwrapped: int
    renamed: int
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The role: ``"base"``, ``"finetuned"`` or ``"target"``."""
        return self.checkpoint.role


def read_role(checkpoint: Checkpoint, renames: Sequence[Rename] = ()) -> Role:
    """Give a role's tensors the names that matching compares.

    Args:
        checkpoint: the role's checkpoint.
        renames: the user's renames, of any role.

    Returns:
        The role.

    Raises:
        MatchError: if two tensors get the same name.
        OptionError: if a rename matches nothing.
        CheckpointError: if the checkpoint has only buffers.
    """
    disk = checkpoint.tensors
    besides = [name for name, spec in disk.items() if is_buffer(name, spec)]
    clean = unwrapped(disk.keys(), besides, checkpoint.role)
    final = renamed(list(clean.values()), renames, checkpoint.role)
    tensors: dict[str, StoredTensor] = {}
    buffers: dict[str, StoredTensor] = {}
    known = frozenset(besides)
    for name, found in disk.items():
        compared = final[clean[name]]
        if compared == name:
            (buffers if name in known else tensors)[name] = found
        else:
            spec = replace(found, name=compared)
            (buffers if is_buffer(compared, spec) else tensors)[compared] = spec
    if not tensors:
        raise CheckpointError(
            checkpoint.folder,
            f"has no weights, only buffers such as {next(iter(buffers))}",
            "download or save it again",
        )
    return Role(
        replace(checkpoint, weights=replace(checkpoint.weights, tensors=tensors)),
        buffers,
        {new: old for old, new in final.items() if new != old},
        sum(new != name for name, new in clean.items()),
        sum(new != old for old, new in final.items()),
    )


def notes_of_names(roles: Sequence[Role]) -> list[str]:
    """Notes on names that were changed, one line per kind, and the roles' other notes.

    Args:
        roles: the roles of the command.
    """
    counted = {
        "names from which training wrappers were removed": [(r.name, r.unwrapped) for r in roles],
        "names changed by --rename": [(r.name, r.renamed) for r in roles],
    }
    lines = [
        f"{what}: " + ", ".join(f"{count:,} of {role}" for role, count in found if count)
        for what, found in counted.items()
        if any(count for _, count in found)
    ]
    return [*lines, *(note for role in roles for note in role.notes)]


def shapes_of(role: Role) -> dict[str, tuple[int, ...] | None]:
    """The shapes of a role's tensors, for pairing; None if the rows may belong to tokens."""
    return {
        name: None if is_known_vocabulary(name) else spec.shape
        for name, spec in role.checkpoint.tensors.items()
    }
