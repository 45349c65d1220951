"""Publishing on the Hub: what is uploaded, what is not, and failures."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from diffxfer.evaluation.content_hash import content_hash
from tests import tiny
from tests.hub import faults, writing
from tests.hub.models import make_family
from tests.hub.store import files_in

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.hub.conftest import User
    from tests.hub.server import Hub

TOKEN = "hf_writer"
CARD = "---\nlicense: llama3.1\nlicense_link: LICENSE\n---\n# Target\n"


@dataclass(frozen=True)
class Made:
    """Folders that diffxfer wrote, and their sources."""

    roles: dict[str, Path]
    diff: Path
    graft: Path


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("published")
    roles = make_family(root)
    for role in ("target", "finetuned"):
        (roles[role] / "README.md").write_text(CARD)
    three = [roles[role] for role in ("finetuned", "base", "target")]
    for argv in (
        ["extract", *three[:2], "-o", root / "diff"],
        ["transfer", *three, "-o", root / "graft", "--alpha", "0.5"],
    ):
        assert tiny.run(*argv).status == 0
    return Made(roles, root / "diff", root / "graft")


@pytest.fixture
def made(originals: Made, tmp_path: Path) -> Made:
    """Copies that a test may break."""
    folders = [tmp_path / "made" / name for name in ("diff", "graft")]
    for folder in folders:
        shutil.copytree(originals.diff.with_name(folder.name), folder)
    return Made(originals.roles, *folders)


@pytest.fixture
def writer(hub: Hub, user: User) -> User:
    """A user who may write to `me/…`."""
    writing.let_write(hub, TOKEN, "me")
    # The client uses Xet where it can, without asking whether the Hub has it.
    user.env |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return user


def contents(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files_in(folder).items()}


def pushed(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def refused(done: subprocess.CompletedProcess[str], *said: str) -> str:
    """The one line of a refusal."""
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    for words in said:
        assert words in line
    return line


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


@pytest.mark.parametrize(("kind", "part_size"), [("diff", None), ("graft", 300_000)])
def test_what_the_manifest_lists_arrives(
    hub: Hub, writer: User, made: Made, kind: str, part_size: int | None
) -> None:
    folder = getattr(made, kind)
    before = tiny.tree(folder)
    for stray in (".env", "notes.txt", "journal.bin"):
        (folder / stray).write_text("secret")
    if part_size:
        writing.split_uploads(hub, part_size)
    report = pushed(writer.run("push", folder, "me/model", "--private", "--json"))
    for stray in (".env", "notes.txt", "journal.bin"):
        (folder / stray).unlink()
    assert tiny.tree(folder) == before, "the folder was changed"
    repo = hub.repos["me/model"]
    assert repo.private
    found = contents(repo.at())
    assert found.pop(".gitattributes") == writing.ATTRIBUTES
    expected = contents(folder)
    assert found.keys() == expected.keys()
    differing = {name for name in found if found[name] != expected[name]}
    assert differing == {"README.md", "diffxfer.json"}
    assert found["README.md"].decode() == report["card"]
    assert report["bytes_in_all"] == report["bytes_to_upload"] == sum(map(len, found.values()))
    assert (report["pushed"], report["created"], report["commit"]) == (
        *(True, True),
        repo.refs["main"],
    )
    assert hub.received("/upload/") == sum(
        len(data) for name, data in found.items() if name.endswith(".safetensors")
    ) + hub.received(r"/upload/me/model/[0-9a-f]{64}$") * bool(part_size)


@pytest.mark.slow
def test_a_pushed_diff_vector_is_applied_from_the_hub(hub: Hub, writer: User, made: Made) -> None:
    target = made.roles["target"]
    assert writer.run("push", made.diff, "me/diff").returncode == 0
    hub.add("org/target", target)
    for options in ([], ["--stream"]):
        shutil.rmtree(writer.cache, ignore_errors=True)
        argv = ["apply", "me/diff", "org/target", "-o", f"out{len(options)}", "--alpha", "0.5"]
        done = writer.run(*argv, *options)
        assert done.returncode == 0, done.stderr
        assert writer.run("apply", made.diff, target, "-o", "by-hand", "--alpha", "0.5", "-q")
        ours, theirs = contents(writer.home / argv[4]), contents(writer.home / "by-hand")
        for name in theirs.keys() - {"README.md", "diffxfer.json"}:
            assert ours[name] == theirs[name], name
        shutil.rmtree(writer.home / "by-hand")
    manifest = json.loads((writer.home / "out0" / "diffxfer.json").read_text())
    commit = hub.repos["me/diff"].refs["main"]
    assert manifest["sources"]["diff vector"]["revision"] == commit


def test_a_push_needs_no_torch(writer: User, made: Made, tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    pushed(writer.run("push", made.diff, "me/diff", "--json", TEST_MODULES=str(modules)))
    found = set(json.loads(modules.read_text()))
    assert "huggingface_hub" in found
    assert not found & {"torch", "numba", "transformers", "scipy"}


def test_a_second_push_has_nothing_to_do(hub: Hub, writer: User, made: Made) -> None:
    first = writer.run("push", made.diff, "me/diff")
    assert first.returncode == 0
    assert first.stderr.splitlines()[-2:] == [
        f"{hub.url}/me/diff",
        "diffxfer apply me/diff TARGET -o OUT",
    ]
    commit = hub.repos["me/diff"].refs["main"]
    hub.forget()
    again = writer.run("push", made.diff, "me/diff")
    assert again.returncode == 0
    assert "nothing to do: the Hub already has these files" in again.stderr
    assert hub.repos["me/diff"].refs["main"] == commit
    assert not hub.received()


def test_a_card_that_somebody_edited_is_published_as_it_is(
    hub: Hub, writer: User, made: Made
) -> None:
    (made.diff / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n")
    report = pushed(writer.run("push", made.diff, "me/diff", "--json"))
    assert report["warnings"] == ["README.md was edited, and is published unchanged"]
    assert contents(hub.repos["me/diff"].at())["README.md"].endswith(b"# By hand\n")
    done = writer.run("push", made.diff, "me/diff", "--license", "mit")
    refused(done, "README.md: was edited, so --eval and --license do not change it")


def test_what_changed_is_replaced_and_what_is_stale_goes(
    hub: Hub, writer: User, made: Made
) -> None:
    three = [made.roles[role] for role in ("finetuned", "base", "target")]
    assert writer.run("push", made.graft, "me/graft", "-m", "first").returncode == 0
    hub.repos["me/graft"].commit({"picture.png": b"somebody's own"})
    hub.forget()
    argv = ["transfer", *three, "-o", "one-file", "--alpha", "0.5", "--max-shard-size", "1GB"]
    assert writer.run(*argv, "-q").returncode == 0
    report = pushed(writer.run("push", "one-file", "me/graft", "-m", "second", "--json"))
    found = contents(hub.repos["me/graft"].at())
    del found[".gitattributes"]
    assert found.pop("picture.png") == b"somebody's own"
    assert found.keys() == contents(writer.home / "one-file").keys()
    assert {f["name"] for f in report["files"] if f["fate"] == "removed"} == {
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        "model.safetensors.index.json",
    }
    assert hub.state["messages"] == ["first", "second"]


def test_scores_of_this_very_model_are_in_its_card(hub: Hub, writer: User, made: Made) -> None:
    scores = writer.home / "scores"
    scores.mkdir()
    row = {"task": "gsm8k", "metric": "acc", "filter": "none", "stderr": None, "n": 9}
    rows = [
        {**row, "model": "graft", "value": 0.75, "content": content_hash(made.graft)},
        {**row, "model": "diff", "value": 0.25, "content": content_hash(made.roles["target"])},
    ]
    tiny.write_json(
        scores / "comparison.json", {"rows": rows, "columns": [["gsm8k", "acc", "none"]]}
    )
    report = pushed(writer.run("push", made.graft, "me/graft", "--eval", scores, "--json"))
    front = front_matter(report["card"])
    assert front["license"] == "llama3.1"
    assert front["license_link"] == "LICENSE"
    (result,) = front["model-index"][0]["results"]
    assert [metric["value"] for metric in result["metrics"]] == [0.75]
    assert str(writer.home) not in report["card"]
    card = contents(hub.repos["me/graft"].at())["README.md"]
    assert card.decode() == report["card"]
    tiny.edit_json(scores / "comparison.json", lambda value: value["rows"].pop(0))
    done = writer.run("push", made.graft, "me/graft", "--eval", scores)
    refused(done, "comparison.json: has no score of this model")


class TestFaults:
    def test_what_was_uploaded_is_not_uploaded_again(
        self, hub: Hub, writer: User, made: Made
    ) -> None:
        shards = sorted(made.graft.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        lost = writing.sha256_of(shards[0])
        hub.faults.on(faults.failing(f"/upload/.*{lost}", status=400))
        refused(
            writer.run("push", made.graft, "me/graft", "-q"), "rejects the upload", "status 400"
        )
        assert contents(hub.repos["me/graft"].at()).keys() == {".gitattributes"}
        hub.faults.off()
        hub.forget()
        assert writer.run("push", made.graft, "me/graft").returncode == 0
        assert hub.received("/upload/") == shards[0].stat().st_size

    @pytest.mark.parametrize(
        "fault",
        [
            faults.failing("/api/repos/create", times=1),
            faults.limited("/commit/", times=1),
            faults.cut_upload("/upload/", 100_000, times=1),
            *(
                pytest.param(faults.failing(path, times=1), marks=pytest.mark.slow)
                for path in ("/api/models/me/graft", "/api/validate-yaml", "/commit/", "/preup")
            ),
        ],
        ids=lambda fault: f"{fault.path} {fault.status}",
    )
    def test_survived(self, hub: Hub, writer: User, made: Made, fault: faults.Fault) -> None:
        hub.faults.on(fault)
        done = writer.run("push", made.graft, "me/graft", "-q")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert fault.met == 1
        found = contents(hub.repos["me/graft"].at())
        assert found.keys() == contents(made.graft).keys() | {".gitattributes"}

    def test_a_commit_whose_answer_is_lost_is_made_once(
        self, hub: Hub, writer: User, made: Made
    ) -> None:
        hub.faults.on(faults.Fault("/commit/", method="POST", times=1, after=0))
        assert writer.run("push", made.diff, "me/diff").returncode == 0
        assert len(hub.state["messages"]) == 1

    @pytest.mark.parametrize(
        ("path", "status", "said"),
        [
            ("/api/repos/create", 401, "rejects your token (no luck today); run hf auth lo"),
            ("/commit/", 403, "cannot be written to with your token (no luck today); push to a "),
            ("/commit/", 412, "was changed by someone else during the upload; check it, and run "),
            ("/preupload/", 413, "answers with status 413 (no luck today)"),
        ],
    )
    def test_named(
        self, hub: Hub, writer: User, made: Made, path: str, status: int, said: str
    ) -> None:
        hub.faults.on(faults.failing(path, status))
        refused(writer.run("push", made.graft, "me/graft"), "me/graft: ", said)

    def test_a_file_that_the_hub_leaves_out(self, hub: Hub, writer: User, made: Made) -> None:
        hub.state["ignored"] = r"00002-of"
        said = "received model-00002-of-00002.safetensors, but did not store it"
        refused(writer.run("push", made.graft, "me/graft"), said)

    def test_a_web_page_instead_of_an_answer(
        self, hub: Hub, writer: User, made: Made, tmp_path: Path
    ) -> None:
        page = tmp_path / "login.html"
        page.write_text("<html>Welcome to our hotel</html>")
        hub.faults.on(faults.Fault("^/api/", page=page))
        done = writer.run("push", made.diff, "me/diff")
        refused(done, f"the server at {hub.url} is not the Hub; open it in a browser")

    @pytest.mark.slow
    def test_the_hub_is_down(self, writer: User, made: Made) -> None:
        writer.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
        line = refused(writer.run("push", made.graft, "me/graft"), "no connection to http://127")
        assert line.endswith("files already uploaded are skipped")


class TestRefused:
    def test_a_repository_of_something_else(self, hub: Hub, writer: User, made: Made) -> None:
        hub.add("me/model", made.roles["base"])
        hub.add("me/notes").commit({"README.md": b"my notes", "LICENSE": b"mine"})
        hub.tokens[TOKEN] |= {"me/model", "me/notes"}
        said = "has a model that diffxfer did not push (config.json); push to another name"
        refused(writer.run("push", made.diff, "me/model"), said)
        assert writer.run("push", made.diff, "me/notes").returncode == 0
        said = "me/notes: has a diff vector, but this folder is a graft; push to another name"
        refused(writer.run("push", made.graft, "me/notes"), said)
        assert contents(hub.repos["me/notes"].at())["LICENSE"] == b"mine"

    def test_a_public_repository_where_a_private_one_is_due(
        self, hub: Hub, writer: User, made: Made
    ) -> None:
        assert writer.run("push", made.diff, "me/diff").returncode == 0
        (made.diff / "README.md").write_text("---\nlicense: mit\n---\nsecret")
        refused(writer.run("push", made.diff, "me/diff", "--private"), "exists and is public")
        assert b"secret" not in contents(hub.repos["me/diff"].at())["README.md"]

    def test_a_name_of_others(self, writer: User, made: Made) -> None:
        said = 'under the namespace "you"); push to a namespace of your own (see hf auth whoami)'
        refused(writer.run("push", made.diff, "you/diff"), said)

    def test_nobody_is_logged_in(self, hub: Hub, user: User, made: Made) -> None:
        refused(user.run("push", made.diff, "me/diff"), "no token is set", "run hf auth login")
        offline = user.run("push", made.diff, "me/diff", HF_HUB_OFFLINE="1", HF_TOKEN=TOKEN)
        refused(offline, "HF_HUB_OFFLINE is set")
        assert not hub.requests

    def test_a_token_that_is_no_good(self, writer: User, made: Made) -> None:
        done = writer.run("push", made.diff, "me/diff", HF_TOKEN="hf_old")
        refused(done, "rejects your token", "hf auth login")

    def test_a_licence_that_the_hub_does_not_know(self, hub: Hub, writer: User, made: Made) -> None:
        push = "push", made.diff, "me/diff"
        said = '"license" must be one of [apache-2.0, mit, …]', "give another one with --license"
        refused(writer.run(*push, "--license", "mine"), "me/diff: rejects the upload: ", *said)
        assert not hub.repos
        assert writer.run(*push).returncode == 0
        refused(writer.run(*push, "--license", "mine"), *said)

    @pytest.mark.parametrize("name", ["diff", "me/you/diff", "me/diff@main", "me/", "../diff"])
    def test_names_that_are_none(self, user: User, made: Made, name: str) -> None:
        done = user.run("push", made.diff, name)
        assert done.returncode == 2
        what = "names a revision" if "@" in name else "is not the id of a model on the Hub"
        assert done.stderr == f"error: {name}: {what}; give a name such as org/name\n"

    def test_folders_that_are_not_whole(self, hub: Hub, writer: User, made: Made) -> None:
        def push(folder: Path) -> subprocess.CompletedProcess[str]:
            return writer.run("push", folder, "me/model")

        refused(push(made.roles["base"]), "diffxfer did not write it; hf upload")
        refused(push(writer.home / "none"), "no such folder")
        (made.graft / "LICENSE").write_text("another")
        refused(push(made.graft), "LICENSE: is not the file that the manifest names")
        shard = made.diff / "model-00001-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes() + b"\0" * 8)
        refused(push(made.diff), shard.name)
        tiny.save_model(made.graft / "other", {"a": torch.zeros(1)})
        shutil.copy(made.graft / "other" / "model.safetensors", shard)
        refused(push(made.diff), shard.name)
        assert not hub.requests

    @pytest.mark.parametrize("name", ["../secret", ".env", "sub/.env", "diffxfer.json"])
    def test_a_manifest_that_names_what_it_should_not(
        self, hub: Hub, writer: User, made: Made, name: str
    ) -> None:
        (made.diff.parent / "secret").write_text("secret")
        entry = {"size": 6, "xxh3": "0" * 32}
        manifest = made.diff / "diffxfer.json"
        tiny.edit_json(manifest, lambda value: value["files"].update({name: entry}))
        refused(writer.run("push", made.diff, "me/diff"), str(made.diff))
        assert not hub.requests


class TestDryRun:
    def test_lists_files_and_card_and_writes_nothing(
        self, hub: Hub, writer: User, made: Made
    ) -> None:
        done = writer.run("push", made.diff, "me/diff", "--dry-run")
        assert done.returncode == 0
        listed = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines() if line}
        for name in contents(made.diff):
            assert listed[name] == "new"
        assert "diffxfer apply me/diff TARGET -o OUT" in done.stdout
        assert not hub.repos
        assert not hub.received()

    def test_needs_no_token(self, hub: Hub, user: User, made: Made) -> None:
        report = pushed(user.run("push", made.diff, "me/diff", "--dry-run", "--json"))
        assert report["warnings"] == [
            "the Hub was not queried: no user is logged in, or HF_HUB_OFFLINE is set"
        ]
        assert not hub.requests

    def test_finds_what_would_be_refused(self, hub: Hub, writer: User, made: Made) -> None:
        hub.add("me/model", made.roles["base"])
        hub.tokens[TOKEN].add("me/model")
        refused(writer.run("push", made.diff, "me/model", "--dry-run"), "did not push")
