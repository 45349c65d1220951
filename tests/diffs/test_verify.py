"""Every kind of damage is found and named, and an undamaged folder passes."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from diffxfer import DiffxferError, extract_diff, transfer, verify
from diffxfer.checkpoints.reader import read_shard
from diffxfer.diffs.artifact.manifest import Manifest, manifest_bytes
from diffxfer.errors import (
    ArtifactError,
    DamageError,
    InputChangedError,
    MatchError,
    OptionError,
)
from tests import families, oracle, tiny
from tests.families import fast_tokenizer, llama, save_model, save_tensors, save_tokenizer
from tests.oracle import Roles
from tests.tiny import SHARDS

MANIFEST = "diffxfer.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A graft and a diff vector of two shards each, and what they were made from."""
    root = tmp_path_factory.mktemp("made")
    roles = [
        tiny.save_model(root / role, tiny.tensors(role), sharded=True)
        for role in ("finetuned", "base", "target")
    ]
    transfer(*roles, root / "graft")
    extract_diff(*roles[:2], root / "diff")
    return root


@pytest.fixture(params=["graft", "diff"])
def folder(made, request, tmp_path):
    return Path(shutil.copytree(made / request.param, tmp_path / "folder"))


def found(folder, **options):
    """The problem of each damaged (file, tensor) pair."""
    with pytest.raises(DamageError) as caught:
        verify(folder, **options)
    assert caught.value.damage
    others = any(("base" in d.problem) for d in caught.value.damage)
    remedy = "give the base and the fine-tuned model" if others else "make or download it again"
    assert remedy in caught.value.remedy
    return {(d.file, d.tensor): d.problem for d in caught.value.damage}


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def tensor_names(shard):
    return {spec.name: spec for spec in read_shard(shard).values()}


class TestWhole:
    def test_what_was_just_written(self, folder):
        before = families.fingerprints(folder)
        report = verify(folder)
        assert (report.tensors, report.shards, report.restored) == (5, 2, None)
        names = {path.name for path in folder.rglob("*") if path.is_file()}
        assert report.files == len(names) - 2
        assert families.fingerprints(folder) == before

    def test_what_the_hub_adds_is_no_damage(self, folder):
        (folder / ".gitattributes").touch()
        (folder / ".cache" / "huggingface").mkdir(parents=True)
        (folder / ".cache" / "huggingface" / "lock").touch()
        verify(folder)

    def test_shards_may_be_links(self, folder, tmp_path):
        (folder / SHARDS[0]).rename(tmp_path / "blob")
        (folder / SHARDS[0]).symlink_to(tmp_path / "blob")
        verify(folder)

    def test_a_shard_that_changes_meanwhile(self, folder):
        def touch(done, total):
            if done == total:
                os.utime(folder / SHARDS[0], ns=(0, 0))

        with pytest.raises(InputChangedError, match="changed while it was read"):
            verify(folder, progress=touch)

    def test_a_thread_more_or_less(self, folder):
        calls = []
        verify(folder, threads=1, progress=lambda *moved: calls.append(moved))
        verify(folder, threads=3)
        assert calls[-1][0] == calls[-1][1]


