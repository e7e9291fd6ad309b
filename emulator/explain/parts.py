"""The parts that moments play in a plot, in the order in which they are explained.

Of uses of stale translations, see plot.py; of lost dirty bits, see lost.py.
"""

from __future__ import annotations

from typing import Final

FILL: Final = "fill"
REVOKE: Final = "revoke"
ELIDED: Final = "elided"
LATE: Final = "late"
NARROW: Final = "narrow"
MISSED: Final = "missed"
OUTDATED: Final = "outdated"
EARLY: Final = "early"
SKIPPED: Final = "skipped"
UNNOTIFIED: Final = "unnotified"
PROMISE: Final = "promise"
USE: Final = "use"

COPIED: Final = "copied"
UNPROTECTED: Final = "unprotected"
REOPENED: Final = "reopened"
MARKED_EARLY: Final = "marked early"
LOST: Final = "lost"
UNNAMED: Final = "unnamed"

# What was not done, or not in time.
CULPRITS: Final = (
    *(ELIDED, LATE, NARROW, MISSED, OUTDATED, EARLY, SKIPPED, UNNOTIFIED),
    *(UNPROTECTED, REOPENED, MARKED_EARLY),
)
