"""The config of an adapter that diffxfer writes, ``adapter_config.json``, as PEFT reads it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from statistics import mode
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.text_config import TEXT_CONFIGS
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from diffxfer.checkpoints.reader import Checkpoint

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_TASK_HEADS = ("classifier", "score", "qa_outputs")
_NO_TARGET = "dummy-target-modules"
"""What PEFT accepts for an adapter without factors."""


@dataclass(slots=True)
class Stored:
    """What an adapter stores, by module of the model.

    Attributes:
        ranks: the rank of each module with factors.
        parameters: the rank of each parameter with factors that PEFT finds by its own name.
        transposed: whether some layers store their weight as (in, out).
        whole: the modules that are stored whole.
        biases: whether biases of linear layers are stored.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    transposed: bool = False
    whole: list[str] = field(default_factory=list)
    biases: bool = False


def make_config(
    stored: Stored,
    modules: Collection[str],
    *,
    base: str,
    revision: str | None,
    config: Mapping[str, Any],
) -> bytes:
    """The bytes of ``adapter_config.json``; the scaling of every module is 1.

    Args:
        stored: what the adapter stores.
        modules: every module of base that has a weight.
        base: the name of base: a Hub id or a folder.
        revision: its commit, for a Hub id.
        config: finetuned's ``config.json``.
    """
    ranks = {**stored.ranks, **stored.parameters}
    # PEFT 0.21 uses the pattern of a parameter, but warns that it matches no module: so parameters
    # have the rank without a pattern, as far as they can.
    most = mode(stored.parameters.values()) if stored.parameters else 0
    rank = most or max(ranks.values(), default=1)
    # PEFT takes the first pattern that matches the end of a name, so longer ones come first.
    others = sorted((n for n, r in ranks.items() if r != rank), key=lambda n: (-len(n), n))
    pattern = {name: ranks[name] for name in others}
    made = {
        "alpha_pattern": dict(pattern),
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "all" if stored.biases else "none",
        "fan_in_fan_out": stored.transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(dict.fromkeys(stored.whole)) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": pattern,
        "revision": revision,
        "target_modules": target_modules([*stored.ranks], modules) if stored.ranks else _NO_TARGET,
        "task_type": task_type(config, stored.whole),
        "use_dora": False,
        "use_rslora": False,
    }
    if stored.parameters:
        made["target_parameters"] = sorted(stored.parameters)
    return (json.dumps(made, indent=2, sort_keys=True) + "\n").encode()


def target_modules(chosen: Sequence[str], modules: Collection[str]) -> list[str] | str:
    """The shortest list of endings that match the chosen modules and no others, as PEFT matches.

    Args:
        chosen: modules with factors.
        modules: every module of base that has a weight.

    Returns:
        Endings of names; or a regular expression, if a whole name is the ending of another.
    """
    known, every = set(chosen), {*modules, *chosen}
    by_leaf: dict[str, list[str]] = {}
    for name in sorted(every):
        by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    targets: list[str] = []
    for leaf, names in sorted(by_leaf.items()):
        inside = [name for name in names if name in known]
        # A number as an ending would match many modules of other kinds.
        targets += [leaf] if len(inside) == len(names) and not leaf.isdigit() else inside
    endings = tuple(f".{target}" for target in targets)
    others = every - known
    if any(name in targets or name.endswith(endings) for name in others):
        return "|".join(re.escape(name) for name in sorted(known))
    return targets


def task_type(config: Mapping[str, Any], whole: Collection[str]) -> str | None:
    """PEFT's name of a model's task; None for a model without one.

    PEFT demands the heads of classifiers in the adapter, so one without them has no task.

    Args:
        config: the model's ``config.json``.
        whole: the modules that the adapter stores whole.
    """
    named = config.get("architectures")
    for name in named if isinstance(named, list) else []:
        if isinstance(name, str):
            if name.endswith("ForConditionalGeneration"):
                return "SEQ_2_SEQ_LM" if config.get("is_encoder_decoder") else "CAUSAL_LM"
            for ending, task in _TASKS.items():
                if name.endswith(ending):
                    heads = any(module.rpartition(".")[2] in _TASK_HEADS for module in whole)
                    return task if task == "CAUSAL_LM" or heads else None
    return None


def model_prefix(config: Mapping[str, Any], names: Collection[str]) -> str:
    """The beginning of a model's names that its checkpoint lacks, such as ``"transformer."``.

    A checkpoint of the bare model may be loaded into one with a head, as that of GPT-2 is: the
    names that PEFT sees then begin with the name of the bare model.

    Args:
        config: base's ``config.json``.
        names: its tensors' names.

    Returns:
        The beginning with its dot, or "" if nothing lacks, or transformers is not installed.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str) or any(n.startswith(("model.", "transformer.")) for n in names):
        return ""
    try:
        import transformers
    except ImportError:
        return ""
    bare = str(getattr(getattr(transformers, name, None), "base_model_prefix", ""))
    is_bare = name.endswith("Model") and "LMHead" not in name
    inside = any(known.startswith(f"{bare}.") for known in names)
    return "" if not bare or inside or is_bare else f"{bare}."


def refuse_unknown_names(checkpoint: Checkpoint, remedy: str) -> None:
    """Refuse a model whose modules in PEFT are not named as its tensors on disk are.

    Args:
        checkpoint: the model.
        remedy: what to do instead.

    Raises:
        CheckpointError: if it is an encoder-decoder or a multimodal model, or a Mixtral.
    """
    config = checkpoint.config
    nested = next((key for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None)
    routers = any("block_sparse_moe" in name for name in checkpoint.tensors)
    if nested is None and not routers and not config.get("is_encoder_decoder"):
        return
    kind = str(config.get("model_type") or "multimodal")[:40]
    raise CheckpointError(
        checkpoint.folder,
        f"is a {kind} model, whose names in PEFT differ from those on disk",
        remedy,
    )
