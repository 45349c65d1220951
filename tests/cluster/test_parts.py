"""Parts of a plan, without Ray: together they are the plan, and whatever they hold can be sent."""

from __future__ import annotations

import inspect
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import diffxfer.errors
from diffxfer import apply_diff, compare_checkpoints, extract_diff, transfer, verify
from diffxfer.checkpoints.files import check_unchanged
from diffxfer.checkpoints.journal import JOURNAL_NAME, Done, Journal, summarize
from diffxfer.checkpoints.part_journal import (
    done_bytes_in_parts,
    done_in_part,
    new_part_journal,
    part_journals,
)
from diffxfer.checkpoints.partial import is_our_partial
from diffxfer.checkpoints.reader import read_shard
from diffxfer.checkpoints.stored import is_unchanged, stat_identity
from diffxfer.cli.optional_values import DEFAULT, fill_in
from diffxfer.errors import DiffxferError, InputChangedError, NonFiniteError, OptionError
from diffxfer.family import family_folder
from diffxfer.streaming.completed import ChunkSet
from diffxfer.streaming.parts import Workload, cut, moved_by
from diffxfer.streaming.plan import Plan, chunks, digest_task, make_plan
from tests import tiny
from tests.checkpoints.encodings.codings import FP8, INT4, INT8, NF4_DOUBLE
from tests.cluster.here import Here
from tests.diffs.adapters.variants import VARIANTS, make_adapter
from tests.families import contents
from tests.helpers import save_shard

if TYPE_CHECKING:
    from tests.checkpoints.encodings.codings import Coding

BLOCK = 262144
FINGERPRINT = bytes(range(16))


LOAD = Workload(Path(), None, FINGERPRINT, "run", 1, "cpu", 0, allow_nonfinite=False)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """A stored tensor of every size, from none to three chunks."""
    folder = tmp_path_factory.mktemp("sizes")
    elements = (0, 1, 100, BLOCK, BLOCK + 1, 3 * BLOCK)
    tensors = {f"t{count}": torch.zeros(count, dtype=torch.uint8) for count in elements}
    save_shard(folder / "model.safetensors", tensors)
    found = read_shard(folder / "model.safetensors")
    return {count: found[f"t{count}"] for count in elements}


def plan_of(sizes: dict[int, Any], drawn: list[int]) -> Plan:
    return make_plan([digest_task(str(i), sizes[count]) for i, count in enumerate(drawn)], ())


class TestCut:
    @given(
        drawn=st.lists(st.sampled_from([0, 1, 100, BLOCK, BLOCK + 1, 3 * BLOCK]), max_size=12),
        part_bytes=st.sampled_from([1, 100, BLOCK, 2 * BLOCK, 10**9]),
        data=st.data(),
    )
    def test_every_chunk_that_is_not_done_is_in_one_part(
        self, sizes, drawn, part_bytes, data
    ) -> None:
        plan = plan_of(sizes, drawn)
        every = [chunk.number for chunk in chunks(plan)]
        known = data.draw(st.sets(st.sampled_from(every))) if every else set()
        done = ChunkSet(plan, BLOCK)
        for number in known:
            done.add(number)
        parts = [*cut(plan, done, LOAD, part_bytes)]
        found = [chunk.number for part in parts for chunk in chunks(part.plan, BLOCK, part.done)]
        assert found == [number for number in every if number not in known]

    @given(drawn=st.lists(st.sampled_from([1, 100, BLOCK]), min_size=1, max_size=30))
    def test_a_part_has_at_most_its_bytes_or_one_tensor(self, sizes, drawn) -> None:
        plan = plan_of(sizes, drawn)
        for part in cut(plan, ChunkSet(plan, BLOCK), LOAD, 1000):
            assert len(part.plan.tasks) == 1 or part.nbytes <= 1000
            assert part.nbytes == sum(moved_by(task) for task in part.plan.tasks)

    def test_a_part_ends_with_a_shard_unless_it_is_small(self, tmp_path: Path) -> None:
        world = tiny.make_world(tmp_path, sharded=True)
        shards = len({*load_shards(world.folders["target"])})
        assert shards == 2
        for part_bytes, expected in ((10**9, 1), (400, shards)):
            here = Here(part_bytes)
            transfer(*roles(world), tmp_path / f"out-{part_bytes}", cluster=here)
            assert here.pieces[0] >= expected


