"""The fixtures of the tests of SPTEs, tables and walks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.native.memory_rig import Rig


@pytest.fixture(params=[4, 5])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with Rig(root_level=request.param) as machine:
        yield machine
