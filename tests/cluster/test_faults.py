"""A Ray cluster that fails: nodes, their disks, and the process that started the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer import RayCluster, transfer
from diffxfer.errors import ClusterError, DiskSpaceError
from diffxfer.family import family_folder
from tests import tiny
from tests.cluster import nodes
from tests.cluster.nodes import roles, wait_until
from tests.families import contents

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ray = pytest.importorskip("ray")
PART = 10_000_000


class TestReaching:
    def test_nobody_listens(self, tmp_path: Path) -> None:
        family = family_folder()
        done = tiny.run(
            *("extract", family / "finetuned", family / "base", "-o", tmp_path / "out"),
            *("--ray", "127.0.0.1:1"),
        )
        assert done.status == 1
        assert done.err.startswith("error: --ray 127.0.0.1:1: no cluster can be used there (")
        assert "Connection refused" in done.err
        assert done.err.count("\n") == 1

    def test_without_ray_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(ClusterError, match=r"pip install 'diffxfer\[ray\]'"):
            RayCluster().__enter__()


def two(**second: Any) -> Any:
    """A cluster whose second node is special."""
    return nodes.cluster({}, second)


@pytest.mark.slow
class TestNodesThatFail:
    def test_one_is_killed_in_the_middle(self, world, expected, tmp_path: Path) -> None:
        slow = nodes.path_with(tmp_path / "slow", nodes.SLOW)
        out = tmp_path / "out"
        with nodes.cluster({"env_vars": slow}, {"env_vars": slow}) as made:
            lost = next(iter(made.worker_nodes))
            with RayCluster(made.address, part_bytes=PART) as cluster:

                def kill(done: int, total: int) -> None:
                    if done > total // 4 and lost in made.worker_nodes:
                        made.remove_node(lost, allow_graceful=False)

                transfer(*roles(world), out, cluster=cluster, progress=kill)
                assert lost not in made.worker_nodes
        assert contents(out) == expected

    def test_the_last_one_is_killed(
        self, world, expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The head has no processors, so that nobody is left to do the work."""
        monkeypatch.setattr("diffxfer.cluster.ray_cluster._PATIENCE_S", 3.0)
        slow = nodes.path_with(tmp_path / "slow", nodes.SLOW)
        out = tmp_path / "out"
        with nodes.cluster({"num_cpus": 0}, {"env_vars": slow}) as made:
            lost = next(iter(made.worker_nodes))
            with RayCluster(made.address, part_bytes=PART) as cluster:

                def kill(done: int, total: int) -> None:
                    if done > total // 4 and lost in made.worker_nodes:
                        made.remove_node(lost, allow_graceful=False)

                with pytest.raises(ClusterError, match="no node has 1 processor and") as found:
                    transfer(*roles(world), out, cluster=cluster, progress=kill)
                assert "% is kept at" in str(found.value)
                made.add_node(num_cpus=1, object_store_memory=nodes.STORE_BYTES)
                report = transfer(*roles(world), out, cluster=cluster)
        assert report.resumed_bytes > 0
        assert contents(out) == expected

    def test_one_has_a_full_disk(self, world, expected, tmp_path: Path) -> None:
        full = nodes.path_with(tmp_path / "full", nodes.FULL)
        out = tmp_path / "out"
        with two(env_vars=full) as made, RayCluster(made.address, part_bytes=PART) as cluster:
            with pytest.raises(DiskSpaceError, match="the disk is full; free disk space") as found:
                transfer(*roles(world), out, cluster=cluster)
            assert "% is kept at" in str(found.value)
        assert not out.exists()
        report = transfer(*roles(world), out)
        assert report.resumed_bytes > 0
        assert contents(out) == expected

    def test_a_bug_names_the_log(self, world, tmp_path: Path) -> None:
        broken = nodes.path_with(tmp_path / "broken", nodes.BROKEN)
        with nodes.cluster({"env_vars": broken}) as made, RayCluster(made.address) as cluster:
            with pytest.raises(ClusterError, match="ZeroDivisionError: made on purpose") as found:
                transfer(*roles(world), tmp_path / "out", cluster=cluster)
            log = str(found.value).partition("read ")[2].removesuffix(" there")
            with open(log) as file:  # noqa: PTH123
                assert "Traceback" in file.read()
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("package", ["numba", "torch", "diffxfer"])
    def test_another_version_is_refused_before_anything_is_written(
        self, world, tmp_path: Path, package: str
    ) -> None:
        old = nodes.older(tmp_path / "old", package)
        with two(env_vars=old) as made:
            argv = *map(str, roles(world)), "-o", str(tmp_path / "made" / "out")
            done = tiny.run("transfer", *argv, "--ray", made.address)
        assert done.status == 1
        assert f"has {package} 0.0.1, this machine has" in done.err
        assert done.err.startswith("error: node ")
        assert not (tmp_path / "made").exists()

    def test_a_node_that_joins_later_is_checked(self, world, tmp_path: Path) -> None:
        old = nodes.older(tmp_path / "old", "numba")
        with nodes.cluster({}) as made, RayCluster(made.address, part_bytes=PART) as cluster:
            made.add_node(num_cpus=1, object_store_memory=nodes.STORE_BYTES, env_vars=old)
            with pytest.raises(ClusterError, match=r"has numba 0\.0\.1, this machine has"):
                transfer(*roles(world), tmp_path / "out", cluster=cluster)

    def test_one_does_not_see_the_folder(self, world, tmp_path: Path) -> None:
        out = tmp_path / "hidden" / "out"
        out.parent.mkdir()
        with nodes.cluster({}) as made, nodes.blind_node(made.address, out.parent):
            wait_until(lambda: len([n for n in made_nodes(made.address) if n]) == 2)
            done = tiny.run(
                "transfer", *map(str, roles(world)), "-o", str(out), "--ray", made.address
            )
        assert done.status == 1
        assert f"does not see the output folder {out.parent}" in done.err
        assert "use a file system that every node mounts at the same path" in done.err
        assert not [*out.parent.iterdir()]

    def test_one_does_not_see_an_input(self, world, tmp_path: Path) -> None:
        moved = world.copy(tmp_path / "models")
        with nodes.cluster({}) as made, nodes.blind_node(made.address, tmp_path / "models"):
            wait_until(lambda: len([n for n in made_nodes(made.address) if n]) == 2)
            operands = [*map(str, roles(moved)), "-o", str(tmp_path / "made" / "out")]
            done = tiny.run("transfer", *operands, "--ray", made.address)
            pair = tiny.run("inspect", *map(str, roles(moved)[:2]), "--ray", made.address)
        assert "does not see " in done.err
        assert "model-00001-of-00002.safetensors (No such file or directory)" in done.err
        assert "(No such file or directory)" in pair.err
        assert not (tmp_path / "made").exists()

    def test_a_cluster_without_processors(self, world, tmp_path: Path) -> None:
        with nodes.cluster({"num_cpus": 0}) as made:
            argv = *map(str, roles(world)), "-o", str(tmp_path / "made" / "out")
            done = tiny.run("transfer", *argv, "--ray", made.address)
        assert done.err.startswith("error: --ray: no node has a processor for Ray; ")
        assert not (tmp_path / "made").exists()


