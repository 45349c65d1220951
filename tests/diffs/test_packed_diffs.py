"""`extract --pack`: exact, small, and read by every command as a plain diff vector is."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffxfer import (
    apply_diff,
    compare_checkpoints,
    extract_diff,
    inspect_checkpoint,
    transfer,
    verify,
)
from diffxfer import family as shipped
from diffxfer.checkpoints import output_place
from diffxfer.errors import (
    ArtifactError,
    CheckpointError,
    DamageError,
    DiskSpaceError,
    OptionError,
)
from diffxfer.streaming.plan import BLOCK_ELEMENTS
from tests import tiny
from tests.families import WORDS, fast_tokenizer, llama, save_model, save_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

FAMILY = Path(shipped.__file__).parent
PAYLOADS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_SEEDED = torch.Generator().manual_seed(20)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def exceptions(folder: Path) -> dict[str, int]:
    entries = json.loads((folder / "diffxfer.json").read_text())["tensors"]
    return {name: entry.get("exceptions") or 0 for name, entry in entries.items()}


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def assert_same(left: Path, right: Path) -> None:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(bits(tensor), bits(theirs[name])), name


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=_SEEDED) * scale


@cache
def odd_pair() -> dict[str, tuple[Tensor, Tensor]]:
    """Finetuned's and base's tensors of every odd kind."""
    base = drawn(40, 30, scale=0.02)
    moved = base + drawn(40, 30, scale=1e-3)
    tiny_ones = torch.tensor([1e-40, -1e-40, 1e-45, 0.0, 3e-39])
    far = torch.tensor([1.0, 1e-9, -3e38, 2.0**40, 0.5])
    return {
        "bfloat16": (moved.bfloat16(), base.bfloat16()),
        "float16": (moved.half(), base.half()),
        "float32": (moved, base),
        "float64": (moved.double(), base.double()),
        "mixed": (moved.half(), base.bfloat16()),
        "wider": (moved, base.bfloat16()),
        "subnormal": (tiny_ones, tiny_ones.flip(0)),
        "subnormal16": (tiny_ones.bfloat16(), tiny_ones.flip(0).bfloat16()),
        "far": (torch.tensor([1e-3, 1.0, 3e38, 1.0, 0.0]).bfloat16(), far.bfloat16()),
        "scalar": (torch.tensor(1.5).bfloat16(), torch.tensor(0.25).bfloat16()),
        "empty": (torch.zeros(0, 4).bfloat16(), torch.zeros(0, 4).bfloat16()),
        "equal": (base.bfloat16(), base.bfloat16()),
        "blocks": (
            drawn(BLOCK_ELEMENTS + 300).bfloat16(),
            drawn(BLOCK_ELEMENTS + 300).bfloat16(),
        ),
    }


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    for place, role in enumerate(("finetuned", "base")):
        found = {f"model.{name}.weight": pair[place].clone() for name, pair in odd_pair().items()}
        tiny.save_model(root / role, found, sharded=True)
    extract_diff(root / "finetuned", root / "base", root / "packed", pack=True)
    return root


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    extract_diff(FAMILY / "finetuned", FAMILY / "base", root / "packed", pack=True)
    return root


def test_the_shipped_family_comes_back_bit_for_bit(family: Path, tmp_path: Path) -> None:
    apply_diff(family / "packed", FAMILY / "base", tmp_path / "back")
    assert_same(tmp_path / "back", FAMILY / "finetuned")
    size = (family / "packed" / "model.safetensors").stat().st_size
    assert size < 0.8 * (FAMILY / "finetuned" / "model.safetensors").stat().st_size
    for name in ("tokenizer.json", "generation_config.json"):
        there = tmp_path / "back" / name
        assert json.loads(there.read_text()) == json.loads(
            (FAMILY / "finetuned" / name).read_text()
        )


def test_a_graft_is_that_of_transfer(family: Path, tmp_path: Path) -> None:
    roles = FAMILY / "finetuned", FAMILY / "base", FAMILY / "target"
    transfer(*roles, tmp_path / "direct", alpha=0.7)
    apply_diff(family / "packed", FAMILY / "target", tmp_path / "applied", alpha=0.7, threads=2)
    assert_same(tmp_path / "applied", tmp_path / "direct")


def test_every_odd_kind_comes_back_bit_for_bit(odd: Path, tmp_path: Path) -> None:
    apply_diff(odd / "packed", odd / "base", tmp_path / "back")
    back, finetuned = weights(tmp_path / "back"), weights(odd / "finetuned")
    for name, tensor in back.items():
        if tensor.dtype == finetuned[name].dtype:  # a graft has the target's dtypes
            assert torch.equal(bits(tensor), bits(finetuned[name])), name
    found = verify(odd / "packed", base=odd / "base", finetuned=odd / "finetuned")
    assert found.restored is not None
    assert found.restored.inexact == {}


def test_it_is_stored_in_the_narrowest_exact_dtype(odd: Path) -> None:
    manifest = json.loads((odd / "packed" / "diffxfer.json").read_text())
    dtypes = {name.split(".")[1]: each["dtype"] for name, each in manifest["tensors"].items()}
    for name, (finetuned, base) in odd_pair().items():
        exact = finetuned.double() - base.double()
        fitting = [
            dtype
            for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.half), ("F32", torch.float))
            if torch.equal(exact.to(kind).double(), exact)
        ] or ["F64"]
        narrow = {"BF16", "F16"}
        if narrow & {*fitting}:
            assert dtypes[name] in narrow & {*fitting}, name
        else:
            assert dtypes[name] == fitting[0], name
    assert {"F32", "F64"} <= {*dtypes.values()}


def test_threads_and_levels(odd: Path, tmp_path: Path) -> None:
    """The number of threads does not change a byte; the level changes only how Δ is compressed."""
    for threads in (1, 3):
        out = tmp_path / str(threads)
        extract_diff(odd / "finetuned", odd / "base", out, pack=True, threads=threads)
        for path in sorted((odd / "packed").glob("*.safetensors")):
            assert (out / path.name).read_bytes() == path.read_bytes()
    extract_diff(odd / "finetuned", odd / "base", tmp_path / "l9", pack=True, pack_level=9)
    assert compare_checkpoints(odd / "packed", tmp_path / "l9").norms.delta == 0


NAN = float("nan")
ODD_VALUES = {
    # finetuned and base, of which base + (finetuned − base) is not finetuned in each element
    "minus zeros": ([-0.0, -0.0, -0.0], [-0.0, 0.0, 1.0]),
    "far apart": ([1.0, 2.0, -3.0], [2.0**100, -(2.0**90), 2.0**70]),
    "infinity": ([1.0, float("inf"), NAN], [float("inf"), float("inf"), 1.0]),
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    # No two float16 are far apart.
    [each for each in product(ODD_VALUES, PAYLOADS) if each != ("far apart", torch.float16)],
)
def test_what_no_difference_gives_back(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """It is stored as it is: in some elements of a tensor, in all of them, and in many blocks."""
    for place, role in enumerate(("finetuned", "base")):
        values = torch.tensor(ODD_VALUES[kind][place], dtype=dtype)
        one = torch.ones(300_000, dtype=dtype)
        sparse = torch.cat([one, values, one])
        if role == "finetuned" and kind == "infinity":
            bits(values).view(PAYLOADS[dtype])[-1] += 3  # another NaN
        many = values.repeat(100_000)
        tiny.save_model(tmp_path / role, {"few": values, "sparse": sparse, "many": many})
    pair = tmp_path / "finetuned", tmp_path / "base"
    report = extract_diff(*pair, tmp_path / "packed", pack=True, allow_nonfinite=True)
    assert report.inexact == {}
    assert (
        exceptions(tmp_path / "packed")["many"] == 100_000 * exceptions(tmp_path / "packed")["few"]
    )
    apply_diff(tmp_path / "packed", pair[1], tmp_path / "back", allow_nonfinite=True)
    assert_same(tmp_path / "back", pair[0])
    found = verify(tmp_path / "packed", base=pair[1], finetuned=pair[0])
    assert found.restored is not None
    assert found.restored.inexact == {}


def test_verify_counts_exceptions_that_are_not_finetuned(tmp_path: Path) -> None:
    for role, values in (("finetuned", [-0.0, 1.0]), ("base", [-0.0, 0.5]), ("other", [0.0, 1.0])):
        tiny.save_model(tmp_path / role, {"w": torch.tensor(values).bfloat16()})
    extract_diff(tmp_path / "finetuned", tmp_path / "base", tmp_path / "packed", pack=True)
    with pytest.raises(DamageError) as caught:
        verify(tmp_path / "packed", base=tmp_path / "base", finetuned=tmp_path / "other")
    assert "does not give back 1 elements" in caught.value.damage[0].problem


def test_what_it_says(odd: Path, family: Path) -> None:
    found = inspect_checkpoint(family / "packed")
    assert found.encodings == ("packed",)
    assert found.parameters == sum(each.numel() for each in weights(FAMILY / "base").values())
    assert found.inexact == 0
    manifest = json.loads((odd / "packed" / "diffxfer.json").read_text())
    assert (manifest["diffxfer_format"], manifest["packing"], manifest["dtype"]) == (2, 1, "exact")


def test_what_it_says_of_an_adapter(tmp_path: Path) -> None:
    """Its difference is a product of factors: exact in float64 alone, and packed it is larger."""
    pair = FAMILY / "adapter", FAMILY / "base"
    plain = extract_diff(*pair, tmp_path / "plain")
    packed = extract_diff(*pair, tmp_path / "packed", pack=True)
    rounded = extract_diff(*pair, tmp_path / "rounded", pack="int8")
    assert plain.packed_estimate is None
    assert packed.bytes_to_write > plain.bytes_to_write > rounded.bytes_to_write
    said = [" ".join(report.notes) for report in (plain, packed, rounded)]
    assert ["exact only in float64" in notes for notes in said] == [False, True, False]
    apply_diff(tmp_path / "packed", pair[1], tmp_path / "back")
    transfer(*pair, pair[1], tmp_path / "merged")
    assert_same(tmp_path / "back", tmp_path / "merged")


def test_the_ten_lines_of_the_card(odd: Path, family: Path) -> None:
    """They give every value, without diffxfer, that the roles' difference in float64 has."""
    for folder, roles in ((odd / "packed", odd), (family / "packed", FAMILY)):
        card = (folder / "README.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(code.splitlines()) == 10
        known: dict[str, Any] = {}
        exec(code, known)
        entries = json.loads((folder / "diffxfer.json").read_text())["tensors"]
        finetuned, base = weights(roles / "finetuned"), weights(roles / "base")
        for name, raw in weights(folder).items():
            out = np.zeros(entries[name]["shape"])
            known["unpack"](raw.numpy(), out)
            expected = finetuned[name].double() - base[name].double()
            assert out.tobytes() == expected.numpy().tobytes(), name


def test_added_and_dropped_tokens(tmp_path: Path) -> None:
    """A row that finetuned added comes whole; rows that it dropped have no difference."""
    specials = {"base": ("<s>", "<gone>"), "finetuned": ("<s>", "<new>", "<newer>")}
    for seed, (role, names) in enumerate(specials.items()):
        size = len(WORDS) + len(names)
        folder = save_model(tmp_path / role, llama(vocab_size=size), seed)
        save_tokenizer(folder, fast_tokenizer(names), bos_token="<s>")
    pair = tmp_path / "finetuned", tmp_path / "base"
    extract_diff(*pair, tmp_path / "plain", diff_dtype="float64", vocab="tokens")
    extract_diff(*pair, tmp_path / "packed", pack=True, vocab="tokens")
    for name in ("plain", "packed"):
        apply_diff(tmp_path / name, pair[1], tmp_path / f"{name}-back", vocab="tokens")
    assert_same(tmp_path / "packed-back", tmp_path / "plain-back")
    found = verify(tmp_path / "packed", base=pair[1], finetuned=pair[0])
    assert found.restored is not None
    assert found.restored.inexact == {}


def test_a_head_that_finetuned_added_is_stored_as_it_is(tmp_path: Path) -> None:
    base = {"model.layers.0.up_proj.weight": drawn(8, 8).bfloat16()}
    head = {"score.weight": drawn(3, 8).bfloat16()}
    moved = {name: (tensor.float() + drawn(8, 8)).bfloat16() for name, tensor in base.items()}
    pair = tiny.save_model(tmp_path / "ft", moved | head), tiny.save_model(tmp_path / "b", base)
    options: dict[str, Any] = {"added": "bring", "allow_unrelated": True}
    extract_diff(*pair, tmp_path / "packed", pack=True, **options)
    assert torch.equal(weights(tmp_path / "packed")["score.weight"], head["score.weight"])
    apply_diff(tmp_path / "packed", pair[1], tmp_path / "back", **options)
    assert_same(tmp_path / "back", pair[0])
    assert verify(tmp_path / "packed").tensors == 2


def test_damage_is_found(odd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(odd / "packed", folder)
    path = next(
        p for p in folder.glob("model*.safetensors") if "model.blocks.weight" in load_file(p)
    )
    with safe_open(path, "np") as file:
        raw = file.get_tensor("model.blocks.weight").tobytes()
    data = bytearray(path.read_bytes())
    at = data.index(raw) + len(raw) // 2
    data[at] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(DamageError) as caught:
        verify(folder)
    assert [(each.tensor, each.file) for each in caught.value.damage] == [
        ("model.blocks.weight", path.name)
    ]
    with pytest.raises(DamageError):
        verify(folder, base=odd / "base", finetuned=odd / "finetuned")
    with pytest.raises((ArtifactError, CheckpointError), match=r"model\.blocks\.weight"):
        apply_diff(folder, odd / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"pack_level": 3}, "does nothing without --pack"),
        ({"pack": True, "pack_level": 20}, "20 is no level of compression"),
        ({"pack": True, "diff_dtype": "float32"}, "stores every difference exactly"),
        ({"pack": True, "as_": "lora"}, "cannot be used with --as lora"),
    ],
)
def test_options(odd: Path, tmp_path: Path, options: dict[str, object], problem: str) -> None:
    with pytest.raises(OptionError, match=re.escape(problem)):
        extract_diff(odd / "finetuned", odd / "base", tmp_path / "out", **options)  # type: ignore[arg-type]


