"""Configs of transformers as they are by default, whose weights are known by their shapes."""

from dataclasses import dataclass

import pytest
import torch
import transformers

from diffxfer.checkpoints.beside import Beside
from diffxfer.diffs.soundness.check import find_contradictions
from diffxfer.diffs.soundness.model import read_model


@dataclass(frozen=True)
class Shape:
    dtype: str
    shape: tuple[int, ...]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "CsmForConditionalGeneration",  # two models, each with heads of its own
        "EfficientNetModel",  # counts layers otherwise
        "HrmTextForCausalLM",  # runs two stacks several times
        "KyutaiSpeechToTextForConditionalGeneration",  # a codec within
        "KyutaiSpeechToTextModel",  # without the head, whose size the config states
        "MllamaModel",
        "MoshiModel",
        "NeoMMEForMaskedLM",  # a narrow embedding
        "Nemotron3_5TranscribeModel",  # its ears have the only `q_proj`
    ],
)
def test_sound_layouts_are_no_errors(name, tmp_path):
    model_class = getattr(transformers, name)
    config = model_class.config_class(architectures=[name])
    with torch.device("meta"):
        model = model_class(config)
    config.save_pretrained(tmp_path)
    tensors = {n: Shape("F32", tuple(t.shape)) for n, t in model.state_dict().items()}
    found = find_contradictions(read_model(Beside(tmp_path), tensors))
    assert [str(finding) for finding in found if finding.severity == "error"] == []
