"""Shared objects that steps read and write: named, with sets of them as integers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from functools import lru_cache
from typing import Any


class Objects:
    """Assigns a bit to each shared object.  Names are hashable, and equal in every execution."""

    __slots__ = ("bits", "names")

    def __init__(self) -> None:
        self.bits: dict[Hashable, int] = {}
        self.names: list[Hashable] = []

    def bit(self, name: Hashable) -> int:
        bit = self.bits.get(name)
        if bit is None:
            bit = self.bits[name] = 1 << len(self.names)
            self.names.append(name)
        return bit

    def mask(self, names: Iterable[Hashable]) -> int:
        mask = 0
        for name in names:
            mask |= self.bit(name)
        return mask

    def of(self, mask: int) -> list[Hashable]:
        return [self.names[i] for i in bits(mask)]


def name_of(plain: Any) -> Hashable:
    """Return the name of an object, which JSON holds with lists in the place of tuples."""
    return tuple(map(name_of, plain)) if isinstance(plain, list) else plain


def bits(mask: int) -> Iterator[int]:
    """Yield the positions of the bits that are set, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


@lru_cache(maxsize=1 << 14)
def members(mask: int) -> tuple[int, ...]:
    """Return the positions of the bits that are set, from a cache, because sets recur."""
    return tuple(bits(mask))


@lru_cache(maxsize=1 << 14)
def accesses(reads: int, writes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the positions of the objects that a step writes, and of those that it only reads."""
    return tuple(bits(writes)), tuple(bits(reads & ~writes))