def test_a_dry_run_estimates_the_size(family: Path, tmp_path: Path) -> None:
    """At most so much: a little more than the packed file, and less than the plain one."""
    pair = FAMILY / "finetuned", FAMILY / "base"
    found = extract_diff(*pair, tmp_path / "out", pack=True, dry_run=True)
    assert not found.written
    assert [*tmp_path.iterdir()] == []
    size = (family / "packed" / "model.safetensors").stat().st_size
    assert found.unpacked_bytes is not None
    assert size <= found.bytes_to_write * 1.01 < 1.2 * size < found.unpacked_bytes
    plain = extract_diff(*pair, tmp_path / "plain")
    assert plain.packed_estimate == found.packed_estimate == found.bytes_to_write


def test_the_estimate_of_a_few_blocks(tmp_path: Path) -> None:
    """It is the size: all of them are packed, with what no difference gives back."""
    for role in ("finetuned", "base"):
        zeros = torch.zeros(3, 40) if role == "base" else torch.full((3, 40), -0.0)
        tiny.save_model(tmp_path / role, {"a": drawn(50, 60), "zeros": zeros})
    pair = tmp_path / "finetuned", tmp_path / "base"
    options: dict[str, Any] = {"pack": True, "allow_unrelated": True}
    estimate = extract_diff(*pair, tmp_path / "out", dry_run=True, **options).bytes_to_write
    size = extract_diff(*pair, tmp_path / "out", **options).bytes_to_write
    assert exceptions(tmp_path / "out")["zeros"] == 120
    assert 0 <= estimate - size < 32  # the header names another dtype


