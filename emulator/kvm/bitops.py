"""include/linux/find.h: iteration over the bits of a mask."""

from __future__ import annotations

from collections.abc import Iterator


def for_each_set_bit(mask: int) -> Iterator[int]:
    """Yield the positions of the bits that are set, lowest first; the mask is read once."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
