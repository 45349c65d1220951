"""Models in formats that are not supported, and the errors for them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from diffxfer.checkpoints.reader import open_checkpoint, open_weights
from diffxfer.checkpoints.resolve import find
from diffxfer.checkpoints.shard_index import names_like
from diffxfer.diffs.inspection.describe import inspect_checkpoint
from diffxfer.errors import CheckpointError, QuantizedError
from tests.helpers import save_shard

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def refusal(folder: Path) -> str:
    """The error for a folder, which is the same wherever it is opened."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, "base")
    text = str(caught.value)
    assert "\n" not in text
    return text


def files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}" if name.endswith(".json") else b"x")
    return folder


@pytest.mark.parametrize("config", [(), ("config.json",)])
@pytest.mark.parametrize(
    ("names", "problem", "remedy"),
    [
        (("m.Q4_K_M.gguf",), "is a GGUF model (m.Q4_K_M.gguf)", "give the safetensors model"),
        (("weights.npz",), "has MLX weights (weights.npz)", "give the safetensors model"),
        (("weights.00.npz",), "has MLX weights (weights.00.npz)", "give the safetensors model"),
        (
            ("consolidated.00.pth", "params.json"),
            "own layout (consolidated.00.pth)",
            "in transformers format",
        ),
        (
            ("consolidated.safetensors", "params.json"),
            "own layout (consolidated.safetensors)",
            "in transformers format",
        ),
        (
            ("zero_to_fp32.py", "latest", "global_step5/mp_rank_00_model_states.pt"),
            "is a DeepSpeed checkpoint (zero_to_fp32.py) with ungathered weights",
            "python zero_to_fp32.py . . --safe_serialization",
        ),
        (
            ("zero_pp_rank_0_mp_rank_00_model_states.pt",),
            "is a DeepSpeed checkpoint with ungathered weights",
            "stage3_gather_16bit_weights_on_model_save: true",
        ),
    ],
)
def test_a_form_that_is_not_read(
    tmp_path: Path, config: tuple[str, ...], names: tuple[str, ...], problem: str, remedy: str
) -> None:
    text = refusal(files(tmp_path, *names, *config))
    said, _, advice = text.partition("; ")
    assert said.startswith(f"{tmp_path}: ")
    assert problem in said
    assert remedy in advice
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(tmp_path)
    assert str(caught.value) == text
    # Beside a model in a supported format, they are ignored.
    llama().save_pretrained(tmp_path)
    open_checkpoint(tmp_path, "base")


def test_a_gguf_that_is_named_itself(tmp_path: Path) -> None:
    files(tmp_path, "m.gguf")
    with pytest.raises(CheckpointError, match=r"m\.gguf: is a GGUF file, .*; give the safetensors"):
        find(tmp_path / "m.gguf", "the base checkpoint")


class TestZero3:
    def saved(self, folder: Path) -> Path:
        """What `save_pretrained` writes while the matrices are on other processes."""
        states = llama().state_dict()
        kept = {n: v if v.dim() == 1 else torch.empty(0) for n, v in states.items()}
        llama().save_pretrained(folder, state_dict=kept)
        return folder

    def test_empty_tensors(self, tmp_path: Path) -> None:
        text = refusal(self.saved(tmp_path))
        assert text.startswith(f"{tmp_path}/model.safetensors: has 9 empty tensors, such as ")
        assert "of shape (0,), but config.json has hidden_size 16" in text
        assert (
            "run zero_to_fp32.py in the training output folder that contains global_step*/" in text
        )
        assert "with stage3_gather_16bit_weights_on_model_save: true" in text

    def test_the_parts_beside_them(self, tmp_path: Path) -> None:
        folder = files(self.saved(tmp_path / "a b"), "zero_to_fp32.py")
        command = f"cd '{folder}' && rm model.safetensors && python zero_to_fp32.py . ."
        assert command in refusal(folder)

    def test_no_tensors_at_all(self, tmp_path: Path) -> None:
        save_shard(files(tmp_path, "config.json") / "model.safetensors", {})
        assert "model.safetensors: has no tensors" in refusal(tmp_path)
        files(tmp_path, "zero_to_fp32.py")
        assert "python zero_to_fp32.py" in refusal(tmp_path)

    def test_an_empty_tensor_that_nothing_speaks_against(self, tmp_path: Path) -> None:
        save_shard(tmp_path / "model.safetensors", {"a.weight": torch.empty(0)})
        (tmp_path / "config.json").write_text('{"model_type": "odd"}')
        open_checkpoint(tmp_path, "base")
        save_shard(tmp_path / "model.safetensors", {"a.weight": torch.empty(0, 4)})
        (tmp_path / "config.json").write_text('{"hidden_size": 4}')
        open_checkpoint(tmp_path, "base")
        save_shard(tmp_path / "model.safetensors", {"a.weight": torch.empty(0)})
        (tmp_path / "config.json").write_text('{"text_config": {"hidden_size": 4}}')
        assert "but config.json has hidden_size 4" in refusal(tmp_path)


