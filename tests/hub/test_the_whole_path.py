"""From models on the Hub to a diff vector there, and to a graft: the same as with folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests import tiny
from tests.hub import faults, writing
from tests.hub.models import IDS, contents, publish, transfer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.hub.conftest import User
    from tests.hub.faults import Fault
    from tests.hub.server import Hub

TOKEN = "hf_writer"
BASE, DIFF = IDS["base"], "me/diff"
SHARD = "model-00001-of"
MODES = pytest.mark.parametrize("options", [(), ("--stream",)], ids=["downloaded", "streamed"])


@dataclass(frozen=True)
class Expected:
    """The results of the same commands on folders."""

    graft: Path
    diff: Path
    applied: Path


@pytest.fixture(scope="session")
def expected(
    family: dict[str, Path], grafted: Path, tmp_path_factory: pytest.TempPathFactory
) -> Expected:
    root = tmp_path_factory.mktemp("by-folders")
    two = family["finetuned"], family["base"]
    assert tiny.run("extract", *two, "-o", root / "diff").status == 0
    assert tiny.run("apply", root / "diff", family["target"], "-o", root / "applied").status == 0
    return Expected(grafted, root / "diff", root / "applied")


@pytest.fixture
def writer(hub: Hub, user: User) -> User:
    """A user who may write to `me/…`."""
    writing.let_write(hub, TOKEN, "me")
    user.env |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return user


def commands(*options: str) -> list[list[str]]:
    """The whole path."""
    return [
        transfer("graft", *options),
        ["extract", IDS["finetuned"], BASE, "-o", "diff", *options],
        ["push", "diff", DIFF],
        ["apply", DIFF, IDS["target"], "-o", "applied", *options],
    ]


def check(hub: Hub, user: User, expected: Expected) -> None:
    """Everything has the bytes that folders give, and the Hub has those of the diff vector."""
    for name in ("graft", "diff", "applied"):
        assert contents(user.home / name) == contents(getattr(expected, name)), name
    ours, there = contents(user.home / "diff"), contents(hub.repos[DIFF].at())
    assert there.pop(".gitattributes") == writing.ATTRIBUTES
    assert there == ours
    manifest = json.loads((user.home / "applied" / "diffxfer.json").read_text())
    assert manifest["sources"]["diff vector"]["revision"] == hub.repos[DIFF].refs["main"]


SURVIVED: dict[str, Callable[[], list[Fault]]] = {
    "500 once": lambda: [
        faults.failing(f"^/api/models/{BASE}$", times=1),
        faults.failing(f"^/{IDS['target']}/resolve/.*{SHARD}", times=1),
        faults.failing(f"^/cdn/{IDS['finetuned']}/.*{SHARD}", times=1),
        faults.failing("/commit/", times=1),
        faults.failing(f"^/cdn/{DIFF}/.*{SHARD}", times=1),
    ],
    "429 once": lambda: [
        faults.limited(f"^/api/models/{BASE}$", times=1),
        faults.limited(f"^/cdn/{BASE}/.*{SHARD}", times=1),
        faults.limited("/api/repos/create", times=1),
        faults.limited(f"^/cdn/{DIFF}/.*{SHARD}", times=1),
    ],
    "cut in the middle": lambda: [
        faults.cut(f"^/cdn/{BASE}/.*{SHARD}", 300_000, times=1),
        faults.cut_upload("/upload/", 100_000, times=1),
        faults.cut(f"^/cdn/{DIFF}/.*{SHARD}", 300_000, times=1),
    ],
    "truncated": lambda: [
        faults.truncated(f"^/cdn/{BASE}/.*{SHARD}", 200_000, times=1),
        faults.truncated(f"^/cdn/{DIFF}/.*{SHARD}", 200_000, times=1),
    ],
    "slow": lambda: [
        faults.slow(f"^/cdn/{BASE}/.*{SHARD}", 0.01),
        faults.slow("/upload/", 0.3),
        faults.slow(f"^/cdn/{DIFF}/.*{SHARD}", 0.01),
    ],
}

TO_READ: dict[int, str] = {
    401: "the Hub rejects your token; correct or unset HF_TOKEN, or run: hf auth login",
    403: "refuses the request (status 403: no luck today)",
    404: "refuses the request (status 404: no luck today)",
    429: "too many requests from this address; wait 3600 s, and run the same command again",
    500: "(status 500); wait a while, and run the same command again",
}
TO_WRITE: dict[int, str] = {
    401: "rejects your token (no luck today); run hf auth login",
    403: "with your token (no luck today); push to a namespace of your own (see hf auth whoami)",
    404: "with your token (no luck today); push to a namespace of your own (see hf auth whoami)",
    429: "too many requests from this address; wait a few minutes, and run the same command again",
    500: "(status 500); wait a while, and run the same command again",
}


@MODES
def test_as_with_folders_whatever_happens_once(
    hub: Hub, writer: User, family: dict[str, Path], expected: Expected, options: tuple[str, ...]
) -> None:
    publish(hub, family)
    on = [hub.faults.on(fault) for name in ("500 once", "slow") for fault in SURVIVED[name]()]
    for argv in commands(*options):
        done = writer.run(*argv)
        assert done.returncode == 0, (argv, done.stderr)
    check(hub, writer, expected)
    assert all(fault.met for fault in on), on
    stored = [path for path in writer.cache.rglob("*model-*.safetensors") if path.is_file()]
    assert len(stored) == (0 if options else 8)


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("name", SURVIVED)
def test_survived(
    hub: Hub,
    writer: User,
    family: dict[str, Path],
    expected: Expected,
    name: str,
    options: tuple[str, ...],
) -> None:
    publish(hub, family)
    on = [hub.faults.on(fault) for fault in SURVIVED[name]()]
    for argv in commands(*options):
        done = writer.run(*argv)
        assert done.returncode == 0, (argv, done.stderr)
        assert "Traceback" not in done.stderr
    check(hub, writer, expected)
    assert all(fault.met for fault in on), on


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("status", TO_READ)
def test_named_and_gone_on_from(
    hub: Hub,
    writer: User,
    family: dict[str, Path],
    expected: Expected,
    status: int,
    options: tuple[str, ...],
) -> None:
    """Each command meets it for good, says so in one line, and goes on once it is over."""
    publish(hub, family)
    pushing = {"push": ("/commit/", DIFF, TO_WRITE[status])}
    for argv in commands(*options):
        repo = DIFF if argv[0] == "apply" else BASE
        path, repo, said = pushing.get(
            argv[0], (f"^/{repo}/resolve/.*{SHARD}", repo, TO_READ[status])
        )
        fault = (
            faults.failing(path, status)
            if status != 429
            else faults.limited(path, retry_after_s=3600)
        )
        hub.faults.on(fault)
        shutil.rmtree(writer.cache, ignore_errors=True)  # what is there is not asked for again
        done = writer.run(*argv, "-q")
        assert done.returncode == 1, (argv, done.stderr)
        assert fault.met
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {repo}: ")
        assert said in line, line
        hub.faults.off()
        done = writer.run(*argv)
        assert done.returncode == 0, (argv, done.stderr)
    check(hub, writer, expected)
