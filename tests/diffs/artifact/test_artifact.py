"""The files that diffxfer writes: manifest, samples and card; they are enough to apply it."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.numpy import load_file

from diffxfer import apply_diff, extract_diff, transfer
from diffxfer.errors import ArtifactError
from tests import families, oracle
from tests.diffs.artifact.test_damage_at_apply import flip
from tests.families import fast_tokenizer, llama, save_model, save_tokenizer
from tests.oracle import Roles

ROLES = ("finetuned", "base", "target")
CONTROL = ("<|start|>", "<|eot|>")
TEMPLATE = "{% for m in messages %}<|start|>{{ m.content }}<|eot|>{% endfor %}"


def read_manifest(folder):
    return json.loads((folder / "diffxfer.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A family in bfloat16 whose finetuned model is cut into shards and added a token."""
    folder = tmp_path_factory.mktemp("llamas")
    config = llama(vocab_size=40)
    for seed, role in enumerate(ROLES):
        size = "3KB" if role == "finetuned" else "1GB"
        save_model(folder / role, config, seed, max_shard_size=size)
        added = (*CONTROL, "<|call|>") if role == "finetuned" else CONTROL
        save_tokenizer(folder / role, fast_tokenizer(added), template=TEMPLATE)
    return [folder / role for role in ROLES]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Tensors of more than a block, of one element, of none, and of rows that moved."""
    folder = tmp_path_factory.mktemp("odd")
    words = [f"w{i}" for i in range(30)]
    for seed, role in enumerate(ROLES[:2]):
        generator = torch.Generator().manual_seed(seed)

        def values(*shape, dtype=torch.float16, generator=generator):
            return torch.randn(shape, generator=generator).to(dtype)

        tensors = {
            "model.embed_tokens.weight": values(36 - 2 * seed, 5, dtype=torch.bfloat16),
            "model.big": values(300, 1000),
            "model.one": values(),
            "model.none": values(3, 0),
            "model.wide": values(4, 4, dtype=torch.float32),
            "model.tiny": values(50, dtype=torch.float64) * 1e-9,
            "model.steps": torch.arange(4),
        }
        families.save_tensors(folder / role, tensors, {"vocab_size": 36 - 2 * seed})
        table = words if role == "base" else [words[0], *reversed(words[1:])]
        save_tokenizer(folder / role, fast_tokenizer(CONTROL, table))
    return [folder / role for role in ROLES[:2]]


def extract_all(folders, out, roles, dtype, **options):
    """A diff vector, and what the oracle makes of the same."""
    report = extract_diff(*folders, out, diff_dtype=dtype, **options)
    stored = None if dtype == "source" else getattr(torch, dtype)
    expected = oracle.extract(*map(oracle.load, folders), stored, roles)
    return report, expected


DTYPES = ("source", "float32", "float64", "bfloat16")


class TestDiffVector:
    @pytest.fixture(params=DTYPES)
    def dtype(self, request):
        return request.param

    @pytest.fixture(params=["llamas", "odd"])
    def case(self, request):
        folders = request.getfixturevalue(request.param)[:2]
        mode = "ids" if request.param == "llamas" else "tokens"
        return folders, Roles(*map(oracle.tokens_of, folders), base_mode=mode)

    def test_manifest_says_what_the_oracle_says(self, case, tmp_path, dtype):
        folders, roles = case
        report, expected = extract_all(folders, tmp_path / "diff", roles, dtype)
        diff = oracle.load(tmp_path / "diff")
        oracle.assert_same(diff, {name: stored.values for name, stored in expected.items()})
        entries = read_manifest(tmp_path / "diff")["tensors"]
        assert entries.keys() == expected.keys()
        base = oracle.load(folders[1])
        for name, stored in expected.items():
            entry = entries[name]
            assert entry["checksum"] == oracle.checksum(diff[name])
            assert entry["delta_norm"] == pytest.approx(stored.delta_norm, rel=1e-8, abs=0)
            assert entry["base_norm"] == pytest.approx(stored.base_norm, rel=1e-8, abs=0)
            assert entry["inexact"] == stored.inexact, name
            assert entry["unchanged"] == stored.unchanged, name
            if base[name].numel():
                assert entry["base_checksum"] == oracle.checksum(base[name])
        inexact = {name: stored.inexact for name, stored in expected.items() if stored.inexact}
        assert report.inexact == inexact
        if dtype == "float64":
            assert inexact.keys() <= {"model.tiny"}, "only what is float64 itself is rounded"

    def test_samples_are_bases(self, case, tmp_path):
        folders, roles = case
        _, expected = extract_all(folders, tmp_path / "diff", roles, "source")
        samples = load_file(tmp_path / "diff" / "base_samples.safetensors")
        assert (samples["index"].dtype, samples["value"].dtype) == (np.int64, np.float64)
        entries = read_manifest(tmp_path / "diff")["tensors"]
        done = 0
        for name, entry in entries.items():
            part = slice(done, done := done + entry["samples"])
            indices, values = samples["index"][part], samples["value"][part]
            flat = expected[name].base.reshape(-1)
            assert list(indices) == sorted(set(indices.tolist()))
            assert np.array_equal(values, flat[indices])
            enough = min(flat.size, 64) // 2
            assert len(indices) >= enough
        assert done == len(samples["index"])

    def test_finetuned_comes_back_from_base(self, llamas, tmp_path):
        """base + Δ is finetuned, every bit, where Δ is in float64."""
        config = llamas[1] / "config.json"
        extract_diff(*llamas[:2], tmp_path / "diff", diff_dtype="float64")
        apply_diff(tmp_path / "diff", llamas[1], tmp_path / "back")
        back, ours = oracle.load(tmp_path / "back"), oracle.load(llamas[0])
        assert json.loads(config.read_text())["vocab_size"] == 40
        for name, tensor in ours.items():
            rows = 33 if tensor.shape[0] == 40 else len(tensor)
            assert oracle.same(back[name][:rows], tensor[:rows])

    def test_sources_options_and_companions(self, llamas, tmp_path):
        report = extract_diff(*llamas[:2], tmp_path / "diff", exclude=["norm"], vocab="ids")
        manifest = read_manifest(tmp_path / "diff")
        assert (manifest["diffxfer_format"], manifest["kind"]) == (1, "diff")
        assert manifest["command"] == {
            "verb": "extract",
            "diff_dtype": "source",
            "include": [],
            "exclude": ["norm"],
            "allow_missing": [],
            "vocab": "ids",
            "max_shard_size": "finetuned",
            "allow_nonfinite": "false",
        }
        assert {role: source["name"] for role, source in manifest["sources"].items()} == {
            "finetuned": "finetuned",
            "base": "base",
        }
        assert manifest["tied"] == {"finetuned": "own", "base": "own"}
        assert manifest["tokens"]["added"] == {"32": "<|call|>"}
        left_out = sorted(name for name in oracle.load(llamas[0]) if "norm" in name)
        assert manifest["left_out"] == left_out
        assert report.tensors["left out"] == len(left_out)
        ours = {path.name for path in llamas[0].glob("*") if "safetensors" not in path.name}
        assert {path.name for path in (tmp_path / "diff" / "companions").iterdir()} == ours

    def test_integers_are_named(self, odd, tmp_path):
        extract_diff(*odd, tmp_path / "diff")
        assert read_manifest(tmp_path / "diff")["kept"] == ["model.steps"]

    def test_is_enough_by_itself(self, llamas, tmp_path):
        for name in ROLES[:2]:
            shutil.copytree(llamas[ROLES.index(name)], tmp_path / name)
        extract_diff(
            tmp_path / "finetuned", tmp_path / "base", tmp_path / "diff", diff_dtype="float64"
        )
        transfer(tmp_path / "finetuned", tmp_path / "base", llamas[2], tmp_path / "graft")
        shutil.rmtree(tmp_path / "finetuned")
        shutil.rmtree(tmp_path / "base")
        (tmp_path / "diff").rename(tmp_path / "elsewhere")
        apply_diff(tmp_path / "elsewhere", llamas[2], tmp_path / "applied")
        applied, graft = (families.contents(tmp_path / name) for name in ("applied", "graft"))
        differing = {name for name in graft if applied.get(name) != graft[name]}
        assert differing == {"README.md", "diffxfer.json"}
        assert applied.keys() == graft.keys()


def make_all(llamas, out, **how):
    """Each verb's folder."""
    extract_diff(*llamas[:2], out / "diff", diff_dtype="float32", **how)
    apply_diff(out / "diff", llamas[2], out / "applied", alpha=0.5, **how)
    transfer(*llamas, out / "graft", alpha_for={"mlp": 2}, exclude=["norm"], **how)
    return [out / name for name in ("diff", "applied", "graft")]


