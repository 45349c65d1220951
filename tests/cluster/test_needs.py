"""What needs no cluster: places on nodes, patience, the example, useless options."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffxfer import RayCluster, extract_diff
from diffxfer.cluster.needs import Needs, counts_of, many
from diffxfer.cluster.node_work import PACKAGES, Tally, other_version, versions
from diffxfer.cluster.pieces import Patience
from diffxfer.errors import ClusterError
from diffxfer.family import family_folder
from tests import tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "cluster" / "cluster.yaml"
GB = 10**9


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (Needs(1, 0, GB), 16 + 4),
        (Needs(8, 0, GB), 2),
        (Needs(1, 0, 8 * GB), 4 + 1),
        (Needs(1, 1, GB), 2),
        (Needs(1, 0.5, GB), 4),
        (Needs(32, 0, GB), 0),
    ],
)
def test_places(needs: Needs, expected: int) -> None:
    nodes = [
        {"Resources": {"CPU": 16.0, "GPU": 2.0, "memory": 32.0 * GB}},
        {"Resources": {"CPU": 4.0, "memory": 8.0 * GB}},
        {"Resources": {}},
    ]
    assert needs.places(nodes) == expected


def test_words() -> None:
    assert (many(1, "node"), many(2, "node"), many(0, "GPU")) == ("1 node", "2 nodes", "0 GPUs")
    assert (counts_of([1, 2.5]), counts_of([])) == ("1, 2.5", "none")
    assert "1 processor, 0.5 GPUs and 2.0 GB of memory" in str(Needs(1, 0.5, 2 * GB).nowhere())


def test_patience_begins_anew_when_a_node_is_back() -> None:
    assert not Patience(60).is_over(0)
    patience = Patience(-1)
    assert not patience.is_over(3)
    assert patience.is_over(0)
    assert not patience.is_over(1)


def test_a_tally_keeps_the_most_and_gives_it_once() -> None:
    tally = Tally()
    assert tally.report(0, 5)
    tally.report(0, 3)
    tally.report(7, 1)
    assert tally.take() == {0: 5, 7: 1}
    assert tally.take() == {}


def test_a_tally_stops_the_pieces_after_the_earliest_failure() -> None:
    tally = Tally()
    tally.stop_after(3)
    tally.stop_after(5)
    assert [tally.report(index, 0) for index in (2, 3, 4, 6)] == [True, True, False, False]
    tally.stop_after(-1)
    assert not tally.report(0, 0)


def test_every_version_counts() -> None:
    ours = versions()
    assert ours.keys() == {"Python", *PACKAGES}
    assert other_version(ours, ours) == ""
    for package in ours:
        found = other_version(ours, {**ours, package: "0"})
        assert found == f"has {package} 0, this machine has {ours[package]}"


def test_the_example_is_a_configuration_of_ray() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    prepared = util.prepare_config(yaml.safe_load(EXAMPLE.read_text()))
    util.validate_config(prepared)
    assert prepared["max_workers"] == 3


def test_one_folder_needs_no_cluster() -> None:
    done = tiny.run("inspect", family_folder() / "base", "--ray", "10.0.0.1:6379")
    assert done.err.startswith("error: --ray: has no effect on one folder")


@pytest.mark.parametrize("option", [("--ray", "10.0.0.1"), ("--ray=head",)])
def test_an_address_needs_a_port(option: tuple[str, ...], tmp_path: Path) -> None:
    family = family_folder()
    roles = (family / role for role in ("finetuned", "base", "target"))
    done = tiny.run("transfer", *option, *roles, "-o", tmp_path / "out")
    said = f"--ray: {option[-1].removeprefix('--ray=')!r} is not the address of a cluster"
    assert done.err.startswith(f"error: {said}; give HOST:PORT")
    assert done.status == 2


def test_a_cluster_outside_of_its_block_is_refused(tmp_path: Path) -> None:
    family = family_folder()
    with pytest.raises(ClusterError, match="RayCluster: is not connected; use it in a block"):
        extract_diff(family / "finetuned", family / "base", tmp_path / "out", cluster=RayCluster())
    assert not [*tmp_path.iterdir()]
