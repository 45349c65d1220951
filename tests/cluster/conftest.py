"""The models of the tests on a cluster, and what one machine makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from diffxfer import transfer
from tests.cluster import nodes
from tests.cluster.nodes import roles
from tests.families import contents

if TYPE_CHECKING:
    from tests import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny.World:
    return nodes.make_world(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def expected(world: tiny.World) -> dict[str, bytes]:
    out = world.root / "whole" / "out"
    transfer(*roles(world), out)
    return contents(out)
