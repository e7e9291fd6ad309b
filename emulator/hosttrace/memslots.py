"""Memslots of a traced host: which guest pages a notifier's range of host addresses is about.

A memslot is given (`--memslot`), or inferred by this rule: if the SPTEs that a task zaps after a range's
event fill the range, without a gap, then the range's first address is that of the lowest page.  Two such
ranges that agree make a memslot, from the lowest page to the highest.

A trace that shows SPTEs tells a range's pages by its zaps.  For a trace that shows none, given memslots tell
them: the pages were mapped when the recording began, or by a fault since.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from emulator.errors import BadInput, shown
from emulator.hosttrace.fields import PAGE_SHIFT

_AGREEING: Final = 2
_EXPECTED: Final = "GFN,PAGES,HVA or VM:GFN,PAGES,HVA, such as 0x100000,0x80000,0x7f589c000000"
_MOST: Final = 1 << 52
RULE: Final = (
    "A memslot is inferred from ranges that the SPTEs zapped after them fill without a gap, "
    "if two or more agree on its address."
)


class Memslot(NamedTuple):
    """Guest pages and their address in the VMM.  It was inferred from so many `ranges`, 0: it was given."""

    vm: int
    gfn: int
    pages: int
    hva: int
    ranges: int = 0

    def __str__(self) -> str:
        origin = f"inferred from {self.ranges} ranges" if self.ranges else "given"
        end = self.gfn + self.pages
        return f"VM {self.vm}: guest pages {self.gfn:#x} to {end:#x} at {self.hva:#x}, {origin}"

    def clipped(self, start: int, end: int) -> tuple[int, int] | None:
        """Return the guest pages of the host addresses [start, end) that are in this memslot."""
        first = max(start - self.hva >> PAGE_SHIFT, 0)
        last = min((end - self.hva + (1 << PAGE_SHIFT) - 1) >> PAGE_SHIFT, self.pages)
        return (self.gfn + first, self.gfn + last) if first < last else None


def parsed_memslot(text: str) -> Memslot:
    """Return the memslot of an option; raise BadInput."""
    vm, colon, rest = text.rpartition(":")
    try:
        gfn, pages, hva = (int(part, 0) for part in rest.split(","))
        slot = Memslot(int(vm) if colon else 0, gfn, pages, hva)
    except ValueError as error:
        raise BadInput("--memslot", f"found {shown(text)}", _EXPECTED) from error
    fits = slot.vm >= 0 and 0 <= gfn < _MOST and 0 < pages < _MOST and 0 <= hva < 1 << 64
    if not fits or hva % (1 << PAGE_SHIFT):
        raise BadInput("--memslot", f"found {shown(text)}", f"{_EXPECTED}; HVA a multiple of 0x1000")
    return slot


@dataclass(slots=True)
class NotifierRange:
    """The host addresses of a notifier's range, and the SPTEs that its task has zapped since."""

    vm: int
    start: int
    end: int
    zapped: int = 0
    low: int = -1
    high: int = -1

    def zap(self, pages: range) -> None:
        self.zapped += len(pages)
        self.low = pages.start if self.low < 0 else min(self.low, pages.start)
        self.high = max(self.high, pages.stop)

    @property
    def filled(self) -> bool:
        return self.zapped == self.high - self.low == self.end - self.start >> PAGE_SHIFT


class Memslots:
    """The memslots of all VMs: those given, and the votes for others."""

    def __init__(self, given: tuple[Memslot, ...] = ()) -> None:
        self.given = given
        self._ranges: list[NotifierRange] = []

    def begin(self, vm: int, start: int, end: int) -> NotifierRange:
        found = NotifierRange(vm, start, end)
        self._ranges.append(found)
        return found

    def pages(self, vm: int, start: int, end: int) -> Iterator[range]:
        """Yield the guest pages of host addresses that are in given memslots."""
        for slot in self.given:
            if slot.vm == vm and (pages := slot.clipped(start, end)) is not None:
                yield range(*pages)

    def all(self) -> list[Memslot]:
        """Return the given memslots, or else those inferred for the VM."""
        told = {slot.vm for slot in self.given}
        return [*self.given, *(slot for slot in self._inferred() if slot.vm not in told)]

    def _inferred(self) -> Iterator[Memslot]:
        votes: defaultdict[tuple[int, int], list[NotifierRange]] = defaultdict(list)
        for one in self._ranges:
            if one.zapped and one.filled:
                votes[one.vm, one.start - (one.low << PAGE_SHIFT)].append(one)
        for (vm, offset), agreeing in sorted(votes.items()):
            if len(agreeing) >= _AGREEING:
                low = min(one.low for one in agreeing)
                high = max(one.high for one in agreeing)
                yield Memslot(vm, low, high - low, offset + (low << PAGE_SHIFT), len(agreeing))

    def silent(self) -> tuple[int, int]:
        """Return the numbers of ranges without a zapped SPTE: in a memslot, and elsewhere."""
        slots = self.all()
        inside = outside = 0
        for one in self._ranges:
            if not one.zapped:
                known = any(slot.vm == one.vm and slot.clipped(one.start, one.end) for slot in slots)
                inside += known
                outside += not known
        return inside, outside
