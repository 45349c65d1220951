"""The parts of a config that describe the language model, which multimodal models nest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

TEXT_CONFIGS = ("text_config", "language_config", "llm_config")
"""Where multimodal models keep the config of their language model."""


def config_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config itself, then its nested configs that describe the language model.

    Args:
        config: the content of a config.json.
    """
    nested = (config.get(key) for key in TEXT_CONFIGS)
    return [config, *(part for part in nested if isinstance(part, dict))]
