"""LoRA adapters on the Hub."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.hub.models import IDS, WIDTH, contents, publish

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hub.conftest import User
    from tests.hub.server import Hub

ID = "me/llama-lora"
FACTORS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "llama-lora"
    folder.mkdir()
    generator = torch.Generator().manual_seed(7)
    factors = {
        f"base_model.model.model.layers.{n}.mlp.up_proj.lora_{half}.weight": 0.01
        * torch.randn(shape, generator=generator)
        for n in range(4)
        for half, shape in (("A", (4, WIDTH)), ("B", (320, 4)))
    }
    save_file(factors, folder / FACTORS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": IDS["base"]}
    tiny.write_json(folder / "adapter_config.json", config)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "optimizer.pt").write_bytes(b"not this one" * 100_000)
    return folder


@pytest.mark.parametrize("options", [(), ("--stream",)], ids=["downloaded", "streamed"])
def test_the_same_bytes_as_from_a_folder(
    hub: Hub, user: User, family: dict[str, Path], adapter: Path, options: tuple[str, ...]
) -> None:
    publish(hub, family)
    commit = hub.add(ID, adapter).refs["main"]
    roles = [adapter, family["base"], family["target"]]
    for command, folders, ids in (
        ("transfer", roles, [ID, IDS["base"], IDS["target"]]),
        ("apply", [roles[0], roles[2]], [ID, IDS["target"]]),
    ):
        done = tiny.run(command, *folders, "-o", user.home / "plain" / command, "--allow-unrelated")
        assert done.status == 0, done.err
        hubbed = user.run(command, *ids, "-o", command, "--allow-unrelated", "--json", *options)
        assert hubbed.returncode == 0, hubbed.stderr
        assert contents(user.home / command) == contents(user.home / "plain" / command)
        sources = json.loads((user.home / command / "diffxfer.json").read_text())["sources"]
        found = sources["finetuned" if command == "transfer" else "adapter"]
        assert (found["name"], found["revision"]) == (ID, commit)
        if command == "transfer":
            expected = f"base has the name that the adapter states: {IDS['base']}"
            assert json.loads(hubbed.stdout)["notes"] == [expected]
    assert not hub.asked("optimizer")


def test_a_remedy_names_the_repository_and_its_revision(
    hub: Hub, user: User, family: dict[str, Path], adapter: Path
) -> None:
    publish(hub, family)
    tiny.edit_json(adapter / "adapter_config.json", lambda config: config.update(peft_type="IA3"))
    commit = hub.add(ID, adapter).refs["main"]
    done = user.run("transfer", ID, IDS["base"], IDS["target"], "-o", "out")
    assert done.returncode == 1
    assert f"from_pretrained('{ID}', revision='{commit}')" in done.stderr
