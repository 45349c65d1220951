"""Models in unsupported formats: recognising them, and how to convert them.

File names identify the format, so this works alike for a folder and for a model on the Hub, and
needs no download.
"""

from __future__ import annotations

import json
import shlex
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import optional_object
from diffxfer.checkpoints.location import Place
from diffxfer.checkpoints.shard_index import INDEX_NAME, SINGLE_SHARD
from diffxfer.checkpoints.stored import FLOATS
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffxfer.checkpoints.stored import StoredTensor

_WHOLE = "*pytorch_model*.bin"
"""The weight files of transformers and diffusers before safetensors."""
_PICKLES = (_WHOLE, "*.bin", "*.pt", "*.pth", "*.ckpt")
_MADE_FROM = "give the safetensors model that it was made from"

_ZERO_SCRIPT = "zero_to_fp32.py"
_GATHER = "stage3_gather_16bit_weights_on_model_save"
_STEP = "checkpoint-"
"""How transformers' Trainer names the folder of a step."""
_SIZES = ("hidden_size", "d_model", "n_embd", "dim", "vocab_size")
"""Config keys of sizes that cannot be 0 in the model's tensors."""

_TRAINED = ("transformer", "unet")
"""The parts of a diffusers pipeline that are usually fine-tuned; messages name them first."""


def refuse_foreign(place: Place) -> None:
    """Refuse a model whose weights are only in an unsupported format.

    Args:
        place: the checkpoint.

    Raises:
        CheckpointError: if so; it names the format and the remedy.
    """
    # Whole pickles are preferable to another format beside them: they can be saved again.
    if place.shard_names is not None or place.matching(_WHOLE):
        return
    for form in (_zero, _adapter, _pipeline, _gguf, _mlx, _consolidated, _training_run):
        found = form(place)
        if found is not None:
            raise CheckpointError(place.label, *found)


def refuse_foreign_file(path: Path) -> None:
    """Refuse a single file that is a whole model in an unsupported format.

    Args:
        path: a file that was given instead of a folder.

    Raises:
        CheckpointError: if it is one.
    """
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(path, "is a GGUF file, expected safetensors", _MADE_FROM)


def no_weights(place: Place) -> CheckpointError:
    """The error for a checkpoint without a single shard, an index or any other known format.

    Args:
        place: the checkpoint.
    """
    pickles = [name for pattern in _PICKLES for name in place.matching(pattern)]
    if pickles:
        return CheckpointError(
            place.label,
            f"has only pickled weights ({pickles[0]}), which are never loaded: a pickle runs code",
            f"if you trust it, save it as safetensors: {_unpickle(place, pickles[0])}",
        )
    others = place.matching("*.safetensors")
    found = f"only {', '.join(others[:3])}" if others else "none"
    return CheckpointError(
        place.label,
        f"expected {SINGLE_SHARD} or {INDEX_NAME}, found {found}",
        "save the model with save_pretrained, or download the whole folder",
    )


