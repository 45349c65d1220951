"""Transfers of adapters: options, names, folders, and runs that are disturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffxfer import transfer
from diffxfer.errors import InputChangedError
from tests import tiny
from tests.helpers import same_bits
from tests.shim import Faults, compile_shim

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q = "model.layers.0.self_attn.q_proj.weight"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / tiny.SHARD)


def roles(family: Path) -> list[Path]:
    return [family / role for role in ("adapter", "base", "target")]


def run(*argv: str | Path, err: str = "") -> tiny.Outcome:
    done = tiny.run(*argv)
    assert (done.status, done.err) == (0, err), done
    return done


def graft(family: Path, name: str, *options: str) -> dict[str, Tensor]:
    run("transfer", *roles(family), "-o", family / name, *options)
    return weights(family / name)


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(same_bits(left[n], right[n]) for n in left)


def rename_factors(family: Path, change: Callable[[str], str]) -> None:
    path = family / "adapter" / FILE
    tensors = load_file(path)
    save_file({change(name): tensor for name, tensor in tensors.items()}, path)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family with several chunks per tensor."""
    root = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    factors: dict[str, Any] = {}
    base = {"model.norm.weight": torch.ones(32)}
    for i in range(6):
        name = f"model.layers.{i}.mlp.up_proj"
        base[f"{name}.weight"] = torch.randn(900, 1024, generator=generator).bfloat16()
        for half, shape in (("A", (8, 1024)), ("B", (900, 8))):
            drawn = torch.randn(shape, generator=generator) * 0.01
            factors[f"base_model.model.{name}.lora_{half}.weight"] = drawn
        factors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.rand(900) + 31
    tiny.save_model(root / "base", base)
    tiny.save_model(root / "target", {n: t * 1.01 for n, t in base.items()})
    (root / "adapter").mkdir()
    save_file(factors, root / "adapter" / FILE)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "use_dora": True}
    tiny.write_json(root / "adapter" / CONFIG, config)
    return root