class TestEveryFolder:
    @pytest.fixture(scope="class", params=[0, 1, 2], ids=["diff", "applied", "graft"])
    @classmethod
    def written(cls, request, llamas, tmp_path_factory):
        return make_all(llamas, tmp_path_factory.mktemp("written"))[request.param]

    def test_manifest_names_every_file_and_tensor(self, written):
        manifest = read_manifest(written)
        files = families.contents(written)
        files.pop("diffxfer.json")
        shards = {name for name in files if name in manifest["shards"]}
        assert files.keys() - shards == manifest["files"].keys()
        for name, entry in manifest["files"].items():
            digest = xxhash.xxh3_128_hexdigest(files[name])
            assert entry == {"size": len(files[name]), "xxh3": digest}
        for name, entry in manifest["shards"].items():
            length = int.from_bytes(files[name][:8], "little")
            digest = xxhash.xxh3_128_hexdigest(files[name][8 : 8 + length])
            assert entry == {"size": len(files[name]), "header_xxh3": digest}
        tensors = oracle.load(written)
        checksums = {name: entry["checksum"] for name, entry in manifest["tensors"].items()}
        assert checksums == {name: oracle.checksum(tensor) for name, tensor in tensors.items()}

    def test_no_local_path_and_no_clock_time(self, written):
        home = Path.home()
        paths = [str(written.parent.parent), str(Path.cwd()), *([str(home)] if home.name else [])]
        clock = re.compile(rb"\d\d:\d\d:\d\d|20\d\d-\d\d-\d\d")
        for name, data in families.contents(written).items():
            assert not any(path.encode() in data for path in paths), name
            if not name.endswith(".safetensors"):
                assert not clock.search(data), name
                assert b"/tmp" not in data, name

    def test_card(self, written):
        card = (written / "README.md").read_text("utf-8")
        assert card.startswith("---\nlibrary_name: ")
        assert f"\n# {written.name}\n" in card
        assert "base_model" not in card
        if written.name == "graft":
            assert "| alpha\\_for | mlp=2.0 |" in card or "| alpha_for | mlp=2.0 |" in card


