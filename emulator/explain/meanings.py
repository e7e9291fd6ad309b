"""The meanings of a race's moments, in the order in which they are explained.

The first group belongs to uses of stale translations (analysis.py), the second one to lost dirty bits
(lost.py).
"""

from __future__ import annotations

from typing import Final

FILL: Final = "fill"
REVOKE: Final = "revoke"
ELIDED: Final = "elided"
LATE: Final = "late"
NARROW: Final = "narrow"
REFUSED: Final = "refused"
MISSED: Final = "missed"
OUTDATED: Final = "outdated"
FORBIDDEN: Final = "forbidden"
EARLY: Final = "early"
SKIPPED: Final = "skipped"
UNNOTIFIED: Final = "unnotified"
PROMISE: Final = "promise"
USE: Final = "use"
# In the course of a traced execution: a danger that occurred.
DANGER: Final = "danger"

COPIED: Final = "copied"
UNPROTECTED: Final = "unprotected"
REOPENED: Final = "reopened"
MARKED_EARLY: Final = "marked early"
LOST: Final = "lost"
UNNAMED: Final = "unnamed"

# Moments that are to blame: an action that is missing, too narrow, too early or too late.
CULPRITS: Final = (
    *(ELIDED, LATE, NARROW, REFUSED, MISSED, OUTDATED, FORBIDDEN, EARLY, SKIPPED, UNNOTIFIED),
    *(UNPROTECTED, REOPENED, MARKED_EARLY),
)
