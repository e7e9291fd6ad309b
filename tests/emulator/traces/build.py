"""Small traces for the tests."""

from __future__ import annotations

import numpy as np

from emulator.traces.model import TraceMetadata, Window
from emulator.traces.record import AccessType, Records, distinct_pages, pack, types_of


def records_of(*accesses: tuple[AccessType, int]) -> Records:
    """Records from (type, address) pairs."""
    types = np.array([kind for kind, _ in accesses], dtype=np.uint64)
    return pack(types, np.array([address for _, address in accesses], dtype=np.uint64))


def metadata_of(records: Records, name: str = "small") -> TraceMetadata:
    """Metadata that fits some records."""
    counts = np.bincount(types_of(records), minlength=3)
    return TraceMetadata(
        name=name,
        program="program",
        command="program argument",
        valgrind="3.19.0",
        accesses=records.size,
        reads=int(counts[0]),
        writes=int(counts[1]),
        executes=int(counts[2]),
        distinct_pages=distinct_pages(records).size,
        window=Window(skipped=0, limit=None, recording=records.size, instructions=True),
    )


def loop_trace(rounds: int = 50) -> Records:
    """A loop of three instructions that copies an array."""
    body: list[tuple[AccessType, int]] = []
    for i in range(rounds):
        body += [(AccessType.EXECUTE, 0x401000), (AccessType.READ, 0x7F0000 + 8 * i)]
        body += [(AccessType.EXECUTE, 0x401004), (AccessType.WRITE, 0x800FF0 + 8 * i)]
        body += [(AccessType.EXECUTE, 0x401007)]
    return records_of(*body)
