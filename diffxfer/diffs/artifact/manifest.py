"""The manifest `diffxfer.json`: the content of a folder that diffxfer wrote, and its sources.

It holds no timestamps and no paths, so that the same command gives the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import xxhash
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from diffxfer.checkpoints.companions import companion_path, read_bytes
from diffxfer.checkpoints.output_place import MANIFEST_NAME
from diffxfer.diffs.artifact.lossy import LossyEntry
from diffxfer.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FORMAT = 1
PACKED_FORMAT = 2
"""The version of a manifest of packed tensors, which older versions cannot read."""

_Norm: TypeAlias = Annotated[float, Field(ge=0, le=math.sqrt(sys.float_info.max))]
"""A norm: the square root of a finite sum."""
_SEALED = re.compile(rb'(.*),\n "seal": "([0-9a-f]{32})"\n\}\n', re.DOTALL)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class FileEntry(_Model):
    """A file other than weights: its size in bytes and its xxh3-128."""

    size: int = Field(ge=0)
    xxh3: str


class ShardEntry(_Model):
    """A safetensors file: its size in bytes and the xxh3-128 of its header.

    The tensors have separate checksums, which do not depend on the division into shards.
    """

    size: int = Field(ge=0)
    header_xxh3: str


class VocabularyEntry(_Model):
    """How tokens were treated.

    Attributes:
        pairing: how rows were paired: ``"ids"``, ``"tokens"`` or ``"rows"``.
        added: finetuned's tokens that were added to the output.
        dropped: tokens whose difference was dropped.
    """

    pairing: str
    added: list[str]
    dropped: list[str]


class LicenseEntry(_Model):
    """A licence, with the fields of the Hub's model cards.

    Attributes:
        license: its id, such as ``"apache-2.0"``, or ``"other"``.
        license_name: its name, if the id is ``"other"``.
        license_link: its text: a URL, or a file in the same folder.
    """

    license: str
    license_name: str | None = None
    license_link: str | None = None


class SourceEntry(_Model):
    """An input.

    Attributes:
        name: the folder's name, or the Hub id.
        revision: the commit, for a Hub id.
        shards: its safetensors files.
        license: the licence that its README states, if any.
        made_from: for a diff vector, its own inputs by role.
        decoded_from: the formats that its tensors were decoded from, if it is quantised.
    """

    name: str
    revision: str | None = None
    shards: dict[str, ShardEntry]
    license: LicenseEntry | None = None
    made_from: dict[str, SourceEntry] = {}
    decoded_from: list[str] = []


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of the output; not a pydantic model, because that takes 1.4 kB of memory.

    Attributes:
        checksum: see `streaming.checksum`.
        delta_norm: ‖Δ‖₂, for a diff vector; None if it is not finite.
        base_norm: ‖base‖₂, for a diff vector; None if it is not finite.
        base_checksum: the checksum of base's tensor, for a diff vector.
        inexact: number of elements of finetuned that base + the stored Δ does not give back.
        samples: number of this tensor's entries in the samples file.
        unchanged: for a diff vector, number of elements that are equal in finetuned and base: bit
            for bit, or by value if their dtypes differ; None if an older version wrote it.
        dtype: for a packed tensor, the dtype of its values; `checksum` is that of its values.
        shape: for a packed tensor, the shape of its values.
        exceptions: for a packed tensor, number of elements that base + Δ does not give back, and
            that are stored themselves; None if there are none.
        stored: for a packed tensor, the checksum of its bytes on disk.
        error_norm: for a tensor packed with a loss, ‖stored Δ − Δ‖₂.
    """

    checksum: str
    delta_norm: _Norm | None = None
    base_norm: _Norm | None = None
    base_checksum: str | None = None
    inexact: int | None = Field(default=None, ge=0)
    samples: int | None = Field(default=None, ge=0)
    unchanged: int | None = Field(default=None, ge=0)
    dtype: str | None = None
    shape: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    exceptions: int | None = Field(default=None, ge=0)
    stored: str | None = None
    error_norm: _Norm | None = None


_TENSOR_ENTRY = TypeAdapter(TensorEntry)


class TokensEntry(_Model):
    """How finetuned's tokens relate to base's.

    Attributes:
        finetuned: fingerprint of finetuned's token table.
        base: fingerprint of base's.
        pairing: ``"ids"`` or ``"tokens"``.
        added: finetuned's id to token, for tokens that base lacks.
        renamed: finetuned's id to base's token, for slots that finetuned renamed.
    """

    finetuned: str
    base: str
    pairing: str
    added: dict[int, str]
    renamed: dict[int, str]


