"""Quantised models are read from the Hub in ranges: codes and their scales, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import tiny
from tests.checkpoints.encodings.codings import FP8, INT4, NF4_DOUBLE
from tests.hub.models import WIDTH, contents, publish, transfer, weights

if TYPE_CHECKING:
    from pathlib import Path

    from tests.checkpoints.encodings.codings import Coding
    from tests.hub.conftest import User
    from tests.hub.server import Hub

ROLES = ("finetuned", "base", "target")


def make_family(root: Path, coding: Coding) -> dict[str, Path]:
    folders = {}
    for role in ROLES:
        plain = weights(role)
        # Eight times as many rows: much of a small shard would be fetched twice.
        layers = {n: plain.pop(n).repeat(8, 1) for n in list(plain) if "proj" in n}
        config = {**tiny.CONFIG, "hidden_size": WIDTH, **coding.config}
        encoded = {**coding.encode(layers), **plain}
        folders[role] = tiny.save_model(root / role, encoded, config=config, sharded=True)
    return folders


@pytest.mark.parametrize("coding", [FP8, INT4, NF4_DOUBLE], ids=lambda coding: coding.name)
def test_a_stream_gives_the_same_bytes(
    hub: Hub, user: User, tmp_path: Path, coding: Coding
) -> None:
    folders = make_family(tmp_path / "family", coding)
    publish(hub, folders)
    local = tiny.run("transfer", *(folders[role] for role in ROLES), "-o", tmp_path / "out")
    assert local.status == 0, local.err
    done = user.run(*transfer("out", "--stream", "--threads", "2"))
    assert done.returncode == 0, done.stderr
    assert contents(user.home / "out") == contents(tmp_path / "out")
    shards = [path for folder in folders.values() for path in folder.glob("model-*.safetensors")]
    size = sum(path.stat().st_size for path in shards)
    # A few tensors are sampled before.
    assert hub.sent("^/cdn/") < 1.1 * size
    assert not list(user.cache.rglob("*.safetensors"))
