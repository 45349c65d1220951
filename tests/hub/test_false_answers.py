"""A server or proxy that answers with success and wrong bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from diffxfer.checkpoints.hub.download import _Meter, _StoppedError
from diffxfer.checkpoints.hub.repo_ids import HubFile
from tests.hub.faults import Fault
from tests.hub.models import IDS, contents, publish, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hub.conftest import User
    from tests.hub.server import Hub

SHARD = "model-00001-of-00002.safetensors"
CDN = f"^/cdn/{IDS['base']}/.*{SHARD}"


def refused(user: User, *options: str) -> str:
    done = user.run(*transfer("out", *options, "-q"))
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {IDS['base']}: cannot be fetched: ")
    assert not (user.home / "out").exists()
    return line


def test_a_range_that_is_answered_with_the_whole_file(
    hub: Hub, user: User, family: dict[str, Path], grafted: Path
) -> None:
    publish(hub, family)
    fault = hub.faults.on(Fault("^/cdn/", whole=True))
    done = user.run(*transfer("out", "--stream"))
    assert done.returncode == 0, done.stderr
    assert contents(user.home / "out") == contents(grafted)
    assert fault.met > 6


def test_another_range_than_the_one_asked_for(
    hub: Hub, user: User, family: dict[str, Path], grafted: Path
) -> None:
    publish(hub, family)
    hub.faults.on(Fault(CDN, beyond=1, shifted=2))
    line = refused(user, "--stream")
    assert "sent 'bytes " in line
    assert line.endswith(
        "for another range; if the error persists, correct HF_ENDPOINT and your proxy, or tell the"
        " server's owner"
    )
    hub.faults.off()
    hub.faults.on(Fault(CDN, beyond=1, shifted=2, times=1))
    done = user.run(*transfer("out", "--stream"))
    assert done.returncode == 0, done.stderr
    assert contents(user.home / "out") == contents(grafted)


@pytest.mark.parametrize("options", [(), ("--stream",)], ids=["downloaded", "streamed"])
def test_a_file_of_another_size(
    hub: Hub, user: User, family: dict[str, Path], options: tuple[str, ...]
) -> None:
    publish(hub, family)
    other = family["base"] / "model-00002-of-00002.safetensors"
    hub.faults.on(Fault(CDN, instead=other))
    assert refused(user, *options)


def test_another_file_of_that_size_is_not_kept(
    hub: Hub, user: User, family: dict[str, Path], grafted: Path
) -> None:
    publish(hub, family)
    fault = hub.faults.on(Fault(CDN, least=1_000_000, instead=family["target"] / SHARD))
    assert f"sent different content for {SHARD} than it lists" in refused(user)
    assert fault.met >= 3
    hub.faults.off()
    done = user.run(*transfer("out", "--json"))
    assert done.returncode == 0, done.stderr
    assert contents(user.home / "out") == contents(grafted)
    fetched = {file.stat().st_size for file in user.cache.rglob(SHARD)}
    assert fetched == {(family["base"] / SHARD).stat().st_size}


def test_what_was_not_checked_to_its_end_is_checked_again(tmp_path: Path) -> None:
    content, link = tmp_path / "blob", tmp_path / "a.safetensors"
    content.write_bytes(b"abc")
    link.symlink_to(content)
    file = HubFile("org/name", "c" * 40, link.name, 3, "ab" * 32, link)
    meter = _Meter([file])
    meter.stop = True
    with pytest.raises(_StoppedError):
        meter._check(file, link)
    assert not file.here
    assert content.exists()


@pytest.mark.parametrize("path", [f"^/api/models/{IDS['base']}$", f"{IDS['base']}/tree/"])
def test_a_web_page_instead_of_an_answer(
    hub: Hub, user: User, family: dict[str, Path], tmp_path: Path, path: str
) -> None:
    publish(hub, family)
    page = tmp_path / "login.html"
    page.write_text("<html>Welcome to our hotel</html>")
    hub.faults.on(Fault(path, page=page))
    line = refused(user)
    assert "the server at" in line
    assert "open it in a browser, as the network may need a login" in line


def test_a_list_that_names_files_elsewhere(hub: Hub, user: User, family: dict[str, Path]) -> None:
    """A diff vector names all that it needs, and the list has it where it should not be."""
    two = IDS["finetuned"], IDS["base"]
    publish(hub, family)
    assert user.run("extract", *two, "-o", "diff", "--stream", "-q").returncode == 0
    manifest = user.home / "diff" / "diffxfer.json"
    described = json.loads(manifest.read_text())
    names = "../../../evil.json", "/evil.json", "a/../../evil.json", "a//evil.json"
    described["files"] |= {name: {"size": 4, "xxh3": "0" * 32} for name in names}
    manifest.write_text(json.dumps(described))
    hub.add("me/diff", user.home / "diff")
    hub.state["listed"] = dict.fromkeys(names, 4)
    done = user.run("apply", "me/diff", IDS["target"], "-o", "out", "-q")
    assert done.returncode == 0, done.stderr
    assert not hub.asked("evil")
    assert not list(user.home.rglob("evil.json"))


def test_names_with_escapes_reach_no_terminal(
    hub: Hub, user: User, family: dict[str, Path]
) -> None:
    publish(hub, family)
    names = "\x1b]0;x\x07.safetensors", "\x1b[31mtokenizer.json", "\x1b[1mpytorch_model.bin"
    hub.state["listed"] = dict.fromkeys(names, 4)
    base = hub.repos[IDS["base"]]
    index = base.at() / "model.safetensors.index.json"
    index.unlink()
    done = user.run(*transfer("out"))
    assert done.returncode == 1
    assert "\x1b" not in done.stderr + done.stdout
    assert "only pickled weights" in done.stderr


def test_a_companion_that_is_none_for_its_size(
    hub: Hub, user: User, family: dict[str, Path]
) -> None:
    publish(hub, family)
    hub.state["listed"] = {"tokenizer.model": 300 << 20}
    done = user.run(*transfer("out"))
    assert done.returncode == 1
    assert "tokenizer.model: has 314572800 bytes on the Hub" in done.stderr
    assert not hub.asked("resolve.*tokenizer.model")
