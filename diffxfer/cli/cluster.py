"""`--ray`: the work on a cluster."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from diffxfer.checkpoints.header import short
from diffxfer.cli.help import WHERE
from diffxfer.cli.optional_values import ADDRESS, DEFAULT
from diffxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffxfer.cli.console import Console
    from diffxfer.cluster.ray_cluster import RayCluster

Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        rich_help_panel=WHERE,
        metavar="[ADDRESS]",
        help="Do the work on a Ray cluster: HOST:PORT of its head, auto, or local for a new one on"
        " this machine; by default what RAY_ADDRESS says, else local.",
    ),
]

GpusPerModel = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=WHERE,
        metavar="N",
        help="With --ray, GPUs of each model, or a share of one: 0.5; by default 1 if nodes have"
        " GPUs.",
    ),
]


@contextmanager
def cluster_of(ray: str | None, console: Console) -> Iterator[RayCluster | None]:
    """The cluster that `--ray` names, connected; None without the option.

    Args:
        ray: the option's value.
        console: says which nodes take part.

    Raises:
        OptionError: if the value is no address.
    """
    if ray is None:
        yield None
        return
    if ray != DEFAULT and not ADDRESS.fullmatch(ray):
        remedy = "give HOST:PORT (ray start uses port 6379), ray://HOST:PORT, auto or local"
        raise OptionError("--ray", f"{short(ray)} is not the address of a cluster", remedy)
    from diffxfer.cluster.ray_cluster import RayCluster

    with RayCluster(None if ray == DEFAULT else ray) as cluster:
        console.say(cluster.description())
        yield cluster