def load_shards(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.safetensors")]


def roles(world: tiny.World) -> tuple[Path, Path, Path]:
    return tuple(world.folders[role] for role in ("finetuned", "base", "target"))  # type: ignore[return-value]


def check_same(tmp_path: Path, verb: Any, *inputs: Path, part_bytes: int = 200, **options) -> None:
    """Check that a verb gives the same folder in one process and in parts, and the same report."""
    whole, parts, here = tmp_path / "one" / "out", tmp_path / "parts" / "out", Here(part_bytes)
    first = verb(*inputs, whole, **options)
    second = verb(*inputs, parts, cluster=here, **options)
    assert contents(parts) == contents(whole)
    assert here.pieces[0] > 1, "the test is about several parts"
    told = ("tensors", "parameters", "inexact", "warnings", "notes", "bytes_to_read", "requantized")
    for name in told:
        assert getattr(first, name) == getattr(second, name), name
    assert verify(parts, cluster=here).tensors == verify(parts).tensors


class TestWhatPartsHold:
    @pytest.mark.parametrize(
        ("coding", "requantize"),
        [
            *((coding, False) for coding in (FP8, INT4, INT8, NF4_DOUBLE)),
            *((coding, True) for coding in (FP8, INT4, INT8)),  # bitsandbytes is not written
        ],
        ids=lambda value: getattr(value, "name", ""),
    )
    def test_quantised(self, tmp_path: Path, coding: Coding, requantize: bool) -> None:
        folders = []
        for role in ("finetuned", "base", "target"):
            weights = tiny.tensors(role)
            layers = {name: weights.pop(name) for name in list(weights) if "proj" in name}
            config = {**tiny.CONFIG, **coding.config}
            made = {**weights, **coding.encode(layers)}
            folders.append(tiny.save_model(tmp_path / role, made, config=config))
        check_same(tmp_path, transfer, *folders, requantize=requantize)
        if not requantize:
            check_same(tmp_path / "diff", extract_diff, *folders[:2])

    @pytest.mark.parametrize("variant", ["alpha over r", "DoRA", "bias all"])
    def test_adapters(self, tmp_path: Path, variant: str) -> None:
        make_adapter(VARIANTS[variant], tmp_path)
        inputs = [tmp_path / role for role in ("adapter", "base", "target")]
        check_same(tmp_path, transfer, *inputs)
        check_same(tmp_path / "diff", extract_diff, *inputs[:2])

    def test_a_diff_vector_and_a_scale_by_name(self, tmp_path: Path) -> None:
        world = tiny.make_world(tmp_path, sharded=True)
        inputs = world.folders["diff"], world.folders["target"]
        check_same(tmp_path, apply_diff, *inputs, alpha=0.5, alpha_for={"mlp": 0.25})

    def test_empty_tensors_at_the_ends(self, tmp_path: Path) -> None:
        folders = []
        for role in ("finetuned", "base", "target"):
            weights = {"a.empty": torch.zeros(0, 4), **tiny.tensors(role), "z": torch.zeros(0)}
            folders.append(tiny.save_model(tmp_path / role, weights))
        check_same(tmp_path, transfer, *folders)
        found = compare_checkpoints(folders[0], folders[1], cluster=Here())
        assert found.tensors == compare_checkpoints(folders[0], folders[1]).tensors

    def test_every_error_comes_back_as_it_was(self) -> None:
        kinds = [
            kind
            for _, kind in inspect.getmembers(diffxfer.errors, inspect.isclass)
            if issubclass(kind, DiffxferError)
        ]
        assert len(kinds) > 20
        for kind in kinds:
            exc = kind.__new__(kind)
            DiffxferError.__init__(exc, "where", "problem", "remedy")
            exc.extra = ("kept", 1)
            again = pickle.loads(pickle.dumps(exc))
            assert type(again) is kind
            assert (str(again), again.__dict__) == (str(exc), exc.__dict__)

    def test_an_error_that_was_raised(self, tmp_path: Path) -> None:
        world = damaged(tmp_path)
        with pytest.raises(NonFiniteError) as found:
            transfer(*roles(world), tmp_path / "out")
        again = pickle.loads(pickle.dumps(found.value))
        assert (str(again), again.__dict__) == (str(found.value), found.value.__dict__)


def damaged(root: Path) -> tiny.World:
    """A family with NaN in two tensors of finetuned."""
    world = tiny.make_world(root, sharded=True)
    for shard in world.folders["finetuned"].glob("*.safetensors"):
        weights = load_file(shard)
        for tensor in weights.values():
            if tensor.dim() > 1:
                tensor[1, 2] = float("nan")
        save_shard(shard, weights)
    return world


class TestFailures:
    def test_the_earliest_is_told_as_on_one_machine(self, tmp_path: Path) -> None:
        world = damaged(tmp_path)
        told = []
        for cluster in (None, Here()):
            with pytest.raises(NonFiniteError) as found:
                transfer(*roles(world), tmp_path / "made" / "out", cluster=cluster)
            told.append(str(found.value))
            assert not (tmp_path / "made").exists()
        assert told[0] == told[1]

    def test_a_stopped_run_goes_on(self, tmp_path: Path) -> None:
        world = tiny.make_world(tmp_path)
        whole, out = tmp_path / "one" / "out", tmp_path / "parts" / "out"
        transfer(*roles(world), whole)
        with pytest.raises(KeyboardInterrupt):
            transfer(*roles(world), out, cluster=Here(stop_after=2))
        report = transfer(*roles(world), out, cluster=Here())
        assert report.resumed_bytes > 0
        assert contents(out) == contents(whole)

    def test_no_adapter_is_made_on_a_cluster(self, tmp_path: Path) -> None:
        family = family_folder()
        with pytest.raises(OptionError, match="--ray: has no use here: an adapter's factors"):
            extract_diff(
                *(family / "finetuned", family / "base", tmp_path / "out"),
                as_="lora",
                cluster=Here(),
            )
        inputs = family / "adapter", family / "target", tmp_path / "out"
        with pytest.raises(OptionError, match="--ray: has no use here: an adapter's factors"):
            apply_diff(*inputs, as_="lora", cluster=Here())

    def test_a_gpu_by_number_has_no_meaning(self, tmp_path: Path) -> None:
        family = family_folder()
        with pytest.raises(OptionError, match="--device: auto has no meaning on a cluster"):
            extract_diff(
                *(family / "finetuned", family / "base", tmp_path / "out"),
                device="auto",
                cluster=Here(),
            )


class TestJournals:
    def begun(self, folder: Path, run: str = "run", first: int = 3, job: bytes = FINGERPRINT):
        journal = new_part_journal(folder, job, run, first)
        journal.begin(100)
        return journal

    def test_what_a_part_did_is_found_again(self, tmp_path: Path) -> None:
        journal = self.begun(tmp_path)
        journal.add([Done(3, 10, b"a"), Done(4, 20, b"")])
        journal.close()
        assert part_journals(tmp_path) == [journal.path]
        assert [*done_in_part(journal.path, FINGERPRINT)] == [Done(3, 10, b"a"), Done(4, 20, b"")]
        assert done_bytes_in_parts(tmp_path, FINGERPRINT) == 30

    def test_another_job_has_nothing(self, tmp_path: Path) -> None:
        journal = self.begun(tmp_path, job=bytes(16))
        journal.add([Done(3, 10, b"a")])
        journal.close()
        assert [*done_in_part(journal.path, FINGERPRINT)] == []
        assert done_bytes_in_parts(tmp_path, FINGERPRINT) == 0

    def test_attempts_of_other_runs_and_parts_are_not_this_ones(self, tmp_path: Path) -> None:
        journals = [self.begun(tmp_path, run, first) for run in "ab" for first in (0, 3, 3)]
        found = part_journals(tmp_path, ("a", 3))
        assert found == sorted(journal.path for journal in journals[1:3])
        assert len(part_journals(tmp_path)) == 6
        assert part_journals(tmp_path / "missing") == []

    def test_another_node_has_what_it_has_synced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal = self.begun(tmp_path)
        journal.add([Done(3, 10, b"a")])
        journal.mark(journal.size)
        journal.add([Done(4, 10, b"a")])
        journal.close()
        monkeypatch.setattr("diffxfer.checkpoints.journal.boot_id", lambda: b"another")
        assert [done.number for done in done_in_part(journal.path, FINGERPRINT)] == [3]

    def test_a_folder_with_nothing_else_is_ours(self, tmp_path: Path) -> None:
        self.begun(tmp_path).close()
        assert is_our_partial(tmp_path)
        part_journals(tmp_path)[0].write_bytes(b"something else")
        assert not is_our_partial(tmp_path)

    def test_what_lost_nodes_did_is_taken_over_once(self, tmp_path: Path) -> None:
        world = tiny.make_world(tmp_path)
        whole, out = tmp_path / "one" / "out", tmp_path / "parts" / "out"
        transfer(*roles(world), whole)
        with pytest.raises(KeyboardInterrupt):
            transfer(*roles(world), out, cluster=Here(stop_after=3))
        (partial,) = out.parent.glob(".out.partial-*")
        known = summarize(partial / JOURNAL_NAME)
        assert known is not None
        main = Journal(partial / JOURNAL_NAME, known.fingerprint, known.inode, known)
        records = [*main.done()]
        main.forget()
        main.begin(known.total_bytes)
        main.close()
        for run in ("killed", "killed before"):  # both did the same, and a chunk that is none
            journal = self.begun(partial, run, 0, known.fingerprint)
            journal.add([*records, Done(10**6, 5, b"")])
            journal.close()
        other = self.begun(partial, job=bytes(16))
        other.add([Done(0, 10**6, b"")])
        other.close()
        report = transfer(*roles(world), out)
        assert report.resumed_bytes == sum(done.moved for done in records) > 0
        assert contents(out) == contents(whole)


class TestIdentity:
    def test_the_same_file_from_another_node(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"abc")
        device, inode, size, mtime = stat_identity(path.stat())
        assert is_unchanged(path.stat(), (device, inode, size, mtime))
        assert is_unchanged(path.stat(), (device + 1, inode + 1, size, mtime))
        assert not is_unchanged(path.stat(), (device, inode + 1, size, mtime))
        assert not is_unchanged(path.stat(), (device + 1, inode, size, mtime + 1))
        assert not is_unchanged(path.stat(), (device + 1, inode, size + 1, mtime))

    def test_a_touched_input_has_changed(self, tmp_path: Path) -> None:
        save_shard(tmp_path / "model.safetensors", {"a": torch.zeros(3)})
        shard = read_shard(tmp_path / "model.safetensors")["a"].parts[0].shard
        check_unchanged(shard)
        os.utime(shard.path, ns=(0, 1))
        with pytest.raises(InputChangedError):
            check_unchanged(shard)


@pytest.mark.parametrize(
    ("typed", "parsed"),
    [
        (["--ray"], [f"--ray={DEFAULT}"]),
        (["--ray", "-o", "x"], [f"--ray={DEFAULT}", "-o", "x"]),
        (["--ray", "auto"], ["--ray", "auto"]),
        (["--ray", "local", "a"], ["--ray", "local", "a"]),
        (["--ray", "10.0.0.1:6379"], ["--ray", "10.0.0.1:6379"]),
        (["--ray", "head:6379", "a"], ["--ray", "head:6379", "a"]),
        (["--ray", "ray://head:10001"], ["--ray", "ray://head:10001"]),
        (["--ray", "./model"], [f"--ray={DEFAULT}", "./model"]),
        (["--ray", "org/model"], [f"--ray={DEFAULT}", "org/model"]),
        (["--ray=org/model"], ["--ray=org/model"]),
        (["a", "--", "--ray"], ["a", "--", "--ray"]),
        (["--rays", "b"], ["--rays", "b"]),
    ],
)
def test_the_value_of_ray_may_be_left_out(typed: list[str], parsed: list[str]) -> None:
    assert fill_in(typed) == parsed


def test_a_plan_of_nothing_has_no_parts() -> None:
    plan = Plan((), {}, ())
    assert [*cut(plan, ChunkSet(plan, BLOCK), LOAD, 10)] == []