def refuse_empty(
    place: Place, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> None:
    """Refuse a checkpoint whose shards lack the weights, as DeepSpeed ZeRO-3 may save it.

    Args:
        place: the checkpoint.
        config: its ``config.json``.
        tensors: the tensors of its shards.

    Raises:
        CheckpointError: if there are no tensors, or empty ones whose size the config states.
    """
    names = place.shard_names
    if not tensors:
        where = f"{place.label}/{names.single}" if names is not None else place.label
        problem = "has no tensors, expected a complete checkpoint"
        zero = place.has(_ZERO_SCRIPT)
        raise CheckpointError(
            where, problem, _gather(place) if zero else "download or save it again"
        )
    empty = [spec for spec in tensors.values() if spec.shape == (0,) and spec.dtype in FLOATS]
    weight = next((spec for spec in empty if spec.name.endswith("weight")), None)
    size = _stated_size(config)
    if weight is not None and size is not None:
        raise CheckpointError(
            weight.shard.path,
            f"has {len(empty):,} empty tensors, such as {weight.name} of shape (0,), but"
            f" config.json has {size}: DeepSpeed ZeRO-3 saved it without gathering the weights",
            _gather(place),
        )


def _stated_size(config: Mapping[str, Any]) -> str | None:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _SIZES:
            value = part.get(key)
            if type(value) is int and value > 0:
                return f"{key} {value}"
    return None


def _gather(place: Place) -> str:
    """How to recover the weights from the files of ZeRO-3."""
    if place.files is None and place.has(_ZERO_SCRIPT):
        stale = place.folder / SINGLE_SHARD
        remove = f"rm {SINGLE_SHARD} && " if place.has(stale.name) else ""
        folder = shlex.quote(str(place.folder))
        command = f"cd {folder} && {remove}python {_ZERO_SCRIPT} . . --safe_serialization"
        return f"gather the weights: {command}; or train with {_GATHER}: true"
    return (
        f"run {_ZERO_SCRIPT} in the training output folder that contains global_step*/, or save the"
        f" model again with {_GATHER}: true"
    )


def _zero(place: Place) -> tuple[str, str] | None:
    if place.has(_ZERO_SCRIPT):
        return f"is a DeepSpeed checkpoint ({_ZERO_SCRIPT}) with ungathered weights", _gather(place)
    parts = place.matching("*_model_states.pt")
    if not parts:
        return None
    return f"is a DeepSpeed checkpoint with ungathered weights ({parts[0]})", _gather(place)


def _adapter(place: Place) -> tuple[str, str] | None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if place.has(name):
            return (
                f"is a LoRA adapter ({name}), expected a complete checkpoint",
                "merge it into its base first: "
                "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(…)",
            )
    return None


def _pipeline(place: Place) -> tuple[str, str] | None:
    if not place.has("model_index.json"):
        return None
    problem = "is a diffusers pipeline of several models (model_index.json), expected one model"
    parts = sorted(_parts(place), key=lambda part: (part not in _TRAINED, part))
    if not parts:
        return problem, (
            "none of its folders has safetensors: save the pipeline again with"
            " DiffusionPipeline.from_pretrained(…).save_pretrained(…)"
        )
    home, download = _downloaded(place)
    named = ", ".join(f"{home}/{part}" for part in parts)
    return problem, f"{download}give the folder of one model: {named}"


def _parts(place: Place) -> list[str]:
    """The folders of a pipeline that can be used as checkpoints."""
    if place.files is None:
        inside = [Place(path) for path in place.folder.iterdir() if path.is_dir()]
        found = [part for part in inside if part.has("config.json") and part.shard_names]
        return [part.folder.name for part in found]
    folders = {name.rpartition("/")[0] for name in place.files if name.endswith("/config.json")}
    return [
        folder
        for folder in folders
        if Place(place.folder / folder, _below(place.files, folder)).shard_names
    ]


def _below(files: Mapping[str, Any], folder: str) -> dict[str, Any]:
    start = f"{folder}/"
    return {name.removeprefix(start): f for name, f in files.items() if name.startswith(start)}


def _downloaded(place: Place) -> tuple[str, str]:
    """The local path of a checkpoint, and the command that downloads it, followed by ``, then``."""
    if place.files is None:
        return str(place.folder), ""
    file = next(iter(place.files.values()))
    home = file.repo.rpartition("/")[2]
    return home, (f"hf download {file.repo} --revision {file.commit} --local-dir {home}, then ")


def _gguf(place: Place) -> tuple[str, str] | None:
    found = place.matching("*.gguf")
    return (f"is a GGUF model ({found[0]}), expected safetensors", _MADE_FROM) if found else None


def _mlx(place: Place) -> tuple[str, str] | None:
    found = place.matching("weights*.npz")
    if not found:
        return None
    return f"has MLX weights ({found[0]}), expected safetensors", _MADE_FROM


def _consolidated(place: Place) -> tuple[str, str] | None:
    found = place.matching("consolidated*.safetensors") + place.matching("consolidated*.pth")
    if not found:
        return None
    return (
        f"has weights only in Meta's or Mistral's own layout ({found[0]})",
        f"give the same model in transformers format, with config.json and {SINGLE_SHARD}",
    )


def _training_run(place: Place) -> tuple[str, str] | None:
    """A trainer's output folder that has only the checkpoints of its steps."""
    if place.files is not None:
        return None
    steps = {
        int(path.name.removeprefix(_STEP)): path
        for path in place.folder.glob(f"{_STEP}*")
        if path.name.removeprefix(_STEP).isdecimal() and _has_weights(Place(path))
    }
    if not steps:
        return None
    folders = f"{len(steps)} {_STEP}* folder{'s' if len(steps) > 1 else ''} of a training run"
    return f"has no weights, only {folders}", f"give the newest one: {steps[max(steps)]}"


def _has_weights(place: Place) -> bool:
    return place.shard_names is not None or _adapter(place) is not None


def _unpickle(place: Place, pickle: str) -> str:
    """How to convert pickles of transformers or diffusers to safetensors."""
    config = optional_object(place.folder, "config.json")
    named = config.get("architectures")
    library, classes = "transformers", named if isinstance(named, list) else []
    if pickle.startswith("diffusion_"):
        library, classes = "diffusers", [config.get("_class_name")]
    known = classes and isinstance(classes[0], str) and classes[0].isidentifier()
    if not known or "auto_map" in config or not fnmatchcase(pickle, _WHOLE):
        return "load it with the code that wrote it, and call save_pretrained(…)"
    home, download = _downloaded(place)
    where = json.dumps(home, ensure_ascii=False)
    code = f"M.from_pretrained({where}).save_pretrained({where})"
    return f"{download}python -c {shlex.quote(f'from {library} import {classes[0]} as M; {code}')}"
