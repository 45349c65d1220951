"""Commands that only read models on the Hub: samples before a run, `inspect`, `verify`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffxfer.family import family_folder
from tests.hub.models import IDS, publish

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.hub.conftest import User
    from tests.hub.server import Hub

ROLES = ("finetuned", "base", "target")


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The output of `--json`, without what depends on place and time."""
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    for name in ("path", "other", "elapsed_s", "output", "bytes_to_fetch", "free_bytes"):
        found.pop(name, None)
    return found


def publish_tiny(hub: Hub) -> list[str]:
    """The family that ships with the package, whose models are related."""
    for role in ROLES:
        hub.add(f"tiny/{role}", family_folder() / role)
    return [f"tiny/{role}" for role in ROLES]


def test_samples_come_by_range_before_any_download(hub: Hub, user: User) -> None:
    ids = publish_tiny(hub)
    folders = [family_folder() / role for role in ROLES]
    here = result(user.run("transfer", *folders, "-o", "out", "--dry-run", "--json"))
    there = result(user.run("transfer", *ids, "-o", "out", "--dry-run", "--json"))
    assert there["relations"] == here["relations"]
    assert there["relations"][1]["cosine"] > 0.9
    # Headers, with the first 64 KiB of each file; head and embedding, to be compared; samples.
    ranges = hub.asked("^/cdn/", "GET")
    samples = [request for request in ranges if request.sent <= 64 * 8]
    assert 0 < len(samples) <= 3 * 64
    assert len(ranges) == len(samples) + 3 * 3
    assert not list(user.cache.rglob("model.safetensors"))


def test_an_unrelated_model_is_refused_before_any_download(hub: Hub, user: User) -> None:
    ids = publish_tiny(hub)
    weights = load_file(family_folder() / "target" / "model.safetensors")
    other = {}
    for name, tensor in weights.items():
        places = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))
        other[name] = tensor.flatten()[places].reshape(tensor.shape).clone()
    shuffled = user.home / "shuffled.safetensors"
    save_file(other, shuffled)
    hub.repos["tiny/target"].commit({"model.safetensors": shuffled.read_bytes()})
    done = user.run("transfer", *ids, "-o", "out", "-q")
    assert done.returncode == 1
    assert "base and target are unrelated" in done.stderr
    assert not list(user.cache.rglob("model.safetensors"))
    diff = user.run("extract", *ids[:2], "-o", "diff", "-q", "--stream")
    assert diff.returncode == 0, diff.stderr
    hub.add("tiny/diff", user.home / "diff")
    done = user.run("apply", "tiny/diff", "tiny/target", "-o", "out", "-q")
    assert done.returncode == 1
    assert "base and target are unrelated" in done.stderr
    assert not list(user.cache.rglob("model.safetensors"))


@pytest.fixture
def diff(hub: Hub, user: User, family: dict[str, Path]) -> Path:
    """A diff vector, here and on the Hub."""
    publish(hub, family)
    two = family["finetuned"], family["base"]
    assert user.run("extract", *two, "-o", "diff", "-q").returncode == 0
    hub.add("me/diff", user.home / "diff")
    return user.home / "diff"


@pytest.mark.parametrize("options", [(), ("--stream",)], ids=["downloaded", "streamed"])
def test_verify(
    hub: Hub, user: User, family: dict[str, Path], diff: Path, options: tuple[str, ...]
) -> None:
    roles = ("--base", family["base"], "--finetuned", family["finetuned"])
    here = result(user.run("verify", diff, *roles, "--json"))
    ids = ("--base", IDS["base"], "--finetuned", IDS["finetuned"])
    there = result(user.run("verify", "me/diff", *ids, "--json", *options))
    assert there == here
    assert bool(list(user.cache.rglob("model-*.safetensors"))) is not bool(options)
    broken = diff / "model-00001-of-00002.safetensors"
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    hub.repos["me/diff"].commit({broken.name: bytes(data), "README.md": b"edited"})
    done = user.run("verify", "me/diff", *options)
    assert done.returncode == 1
    damaged = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert damaged == ["README.md", broken.name]
    hub.repos["me/diff"].commit({broken.name: None})
    done = user.run("verify", "me/diff", *options)
    assert f"{broken.name}: is missing" in done.stdout.splitlines()


def test_what_is_due_elsewhere_is_called_by_its_id(
    hub: Hub, user: User, family: dict[str, Path], diff: Path
) -> None:
    commits = {name: repo.refs["main"][:8] for name, repo in hub.repos.items()}
    base, target = IDS["base"], IDS["target"]
    done = user.run("apply", base, target, "-o", "out", "-q")
    assert done.stderr.startswith(
        f"error: {base}@{commits[base]}: is a model, expected a diff vector"
    )
    done = user.run("apply", "me/diff", "me/diff", "-o", "out", "-q")
    assert done.stderr.startswith(
        f"error: me/diff@{commits['me/diff']}: is a diff vector, expected "
    )


def test_inspect(hub: Hub, user: User, family: dict[str, Path], diff: Path) -> None:
    hub.forget()
    assert result(user.run("inspect", "me/diff", "--json")) == result(
        user.run("inspect", diff, "--json")
    )
    samples = (diff / "base_samples.safetensors").stat().st_size
    assert hub.sent("^/cdn/") <= 2 * (1 << 16) + samples
    two = [family["base"], family["target"]], [IDS["base"], IDS["target"]]
    here, there = (result(user.run("inspect", *pair, "--json")) for pair in two)
    assert there == here
    user.env["HF_HOME"] = str(user.home / "another")
    assert result(user.run("inspect", *two[1], "--stream", "--json")) == here
    assert not list((user.home / "another").rglob("model-*.safetensors"))


def test_probe(hub: Hub, user: User) -> None:
    """Downloaded, streamed and in folders: the same figures; an adapter and --direct as well."""
    ids = publish_tiny(hub)
    for role in ("adapter", "direct"):
        hub.add(f"tiny/{role}", family_folder() / role)

    def distances(*argv: object) -> dict[str, Any]:
        found: dict[str, Any] = result(user.run("probe", *argv, "--json"))["distances"]
        del found["elapsed_s"]
        return found

    here = distances(
        *(family_folder() / role for role in ("adapter", *ROLES[1:])),
        "--direct",
        family_folder() / "direct",
    )
    named = ("tiny/adapter", *ids[1:], "--direct", "tiny/direct")
    there = [distances(*named, "--stream")]
    assert not list(user.cache.rglob("model.safetensors"))
    there.append(distances(*named))
    assert list(user.cache.rglob("model.safetensors"))
    for found in there:
        assert {**found, "notes": ""} == {**here, "notes": ""}