def test_many_small_tensors_are_not_said_to_be_smaller(tmp_path: Path) -> None:
    """Most of their bytes are headers."""
    for role, scale in (("base", 1.0), ("finetuned", 1.1)):
        drawn_once = torch.randn(400, 40, generator=torch.Generator().manual_seed(1)) * scale
        tiny.save_model(
            tmp_path / role, {f"w{i}": row.bfloat16() for i, row in enumerate(drawn_once)}
        )
    pair = tmp_path / "finetuned", tmp_path / "base"
    plain = extract_diff(*pair, tmp_path / "plain")
    made = extract_diff(*pair, tmp_path / "packed", pack=True)
    assert plain.packed_estimate is not None
    assert plain.packed_estimate >= made.bytes_to_write > plain.bytes_to_write


def test_the_estimate_of_a_large_tensor(tmp_path: Path) -> None:
    """Only some of its blocks are packed; one of them has values that need float64."""
    torch.manual_seed(3)
    base = (torch.randn(20 * BLOCK_ELEMENTS) * 0.02).bfloat16()
    moved = (base.float() + torch.randn(len(base)) * 1e-3).bfloat16()
    base[7], moved[7] = 1.0, 1e-9
    tiny.save_model(tmp_path / "finetuned", {"w": moved.reshape(20, -1)})
    tiny.save_model(tmp_path / "base", {"w": base.reshape(20, -1)})
    pair = tmp_path / "finetuned", tmp_path / "base"
    estimate = extract_diff(*pair, tmp_path / "out", pack=True, dry_run=True).bytes_to_write
    made = extract_diff(*pair, tmp_path / "out", pack=True).bytes_to_write
    assert made < estimate < 1.3 * made


