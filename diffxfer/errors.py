"""Every error that diffxfer raises on purpose.

    DiffxferError
    ├── OptionError               an option with an invalid value
    ├── CheckpointError           a folder that is not a sound checkpoint
    │   ├── HeaderError           a shard with an invalid header or length
    │   ├── ShardIndexError       an index that is broken or names missing shards or tensors
    │   ├── CompanionError        a config, tokenizer or other companion that cannot be used
    │   ├── QuantizedError        quantised weights, which have no meaningful difference
    │   ├── HubError              a model on the Hub that cannot be fetched
    │   └── InputChangedError     an input that changed while it was being read
    ├── MatchError                tensors of the roles that do not fit together
    ├── VocabularyError           tokens of the roles that do not fit together
    ├── RelatednessError          unrelated models of the same shape
    ├── ArtifactError             a manifest or diff vector that cannot be used
    │   └── DamageError           a folder that was changed or damaged after it was written
    ├── NonFiniteError            NaN, infinity or overflow in a tensor
    ├── DeviceError               a GPU that fails, or has too little memory
    ├── EvaluationError           a model or a task that cannot be scored
    ├── DataError                 rows to train on that cannot be used
    ├── TrainingError             a training run that cannot go on
    ├── ClusterError              a node of a Ray cluster that fails, or cannot take part
    ├── RecipeError               a recipe of rounds that cannot be followed
    └── OutputError               an output that cannot be written
        ├── OutputExistsError     the output exists already, or is one of the inputs
        ├── UnfinishedError       another, unfinished run to the same output
        └── DiskSpaceError        the disk is too small for the output

A message is one line: which input, what was expected, what was found, what to do.
Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


_LISTED = 5
_LONGEST = 8000
"""The most characters of a problem in a message; the last lines of a log have fewer."""


def printable(text: str) -> str:
    """Escape text so that it is one line and harmless on a terminal.

    Names and values come from untrusted files.

    Args:
        text: any text; control characters, line ends, and characters that reverse or hide text
            are escaped.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "replace").decode()
        for char in text
    )


def first_line(exc: BaseException) -> str:
    """The first line of another library's exception, at most 300 characters.

    Args:
        exc: the exception; if its text is empty, the name of its type is returned.
    """
    lines = (line for line in str(exc).splitlines() if line.strip())
    return next(lines, type(exc).__name__)[:300]


def listed(names: Sequence[str]) -> str:
    """The first five names, and how many more there are.

    Args:
        names: names of tensors, tokens or files.
    """
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


class DiffxferError(Exception):
    """A failure with a known cause; as text it is one printable line.

    Args:
        where: the file, tensor, folder or option that is at fault.
        problem: what was expected and what was found.
        remedy: what the user can do about it.
    """

    def __init__(self, where: str | PathLike[str], problem: str, remedy: str = "") -> None:
        self.where = fspath(where)
        self.problem = problem
        self.remedy = remedy
        super().__init__(self.where, problem, remedy)

    def __reduce__(self) -> tuple[object, ...]:
        # Subclasses take other arguments than those that `Exception` would call them with.
        return _restored, (type(self), self.args), self.__dict__

    def __str__(self) -> str:
        problem = self.problem
        if len(problem) > _LONGEST:  # a name from a file may be very long
            problem = f"{problem[:_LONGEST]}…"
        text = f"{self.where}: {problem}" if self.where else problem
        return printable(f"{text}; {self.remedy}" if self.remedy else text)


def _restored(kind: type[DiffxferError], args: tuple[str, ...]) -> DiffxferError:
    """An error that was pickled, on its way between processes, before its attributes are set."""
    return kind.__new__(kind, *args)


class OptionError(DiffxferError):
    """An option with an invalid value."""


class CheckpointError(DiffxferError):
    """A folder that is not a readable checkpoint."""


class HeaderError(CheckpointError):
    """A shard whose safetensors header is malformed or does not fit the file."""


class ShardIndexError(CheckpointError):
    """A ``model.safetensors.index.json`` that is broken or names missing shards or tensors."""


class CompanionError(CheckpointError):
    """A file beside the weights that cannot be read or must not be followed."""


class QuantizedError(CheckpointError):
    """Quantised weights: their codes have no meaningful difference."""


class InputChangedError(CheckpointError):
    """An input that changed or vanished while it was being read."""


