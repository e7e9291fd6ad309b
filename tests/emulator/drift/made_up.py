"""Made-up kernel trees, and records of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

TREES: Final = Path(__file__).parent / "trees"
# Linux 7.4.0-rc2, and 7.3.0 before it.
LINUX: Final = TREES / "linux"
LINUX_OLD: Final = TREES / "linux-old"


def copied(tree: Path, to: Path, version: str | None = None) -> Path:
    """A copy that a test can change, with another version if wanted."""
    shutil.copytree(tree, to)
    if version is not None:
        keys = ("VERSION", "PATCHLEVEL", "SUBLEVEL")
        numbers = zip(keys, version.split("."), strict=True)
        (to / "Makefile").write_text("".join(f"{key} = {number}\n" for key, number in numbers))
    return to