def test_a_gpu_is_refused(odd: Path, tmp_path: Path) -> None:
    """Only the CPU packs; `auto` chooses it, and says why."""
    pair = odd / "finetuned", odd / "base"
    with pytest.raises(OptionError, match="cuda:0 cannot be used with --pack") as caught:
        extract_diff(*pair, tmp_path / "out", pack=True, device="cuda:0")
    assert caught.value.remedy == "leave out --device"
    found = extract_diff(*pair, tmp_path / "out", pack=True, device="auto")
    assert (found.device, found.device_why) == ("cpu", "differences are packed on the CPU")


def test_a_disk_that_does_not_hold_it_twice(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks wait in a temporary file on the same disk."""
    size = (family / "packed" / "model.safetensors").stat().st_size
    monkeypatch.setattr(output_place, "free_bytes", lambda _: int(1.5 * size) + (1 << 20))
    with pytest.raises(DiskSpaceError, match="needs"):
        extract_diff(FAMILY / "finetuned", FAMILY / "base", tmp_path / "out", pack=True)
    assert [*tmp_path.iterdir()] == []


def test_an_older_diffxfer_would_refuse_it(odd: Path) -> None:
    """Its bytes must never be taken for numbers: they have no float dtype, and a newer format."""
    assert json.loads((odd / "packed" / "diffxfer.json").read_text())["diffxfer_format"] == 2
    for path in (odd / "packed").glob("model*.safetensors"):
        with safe_open(path, "np") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"U8"}  # noqa: SIM118


def test_files_are_those_of_safetensors(odd: Path, tmp_path: Path) -> None:
    for path in (odd / "packed").glob("model*.safetensors"):
        save_file(load_file(path), tmp_path / path.name, {"format": "pt"})
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