class HubError(CheckpointError):
    """A model on the Hub that cannot be fetched.

    Attributes:
        repo: its id, ``org/name``.
        revision: the requested branch, tag or commit, None for the main branch.
        reason: ``"gated"``, ``"missing"``, ``"revision"``, ``"disabled"``, ``"offline"``,
            ``"token"``, ``"rate limit"``, ``"server"``, ``"refused"``, ``"connection"``,
            ``"name"`` or ``"content"``.
    """

    def __init__(
        self, repo: str, revision: str | None, reason: str, problem: str, remedy: str
    ) -> None:
        super().__init__(repo if revision is None else f"{repo}@{revision}", problem, remedy)
        self.repo = repo
        self.revision = revision
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Culprits:
    """Tensors that do not fit, grouped because their names differ only in numbers.

    Attributes:
        role: the role that lacks them or has them in another form, such as ``"base"``.
        pattern: their names with every number replaced by ``*``.
        names: all of them.
        found: what that role has, such as ``"(128264, 4096)"`` or ``"nothing"``.
        expected: what the other roles have.
        reason: why they are refused, in a few words.
        holders: the roles that have them, if another role lacks them.
        addable: whether fine-tuning may have added them, so that they can be brought whole.
    """

    role: str
    pattern: str
    names: tuple[str, ...]
    found: str
    expected: str
    reason: str
    holders: tuple[str, ...] = ()
    addable: bool = False


class MatchError(DiffxferError):
    """Tensors of the roles that do not fit together.

    Attributes:
        groups: every culprit, grouped by role, pattern and reason.
    """

    def __init__(
        self,
        groups: Sequence[Culprits],
        problem: str,
        remedy: str,
        *,
        where: str | PathLike[str] = "",
    ) -> None:
        super().__init__(where, problem, remedy)
        self.groups = tuple(groups)


class VocabularyError(DiffxferError):
    """Tokens of the roles that do not fit together."""


class ArtifactError(DiffxferError):
    """A manifest or diff vector that cannot be used."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Damage to a file or tensor in a folder.

    Attributes:
        file: the file's name within the folder.
        tensor: the tensor's name, empty if the damage concerns the file.
        problem: what is wrong.
    """

    file: str
    tensor: str
    problem: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.tensor, self.problem) if part)


class DamageError(ArtifactError):
    """A folder that was changed or damaged after it was written.

    Attributes:
        damage: all damage found, file by file.
    """

    def __init__(
        self, where: str | PathLike[str], problem: str, remedy: str, damage: Sequence[Damage]
    ) -> None:
        super().__init__(where, problem, remedy)
        self.damage = tuple(damage)


class RelatednessError(DiffxferError):
    """Unrelated models of the same shape.

    Attributes:
        roles: the two roles.
        cosine: the median over tensors of the cosine of the sampled elements.
        samples: number of sampled elements.
    """

    def __init__(
        self, roles: tuple[str, str], cosine: float, samples: int, problem: str, remedy: str
    ) -> None:
        super().__init__("", problem, remedy)
        self.roles = roles
        self.cosine = cosine
        self.samples = samples


class NonFiniteError(DiffxferError):
    """NaN, infinity or overflow in a tensor.

    Attributes:
        tensor: the tensor's name.
        role: the role that has the value, or ``"output"`` for an overflow.
        index: the first such element, one number per dimension.
    """

    def __init__(
        self, tensor: str, role: str, index: tuple[int, ...], problem: str, remedy: str
    ) -> None:
        super().__init__(tensor, problem, remedy)
        self.tensor = tensor
        self.role = role
        self.index = index


class DeviceError(DiffxferError):
    """A GPU that fails, or has too little memory."""


class EvaluationError(DiffxferError):
    """A model or a task that cannot be scored."""


class DataError(DiffxferError):
    """Rows to train on that cannot be read, or have an unknown form."""


class TrainingError(DiffxferError):
    """A training run that cannot begin or go on."""


class ClusterError(DiffxferError):
    """A Ray cluster that cannot be reached, or a node of it that fails or cannot take part."""


class RecipeError(DiffxferError):
    """A recipe of rounds that cannot be read or followed, or that changed since it was begun."""


class OutputError(DiffxferError):
    """An output that cannot be written."""


class OutputExistsError(OutputError):
    """The output exists already, is one of the inputs, or lies inside one."""


class UnfinishedError(OutputError):
    """Another, unfinished run to the same output, which somebody may want to resume."""


class DiskSpaceError(OutputError):
    """The disk is too small for the output."""
