"""A graft checks every tensor of the diff vector against its checksum while it reads it."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import pytest

from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path


def flip(shard: Path, name: str) -> None:
    """Flip the lowest bit of a tensor's last element."""
    data = bytearray(shard.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    data[8 + length + header[name]["data_offsets"][1] - 2] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("name", tiny.SHAPES)
def test_one_flipped_bit_is_refused(tmp_path: Path, name: str) -> None:
    world = tiny.make_world(tmp_path)
    flip(world.folders["diff"] / tiny.SHARD, name)
    done = tiny.run(*world.argv("apply"))
    assert done.status == 1
    assert f"{name} is damaged: it does not have the checksum in the manifest" in done.err
    assert not world.out.exists()
