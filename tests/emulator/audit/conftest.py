from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.emulator.kvm.rig import Rig, running_rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    with running_rig() as rig:
        yield rig
