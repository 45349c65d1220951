"""Real Ray clusters on this machine, and nodes on which something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from diffxfer.checkpoints.partial import find_unfinished
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

cluster_utils = pytest.importorskip("ray.cluster_utils")

STORE_BYTES = 100_000_000
ROLES = ("finetuned", "base", "target")

SLOW = """
import os, time
pwrite = os.pwrite
def slowly(fd, data, offset):
    if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
        time.sleep(0.1)
    return pwrite(fd, data, offset)
os.pwrite = slowly
"""
"""Ten writes to shards a second and thread."""

FULL = """
import errno, os
pwrite, left = os.pwrite, [3]
def full(fd, data, offset):
    if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return pwrite(fd, data, offset)
os.pwrite = full
"""
"""The disk has space for three more writes."""

BROKEN = """
import diffxfer.streaming.engine as engine
def fail(*arguments):
    raise ZeroDivisionError("made on purpose")
engine.Engine.run = fail
"""
"""A bug on the node."""


def path_with(folder: Path, program: str) -> dict[str, str]:
    """The environment of a node on which a program runs first in every process."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(program)
    return {"PYTHONPATH": str(folder)}


def older(folder: Path, package: str) -> dict[str, str]:
    """The environment of a node that has another version of a package."""
    found = folder / f"{package}-0.0.1.dist-info"
    found.mkdir(parents=True)
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
    return {"PYTHONPATH": str(folder)}


@contextmanager
def cluster(*nodes: dict[str, Any]) -> Iterator[Any]:
    """A cluster with a node for each: the arguments of `Cluster.add_node`."""
    made = cluster_utils.Cluster()
    try:
        for node in nodes:
            made.add_node(object_store_memory=STORE_BYTES, **{"num_cpus": 1, **node})
        yield made
    finally:
        made.shutdown()


def make_world(root: Path) -> tiny.World:
    """A family of two shards and thirty chunks per model, with an integer tensor."""
    made = tiny.World(root)
    for number, role in enumerate(("base", "finetuned", "target")):
        generator = torch.Generator().manual_seed(number)
        weights = {"steps": torch.arange(300_000), "norm": torch.randn(33, generator=generator)}
        for i in range(9):
            drawn = torch.randn((700, 1024), generator=generator)
            weights[f"model.layers.{i}.mlp.up_proj.weight"] = drawn.bfloat16()
        made.folders[role] = tiny.save_model(root / role, weights, sharded=True)
    made.folders["diff"] = root / "diff" / "out"
    operands = [str(made.folders[role]) for role in ("finetuned", "base")]
    done = tiny.run("extract", *operands, "-o", str(made.folders["diff"]), "--threads", "2")
    assert done.status == 0, done.err
    return made


def roles(world: tiny.World) -> list[Path]:
    return [world.folders[role] for role in ROLES]


def command(world: tiny.World, out: Path, *options: str) -> list[str]:
    """The command line of a transfer in a process of its own."""
    folders = [str(folder) for folder in roles(world)]
    return [sys.executable, "-m", "diffxfer", "transfer", *folders, "-o", str(out), *options]


@contextmanager
def driver(world: tiny.World, out: Path, address: str) -> Iterator[subprocess.Popen[str]]:
    """A transfer in parts, in a process group of its own."""
    program = (
        "import sys; from diffxfer.cluster import ray_cluster; from diffxfer.cli.main import main;"
        "ray_cluster.RayCluster.__init__.__kwdefaults__['part_bytes'] = 10_000_000;"
        "sys.exit(main())"
    )
    argv = [sys.executable, "-c", program, *command(world, out, "--ray", address)[3:]]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], object], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come so far"
        time.sleep(0.05)


def percent(out: Path) -> int:
    """How much of a run is done, by its journals."""
    found = find_unfinished(out)
    return found.percent if found else 0


@contextmanager
def blind_node(address: str, folder: Path) -> Iterator[None]:
    """A node that sees nothing in a folder; the test is skipped where no mount is permitted."""
    mount = f"mount -t tmpfs tmpfs {folder}"
    hide = ["unshare", "-m", "sh", "-c"]
    if subprocess.run([*hide, mount], check=False, capture_output=True).returncode:
        pytest.skip("a folder can be hidden from a node only by root")
    start = f"{sys.executable} -m ray.scripts.scripts start --address {address} --num-cpus 1"
    start += f" --object-store-memory {STORE_BYTES} --block"
    process = subprocess.Popen(
        [*hide, f"{mount} && exec {start}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)
