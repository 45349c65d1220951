"""The manifest of what a job writes, as far as the plan knows it."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

import xxhash

from diffxfer.checkpoints.header import HEADER_OFFSET
from diffxfer.diffs.artifact.manifest import FORMAT, Manifest, ShardEntry, VocabularyEntry
from diffxfer.streaming import checksum

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.diffs.artifact.manifest import SourceEntry
    from diffxfer.streaming.plan import Plan

_KINDS: Mapping[str, Literal["diff", "tuned"]] = {"extract": "diff", "tune": "tuned"}
"""The kind of folder that a verb writes, if not a graft."""


def make_manifest(
    verb: str,
    command: Mapping[str, str | float | list[str] | dict[str, float]],
    vocabulary: VocabularyEntry,
    sources: Mapping[str, SourceEntry],
    plan: Plan,
) -> Manifest:
    """The manifest of a folder, without its files and tensors.

    Args:
        verb: the verb of the job.
        command: the options that affect the result.
        vocabulary: how rows of tokens were paired.
        sources: the inputs by role.
        plan: the plan, which knows the shards.
    """
    return Manifest(
        diffxfer_format=FORMAT,
        kind=_KINDS.get(verb, "graft"),
        diffxfer_version=version("diffxfer"),
        command={"verb": verb, **command},
        vocabulary=vocabulary,
        checksum=checksum.NAME,
        sources=dict(sources),
        shards={
            name: ShardEntry(
                size=layout.size,
                header_xxh3=xxhash.xxh3_128_hexdigest(layout.header[HEADER_OFFSET:]),
            )
            for name, layout in plan.layouts.items()
        },
        files={},
        tensors={},  # the verb's `Finish` knows them
    )
