"""Every failure of the Hub is survived, or is an error of one line with the remedy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.hub import faults
from tests.hub.models import IDS, contents, publish, transfer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.hub.conftest import User
    from tests.hub.faults import Fault
    from tests.hub.server import Hub

SHARD = "model-00001-of"
BASE = IDS["base"]


def says(user: User, *texts: str, options: tuple[str, ...] = (), **env: str) -> str:
    """The error line of a transfer of the family."""
    done = user.run(*transfer("out", *options, "--quiet"), **env)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for text in texts:
        assert text in done.stderr, (text, done.stderr)
    assert not (user.home / "out").exists()
    return done.stderr


def test_a_gated_model_tells_a_newcomer_what_to_do(
    hub: Hub, user: User, family: dict[str, Path]
) -> None:
    publish(hub, family)
    hub.repos[BASE].gated = True
    page = f"{hub.url}/{BASE}"
    says(
        user,
        f"error: {BASE}: is gated: its licence must be accepted first; ",
        f"log in at {page}, accept the licence there, then run: hf auth login",
    )
    hub.tokens["hf_new"] = set()
    says(user, f"open {page} with the account of your token", HF_TOKEN="hf_new")
    hub.tokens["hf_new"] = {BASE}
    assert user.run(*transfer("out", "--dry-run"), HF_TOKEN="hf_new").returncode == 0
    assert all(request.token is None for request in hub.asked("^/cdn/"))


def test_what_is_not_there(hub: Hub, user: User, family: dict[str, Path]) -> None:
    publish(hub, family)
    target = hub.repos.pop(IDS["target"])
    target.id = "org/llama-3.1-base"
    hub.repos[target.id] = target
    near = "org/llama-3.1-base? Or, if it is private, "
    no_token = says(user, f"{IDS['target']}: is neither a local folder nor a public model at", near)
    assert no_token.endswith("run: hf auth login\n")
    hub.tokens["hf_x"] = set()
    says(user, "that you may read", near, HF_TOKEN="hf_x")
    says(user, "the Hub rejects your token", "hf auth login", HF_TOKEN="hf_wrong")
    hub.add("org/secret", family["base"], private=True)
    done = user.run("extract", IDS["finetuned"], "org/secret", "-o", "out", "-q")
    assert "org/secret: is neither a local folder" in done.stderr
    done = user.run("extract", IDS["finetuned"], f"{BASE}@v1.O", "-o", "out", "-q")
    assert f"{BASE}@v1.O: has no revision 'v1.O'; use one of main" in done.stderr
    hub.repos[BASE].refs["v1.0"] = hub.repos[BASE].refs["main"]
    done = user.run("extract", IDS["finetuned"], f"{BASE}@v1.O", "-o", "out", "-q")
    assert f"did you mean {BASE}@v1.0?" in done.stderr
    done = user.run("extract", IDS["finetuned"], f"{BASE}@v1.0", "-o", "out", "-q")
    assert done.returncode == 0, done.stderr


def test_what_is_no_model(hub: Hub, user: User, family: dict[str, Path]) -> None:
    publish(hub, family)

    def becomes(**files: bytes | None) -> None:
        hub.add(BASE).commit({name.replace("__", "."): data for name, data in files.items()})

    becomes(README__md=b"# Hello")
    says(user, f"{BASE}: has no config.json", "so it is not a model", f"see {hub.url}/{BASE}")
    becomes(config__json=b"{}", pytorch_model__bin=b"pickle")
    says(user, f"{BASE}@", "has only pickled weights (pytorch_model.bin)")
    becomes(config__json=b"{}", adapter_config__json=b"{}", adapter_model__safetensors=b"x")
    says(user, f"{BASE}@", "is a LoRA adapter", "merge it into its base first")
    becomes(adapter_config__json=b"{}", adapter_model__safetensors=b"x")
    says(user, f"{BASE}@", "is a LoRA adapter (adapter_config.json)")
    becomes(m__gguf=b"GGUF")
    says(
        user,
        f"{BASE}@",
        "is a GGUF model (m.gguf)",
        "give the safetensors model that it was made from",
    )
    becomes(m__gguf=b"GGUF", config__json=b"{}")
    says(user, f"{BASE}@", "is a GGUF model (m.gguf)")
    becomes(weights__npz=b"PK", config__json=b"{}")
    says(user, f"{BASE}@", "has MLX weights (weights.npz)")
    becomes(consolidated__safetensors=b"x", params__json=b"{}")
    says(user, f"{BASE}@", "Meta's or Mistral's own layout (consolidated.safetensors)")
    name = BASE.partition("/")[2]
    becomes(config__json=b'{"architectures": ["LlamaModel"]}', pytorch_model__bin=b"pickle")
    says(user, f"--local-dir {name}, then python -c 'from transformers import LlamaModel as M; ")
    parts = {"unet/config.json": b"{}", "unet/diffusion_pytorch_model.safetensors": b"x"}
    commit = hub.add(BASE).commit({"model_index.json": b"{}", **parts})
    download = f"hf download {BASE} --revision {commit} --local-dir {name}, then"
    says(user, f"{BASE}@", f"{download} give the folder of one model: {name}/unet")
    becomes(config__json=b'{"quantization_config": {"quant_method": "gptq"}}')
    hub.repos[BASE].commit(
        {"model.safetensors": (family["base"] / "model-00001-of-00002.safetensors").read_bytes()}
    )
    hub.forget()
    says(user, "gptq")
    assert hub.sent(r"^/cdn/") < 500_000


def test_shards_that_are_none(hub: Hub, user: User, family: dict[str, Path]) -> None:
    publish(hub, family)
    shard = "model-00001-of-00002.safetensors"

    def becomes(data: bytes | None) -> str:
        return f"error: {BASE}@{hub.repos[BASE].commit({shard: data})[:8]}/{shard}: "

    where = becomes(b"\xff" * 5000)
    says(user, f"{where}states a header of ", "; the file on the Hub is broken: report it")
    says(user, f"{becomes(b'')}is empty, expected a safetensors file", options=("--stream",))
    says(user, f"{becomes(None)}is missing on the Hub; report it to the owner")


def test_what_the_hub_has_disabled(hub: Hub, user: User, family: dict[str, Path]) -> None:
    publish(hub, family)
    told = {"X-Error-Message": "Access to this resource is disabled."}
    hub.faults.on(faults.Fault(f"/{BASE}$", status=403, headers=told))
    says(user, f"{BASE}: was disabled by the Hub; see {hub.url}/{BASE}")


SURVIVED: dict[str, list[Callable[[], Fault]]] = {
    "500 once": [
        lambda: faults.failing("^/api/models/org/llama-3.0$", times=1),
        lambda: faults.failing(f"^/org/llama-3.0/resolve/.*{SHARD}", times=1),
        lambda: faults.failing(f"^/cdn/org/llama-3.1/.*{SHARD}", times=1),
    ],
    "429 with Retry-After": [
        lambda: faults.limited("/api/models/me/llama-sft", times=1),
        lambda: faults.limited(f"^/cdn/org/llama-3.1/.*{SHARD}", times=1),
    ],
    "cut and truncated": [
        lambda: faults.cut(f"^/cdn/org/llama-3.1/.*{SHARD}", 300_000, times=1),
        lambda: faults.truncated(f"^/cdn/me/llama-sft/.*{SHARD}", 200_000, times=1),
    ],
    "slow": [lambda: faults.slow(f"^/cdn/org/llama-3.0/.*{SHARD}", 0.01)],
}


@pytest.mark.parametrize("options", [(), ("--stream",)], ids=["downloaded", "streamed"])
@pytest.mark.parametrize("name", SURVIVED)
@pytest.mark.slow
def test_what_is_survived(
    name: str,
    options: tuple[str, ...],
    hub: Hub,
    user: User,
    family: dict[str, Path],
    grafted: Path,
) -> None:
    publish(hub, family)
    on = [hub.faults.on(make()) for make in SURVIVED[name]]
    done = user.run(*transfer("out", *options))
    assert done.returncode == 0, done.stderr
    assert contents(user.home / "out") == contents(grafted)
    assert all(fault.met for fault in on), [fault.met for fault in on]


@pytest.mark.slow
def test_links_expire_while_it_streams(
    hub: Hub, user: User, family: dict[str, Path], grafted: Path
) -> None:
    publish(hub, family)
    # The first link to a large file of each model is of no use any more.
    fault = hub.faults.on(faults.Fault(f"^/cdn/.*{SHARD}", times=2, status=403))
    done = user.run(*transfer("out", "--stream"))
    assert done.returncode == 0, done.stderr
    assert fault.met == 2
    assert contents(user.home / "out") == contents(grafted)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--stream",)], ids=["downloaded", "streamed"])
def test_what_does_not_end_is_named(
    options: tuple[str, ...], hub: Hub, user: User, family: dict[str, Path], grafted: Path
) -> None:
    publish(hub, family)
    # Headers come, then nothing more: requests that begin after the first 64 KiB, or whole files.
    hub.faults.on(faults.limited(f"^/cdn/{BASE}/", retry_after_s=3600))
    says(user, f"{BASE}: ", "too many requests", "wait 3600 s", options=options)
    hub.faults.off()
    hub.faults.on(faults.failing(f"^/cdn/{BASE}/"))
    says(user, f"{BASE}: ", "(status 500)", options=options)
    hub.faults.off()
    assert user.run(*transfer("out", *options)).returncode == 0
    assert contents(user.home / "out") == contents(grafted)


def test_offline_from_the_cache(
    hub: Hub, user: User, family: dict[str, Path], grafted: Path
) -> None:
    commits = publish(hub, family)
    assert user.run(*transfer("out", "--dry-run")).returncode == 0
    says(user, "HF_HUB_OFFLINE is set", "does not contain its model-00001-of", HF_HUB_OFFLINE="1")
    assert user.run(*transfer("online")).returncode == 0
    hub.forget()
    done = user.run(*transfer("offline"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    assert contents(user.home / "offline") == contents(grafted)
    manifest = json.loads((user.home / "offline" / "diffxfer.json").read_text())
    assert manifest["sources"]["base"]["revision"] == commits["base"]
    says(user, "does not contain it", HF_HUB_OFFLINE="1", HF_HOME=str(user.home / "elsewhere"))


def test_no_network(user: User, hub: Hub, family: dict[str, Path]) -> None:
    publish(hub, family)
    hub.stop()
    says(user, f"no connection to {hub.url}", "check the network, and run the same command again")


def test_an_endpoint_that_is_none(user: User) -> None:
    done = user.run("inspect", BASE, "-q", HF_ENDPOINT="hub.example")
    assert f"{BASE}: cannot be fetched: no connection to hub.example (" in done.stderr
    assert "correct HF_ENDPOINT or your proxy" in done.stderr


@pytest.mark.slow
def test_no_network_and_all_of_it_in_the_cache(
    hub: Hub, user: User, family: dict[str, Path]
) -> None:
    commit = publish(hub, family)["base"]
    assert user.run("extract", IDS["finetuned"], BASE, "-o", "diff", "-q").returncode == 0
    here = user.run("inspect", BASE, "--json")
    hub.stop()
    for named in (BASE, f"{BASE}@{commit}"):
        done = user.run("inspect", named, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) | {"path": BASE} == json.loads(here.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--stream",)], ids=["downloaded", "streamed"])
def test_an_interruption_ends_it_soon_and_whole_files_stay(
    options: tuple[str, ...], hub: Hub, user: User, family: dict[str, Path], grafted: Path
) -> None:
    publish(hub, family)
    hub.faults.on(faults.slow(f"^/cdn/{BASE}/.*{SHARD}", 0.3))
    process = subprocess.Popen(
        [sys.executable, "-m", "diffxfer", *transfer("out", *options)],
        cwd=user.home,
        env={**os.environ, **user.env, "HF_HUB_OFFLINE": "0"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(hub.asked(r"^/cdn/.*-00002-of")) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted: " in said
    assert "Traceback" not in said
    assert not (user.home / "out").exists()
    # It waits for nothing that is still on its way.
    coming = next(family["base"].glob(f"{SHARD}*")).stat().st_size
    assert hub.sent(f"^/cdn/{BASE}/.*{SHARD}") < coming
    hub.faults.off()
    hub.forget()
    assert user.run(*transfer("out", *options)).returncode == 0
    assert contents(user.home / "out") == contents(grafted)