class TestOptions:
    def test_alpha_is_a_factor_of_delta(self, plain: Path) -> None:
        base, target = weights(plain / "base"), weights(plain / "target")
        once = graft(plain, "once", "--out-dtype", "float64")
        options = ("--alpha", "2", "--alpha-for", "q_proj=-0.5", "--out-dtype", "float64")
        made = graft(plain, "made", *options)
        for name, tensor in made.items():
            alpha = -0.5 if "q_proj" in name else 2.0
            delta = once[name] - target[name].double()
            assert torch.allclose(tensor, target[name].double() + alpha * delta, atol=1e-15), name
        assert base.keys() == made.keys()

    @pytest.mark.parametrize("option", ["--include", "--exclude"])
    def test_a_choice_of_tensors(self, plain: Path, option: str) -> None:
        every, some = graft(plain, "every"), graft(plain, "some", option, "q_proj")
        target = weights(plain / "target")
        for name, tensor in some.items():
            chosen = ("q_proj" in name) == (option == "--include")
            assert same_bits(tensor, (every if chosen else target)[name]), name

    def test_alpha_0_copies_the_target(self, plain: Path) -> None:
        assert equal(graft(plain, "made", "--alpha", "0"), weights(plain / "target"))

    @pytest.mark.parametrize("verb", ["transfer", "apply"])
    def test_a_dry_run_writes_nothing_and_says_what_is_grafted(
        self, plain: Path, verb: str
    ) -> None:
        before = tiny.tree(plain)
        given = roles(plain) if verb == "transfer" else [plain / "adapter", plain / "target"]
        done = run(verb, *given, "-o", plain / "out", "--dry-run", "--json")
        assert tiny.tree(plain) == before
        told = json.loads(done.out)
        assert told["tensors"] == {"grafted": 4, "copied": 25}
        (whys,) = {fate["why"] for fate in told["plan"] if fate["kind"] == "copied"}
        assert whys == "finetuned does not change it"

    def test_the_manifest_names_the_adapter(self, plain: Path) -> None:
        run("transfer", *roles(plain), "-o", plain / "a")
        run("apply", plain / "adapter", plain / "target", "-o", plain / "b")
        for out, role in (("a", "finetuned"), ("b", "adapter")):
            sources = json.loads((plain / out / "diffxfer.json").read_text())["sources"]
            assert sources[role]["name"] == "adapter"
            assert list(sources[role]["shards"]) == [FILE]

    def test_the_same_bytes_with_any_number_of_threads(self, plain: Path) -> None:
        one, two = (graft(plain, n, "--threads", n) for n in ("1", "2"))
        assert equal(one, two)

    def test_an_unrelated_target_is_refused(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        names = [f"model.layers.{i}.mlp.up_proj" for i in range(20)]
        for role in ("base", "target"):
            drawn = {f"{n}.weight": torch.randn(64, 128, generator=generator) for n in names}
            tiny.save_model(tmp_path / role, drawn)
        (tmp_path / "adapter").mkdir()
        save_file(
            {
                f"base_model.model.{name}.lora_{half}.weight": torch.full(shape, 0.01)
                for name in names
                for half, shape in (("A", (2, 128)), ("B", (64, 2)))
            },
            tmp_path / "adapter" / FILE,
        )
        tiny.write_json(
            tmp_path / "adapter" / CONFIG, {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
        )
        done = tiny.run("transfer", *roles(tmp_path), "-o", tmp_path / "out")
        assert done.status == 1
        assert "unrelated" in done.err


class TestTheRightBase:
    @pytest.mark.parametrize(
        ("stated", "expected"),
        [
            ("org/base", "base has the name that the adapter states: org/base"),
            ("/somewhere/Base", "base has the name that the adapter states: /somewhere/Base"),
            ("org/other", "the adapter was made for org/other, and base is "),
            ("\x1b[31m", "the adapter was made for \\x1b[31m, and base is "),
            (None, None),
        ],
    )
    @pytest.mark.parametrize("verb", ["transfer", "extract"])
    def test_the_name_is_compared_and_said(
        self, plain: Path, verb: str, stated: str | None, expected: str | None
    ) -> None:
        tiny.edit_json(
            plain / "adapter" / CONFIG, lambda c: c.update(base_model_name_or_path=stated)
        )
        given = roles(plain) if verb == "transfer" else roles(plain)[:2]
        told = json.loads(run(verb, *given, "-o", plain / "out", "--json").out)
        assert told["warnings"] == []
        assert [note[: len(expected or "")] for note in told["notes"]] == (
            [] if expected is None else [expected]
        )


class TestNames:
    @pytest.mark.parametrize(
        "change",
        [
            lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
            lambda n: n.replace(".self_attn.", "._orig_mod.self_attn."),
            lambda n: n.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
            lambda n: n.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
            lambda n: n.replace(".weight", ".default.weight"),
            lambda n: n.replace("base_model.model.model.", "base_model.model."),
            lambda n: n.replace("model.model.layers", "model.model.language_model.layers"),
        ],
    )
    def test_other_ways_to_write_them(self, plain: Path, change: Callable[[str], str]) -> None:
        expected = graft(plain, "expected")
        rename_factors(plain, change)
        assert equal(graft(plain, "made"), expected)
        run("apply", plain / "adapter", plain / "target", "-o", plain / "applied")
        assert equal(weights(plain / "applied"), expected)

    @pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
    def test_a_text_tower_onto_a_multimodal_base(self, plain: Path, prefix: str) -> None:
        expected = graft(plain, "expected")
        for role in ("base", "target"):
            path = plain / role / tiny.SHARD
            stored = {
                n if n.startswith("lm_head") else f"{prefix}{n}": t
                for n, t in load_file(path).items()
            }
            stored["vision_tower.proj.weight"] = torch.ones(3, 5)
            save_file(stored, path, {"format": "pt"})
        made = graft(plain, "made")
        assert len(made) == len(expected) + 1
        for name, tensor in made.items():
            if name != "vision_tower.proj.weight":
                assert same_bits(tensor, expected[name.removeprefix(prefix)]), name

    def test_renamed_tensors_of_base(self, plain: Path) -> None:
        expected = graft(plain, "expected")
        path = plain / "base" / tiny.SHARD
        stored = {n.replace("q_proj", "query"): t for n, t in load_file(path).items()}
        save_file(stored, path, {"format": "pt"})
        assert tiny.run("transfer", *roles(plain), "-o", plain / "bad").status == 1
        assert equal(graft(plain, "made", "--rename", "base:query=q_proj"), expected)

    def test_escapes_are_harmless(self, plain: Path) -> None:
        rename_factors(plain, lambda n: n.replace("q_proj", "q\x1b[31m\u202e\nproj"))
        done = tiny.run("transfer", *roles(plain), "-o", plain / "out")
        assert done.status == 1
        assert len(done.err.splitlines()) == 1
        assert done.err.rstrip("\n").isprintable()


class TestFolders:
    def test_a_checkpoint_folder_of_the_trainer(self, plain: Path) -> None:
        expected = graft(plain, "expected")
        folder = plain / "run" / "checkpoint-40"
        shutil.copytree(plain / "adapter", folder)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            (folder / name).write_bytes(b"\x80")
        tiny.write_json(folder / "trainer_state.json", {"global_step": 40})
        run("transfer", folder, *roles(plain)[1:], "-o", plain / "out")
        assert equal(weights(plain / "out"), expected)
        assert not (plain / "out" / "trainer_state.json").exists()
        assert not (plain / "out" / CONFIG).exists()

    def test_inputs_are_left_alone(self, plain: Path) -> None:
        before = tiny.tree(plain)
        for place in (plain / "adapter").iterdir():
            place.chmod(0o444)
        (plain / "adapter").chmod(0o555)
        out = plain.parent / "out"
        run("transfer", *roles(plain), "-o", out)
        (plain / "adapter").chmod(0o755)
        after = tiny.tree(plain)
        assert {n: entry[2] for n, entry in before.items()} == {n: e[2] for n, e in after.items()}

    def test_an_adapter_beside_a_whole_model_is_not_read(self, plain: Path) -> None:
        """The folder has whole weights: those are finetuned."""
        for name in (tiny.SHARD, "config.json"):
            shutil.copyfile(plain / "base" / name, plain / "adapter" / name)
        done = tiny.run("transfer", *roles(plain), "-o", plain / "out")
        assert done.status == 0
        assert equal(weights(plain / "out"), weights(plain / "target"))

    def test_a_config_of_its_own_sets_the_behaviour(self, plain: Path) -> None:
        """Unsloth saves one, with the quantisation that it trained with."""
        config = json.loads((plain / "base" / "config.json").read_text())
        quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        own = {**config, "quantization_config": quantized, "eos_token_id": 5}
        tiny.write_json(plain / "adapter" / "config.json", own)
        template = "{{ messages[0].content }}"
        (plain / "adapter" / "chat_template.jinja").write_text(template)
        graft(plain, "out")
        made = json.loads((plain / "out" / "config.json").read_text())
        assert "quantization_config" not in made
        assert made["eos_token_id"] == 5
        assert (plain / "out" / "chat_template.jinja").read_text() == template


class TestDisturbed:
    def test_an_adapter_that_changes_during_the_run(self, plain: Path) -> None:
        path = plain / "adapter" / FILE

        def touch(done: int, total: int) -> None:
            if path.exists():
                path.write_bytes(path.read_bytes() + b"\0")

        with pytest.raises(InputChangedError, match=FILE):
            transfer(*roles(plain), plain / "out", progress=touch, threads=1)
        assert not (plain / "out").exists()

    def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
        self, large: Path, tmp_path: Path
    ) -> None:
        graft(large, "whole")
        expected = (large / "whole" / tiny.SHARD).read_bytes()
        faults = Faults(compile_shim(tmp_path), tmp_path / "log")
        (tmp_path / "made").mkdir()
        out = tmp_path / "made" / "out"
        argv = ["transfer", *map(str, roles(large)), "-o", str(out), "--threads", "2"]
        calls = faults.run(argv, under=str(out.parent)).calls
        shutil.rmtree(out)
        killed = faults.run(argv, under=str(out.parent), at=calls * 2 // 3, do="kill")
        assert killed.status == -signal.SIGKILL
        assert not out.exists()
        done = tiny.run(*argv, "--json")
        assert (done.status, done.err) == (0, "")
        assert json.loads(done.out)["resumed_bytes"] > 0
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert (out / tiny.SHARD).read_bytes() == expected

    def test_what_a_killed_run_left_in_the_temporary_folder_goes_with_the_next(
        self, plain: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "temporary").mkdir()

        def follow(*, killed: bool) -> int:
            code = (
                "import os, signal, sys, diffxfer\n"
                "kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
                f"diffxfer.transfer(*sys.argv[1:], progress={'kill' if killed else None})"
            )
            return subprocess.run(
                [sys.executable, "-c", code, *map(str, roles(plain)), str(plain / "out")],
                env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
                check=False,
            ).returncode

        assert follow(killed=True) == -signal.SIGKILL
        assert list((tmp_path / "temporary").iterdir()), "the kill left something behind"
        assert follow(killed=False) == 0
        assert not list((tmp_path / "temporary").iterdir())

    def test_another_scaling_is_another_run(self, large: Path, tmp_path: Path) -> None:
        """What is left of a run must not be continued with another adapter_config.json."""
        family = tmp_path / "family"
        shutil.copytree(large, family, ignore=shutil.ignore_patterns("whole"))
        faults = Faults(compile_shim(tmp_path), tmp_path / "log")
        (tmp_path / "made").mkdir()
        out = tmp_path / "made" / "out"
        argv = ["transfer", *map(str, roles(family)), "-o", str(out), "--threads", "2"]
        calls = faults.run(argv, under=str(out.parent)).calls
        shutil.rmtree(out)
        killed = faults.run(argv, under=str(out.parent), at=calls * 2 // 3, do="kill")
        assert killed.status == -signal.SIGKILL
        tiny.edit_json(family / "adapter" / CONFIG, lambda config: config.update(lora_alpha=80))
        done = tiny.run(*argv)
        assert done.status == 1
        assert "--restart to discard it" in done.err
        run(*argv, "--restart")
        assert equal(weights(out), graft(family, "fresh"))
        assert not equal(weights(out), weights(large / "whole"))
