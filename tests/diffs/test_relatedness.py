"""A related model is distinguished from one of the same shapes, and a base from its successor."""

import json
import shutil

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from diffxfer import apply_diff, extract_diff, transfer
from diffxfer.checkpoints.files import OpenShard
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.diffs.relations.relatedness import refuse_unrelated, relate, warn_of_relations
from diffxfer.diffs.relations.sampling import Sample, read_elements
from diffxfer.errors import ArtifactError, MatchError, RelatednessError
from diffxfer.family import family_folder
from tests import families, oracle, tiny
from tests.families import llama, save_tensors

FAMILY = family_folder()
ROLES = [FAMILY / role for role in ("finetuned", "base", "target")]
SHARD = "model.safetensors"


def changed(tmp_path, source, change):
    """A model of the family with different values."""
    folder = tmp_path / "changed"
    shutil.copytree(source, folder)
    weights = {name: change(name, tensor) for name, tensor in load_file(folder / SHARD).items()}
    save_file(weights, folder / SHARD, {"format": "pt"})
    return folder


def state(path):
    """Update a file's entry in the manifest of a diff vector."""
    stated = {"size": path.stat().st_size, "xxh3": xxhash.xxh3_128_hexdigest(path.read_bytes())}
    manifest = path.with_name("diffxfer.json")
    tiny.edit_json(manifest, lambda document: document["files"].update({path.name: stated}))


def untrained(name, tensor):
    """Values of the same size as a model's that was trained apart; norms stay near 1."""
    if tensor.dim() < 2:
        return tensor
    generator = torch.Generator().manual_seed(len(name))
    return (torch.randn(tensor.shape, generator=generator) * tensor.float().std()).bfloat16()