class FactorEntry(_Model):
    """What an adapter keeps of one tensor of Δ.

    Attributes:
        form: ``"factors"``, ``"embedding factors"``, ``"whole"``, ``"bias"`` or ``"dropped"``.
        rank: the rank, 0 without factors.
        kept: the share of ‖Δ‖² that the adapter keeps.
        delta_norm: ‖Δ‖₂.
        bytes: the size in the adapter.
        full_bytes: the size of the whole Δ in the same dtype.
    """

    form: str
    rank: int = Field(ge=0)
    kept: float = Field(ge=0, le=1)
    delta_norm: _Norm
    bytes: int = Field(ge=0)
    full_bytes: int = Field(ge=0)


class Manifest(_Model):
    """The manifest of a folder that diffxfer wrote.

    Attributes:
        diffxfer_format: the version of the manifest format.
        kind: ``"diff"``, ``"graft"``, ``"tuned"`` for a model that was trained further, or
            ``"adapter"`` for a LoRA adapter.
        diffxfer_version: the version of diffxfer that wrote it.
        command: the options that affect the result.
        checksum: the kind of the tensors' checksums.
        sources: the inputs by role.
        dtype: the dtype option of a diff vector: ``"source"`` or a torch dtype; the form of a
            packed one.
        tied: for a diff vector, the state of each role's output head: own, tied or absent.
        tokens: for a diff vector; None if the roles had no tokenizer.
        kept: finetuned's integer tensors, which have no difference.
        left_out: finetuned's tensors that the user left out.
        added_tensors: finetuned's tensors that base lacks, stored whole.
        is_part: for a diff vector, whether finetuned is a part of base or the reverse; a target
            may then have more tensors.
        factors: for an adapter made of a difference, what it keeps of each tensor of Δ.
        packing: for a packed diff vector, the version of `encodings.packed`.
        lossy: for a diff vector packed with a loss, what is lost.
        vocabulary: how tokens were treated.
        shards: every safetensors file.
        files: every file other than weights.
        tensors: every tensor.
    """

    diffxfer_format: int
    kind: Literal["diff", "graft", "tuned", "adapter"]
    diffxfer_version: str
    command: dict[str, str | int | FiniteFloat | list[str] | dict[str, FiniteFloat]]
    checksum: str
    sources: dict[str, SourceEntry]
    dtype: str | None = None
    tied: dict[str, Literal["own", "tied", "absent"]] | None = None
    tokens: TokensEntry | None = None
    kept: list[str] = []
    left_out: list[str] = []
    added_tensors: list[str] = []
    is_part: bool | None = None
    factors: dict[str, FactorEntry] | None = None
    packing: int | None = None
    lossy: LossyEntry | None = None
    vocabulary: VocabularyEntry | None = None
    shards: dict[str, ShardEntry]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]


class _Stamp(BaseModel):
    """The two fields that every version of the format has."""

    diffxfer_format: int
    kind: str


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None if it has none.

    Args:
        folder: any folder.

    Raises:
        ArtifactError: if it cannot be read.
    """
    path = companion_path(folder, MANIFEST_NAME)
    if path is None:
        return None
    raw = read_bytes(path)
    try:
        stamp = _Stamp.model_validate_json(raw)
        if stamp.diffxfer_format > PACKED_FORMAT:
            raise ArtifactError(
                path,
                f"has format {stamp.diffxfer_format}, but this diffxfer reads only up to"
                f" {PACKED_FORMAT}",
                "update diffxfer: pipx upgrade diffxfer",
            )
        return Manifest.model_validate_json(raw)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"][:4])
        found = f"{place}: {first['msg']}" if place else first["msg"]
        problem = f"is not a valid manifest ({found})"
        raise ArtifactError(path, problem, "make or download it again") from exc


def manifest_bytes(manifest: Manifest, tensors: Iterable[tuple[str, TensorEntry]]) -> bytes:
    """The bytes of the manifest file, sealed: its last field is the xxh3-128 of all before it.

    Args:
        manifest: the manifest without its tensors.
        tensors: every tensor by name, one at a time: 60,000 as one object took 70 MB more.
    """
    assert not manifest.tensors
    text = io.BytesIO()
    head = manifest.model_dump_json(indent=1, exclude_none=True)
    text.write(head.removesuffix("{}\n}").encode())
    before = "{"
    for name, entry in tensors:
        text.write(f"{before}\n  {json.dumps(name, ensure_ascii=False)}: ".encode())
        inner = _TENSOR_ENTRY.dump_json(entry, indent=1, exclude_none=True)
        text.write(inner.replace(b"\n", b"\n  "))
        before = ","
    text.write(b"{}" if before == "{" else b"\n }")
    seal = xxhash.xxh3_128_hexdigest(text.getbuffer())
    text.write(f',\n "seal": "{seal}"\n}}\n'.encode())
    return text.getvalue()


def is_sealed(raw: bytes) -> bool:
    """Whether a manifest file is unchanged, by its seal.

    Args:
        raw: its bytes.
    """
    found = _SEALED.fullmatch(raw)
    return found is not None and xxhash.xxh3_128_hexdigest(found[1]).encode() == found[2]