def test_same_command_same_bytes(llamas, tmp_path):
    for name, threads in (("one", 1), ("again", 1), ("three", 3)):
        make_all(llamas, tmp_path / name, threads=threads)
    first = families.contents(tmp_path / "one")
    assert len(first) > 20
    assert families.contents(tmp_path / "again") == first
    assert families.contents(tmp_path / "three") == first


def test_inputs_are_left_as_they_are(llamas, tmp_path):
    before = families.fingerprints(*llamas)
    diff = make_all(llamas, tmp_path)[0]
    kept = families.fingerprints(diff)
    apply_diff(diff, llamas[2], tmp_path / "another")
    assert families.fingerprints(*llamas) == before
    assert families.fingerprints(diff) == kept


def test_integer_alphas_are_floats_in_the_manifest(llamas, tmp_path):
    transfer(*llamas, tmp_path / "a" / "graft", alpha=1, alpha_for={"mlp": 0})
    transfer(*llamas, tmp_path / "b" / "graft", alpha=1.0, alpha_for={"mlp": 0.0})
    assert families.contents(tmp_path / "a") == families.contents(tmp_path / "b")


class TestRefusals:
    @pytest.fixture
    def diff(self, llamas, tmp_path):
        extract_diff(*llamas[:2], tmp_path / "diff")
        return tmp_path / "diff"

    def edit(self, diff, **changes):
        path = diff / "diffxfer.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))

    def test_model_where_a_diff_vector_is_due(self, llamas, tmp_path):
        with pytest.raises(ArtifactError, match="is a model, expected a diff vector"):
            apply_diff(llamas[0], llamas[2], tmp_path / "out")

    def test_graft_where_a_diff_vector_is_due(self, llamas, tmp_path):
        transfer(*llamas, tmp_path / "graft")
        with pytest.raises(ArtifactError, match="is a graft, expected a diff vector"):
            apply_diff(tmp_path / "graft", llamas[2], tmp_path / "out")

    def test_diff_vector_where_a_model_is_due(self, diff, llamas, tmp_path):
        with pytest.raises(ArtifactError, match="expected the base model"):
            transfer(llamas[0], diff, llamas[2], tmp_path / "out")
        with pytest.raises(ArtifactError, match="expected the target model"):
            apply_diff(diff, diff, tmp_path / "out")

    def test_graft_as_a_target_and_as_finetuned(self, llamas, tmp_path):
        """A chain of rounds: a graft is a model like any other."""
        transfer(*llamas, tmp_path / "graft")
        graft = tmp_path / "graft"
        transfer(graft, llamas[1], llamas[2], tmp_path / "next")
        assert read_manifest(tmp_path / "next")["sources"]["finetuned"]["name"] == "graft"

    def test_newer_format(self, diff, llamas, tmp_path):
        self.edit(diff, diffxfer_format=3)
        with pytest.raises(
            ArtifactError, match="has format 3, but this diffxfer reads only up to 2"
        ):
            apply_diff(diff, llamas[2], tmp_path / "out")

    def test_missing_shard(self, diff, llamas, tmp_path):
        index = json.loads((diff / "model.safetensors.index.json").read_text())
        shards = sorted(set(index["weight_map"].values()))
        index["weight_map"] = {n: s for n, s in index["weight_map"].items() if s != shards[-1]}
        (diff / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ArtifactError, match="is damaged: its shards do not have"):
            apply_diff(diff, llamas[2], tmp_path / "out")

    def test_shard_of_another_diff_vector(self, diff, llamas, tmp_path):
        extract_diff(*llamas[:2], tmp_path / "other", diff_dtype="float32")
        for shard in diff.glob("model-*.safetensors"):
            shutil.copy(tmp_path / "other" / shard.name, shard)
        with pytest.raises(ArtifactError, match="is not the shard that the manifest names"):
            apply_diff(diff, llamas[2], tmp_path / "out")

    def test_another_tokenizer(self, diff, llamas, tmp_path):
        save_tokenizer(diff / "companions", fast_tokenizer(("<|other|>",)))
        with pytest.raises(ArtifactError, match="is not the file that the manifest names"):
            apply_diff(diff, llamas[2], tmp_path / "out")


