"""Programs that a piece of work starts on a node, and that may use the cluster themselves."""

from __future__ import annotations

import os


def name_cluster_to_programs() -> None:
    """Let `ray.init()` in programs that this process starts join the cluster that runs it."""
    import ray

    if ray.is_initialized():
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
