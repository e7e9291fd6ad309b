"""Which presets a shipped test is tried under, where all of them would take minutes."""

from __future__ import annotations

import os

from emulator.litmus.model import LitmusTest
from emulator.litmus.policies import suits
from emulator.policy import PRESETS

NEWEST = "linux-7.3"


def by_turns(test: LitmusTest, turn: int) -> list[str]:
    """Return linux-7.3, and of the other presets that suit the test those of an even or of an odd number.

    FLUSHLAB_PRESETS=all: all that suit it.
    """
    every = 1 if os.environ.get("FLUSHLAB_PRESETS") == "all" else 2
    others = [policy for policy in PRESETS if policy != NEWEST]
    return [policy for policy in (NEWEST, *others[turn % every :: every]) if suits(test, policy)]
