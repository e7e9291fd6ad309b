"""Look-ups of memslots."""

from __future__ import annotations

import re
from pathlib import Path

import emulator.kvm

ROOT = Path(next(iter(emulator.kvm.__path__)))
# Updates, which hold slots_lock, so that nothing else writes.
UPDATES = {"virt/memslots.py", "virt/dirty_log.py", "lapic.py"}


def test_each_reader_goes_by_the_function_with_the_ordering_point() -> None:
    """Without a point a look-up would be part of the step before, which an update may seem independent of."""
    readers = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if re.search(r"\.memslots(\[|:\n)", path.read_text())
    }
    assert readers - UPDATES == {"virt/slots.py"}