class TestDamage:
    def test_a_flipped_bit_in_every_tensor(self, folder):
        for shard in SHARDS:
            for name, spec in tensor_names(folder / shard).items():
                bit = 8 * (spec.start + spec.nbytes) - 3
                flip(folder / shard, bit)
                assert list(found(folder)) == [(shard, name)]
                flip(folder / shard, bit)
        verify(folder)

    def test_every_tensor_of_a_shard_at_once(self, folder):
        names = tensor_names(folder / SHARDS[0])
        for spec in names.values():
            flip(folder / SHARDS[0], 8 * spec.start)
        assert found(folder).keys() == {(SHARDS[0], name) for name in names}

    def test_two_shards_swapped(self, folder):
        one, two = (folder / shard for shard in SHARDS)
        one.rename(folder / "aside")
        two.rename(one)
        (folder / "aside").rename(two)
        damage = found(folder)
        assert damage.keys() == {(shard, "") for shard in SHARDS}
        assert f"header of {SHARDS[1]}" in damage[SHARDS[0], ""]

    def test_a_shard_of_another_run_with_the_same_header(self, made, folder, tmp_path):
        roles = [made / role for role in ("finetuned", "base", "target")]
        if json.loads((folder / MANIFEST).read_text())["kind"] == "graft":
            transfer(*roles, tmp_path / "other", alpha=0.5)
        else:
            extract_diff(roles[2], roles[1], tmp_path / "other")
        shutil.copy(tmp_path / "other" / SHARDS[1], folder / SHARDS[1])
        names = tensor_names(folder / SHARDS[1])
        assert found(folder).keys() == {(SHARDS[1], name) for name in names}

    def test_cut_off_in_the_data(self, folder):
        path = folder / SHARDS[1]
        last = max(tensor_names(path).values(), key=lambda spec: spec.start)
        os.truncate(path, path.stat().st_size - 1)
        damage = found(folder)
        assert damage.keys() == {(SHARDS[1], ""), (SHARDS[1], last.name)}
        assert all("is truncated" in problem for problem in damage.values())

    @pytest.mark.parametrize("size", [0, 5, 60])
    def test_cut_off_in_the_header(self, folder, size):
        names = tensor_names(folder / SHARDS[1])
        os.truncate(folder / SHARDS[1], size)
        assert found(folder).keys() == {(SHARDS[1], name) for name in ("", *names)}

    def test_bytes_at_the_end(self, folder):
        with (folder / SHARDS[0]).open("ab") as file:
            file.write(b"\0")
        assert list(found(folder)) == [(SHARDS[0], "")]

    def test_a_shard_is_gone(self, folder):
        names = tensor_names(folder / SHARDS[0])
        (folder / SHARDS[0]).unlink()
        damage = found(folder)
        assert damage.keys() == {(SHARDS[0], name) for name in ("", *names)}
        assert set(damage.values()) == {"is missing"}

    def test_every_other_file_gone_changed_or_longer(self, folder):
        for name in json.loads((folder / MANIFEST).read_text())["files"]:
            path = folder / name
            content = path.read_bytes()
            path.unlink()
            assert found(folder)[name, ""] == "is missing"
            path.write_bytes(content + b"\n")
            assert "bytes, expected" in found(folder)[name, ""]
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
            assert "its checksum differs" in found(folder)[name, ""]
            path.write_bytes(content)
        verify(folder)

    def test_files_too_many(self, folder):
        (folder / "within").mkdir()
        (folder / "within" / "more.txt").touch()
        (folder / "model-00003-of-00003.safetensors").touch()
        (folder / "link").symlink_to("/")
        expected = {"within/more.txt", "model-00003-of-00003.safetensors", "link"}
        assert found(folder).keys() == {(name, "") for name in expected}

    def test_what_is_hidden_within_is_no_hub_s(self, folder):
        (folder / "within" / ".cache").mkdir(parents=True)
        (folder / "within" / ".cache" / "more").touch()
        assert list(found(folder)) == [("within/.cache/more", "")]

    def test_a_folder_that_cannot_be_listed(self, folder, monkeypatch):
        (folder / "within").mkdir()
        scandir = os.scandir

        def refuse(path):
            if Path(path).name == "within":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        assert found(folder) == {("within", ""): "cannot be listed (Permission denied)"}

    def test_a_tensor_in_two_shards(self, folder):
        first, second = (load_file(folder / shard) for shard in SHARDS)
        name = next(iter(first))
        save_file({**second, name: first[name]}, folder / SHARDS[1], {"format": "pt"})
        damage = found(folder)
        assert damage.keys() == {(SHARDS[1], ""), (SHARDS[1], name)}
        assert damage[SHARDS[1], name] == "occurs twice"

    def test_a_tensor_missing_and_one_too_many(self, folder):
        weights = load_file(folder / SHARDS[0])
        gone = sorted(weights)[0]
        weights["more"] = weights.pop(gone)
        save_file(weights, folder / SHARDS[0], {"format": "pt"})
        damage = found(folder)
        assert damage.keys() == {(SHARDS[0], ""), (SHARDS[0], "more"), (SHARDS[0], gone)}
        assert damage[SHARDS[0], "more"] == "is not in the manifest"
        assert damage[SHARDS[0], gone] == "is missing"

    def test_a_companion_that_leads_out_of_the_folder(self, folder, tmp_path):
        (tmp_path / "secret").write_bytes((folder / "README.md").read_bytes())
        (folder / "README.md").unlink()
        (folder / "README.md").symlink_to(tmp_path / "secret")
        assert "points outside" in found(folder)["README.md", ""]

    def test_the_manifest_of_another_folder(self, made, folder):
        kind = json.loads((folder / MANIFEST).read_text())["kind"]
        other = made / ("diff" if kind == "graft" else "graft") / MANIFEST
        shutil.copy(other, folder / MANIFEST)
        assert (SHARDS[0], "model.embed_tokens.weight") in found(folder)

    def test_a_manifest_that_somebody_edited(self, folder):
        tiny.edit_json(folder / MANIFEST, lambda manifest: manifest["command"].update(alpha=2))
        assert list(found(folder)) == [(MANIFEST, "")]

    def test_a_manifest_that_names_shards_elsewhere(self, folder, tmp_path):
        shutil.copy(folder / SHARDS[0], tmp_path / SHARDS[0])

        def lead_out(manifest):
            manifest["shards"] = {f"../{SHARDS[0]}": manifest["shards"].pop(SHARDS[0])}

        tiny.edit_json(folder / MANIFEST, lead_out)
        assert found(folder)[f"../{SHARDS[0]}", ""] == "is not the name of a shard"