def made_nodes(address: str) -> list[bool]:
    """Which nodes of a cluster are alive, asked in a process of its own."""
    program = (
        "import ray, sys, json; ray.init(address=sys.argv[1], log_to_driver=False);"
        "print('nodes', json.dumps([n['Alive'] for n in ray.nodes()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, address], capture_output=True, text=True, check=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("nodes "))
    found: list[bool] = json.loads(line.removeprefix("nodes "))
    return found


@pytest.mark.slow
class TestTheDriver:
    @pytest.fixture(scope="class")
    @classmethod
    def address(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        slow = nodes.path_with(tmp_path_factory.mktemp("slow") / "path", nodes.SLOW)
        with nodes.cluster({"env_vars": slow}, {"env_vars": slow}) as made:
            yield made.address

    @pytest.mark.parametrize("again_on", ["the cluster", "one machine"])
    def test_killed_and_run_again(
        self, address, world, expected, tmp_path: Path, again_on: str
    ) -> None:
        out = tmp_path / "out"
        with nodes.driver(world, out, address) as process:
            wait_until(lambda: nodes.percent(out) >= 20)
            os.killpg(process.pid, signal.SIGKILL)
        assert not out.exists()
        where = ("--ray", address) if again_on == "the cluster" else ()
        done = tiny.run("transfer", *nodes.command(world, out, "--json", *where)[4:])
        assert done.status == 0, done.err
        assert json.loads(done.out)["resumed_bytes"] > 0
        assert contents(out) == expected

    @pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_stopped_and_run_again(
        self, address, world, expected, tmp_path: Path, signum: int, status: int
    ) -> None:
        out = tmp_path / "out"
        with nodes.driver(world, out, address) as process:
            wait_until(lambda: nodes.percent(out) >= 20)
            os.killpg(process.pid, signum)
            _, err = process.communicate(timeout=60)
        assert process.returncode == status, err
        assert "run the same command again to continue" in err
        assert "Traceback" not in err
        report = transfer(*roles(world), out)
        assert report.resumed_bytes > 0
        assert contents(out) == expected

    def test_ctrl_c_of_a_cluster_of_its_own(self, world, expected, tmp_path: Path) -> None:
        """All processes of the terminal get the signal: those that Ray has started, too."""
        out = tmp_path / "out"
        slow = nodes.path_with(tmp_path / "path", nodes.SLOW)
        argv = nodes.command(world, out, "--ray", "local", "--threads", "1")
        process = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **slow},
        )
        wait_until(lambda: nodes.percent(out) >= 20)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "run the same command again to continue" in err
        assert "Traceback" not in err
        assert transfer(*roles(world), out).resumed_bytes > 0
        assert contents(out) == expected
