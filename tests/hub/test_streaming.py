"""Reading from the Hub without storing: what is fetched, held in memory, and resumed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from diffxfer import extract_diff
from tests.hub import faults
from tests.hub.models import IDS, contents, publish, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hub.conftest import User
    from tests.hub.server import Hub

LAST = "model-00001-of"


def refuse_the_rest() -> faults.Fault:
    """What befalls a run in its midst: no headers, and no samples."""
    path = f"^/cdn/{IDS['target']}/.*{LAST}"
    return faults.Fault(path, beyond=1_000_000, least=1000, status=416)


def test_a_run_that_broke_off_goes_on(
    hub: Hub, user: User, family: dict[str, Path], grafted: Path
) -> None:
    publish(hub, family)
    # The header comes, and samples, and about a MiB; then the server wants no more of it.
    refusing = refuse_the_rest()
    hub.faults.on(refusing)
    options = ("--stream", "--threads", "1")
    done = user.run(*transfer("out", *options))
    assert done.returncode == 1, done.stderr
    assert f"{IDS['target']}: cannot be fetched" in done.stderr
    assert refusing.met
    hub.faults.off()
    done = user.run(*transfer("out", *options, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_bytes"] > 0
    assert contents(user.home / "out") == contents(grafted)


def test_it_goes_on_with_what_was_downloaded_meanwhile(
    hub: Hub, user: User, family: dict[str, Path], grafted: Path
) -> None:
    publish(hub, family)
    hub.faults.on(refuse_the_rest())
    assert user.run(*transfer("out", "--stream", "--threads", "1")).returncode == 1
    hub.faults.off()
    done = user.run(*transfer("out", "--json", "--threads", "1"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_bytes"] > 0
    assert contents(user.home / "out") == contents(grafted)


def test_every_byte_is_fetched_about_once(
    hub: Hub, user: User, family: dict[str, Path], grafted: Path
) -> None:
    publish(hub, family)
    done = user.run(*transfer("out", "--stream", "--threads", "2"))
    assert done.returncode == 0, done.stderr
    shards = [path for folder in family.values() for path in folder.glob("model-*.safetensors")]
    size = sum(path.stat().st_size for path in shards)
    # Headers come first, with the first 64 KiB of each of six shards.
    assert size <= hub.sent("^/cdn/") < 1.2 * size
    assert not list(user.cache.rglob("*.safetensors"))


def test_a_packed_diff_vector_is_read_by_ranges(
    hub: Hub, user: User, family: dict[str, Path], tmp_path: Path
) -> None:
    publish(hub, family)
    packed = tmp_path / "packed"
    extract_diff(family["finetuned"], family["base"], packed, pack=True, allow_unrelated=True)
    hub.add("me/packed", packed)
    options = ("--stream", "--allow-unrelated", "-q")
    done = user.run("apply", "me/packed", IDS["base"], "-o", "out", *options)
    assert done.returncode == 0, done.stderr
    assert not list(user.cache.rglob("model*.safetensors"))
    for path in (user.home / "out").glob("model-*.safetensors"):
        theirs = load_file(family["finetuned"] / path.name)
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    done = user.run("verify", "me/packed", "--stream")
    assert done.returncode == 0, done.stderr
