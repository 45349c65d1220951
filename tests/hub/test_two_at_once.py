"""Concurrent runs, runs after a killed one, and a branch that moved between two runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.hub import faults, writing
from tests.hub.models import IDS, contents, publish, transfer
from tests.hub.test_streaming import refuse_the_rest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hub.conftest import User
    from tests.hub.server import Hub

BASE = IDS["base"]
SHARD = "model-00001-of"
TOKEN = "hf_writer"
ROOT = Path(__file__).parents[2]


def start(user: User, *argv: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "diffxfer", *map(str, argv)],
        cwd=user.home,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", **user.env},
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(process: subprocess.Popen[str], when: Callable[[], bool]) -> None:
    """End a process without a chance to clean up, once something has happened."""
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()


def test_a_branch_that_moves_between_two_runs(
    hub: Hub, user: User, family: dict[str, Path], grafted: Path
) -> None:
    commits = publish(hub, family)
    hub.faults.on(refuse_the_rest())
    options = ("--stream", "--threads", "1")
    assert user.run(*transfer("out", *options)).returncode == 1
    hub.faults.off()
    hub.repos[IDS["target"]].commit({"generation_config.json": b'{"temperature": 0.9}'})
    done = user.run(*transfer("out", *options))
    assert done.returncode == 1
    assert "--restart" in done.stderr
    # By its commit it is the model that it was.
    named = f"{IDS['target']}@{commits['target']}"
    argv = [named if word == IDS["target"] else word for word in transfer("out", *options)]
    done = user.run(*argv, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_bytes"] > 0
    assert contents(user.home / "out") == contents(grafted)
    assert user.run(*transfer("new", *options)).returncode == 0
    manifest = json.loads((user.home / "new" / "diffxfer.json").read_text())
    assert manifest["sources"]["target"]["revision"] == hub.repos[IDS["target"]].refs["main"]


@pytest.mark.parametrize("revision", ["refs/pr/1", "feature/ä-1", "v1.0%2F", "v1#2&x=1"])
def test_revisions_with_odd_names(
    hub: Hub, user: User, family: dict[str, Path], revision: str
) -> None:
    publish(hub, family)
    commit = hub.repos[BASE].commit({"notes.txt": b"x"})
    hub.repos[BASE].refs[revision] = commit
    done = user.run("inspect", f"{BASE}@{revision}", "--json")
    assert done.returncode == 0, done.stderr
    assert list((user.cache / "models--org--llama-3.0" / "snapshots").iterdir()) == [
        user.cache / "models--org--llama-3.0" / "snapshots" / commit
    ]


@pytest.mark.slow
def test_two_downloads_into_one_cache(
    hub: Hub, user: User, family: dict[str, Path], grafted: Path
) -> None:
    publish(hub, family)
    hub.faults.on(faults.slow(f"^/cdn/{BASE}/.*{SHARD}", 0.1))
    both = [start(user, *transfer(name)) for name in ("one", "two")]
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    for name in ("one", "two"):
        assert contents(user.home / name) == contents(grafted)
    assert not list(user.cache.rglob("*.incomplete"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--stream",)], ids=["downloaded", "streamed"])
def test_killed_while_it_fetches(
    hub: Hub, user: User, family: dict[str, Path], grafted: Path, options: tuple[str, ...]
) -> None:
    publish(hub, family)
    hub.faults.on(faults.slow(f"^/cdn/{BASE}/.*{SHARD}", 0.3))
    process = start(user, *transfer("out", *options))
    kill(process, lambda: len(hub.asked(r"^/cdn/.*-00002-of")) >= 6)
    assert not (user.home / "out").exists()
    hub.faults.off()
    hub.forget()
    done = user.run(*transfer("out", *options))
    assert done.returncode == 0, done.stderr
    assert contents(user.home / "out") == contents(grafted)


@pytest.mark.slow
def test_killed_while_it_pushes(hub: Hub, user: User, grafted: Path) -> None:
    writing.let_write(hub, TOKEN, "me")
    user.env |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    slow = hub.faults.on(faults.slow("/upload/", 20))  # what comes is kept, and the answer late
    process = start(user, "push", grafted, "me/graft")
    kill(process, lambda: slow.met >= 2)
    hub.faults.off()
    assert "diffxfer.json" not in [path.name for path in hub.repos["me/graft"].at().iterdir()]
    hub.forget()
    done = user.run("push", grafted, "me/graft")
    assert done.returncode == 0, done.stderr
    assert not hub.received("/upload/")
    assert contents(hub.repos["me/graft"].at()).keys() >= contents(grafted).keys()


@pytest.mark.slow
def test_two_pushes_at_once(hub: Hub, user: User, grafted: Path) -> None:
    """The second push finds it done, or is told that someone else changed the repository."""
    writing.let_write(hub, TOKEN, "me")
    user.env |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    both = [start(user, "push", grafted, "me/graft") for _ in range(2)]
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in both]
    assert 0 in [status for _, status in ends], ends
    for said, status in ends:
        assert status == 0 or "was changed by someone else during the upload" in said, said
    assert contents(hub.repos["me/graft"].at()).keys() >= contents(grafted).keys()