@pytest.fixture(scope="module")
def diff(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family") / "diff"
    extract_diff(*ROLES[:2], folder)
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return changed(tmp_path_factory.mktemp("stranger"), FAMILY / "base", untrained)


def figures(report):
    return {relation.roles: relation.cosine for relation in report.relations}


class TestRelated:
    def test_the_family(self, diff, tmp_path):
        whole = transfer(*ROLES, tmp_path / "graft")
        found = figures(whole)
        assert found.keys() == {("finetuned", "base"), ("base", "target")}
        assert 0.8 < found["finetuned", "base"] < 0.95
        assert 0.97 < found["base", "target"] < 1
        assert whole.warnings == ()
        applied = apply_diff(diff, ROLES[2], tmp_path / "applied")
        assert figures(applied) == {("base", "target"): found["base", "target"]}
        assert applied.warnings == ()
        extracted = extract_diff(*ROLES[:2], tmp_path / "diff")
        assert figures(extracted) == {("finetuned", "base"): found["finetuned", "base"]}

    def test_cosines_are_those_of_the_samples(self, diff, tmp_path):
        """The median over tensors, computed anew from the side file and the whole target."""
        (relation,) = apply_diff(diff, ROLES[2], tmp_path / "out", dry_run=True).relations
        samples = load_file(diff / "base_samples.safetensors")
        entries = json.loads((diff / "diffxfer.json").read_bytes())["tensors"]
        target = oracle.load(ROLES[2])
        done, cosines = 0, {}
        for name, entry in entries.items():
            part = slice(done, done := done + entry["samples"])
            if target[name].dim() > 1 and "layers" in name:
                theirs = target[name].double().reshape(-1)[samples["index"][part]]
                cosines[name] = torch.cosine_similarity(samples["value"][part], theirs, dim=0)
        assert relation.tensors == len(cosines) == 28
        assert relation.samples == 28 * 64
        middle = sorted(cosines.values())[13:15]
        assert relation.cosine == pytest.approx(float(sum(middle)) / 2, abs=1e-4)
        assert relation.layers.keys() == {f"model.layers.{i}" for i in range(4)}

    def test_too_few_samples_for_a_verdict(self, tmp_path):
        """Random models of 896 samples: nothing is claimed of them."""
        roles = [
            families.save_tensors(
                tmp_path / str(seed),
                {
                    f"model.layers.{i}.w.weight": torch.randn(
                        16, 16, generator=torch.Generator().manual_seed(100 * seed + i)
                    )
                    for i in range(14)
                },
            )
            for seed in range(3)
        ]
        assert transfer(*roles, tmp_path / "out").relations == ()

    def test_layers_that_are_switched_off_say_nothing(self, tmp_path):
        def off(name, tensor):
            return torch.zeros_like(tensor) if "layers.1." in name else tensor

        folder = changed(tmp_path, ROLES[2], off)
        found = {r.roles: r for r in transfer(*ROLES[:2], folder, tmp_path / "out").relations}
        assert found["base", "target"].tensors == 21
        assert "model.layers.1" not in found["base", "target"].layers

    def test_experts_of_every_layer_are_sampled_and_not_all(self, tmp_path):
        generator = torch.Generator().manual_seed(3)
        weights = {
            f"model.layers.{layer}.mlp.experts.{i}.up_proj.weight": torch.randn(
                4, 16, generator=generator
            ).bfloat16()
            for layer in range(3)
            for i in range(400)
        }
        roles = []
        for role in ("finetuned", "base"):
            near = {
                name: weight + torch.randn(weight.shape, generator=generator) / 9
                for name, weight in weights.items()
            }
            roles.append(save_tensors(tmp_path / role, near))
        (relation,) = extract_diff(*roles, tmp_path / "diff").relations
        assert relation.tensors == 512
        assert relation.samples == 512 * 16
        assert relation.layers.keys() == {f"model.layers.{layer}" for layer in range(3)}


class TestUnrelated:
    def test_base_at_extract(self, stranger, tmp_path):
        with pytest.raises(RelatednessError, match="finetuned and base are unrelated") as caught:
            extract_diff(ROLES[0], stranger, tmp_path / "diff")
        assert caught.value.roles == ("finetuned", "base")
        assert abs(caught.value.cosine) < 0.1
        assert caught.value.samples == 1792
        assert not list(tmp_path.iterdir())
        extract_diff(ROLES[0], stranger, tmp_path / "diff", allow_unrelated=True)

    @pytest.mark.parametrize("dry_run", [False, True])
    def test_target_at_apply(self, diff, stranger, tmp_path, dry_run):
        with pytest.raises(RelatednessError, match="base and target are unrelated") as caught:
            apply_diff(diff, stranger, tmp_path / "out", dry_run=dry_run)
        assert caught.value.roles == ("base", "target")
        assert not list(tmp_path.iterdir())
        report = apply_diff(diff, stranger, tmp_path / "out", allow_unrelated=True)
        assert abs(figures(report)["base", "target"]) < 0.1
        assert any("only distantly related" in warning for warning in report.warnings)

    @pytest.mark.parametrize(
        ("place", "roles"), [(1, "finetuned and base"), (2, "base and target")]
    )
    def test_either_at_transfer(self, stranger, tmp_path, place, roles):
        folders = [*ROLES]
        folders[place] = stranger
        with pytest.raises(RelatednessError, match=f"{roles} are unrelated"):
            transfer(*folders, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        transfer(*folders, tmp_path / "out", allow_unrelated=True)

    def test_alpha_0_grafts_nothing(self, stranger, tmp_path, diff):
        assert apply_diff(diff, stranger, tmp_path / "out", alpha=0).relations == ()

    def test_tensors_that_do_not_fit_come_first(self, stranger, tmp_path):
        folder = changed(tmp_path, stranger, lambda _, tensor: tensor[..., :-1].contiguous())
        with pytest.raises(MatchError, match="do not fit"):
            transfer(ROLES[0], ROLES[1], folder, tmp_path / "out")

    def test_the_command(self, stranger, tmp_path):
        argv = ["transfer", *map(str, ROLES[:2]), str(stranger), "-o", str(tmp_path / "out")]
        done = tiny.run(*argv, "--json")
        error = json.loads(done.out)["error"]
        assert (done.status, error["type"]) == (1, "RelatednessError")
        assert error["roles"] == ["base", "target"]
        assert abs(error["cosine"]) < 0.1
        assert "check that TARGET is a successor" in done.err
        assert "give --allow-unrelated to transfer" in done.err
        assert tiny.run(*argv, "--allow-unrelated").status == 0


class TestMistakes:
    @pytest.mark.parametrize(
        ("order", "says"),
        [
            (("finetuned", "target", "base"), "are base and target swapped?"),
            (("base", "finetuned", "target"), "are finetuned and base swapped"),
            (("base", "finetuned", "direct"), "are finetuned and base swapped"),
        ],
    )
    def test_folders_in_another_order(self, order, says, tmp_path):
        report = transfer(*(FAMILY / role for role in order), tmp_path / "out", dry_run=True)
        (warning,) = report.warnings
        assert says in warning

    @pytest.mark.parametrize("target", ["target", "direct"])
    def test_the_right_order_is_not_remarked_upon(self, target, tmp_path):
        report = transfer(*ROLES[:2], FAMILY / target, tmp_path / "out", dry_run=True)
        assert report.warnings == ()

    def test_a_graft_on_finetuned_itself(self, diff, tmp_path):
        (warning,) = apply_diff(diff, ROLES[0], tmp_path / "out").warnings
        assert "target is closer to finetuned than to base" in warning


def drawn(cosines, count=64):
    """Samples of base and target at these cosines, tensor by tensor."""
    samples = []
    for number, cosine in enumerate(cosines):
        base, target = np.zeros(count), np.zeros(count)
        base[0] = 1
        target[:2] = cosine, (1 - cosine**2) ** 0.5
        samples.append(Sample(f"model.layers.{number}.weight", {"base": base, "target": target}))
    return samples


class TestBounds:
    @pytest.mark.parametrize("cosine", [0.09, 0.0, -0.9])
    def test_below_a_tenth_is_refused(self, cosine):
        relation = relate(drawn([cosine] * 20), "base", "target")
        with pytest.raises(RelatednessError):
            refuse_unrelated([relation], "apply")

    @pytest.mark.parametrize(("cosine", "warns"), [(0.11, 1), (0.49, 1), (0.51, 0), (0.79, 0)])
    def test_below_a_half_is_remarked_upon(self, cosine, warns):
        samples = drawn([cosine] * 20)
        relation = relate(samples, "base", "target")
        refuse_unrelated([relation], "apply")
        assert len(warn_of_relations(samples, [relation])) == warns

    @pytest.mark.parametrize(("count", "enough"), [(999, False), (1000, True)])
    def test_a_thousand_samples_are_enough(self, count, enough):
        assert (relate(drawn([0.0], count), "base", "target") is not None) == enough

    @pytest.mark.parametrize(
        ("near", "far", "warns"), [(15, 0, 0), (16, 0, 1), (11, 5, 0), (12, 4, 1)]
    )
    def test_most_of_sixteen_tensors_are_enough(self, near, far, warns):
        samples = [
            Sample(str(n), {"finetuned": one, "base": other, "target": np.ones(4)})
            for n, (one, other) in enumerate(
                [(np.ones(4) * 1.1, np.ones(4) * 2)] * near
                + [(np.ones(4) * 2, np.ones(4) * 1.1)] * far
            )
        ]
        assert len(warn_of_relations(samples, [])) == warns

    @pytest.mark.parametrize("place", [0, 10, 19])
    def test_one_tensor_that_differs_is_enough(self, place):
        cosines = [1.0] * 20
        assert relate(drawn(cosines), "base", "target").equal
        cosines[place] = 0.9
        assert not relate(drawn(cosines), "base", "target").equal


class TestTheBaseItself:
    def test_apply_proves_it_by_checksums(self, diff, tmp_path):
        report = apply_diff(diff, ROLES[1], tmp_path / "out")
        assert report.warnings == ("this target is the base itself: alpha 1 gives finetuned back",)

    def test_apply_names_what_differs(self, diff, tmp_path):
        def norms(name, tensor):
            return tensor + 1 if name == "model.norm.weight" else tensor

        folder = changed(tmp_path, ROLES[1], norms)
        (warning,) = apply_diff(diff, folder, tmp_path / "out").warnings
        expected = "this target is the base itself except for one tensor: model.norm.weight"
        assert warning == expected

    def test_what_base_has_no_checksum_of(self, tmp_path):
        """A tensor without elements, and a head of its own where base's is tied."""
        roles = []
        for number, role in enumerate(("finetuned", "base")):
            generator = torch.Generator().manual_seed(number)
            weights = {
                f"model.layers.{i}.w.weight": torch.ones(16, 16)
                + torch.rand(16, 16, generator=generator)
                for i in range(16)
            }
            weights["model.embed_tokens.weight"] = torch.rand(8, 16, generator=generator)
            weights["model.empty.weight"] = torch.zeros(0, 16)
            config = {"tie_word_embeddings": True, "vocab_size": 8}
            roles.append(save_tensors(tmp_path / role, weights, config))
        extract_diff(*roles, tmp_path / "tied")
        says = "this target is the base itself"
        assert apply_diff(tmp_path / "tied", roles[1], tmp_path / "one").warnings == (
            f"{says}: alpha 1 gives finetuned back",
        )
        families.edit_tensors(roles[1], lm_head__weight=torch.rand(8, 16))
        tiny.edit_json(roles[1] / "config.json", lambda c: c.update(tie_word_embeddings=False))
        (warning, *_) = apply_diff(tmp_path / "tied", roles[1], tmp_path / "two").warnings
        assert warning == f"{says} except for one tensor: lm_head.weight"

    def test_transfer_says_what_it_saw(self, tmp_path):
        copy = shutil.copytree(ROLES[1], tmp_path / "copy")
        (warning,) = transfer(*ROLES[:2], copy, tmp_path / "out", dry_run=True).warnings
        assert warning.startswith("base and target are equal in all 1,792 sampled weights")


class TestShown:
    def test_in_the_summary_and_in_a_dry_run(self, tmp_path):
        argv = ["transfer", *map(str, ROLES), "-o", str(tmp_path / "out")]
        shown = tiny.run(*argv, "--dry-run").out
        done = tiny.run(*argv, summary=True).err
        for text in (shown, done):
            assert "base and target: cosine 0.99 (1,792 sampled weights)" in text

    def test_by_layer_in_json(self, diff, tmp_path):
        argv = ["apply", str(diff), str(ROLES[2]), "-o", str(tmp_path / "out"), "--json"]
        (relation,) = json.loads(tiny.run(*argv).out)["relations"]
        assert relation["roles"] == ["base", "target"]
        assert len(relation["layers"]) == 4
        assert all(0.97 < cosine < 1 for cosine in relation["layers"].values())


class TestSamples:
    @given(st.lists(st.integers(0, 63), min_size=1, unique=True).map(sorted), st.data())
    @settings(max_examples=30, deadline=None)
    def test_any_elements_of_any_dtype(self, tmp_path_factory, indices, data):
        dtype = data.draw(st.sampled_from(oracle.FLOATS))
        values = torch.randn(8, 8, generator=torch.Generator().manual_seed(7)).to(dtype)
        folder = save_tensors(tmp_path_factory.mktemp("model") / "m", {"a": values})
        spec = open_checkpoint(folder, "base").tensors["a"]
        (found,) = read_elements([(spec, torch.tensor(indices).numpy())])
        assert found.tolist() == values.double().reshape(-1)[indices].tolist()

    def test_one_small_read_a_tensor(self, tmp_path, monkeypatch):
        sizes = []
        read = OpenShard.read_into

        def counted(self, buffer, offset):
            sizes.append(len(buffer))
            read(self, buffer, offset)

        # A plan reads nothing but these: no head of the family may equal its embedding.
        monkeypatch.setattr(OpenShard, "read_into", counted)
        transfer(*ROLES, tmp_path / "out", dry_run=True)
        assert sizes.count(128) == 28 * 3

    def test_samples_that_are_damaged(self, diff, tmp_path):
        folder = shutil.copytree(diff, tmp_path / "diff")
        path = folder / "base_samples.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        with pytest.raises(ArtifactError, match=r"base_samples.*: is not the file that the manif"):
            apply_diff(folder, ROLES[2], tmp_path / "out")
        path.unlink()
        with pytest.raises(ArtifactError, match=r"base_samples.*: is missing"):
            apply_diff(folder, ROLES[2], tmp_path / "out")

    def test_samples_that_are_too_few(self, diff, tmp_path):
        folder = shutil.copytree(diff, tmp_path / "diff")
        path = folder / "base_samples.safetensors"
        save_file({"index": torch.arange(3), "value": torch.ones(3).double()}, path)
        state(path)
        with pytest.raises(ArtifactError, match="does not contain the samples that the manifest"):
            apply_diff(folder, ROLES[2], tmp_path / "out")

    def test_counts_that_are_none(self, diff, tmp_path):
        """Below zero and far above it: together they may be as many as there are."""
        folder = shutil.copytree(diff, tmp_path / "diff")

        def shift(manifest):
            one, two = list(manifest["tensors"].values())[:2]
            one["samples"] += 1 << 63
            two["samples"] -= 1 << 63

        tiny.edit_json(folder / "diffxfer.json", shift)
        with pytest.raises(ArtifactError, match=r"samples: Input should be greater"):
            apply_diff(folder, ROLES[2], tmp_path / "out")

    def test_indices_that_lead_elsewhere_are_not_followed(self, diff, tmp_path):
        folder = shutil.copytree(diff, tmp_path / "diff")
        path = folder / "base_samples.safetensors"
        samples = load_file(path)
        save_file({**samples, "index": samples["index"] + (1 << 40)}, path)
        with pytest.raises(ArtifactError, match="is not the file that the manifest names"):
            apply_diff(folder, ROLES[2], tmp_path / "out")
        state(path)
        assert apply_diff(folder, ROLES[2], tmp_path / "out").relations == ()


def test_a_base_of_other_tokens_is_still_the_base(tmp_path):
    """Rows of tokens take no part, so that another vocabulary hides no relation."""
    roles = [
        families.save_model(tmp_path / str(seed), llama(num_hidden_layers=3), seed)
        for seed in range(3)
    ]
    families.edit_tensors(roles[2], lm_head__weight=torch.randn(50, 16).bfloat16())
    report = transfer(*roles, tmp_path / "out")
    assert all(cosine > 0.8 for cosine in figures(report).values())
    assert len(report.relations) == 2
