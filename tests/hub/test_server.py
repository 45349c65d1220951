"""The tests' own Hub behaves to the real client as the Hub does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub import faults
from tests.hub.store import files_in

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hub.server import Hub

WEIGHTS = bytes(range(256)) * 1024


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """`HF_HUB_OFFLINE` may be set for the tests; this Hub is on the same machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def stock(hub: Hub, **options: bool) -> str:
    return hub.add("org/model", **options).commit(
        {"config.json": b"{}", "model.safetensors": WEIGHTS, "original/a.pth": b"old"}
    )


def client(hub: Hub, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def test_a_snapshot_comes_whole_and_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    commit = stock(hub)
    hub.page = 2
    for _ in range(2):
        found = client(hub).snapshot_download(
            "org/model", cache_dir=tmp_path / "cache", ignore_patterns=["original/*"]
        )
        assert found.endswith(commit)
    assert {n: p.read_bytes() for n, p in files_in(tmp_path / "cache").items() if "snap" in n} == {
        f"models--org--model/snapshots/{commit}/config.json": b"{}",
        f"models--org--model/snapshots/{commit}/model.safetensors": WEIGHTS,
    }
    assert hub.sent(r"\.safetensors") == len(WEIGHTS)
    assert len(hub.asked("/tree/")) == 2
    assert not hub.asked(r"\.pth")


def test_links_to_the_cdn_expire_and_bring_ranges_without_a_token(hub: Hub) -> None:
    stock(hub)
    hub.tokens["hf_x"] = set()
    url = f"{hub.url}/org/model/resolve/main/model.safetensors"
    headers = {"Authorization": "Bearer hf_x", "Range": "bytes=100-199"}
    with httpx2.Client(follow_redirects=True) as session:
        answer = session.get(url, headers=headers)
        assert (answer.status_code, answer.content) == (206, WEIGHTS[100:200])
        assert [r.token for r in hub.asked("model.safetensors")] == ["hf_x", None]
        hub.expire()
        assert session.get(answer.url).status_code == 403
        assert session.get(url, headers={"Range": "bytes=999999-"}).status_code == 416


def test_who_may_read_what(hub: Hub, tmp_path: Path) -> None:
    stock(hub, gated=True)
    hub.add("org/secret", private=True).commit({"config.json": b"{}"})
    hub.tokens |= {"hf_in": {"org/model", "org/secret"}, "hf_out": set()}
    api = client(hub)
    assert api.model_info("org/model").gated == "manual"
    for token in (False, "hf_out"):
        with pytest.raises(GatedRepoError):
            api.hf_hub_download("org/model", "config.json", token=token, cache_dir=tmp_path)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("org/secret", token=token)
    assert api.model_info("org/secret", token="hf_in").private
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/model", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("org/model", "missing.json", token="hf_in", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info("org/model", token="hf_wrong")
    assert [found.id for found in api.list_models(author="org")] == ["org/model"]


def test_faults_befall_as_many_requests_as_they_should(hub: Hub) -> None:
    stock(hub)
    url = f"{hub.url}/org/model/resolve/main/model.safetensors"
    with httpx2.Client(follow_redirects=True) as session:
        hub.faults.on(faults.failing("/resolve/", times=1))
        hub.faults.on(faults.limited("/resolve/", times=1))
        hub.faults.on(faults.cut("/cdn/", 70_000, times=1))
        hub.faults.on(faults.truncated("/cdn/", 100, times=1))
        assert session.get(url).status_code == 500
        assert session.get(url).status_code == 429
        with pytest.raises(httpx2.RemoteProtocolError):
            session.get(url)
        assert len(session.get(url).content) == 100
        assert session.get(url).content == WEIGHTS
    assert [r.sent for r in hub.asked("/cdn/")] == [70_000, 100, len(WEIGHTS)]
