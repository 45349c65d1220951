"""The check that a push overwrites only an earlier push of the same kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import read_bytes
from diffxfer.checkpoints.json_read import parse_object
from diffxfer.checkpoints.output_place import MANIFEST_NAME, named_files
from diffxfer.errors import HubError

if TYPE_CHECKING:
    from diffxfer.checkpoints.hub.upload import Files, Repository
    from diffxfer.diffs.artifact.manifest import Manifest

KIND_NAMES = {
    "diff": "a diff vector",
    "graft": "a graft",
    "tuned": "a tuned model",
    "adapter": "an adapter",
}
"""The name of each kind of folder, for messages."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
_MODELS = ("config.json", "adapter_config.json")


def refuse_overwrite(repository: Repository | None, manifest: Manifest, *, private: bool) -> None:
    """Refuse to overwrite anything but an earlier push of the same kind.

    Args:
        repository: the existing repository; None if there is none.
        manifest: the manifest of the folder to publish.
        private: whether a private repository was requested.

    Raises:
        HubError: if the repository has anything else, or is public instead of private.
    """
    if repository is None:
        return
    repo = repository.repo
    if private and not repository.private:
        problem = "exists and is public, but --private was given"
        raise HubError(repo, None, "public", problem, "make it private in its settings first")
    if MANIFEST_NAME not in repository.files:
        held = [n for n in sorted(repository.files) if n.endswith(_WEIGHTS) or n in _MODELS]
        if held:
            problem = f"has a model that diffxfer did not push ({held[0]})"
            remedy = "push to another name, or delete its files on the Hub first"
            raise HubError(repo, None, "taken", problem, remedy)
        return
    kind = _stored_manifest(repository).get("kind")
    if kind != manifest.kind:
        is_there = (
            KIND_NAMES.get(kind, "something else") if isinstance(kind, str) else "something else"
        )
        problem = f"has {is_there}, but this folder is {KIND_NAMES[manifest.kind]}"
        raise HubError(repo, None, "taken", problem, "push to another name")


def _stored_manifest(repository: Repository) -> dict[str, Any]:
    from diffxfer.checkpoints.hub.upload import read_stored

    where = read_stored(repository, MANIFEST_NAME)
    return parse_object(read_bytes(where), where)


def stale_files(repository: Repository | None, files: Files) -> list[str]:
    """The files of an earlier push that this push does not have; other files are kept.

    Args:
        repository: the existing repository; None if there is none.
        files: the files to publish.
    """
    if repository is None or MANIFEST_NAME not in repository.files:
        return []
    named = named_files(_stored_manifest(repository))
    return sorted((named & repository.files.keys()) - files.keys())