@given(data=st.data())
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("kind", ["graft", "diff"])
def test_one_flipped_bit_anywhere_is_found(made, kind, data):
    files = sorted(path for path in (made / kind).rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    bit = data.draw(st.integers(0, path.stat().st_size * 8 - 1))
    flip(path, bit)
    try:
        with pytest.raises(DiffxferError) as caught:
            verify(made / kind)
    finally:
        flip(path, bit)
    if path.name != MANIFEST:
        assert isinstance(caught.value, DamageError)
        name = path.relative_to(made / kind).as_posix()
        assert name in {damage.file for damage in caught.value.damage}


class TestRefusal:
    def test_a_folder_of_somebody_else(self, made):
        with pytest.raises(ArtifactError, match=r"has no diffxfer\.json, and without"):
            verify(made / "base")

    def test_base_and_finetuned_belong_together(self, made):
        with pytest.raises(OptionError, match="--base: proves nothing without --finetuned"):
            verify(made / "diff", base=made / "base")
        with pytest.raises(OptionError, match="--finetuned: proves nothing without --base"):
            verify(made / "diff", finetuned=made / "finetuned")

    def test_only_a_diff_vector_gives_finetuned_back(self, made):
        with pytest.raises(ArtifactError, match="is a graft"):
            verify(made / "graft", base=made / "base", finetuned=made / "finetuned")

    def test_checksums_of_another_kind(self, folder):
        tiny.edit_json(folder / MANIFEST, lambda manifest: manifest.update(checksum="crc32"))
        with pytest.raises(ArtifactError, match="checksums of the kind 'crc32'"):
            verify(folder)


def reseal(folder, change):
    """Change a manifest, and seal it again."""
    document = json.loads((folder / MANIFEST).read_bytes())
    change(document)
    manifest = Manifest.model_validate(document)
    rest = manifest.model_copy(update={"tensors": {}})
    (folder / MANIFEST).write_bytes(manifest_bytes(rest, manifest.tensors.items()))


def odd_roles(root, rows=(33, 32), order=-1):
    """Roles of every dtype, prefixes, ties and rows of tokens that pair in another order."""
    generator = torch.Generator().manual_seed(5)

    def some(dtype, *shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    words = [f"w{i}" for i in range(30)]
    roles = []
    tokens = [*words, *(["new"] if order < 0 else [])], words[::order]
    for name, known, count in zip(("finetuned", "base"), tokens, rows, strict=True):
        tensors = {
            "model.embed_tokens.weight": some(torch.bfloat16, count, 4),
            "model.a.weight": some(torch.float16, 3, 5),
            "model.b.weight": some(torch.float32, 7),
            "model.c.weight": some(torch.bfloat16, 2, 3, 4),
            "model.scalar": some(torch.bfloat16),
            "model.empty": some(torch.bfloat16, 0, 4),
            "model.ids": torch.arange(4),
        }
        tensors["model.a.weight"][0, 0] = 1e-7
        if name == "base":
            tensors = {key.removeprefix("model."): value for key, value in tensors.items()}
        folder = save_tensors(root / name, tensors, {"vocab_size": count})
        save_tokenizer(folder, fast_tokenizer(words=known), unk_token=known[0])
        roles.append(folder)
    return roles


class TestRestore:
    @pytest.mark.parametrize("dtype", ["source", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize("kind", ["llamas", "odd"])
    def test_counts_are_the_oracles(self, kind, dtype, tmp_path):
        if kind == "odd":
            finetuned, base = odd_roles(tmp_path)
            roles = Roles(*map(oracle.tokens_of, (finetuned, base)), base_mode="tokens")
        else:
            config = llama(tie_word_embeddings=True)
            finetuned, base = (save_model(tmp_path / str(seed), config, seed) for seed in (1, 2))
            roles = Roles()
        extract_diff(finetuned, base, tmp_path / "diff", diff_dtype=dtype)
        stored = None if dtype == "source" else getattr(torch, dtype)
        expected = oracle.extract(oracle.load(finetuned), oracle.load(base), stored, roles)
        report = verify(tmp_path / "diff", base=base, finetuned=finetuned)
        counts = {name: tensor.inexact for name, tensor in expected.items() if tensor.inexact}
        assert report.restored.inexact == counts
        elements = sum(tensor.values.numel() for tensor in expected.values())
        assert report.restored.elements + report.restored.unpaired == elements
        assert bool(report.restored.unpaired) == (kind == "odd")
        if dtype == "float64":
            assert not counts

    def test_only_what_was_extracted(self, made, tmp_path):
        roles = {"finetuned": made / "finetuned", "base": made / "base"}
        extract_diff(*roles.values(), tmp_path / "diff", exclude=["norm"])
        assert verify(tmp_path / "diff", **roles).restored.elements == 72

    def test_a_base_with_more_rows_than_finetuned(self, tmp_path):
        """As where padding was cut off: base is told by its checksum all the same."""
        finetuned, base = odd_roles(tmp_path, rows=(40, 45), order=1)
        extract_diff(finetuned, base, tmp_path / "diff")
        report = verify(tmp_path / "diff", base=base, finetuned=finetuned)
        assert report.restored.unpaired == 0
        self.flip_last_row(base)
        damage = found(tmp_path / "diff", base=base, finetuned=finetuned)
        assert list(damage) == [(tiny.SHARD, "model.embed_tokens.weight")]
        assert "base has different values" in damage[tiny.SHARD, "model.embed_tokens.weight"]

    def test_a_row_of_base_that_no_token_has(self, tmp_path):
        finetuned, base = odd_roles(tmp_path)
        extract_diff(finetuned, base, tmp_path / "diff")
        self.flip_last_row(base)
        damage = found(tmp_path / "diff", base=base, finetuned=finetuned)
        assert list(damage) == [(tiny.SHARD, "model.embed_tokens.weight")]

    def flip_last_row(self, base):
        spec = tensor_names(base / tiny.SHARD)["embed_tokens.weight"]
        flip(base / tiny.SHARD, 8 * (spec.start + spec.nbytes) - 3)

    def test_rows_pair_as_they_did_when_it_was_extracted(self, tmp_path):
        finetuned, base = odd_roles(tmp_path, rows=(33, 33))
        extract_diff(finetuned, base, tmp_path / "diff", vocab="ids")
        report = verify(tmp_path / "diff", base=base, finetuned=finetuned)
        assert report.restored.unpaired == 0

    @pytest.mark.parametrize("other", ["dtype", "shape", "missing"])
    def test_another_header_comes_before_what_it_cannot_prove(self, made, tmp_path, other):
        folder = Path(shutil.copytree(made / "diff", tmp_path / "diff"))
        weights = load_file(folder / SHARDS[1])
        name = "lm_head.weight"
        if other == "missing":
            del weights[name]
        else:
            values = weights[name]
            weights[name] = values.to(torch.int64) if other == "dtype" else values.reshape(4, 6)
        save_file(weights, folder / SHARDS[1], {"format": "pt"})
        damage = found(folder, base=made / "base", finetuned=made / "finetuned")
        assert "another header" in damage[SHARDS[1], ""]

    def test_patterns_of_a_manifest_are_not_run(self, made, tmp_path):
        """Anyone may have written it, with one that never ends."""
        folder = Path(shutil.copytree(made / "diff", tmp_path / "diff"))
        endless = "(" * 99 + ".*" + ")*" * 99 + "$never"
        reseal(folder, lambda manifest: manifest["command"].update(include=["(", endless]))
        report = verify(folder, base=made / "base", finetuned=made / "finetuned")
        assert report.restored.elements == 76

    def test_integers_where_a_difference_is_due(self, made, tmp_path):
        folder = Path(shutil.copytree(made / "diff", tmp_path / "diff"))
        weights = load_file(folder / SHARDS[1])
        weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int64)
        save_file(weights, folder / SHARDS[1], {"format": "pt"})
        shard = next(iter(tensor_names(folder / SHARDS[1]).values())).shard
        stated = {"size": shard.size, "header_xxh3": shard.header_hash}
        reseal(folder, lambda manifest: manifest["shards"].update({SHARDS[1]: stated}))
        with pytest.raises(ArtifactError, match=r"lm_head\.weight' is I64, expected a float dtype"):
            verify(folder, base=made / "base", finetuned=made / "finetuned")

    def test_what_only_base_has_and_was_allowed(self, made, tmp_path):
        base = tiny.save_model(
            tmp_path / "base", tiny.tensors("base") | {"more.weight": torch.ones(3)}
        )
        for number, option in enumerate(({"allow_missing": ["more"]}, {"exclude": ["more"]})):
            folder = tmp_path / str(number)
            extract_diff(made / "finetuned", base, folder, **option)
            report = verify(folder, base=base, finetuned=made / "finetuned")
            assert report.restored.elements == 76

    def test_another_base_of_the_same_shape(self, made):
        damage = found(made / "diff", base=made / "target", finetuned=made / "finetuned")
        assert len(damage) == 5
        assert all(problem.startswith("base has different values") for problem in damage.values())

    def test_another_finetuned_of_the_same_shape(self, made):
        damage = found(made / "diff", base=made / "base", finetuned=made / "target")
        assert len(damage) == 5
        assert all("elements of finetuned" in problem for problem in damage.values())

    def test_a_flipped_bit_in_the_diff_vector_is_told_apart(self, made, tmp_path):
        folder = Path(shutil.copytree(made / "diff", tmp_path / "diff"))
        name, spec = next(iter(tensor_names(folder / SHARDS[0]).items()))
        flip(folder / SHARDS[0], 8 * spec.start + 1)
        damage = found(folder, base=made / "base", finetuned=made / "finetuned")
        assert "its checksum differs" in damage.pop((SHARDS[0], name))
        assert not damage

    def test_models_of_other_shapes(self, made, tmp_path):
        name = "model.norm.weight"
        roles = {}
        for role in ("finetuned", "base"):
            weights = tiny.tensors(role) | {name: torch.ones(5).bfloat16()}
            roles[role] = tiny.save_model(tmp_path / role, weights)
        with pytest.raises(
            MatchError, match=r"are not the models of this diff vector: model\.norm"
        ):
            verify(made / "diff", **roles)
        with pytest.raises(MatchError, match=r"1 tensor does not fit: model\.norm\.weight"):
            verify(made / "diff", **{**roles, "base": made / "base"})

    def test_integers_that_are_others(self, tmp_path):
        finetuned, base = odd_roles(tmp_path)
        extract_diff(finetuned, base, tmp_path / "diff")
        families.edit_tensors(base, ids=torch.arange(1, 5))
        with pytest.raises(MatchError, match=r"model\.ids has different I64 values"):
            verify(tmp_path / "diff", finetuned=finetuned, base=base)

    def test_models_of_other_tensors(self, made, tmp_path):
        others = [
            tiny.save_model(tmp_path / role, tiny.tensors(role) | {"more.weight": torch.ones(3)})
            for role in ("finetuned", "base")
        ]
        with pytest.raises(
            MatchError, match=r"are not the models of this diff vector: more\.weight"
        ):
            verify(made / "diff", finetuned=others[0], base=others[1])


class TestCommand:
    def test_whole(self, made):
        done = tiny.run("verify", made / "diff")
        assert (done.status, done.err) == (0, "")
        assert done.out.startswith(f"{made / 'diff'} is as it was written: tensors 5, shards 2")
        assert tiny.run("verify", made / "graft", "-q") == tiny.Outcome(0, "", "")
        roles = ("--base", made / "base", "--finetuned", made / "finetuned", "--threads", "1")
        done = tiny.run("verify", made / "diff", *roles)
        assert "bit for bit, all 76 elements" in done.out

    def test_damaged(self, folder):
        flip(
            folder / "config.json" if (folder / "config.json").exists() else folder / "README.md", 9
        )
        (folder / "a\x1b[31mb").touch()
        done = tiny.run("verify", folder)
        assert done.status == 1
        assert len(done.out.splitlines()) == 2
        assert r"a\x1b[31mb: is not in the manifest" in done.out
        assert done.err.startswith(f"error: {folder}: 2 problems found, such as ")
        assert done.err.count("\n") == 1

    def test_json(self, made, folder):
        roles = ("--base", made / "base", "--finetuned", made / "finetuned")
        whole = json.loads(tiny.run("verify", made / "diff", "--json", *roles).out)
        assert whole["restored"] == {"elements": 76, "unpaired": 0, "inexact": {}}
        (folder / "more").touch()
        done = tiny.run("verify", folder, "--json")
        damage = json.loads(done.out)["error"]["damage"]
        assert damage == [{"file": "more", "tensor": "", "problem": "is not in the manifest"}]
        assert done.status == 1
