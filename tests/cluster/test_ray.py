"""On a real Ray cluster of several nodes: the folder of one machine, whatever happens to a node."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from diffxfer import RayCluster, apply_diff, compare_checkpoints, extract_diff, transfer, verify
from diffxfer.errors import NonFiniteError, OutputError
from tests import tiny
from tests.cluster import nodes
from tests.cluster.nodes import roles
from tests.families import contents
from tests.helpers import save_shard

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ray = pytest.importorskip("ray")
PART = 10_000_000


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with nodes.cluster({}, {}) as made:
        yield made.address


@pytest.fixture(scope="module")
def cluster(address: str) -> Iterator[RayCluster]:
    with RayCluster(address, part_bytes=PART) as connected:
        yield connected


def test_transfer(cluster, world, expected, tmp_path: Path) -> None:
    seen = []
    out = tmp_path / "out"
    report = transfer(
        *(*roles(world), out), cluster=cluster, progress=lambda *done: seen.append(done)
    )
    assert contents(out) == expected
    assert seen == sorted(seen)
    assert seen[-1] == (report.bytes_to_read + report.bytes_to_write,) * 2


@pytest.mark.parametrize("verb", [extract_diff, apply_diff])
def test_the_two_steps(cluster, world, tmp_path: Path, verb: Any) -> None:
    inputs = {extract_diff: ("finetuned", "base"), apply_diff: ("diff", "target")}[verb]
    folders = [world.folders[role] for role in inputs]
    for name, where in (("one", None), ("parts", cluster)):
        verb(*folders, tmp_path / name / "out", cluster=where)
    assert contents(tmp_path / "parts" / "out") == contents(tmp_path / "one" / "out")


def test_verify_and_inspect(cluster, world) -> None:
    diff, base, finetuned = (world.folders[r] for r in ("diff", "base", "finetuned"))
    found = [
        verify(diff, base=base, finetuned=finetuned, cluster=where) for where in (None, cluster)
    ]
    assert found[0].restored == found[1].restored
    assert (found[0].files, found[0].bytes_read) == (found[1].files, found[1].bytes_read)
    pairs = [compare_checkpoints(finetuned, base, cluster=where) for where in (None, cluster)]
    assert pairs[0].tensors == pairs[1].tensors


def test_damage_is_told_as_on_one_machine(cluster, world, tmp_path: Path) -> None:
    broken = world.copy(tmp_path / "broken")
    for shard in broken.folders["finetuned"].glob("*.safetensors"):
        weights = load_file(shard)
        for tensor in weights.values():
            if tensor.is_floating_point() and tensor.dim() > 1:
                tensor[600, 2] = float("nan")
        save_shard(shard, weights)
    told = []
    for where in (None, cluster):
        with pytest.raises(NonFiniteError) as found:
            transfer(*roles(broken), tmp_path / "made" / "out", cluster=where)
        told.append(str(found.value))
        assert not (tmp_path / "made").exists()
    assert told[0] == told[1]


def test_the_command_line_uses_the_connection(cluster, world, expected, tmp_path: Path) -> None:
    out = tmp_path / "out"
    operands = [*map(str, roles(world)), "-o", str(out)]
    planned = tiny.run("transfer", *operands, "--ray", cluster.address, "--dry-run", "--json")
    assert planned.status == 0
    assert not out.exists()
    done = tiny.run("transfer", *operands, "--ray", cluster.address, "--json")
    assert json.loads(done.out)["written"] is True
    assert contents(out) == expected
    assert ray.is_initialized(), "who connected disconnects"


def test_what_the_nodes_do_not_have(cluster, world, tmp_path: Path) -> None:
    argv = ["transfer", *map(str, roles(world)), "-o", str(tmp_path / "out")]
    argv += ["--ray", cluster.address]
    many = tiny.run(*argv, "--threads", "2")
    assert "--threads: no node has 2 processors for Ray; they have 1, 1" in many.err
    gpu = tiny.run(*argv, "--device", "cuda")
    assert "--ray: no node has 1 GPUs for Ray; they have 0, 0" in gpu.err
    assert not [*tmp_path.iterdir()]


def test_its_nodes_in_words(cluster) -> None:
    assert "on Ray: 2 nodes (" in cluster.description()
    assert cluster.description().endswith("), 2 processors")


def test_two_runs_at_once(cluster, world, expected, tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def run(out: Path) -> None:
        try:
            transfer(*roles(world), out, cluster=cluster)
        except BaseException as exc:
            failed.append(exc)

    outs = [tmp_path / "a" / "out", tmp_path / "b" / "out"]
    threads = [threading.Thread(target=run, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert all(contents(out) == expected for out in outs)


def test_of_two_runs_to_one_output_the_second_is_refused(
    cluster, world, expected, tmp_path: Path
) -> None:
    out, refused = tmp_path / "out", []

    def second(*_: int) -> None:
        if not refused:
            with pytest.raises(OutputError, match="is being written by another run"):
                transfer(*roles(world), out, cluster=cluster)
            refused.append(True)

    transfer(*roles(world), out, cluster=cluster, progress=second)
    assert refused
    assert contents(out) == expected