class TestPickles:
    def pickled(self, folder: Path) -> Path:
        llama().save_pretrained(folder)
        (folder / "model.safetensors").unlink()
        torch.save(llama().state_dict(), folder / "pytorch_model.bin")
        return folder

    @pytest.mark.slow
    def test_the_command_that_is_given_works(self, tmp_path: Path) -> None:
        folder = self.pickled(tmp_path / 'a "b" c')
        text = refusal(folder)
        argv = shlex.split(text.partition("if you trust it, save it as safetensors: ")[2])
        assert argv[:2] == ["python", "-c"]
        subprocess.run([sys.executable, *argv[1:]], check=True, timeout=120, capture_output=True)
        found = open_checkpoint(folder, "base")
        assert found.tensors.keys() == llama().state_dict().keys()

    @pytest.mark.parametrize(
        "changed", [{"architectures": None}, {"auto_map": {}}, {"architectures": ["a;b"]}]
    )
    def test_a_class_that_is_not_transformers_own(
        self, tmp_path: Path, changed: dict[str, object]
    ) -> None:
        folder = self.pickled(tmp_path)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changed))
        assert "load it with the code that wrote it, and call save_pretrained" in refusal(folder)

    def test_are_named_before_another_form(self, tmp_path: Path) -> None:
        folder = files(self.pickled(tmp_path), "m.gguf", "zero_to_fp32.py", "consolidated.00.pth")
        assert "has only pickled weights (" in refusal(folder)
        assert "from transformers import LlamaForCausalLM as M" in refusal(folder)

    def test_those_of_diffusers(self, tmp_path: Path) -> None:
        files(tmp_path, "diffusion_pytorch_model.bin")
        (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
        assert "python -c 'from diffusers import UNet2DModel as M; " in refusal(tmp_path)


class TestDiffusers:
    def test_the_folders_that_can_be_given(self, tmp_path: Path) -> None:
        files(tmp_path, "model_index.json", "scheduler/scheduler_config.json", "bin/config.json")
        text = refusal(files(tmp_path, "bin/diffusion_pytorch_model.bin"))
        assert "is a diffusers pipeline of several models (model_index.json)" in text
        assert "none of its folders has safetensors" in text
        for name, stem in {
            "text_encoder": "model.safetensors",
            "unet": "diffusion_pytorch_model.safetensors",
            "vae": "diffusion_pytorch_model.safetensors.index.json",
        }.items():
            files(tmp_path, f"{name}/config.json", f"{name}/{stem}")
        given = ", ".join(f"{tmp_path}/{name}" for name in ("unet", "text_encoder", "vae"))
        assert refusal(tmp_path).endswith(f"; give the folder of one model: {given}")

    def test_a_component_is_a_checkpoint(self, tmp_path: Path) -> None:
        single = tmp_path / "diffusion_pytorch_model.safetensors"
        save_shard(files(tmp_path, "config.json") / single.name, {"a": torch.ones(2)})
        assert list(open_checkpoint(tmp_path, "base").tensors) == ["a"]
        files(tmp_path, "diffusion_pytorch_model.fp16.safetensors")
        assert not open_weights(tmp_path).indexed
        shard = single.with_name("diffusion_pytorch_model-00001-of-00001.safetensors")
        single.rename(shard)
        index = json.dumps({"weight_map": {"a": shard.name}})
        (tmp_path / f"{single.name}.index.json").write_text(index)
        assert open_weights(tmp_path).indexed
        files(tmp_path, single.name)
        assert f"has both {single.name} and an index" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("shards", "stem"),
    [
        ((), "model"),
        (("model.safetensors",), "model"),
        (("diffusion_pytorch_model.safetensors",), "diffusion_pytorch_model"),
        (("diffusion_pytorch_model-1.safetensors", "model.safetensors"), "model"),
        (("x.safetensors",), "model"),
    ],
)
def test_names_like_those_of_an_input(shards: tuple[str, ...], stem: str) -> None:
    assert names_like(shards).stem == stem
    assert names_like(iter(shards)).index == f"{stem}.safetensors.index.json"


class TestMlx:
    def test_a_whole_one_is_read(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        files(tmp_path, "config.json")
        save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "mlx"})
        assert list(open_checkpoint(tmp_path, "base").tensors) == ["a.weight"]

    def test_a_quantised_one_is_told_by_its_tensors(self, tmp_path: Path) -> None:
        codes = {
            "a.weight": torch.zeros(4, 4).to(torch.uint32),
            "a.scales": torch.ones(4, 1),
            "a.biases": torch.ones(4, 1),
        }
        save_shard(files(tmp_path, "config.json") / "model.safetensors", codes)
        with pytest.raises(
            QuantizedError, match=r"is quantised \(MLX, according to its tensor a\.weight\)"
        ):
            open_checkpoint(tmp_path, "base")


class TestTrainingRun:
    """A trainer's output folder without weights: the newest checkpoint in it is named."""

    @pytest.mark.parametrize("weights", ["model.safetensors", "adapter_model.safetensors"])
    def test_the_newest_step_is_named(self, tmp_path: Path, weights: str) -> None:
        files(tmp_path, *(f"checkpoint-{step}/{weights}" for step in (90, 1000)), "README.md")
        # These have no weights: a step that was cut short, a folder of another kind, a file.
        files(tmp_path, "checkpoint-2000/optimizer.pt", f"checkpoint-best/{weights}")
        files(tmp_path, "checkpoint-3000")
        assert refusal(tmp_path) == (
            f"{tmp_path}: has no weights, only 2 checkpoint-* folders of a training run;"
            f" give the newest one: {tmp_path}/checkpoint-1000"
        )

    def test_the_folder_that_is_named_can_be_opened(self, tmp_path: Path) -> None:
        llama().save_pretrained(tmp_path / "checkpoint-7")
        named = Path(refusal(tmp_path).rpartition(" give the newest one: ")[2])
        assert open_checkpoint(named, "base").tensors

    def test_no_step_with_weights(self, tmp_path: Path) -> None:
        text = refusal(files(tmp_path, "config.json", "checkpoint-5/optimizer.pt"))
        assert "found none" in text

    def test_its_own_weights_come_first(self, tmp_path: Path) -> None:
        files(tmp_path, "checkpoint-5/model.safetensors")
        llama().save_pretrained(tmp_path)
        assert open_checkpoint(tmp_path, "base").tensors
