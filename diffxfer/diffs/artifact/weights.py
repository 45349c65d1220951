"""The tensors of a diff vector: as they are on disk, or as their packed bytes say."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.stored import StoredTensor, TensorSpec
    from diffxfer.checkpoints.weights import Weights
    from diffxfer.diffs.artifact.manifest import Manifest


def diff_weights(weights: Weights, manifest: Manifest | None) -> Weights:
    """Replace the packed tensors of a folder by the differences that they encode.

    Args:
        weights: the tensors as they are on disk.
        manifest: the folder's manifest, if it has one.

    Raises:
        CheckpointError: if a tensor is not packed as the manifest states.
    """
    if manifest is None or manifest.packing is None:
        return weights
    from diffxfer.checkpoints.encodings.packed import FORMAT  # numpy is slow to import

    found = diff_tensors(weights.on_disk, manifest)
    form = FORMAT if manifest.lossy is None else f"{FORMAT} {manifest.lossy.form}"
    return replace(weights, tensors=found, formats=(form,))


def diff_tensors(
    on_disk: Mapping[str, TensorSpec], manifest: Manifest
) -> Mapping[str, StoredTensor]:
    """The differences in a folder.

    Args:
        on_disk: the tensors as they are on disk.
        manifest: the folder's manifest.

    Raises:
        CheckpointError: if a tensor is not packed as the manifest states.
    """
    if manifest.packing is None:
        return on_disk
    from diffxfer.checkpoints.encodings.packed import Packed, unpacked

    described = {
        name: (entry.dtype, entry.shape)
        for name, entry in manifest.tensors.items()
        if entry.dtype is not None and entry.shape is not None
    }
    found = unpacked(on_disk, described)
    if manifest.lossy is None:
        return found
    rounded = {name for name, entry in manifest.tensors.items() if entry.error_norm is not None}
    return {
        name: replace(stored, form=manifest.lossy.form)
        if isinstance(stored, Packed) and name in rounded
        else stored
        for name, stored in found.items()
    }
