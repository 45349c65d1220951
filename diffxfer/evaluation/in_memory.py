"""Backends of lm-eval that are made in this process, so that they need no folder of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.models.loading import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lm_eval.api.model import LM

    from diffxfer.evaluation.eval_settings import EvalSettings
    from diffxfer.models.source import ModelSource


def make_backend(
    source: ModelSource,
    model_args: Mapping[str, Any],
    settings: EvalSettings,
    progress: Callable[[int, int], None] | None,
) -> LM:
    """Make lm-eval's transformers backend; all but the weights is done by its own code.

    Args:
        source: the weights.
        model_args: its arguments; `pretrained` is the folder of the source.
        settings: how to score.
        progress: called with the bytes of weights that are loaded, and the total.

    Raises:
        DiffxferError: if a tensor cannot be made. Exceptions of its libraries are not translated.
    """
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):  # type: ignore[misc]
        """The backend, which loads the model from the source."""

        def _create_model(
            self,
            pretrained: str,
            dtype: Any = "auto",
            attn_implementation: str | None = None,
            **_: Any,
        ) -> None:
            assert pretrained == str(source.folder)
            self._model, _info = load_weights(
                *(source, dtype, self.device, self.AUTO_MODEL_CLASS, progress),
                attn_implementation=attn_implementation,
            )

    return InMemory.create_from_arg_obj(
        dict(model_args),
        {"batch_size": settings.batch_size, "device": settings.resolved_device},
    )


def make_classifier(
    model: ModelSource | str,
    settings: EvalSettings,
    progress: Callable[[int, int], None] | None,
    warn: Callable[[str], None] | None,
) -> LM:
    """Make our backend for classifiers.

    Args:
        model: its weights, or its folder.
        settings: how to score.
        progress: called with the bytes of weights that are loaded, and the total.
        warn: called with a line about texts that were truncated.

    Raises:
        DiffxferError: if it is not a classifier, or cannot be loaded.
    """
    from diffxfer.evaluation.classifier import ClassifierLM

    return ClassifierLM(
        model,
        batch_size=settings.batch_size,
        device=settings.resolved_device,
        dtype=settings.dtype,
        progress=progress,
        warn=warn,
        **settings.model_args,
    )
