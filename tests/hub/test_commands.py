"""Models on the Hub as arguments of commands: the same bytes as from folders, and nothing more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer.family import family_folder
from tests.hub.models import IDS, ROLES, contents, publish, transfer

if TYPE_CHECKING:
    from tests.hub.conftest import User
    from tests.hub.server import Hub

ROOT = Path(__file__).parents[2]
WEIGHTS = r"model-0000\d-of"


def sources(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "diffxfer.json").read_text())["sources"]
    return found


@pytest.mark.parametrize("options", [(), ("--stream",)], ids=["downloaded", "streamed"])
def test_the_same_bytes_as_from_folders(
    hub: Hub, user: User, family: dict[str, Path], grafted: Path, options: tuple[str, ...]
) -> None:
    commits = publish(hub, family)
    hub.page = 3
    done = user.run(*transfer("out", *options))
    assert done.returncode == 0, done.stderr
    assert contents(user.home / "out") == contents(grafted)
    found = sources(user.home / "out")
    assert {role: (found[role]["name"], found[role]["revision"]) for role in ROLES} == {
        role: (IDS[role], commits[role]) for role in ROLES
    }
    card = (user.home / "out" / "README.md").read_text()
    assert all(f"- {IDS[role]}\n" in card for role in ROLES)
    assert not hub.asked(r"original|consolidated|pytorch_model|gguf")
    kept = [path for path in user.cache.rglob("model-*.safetensors") if path.is_file()]
    assert len(kept) == (0 if options else 6)


@pytest.mark.slow
def test_two_steps_by_way_of_a_diff_vector_on_the_hub(
    hub: Hub, user: User, family: dict[str, Path]
) -> None:
    publish(hub, family)
    assert user.run("extract", family["finetuned"], family["base"], "-o", "a").returncode == 0
    assert user.run("apply", "a", family["target"], "-o", "expected").returncode == 0
    assert (
        user.run("extract", IDS["finetuned"], IDS["base"], "-o", "diff", "--stream").returncode == 0
    )
    assert contents(user.home / "diff") == contents(user.home / "a")
    hub.add("me/diff", user.home / "diff")
    done = user.run("apply", "me/diff", IDS["target"], "-o", "out")
    assert done.returncode == 0, done.stderr
    assert contents(user.home / "out") == contents(user.home / "expected")
    assert sources(user.home / "out")["diff vector"]["made_from"]["base"]["name"] == IDS["base"]


def test_a_dry_run_fetches_no_weights(hub: Hub, user: User, family: dict[str, Path]) -> None:
    publish(hub, family)
    done = user.run(*transfer("out", "--dry-run", "--json"))
    assert done.returncode == 0, done.stderr
    shards = [path for folder in family.values() for path in folder.glob("model-*.safetensors")]
    size = sum(path.stat().st_size for path in shards)
    assert json.loads(done.stdout)["bytes_to_fetch"] == size
    assert hub.sent(WEIGHTS) < size / 10
    assert not list(user.cache.rglob("model-*.safetensors"))


def test_a_slip_in_a_folders_name_is_not_looked_for_on_the_hub(
    hub: Hub, user: User, family: dict[str, Path]
) -> None:
    publish(hub, family)
    (user.home / "org" / "llama-3.2").mkdir(parents=True)
    done = user.run("inspect", IDS["base"])
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"mean org/llama-3.2? For the model on the Hub, give {IDS['base']}@main")
    assert not hub.requests
    assert user.run("inspect", f"{IDS['base']}@main").returncode == 0


def test_a_file_without_its_link_is_not_downloaded_again(
    hub: Hub, user: User, family: dict[str, Path], grafted: Path
) -> None:
    publish(hub, family)
    assert user.run(*transfer("out")).returncode == 0
    shard = next(user.cache.glob("models--org--llama-3.0/snapshots/*/model-00001-of-*"))
    size = shard.stat().st_size
    shard.unlink()
    hub.forget()
    assert user.run(*transfer("again")).returncode == 0
    assert shard.is_file()
    assert hub.sent("^/cdn/org/llama-3.0") < size / 5
    assert contents(user.home / "again") == contents(grafted)


@pytest.mark.slow
def test_one_progress_of_all_downloads(hub: Hub, user: User, family: dict[str, Path]) -> None:
    publish(hub, family)
    code = (
        "import diffxfer, json, sys; seen = [];"
        "diffxfer.transfer(*sys.argv[1:], 'out', progress=lambda *now: seen.append(now));"
        "print(json.dumps(seen))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(IDS[role] for role in ROLES)],
        cwd=user.home,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT), **user.env},
        stdout=subprocess.PIPE,
        check=True,
    )
    seen = json.loads(done.stdout)
    shards = [path for folder in family.values() for path in folder.glob("model-*.safetensors")]
    size = sum(path.stat().st_size for path in shards)
    fetched = [now for now, total in seen if total == size]
    assert fetched == sorted(fetched)
    assert fetched[-1] == size
    assert seen[len(fetched) - 1][1] == size, "the downloads come first"


@pytest.mark.slow
def test_what_other_commands_take_from_the_hub(hub: Hub, user: User) -> None:
    """Each in the order of its own: headers, then weights; named by the id, not by a folder."""
    family = family_folder()
    for name in ("base", "finetuned", "target"):
        hub.add(f"tiny/{name}", family / name)
    rows = user.home / "rows.jsonl"
    rows.write_text('{"text": "a few words"}\n' * 8)
    diff = user.run("extract", "tiny/finetuned", "tiny/base", "-o", "diff", "--stream")
    assert diff.returncode == 0, diff.stderr
    hub.add("tiny/diff", user.home / "diff")
    options = ("--data", rows, "--steps", "1", "--max-length", "16", "-o", "tuned", "-q")
    tuned = user.run("tune", "tiny/base", "--teacher", "tiny/finetuned", *options)
    assert tuned.returncode == 0, tuned.stderr
    assert sources(user.home / "tuned")["model"]["name"] == "tiny/base"
    tasks = ("--tasks", "pig_latin", "--include-path", family / "tasks", "--limit", "4")
    scored = user.run("eval", "tiny/target", "--diff", "tiny/diff", *tasks, "--json")
    assert scored.returncode == 0, scored.stderr
    assert {row["model"] for row in json.loads(scored.stdout)["rows"]} == {"tiny/target"}
    recipe = {"bases": ["tiny/base", "tiny/target"], "finetuned": "tiny/finetuned"}
    (user.home / "chain.yaml").write_text(json.dumps(recipe))
    chained = user.run("iterate", "chain.yaml", "-o", "run", "--json")
    assert chained.returncode == 0, chained.stderr
    found = [each["base"] for each in json.loads(chained.stdout)["rounds"]]
    assert found == ["tiny/base", "tiny/target"]
    assert sources(user.home / "run" / "round-02" / "graft")["target"]["name"] == "tiny/target"
    weights = len((family / "target" / "model.safetensors").read_bytes())
    # Beside the weights, once: headers, samples, and head with embedding, of every command.
    assert hub.sent(r"^/cdn/tiny/target/") < 1.3 * weights