def test_norms_are_of_the_difference_before_rounding(tmp_path):
    """1 − 2⁻¹² is rounded to 1 in the file, not in its norm."""
    tensors = [torch.full((16,), value, dtype=torch.float32) for value in (1.0, 2.0**-12)]
    folders = [
        families.save_tensors(tmp_path / role, {"x": tensor})
        for role, tensor in zip(ROLES, tensors, strict=False)
    ]
    extract_diff(*folders, tmp_path / "diff", diff_dtype="bfloat16")
    entry = read_manifest(tmp_path / "diff")["tensors"]["x"]
    assert torch.equal(oracle.load(tmp_path / "diff")["x"], torch.ones(16, dtype=torch.bfloat16))
    assert math.isclose(entry["delta_norm"], 4 * (1 - 2.0**-12), rel_tol=1e-8)
    assert entry["inexact"] == 16


def test_rows_that_come_in_several_runs_are_checked_too(llamas, tmp_path):
    """Finetuned added a token, so the rows of the embedding are not read in order."""
    extract_diff(*llamas[:2], tmp_path / "diff")
    apply_diff(tmp_path / "diff", llamas[2], tmp_path / "sound")
    name = "model.embed_tokens.weight"
    index = json.loads((tmp_path / "diff/model.safetensors.index.json").read_text())
    flip(tmp_path / "diff" / index["weight_map"][name], name)
    with pytest.raises(ArtifactError, match=f"{name} is damaged"):
        apply_diff(tmp_path / "diff", llamas[2], tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
