"""The guest pages of one traced VM: those that KVM maps, and those that it had mapped before."""

from __future__ import annotations

from collections.abc import Iterable

from emulator.hosttrace.workload import BLOCK


class Pages:
    """Sets of guest pages, as far as the trace tells.

    mapped: by an SPTE.  before: by one that is older than the recording.  touched: by a fault of a vCPU.
    gone: zapped by a notifier's range, and not mapped since.
    huge: first pages of blocks that the host backs by a huge page; huge_before: when the recording began.
    obsolete: zaps may be those of obsolete roots, which say nothing about these pages.
    """

    def __init__(self) -> None:
        self.mapped: set[int] = set()
        self.before: set[int] = set()
        self.touched: set[int] = set()
        self.gone: set[int] = set()
        self.huge: set[int] = set()
        self.huge_before: set[int] = set()
        self.obsolete = False
        # Of the last event of the host: pages taken to be older than the recording, and pages zapped.
        self._added: set[int] = set()
        self._zapped: set[int] = set()
        self._was_obsolete = False

    def begin(self) -> None:
        """Note that an event of the host begins, which `undo` may take back."""
        self._added, self._zapped, self._was_obsolete = set(), set(), self.obsolete

    def was_mapped(self, pages: Iterable[int]) -> None:
        """Note that the pages were mapped; without a known SPTE they were when the recording began."""
        if not self.obsolete:
            added = set(pages) - self.mapped
            self._added |= added
            self.before |= added
            self.mapped |= added

    def was_huge(self, pages: range) -> None:
        """Note that an SPTE of level 2 has mapped these pages; without a known one it is an older one."""
        if not self.obsolete and pages.start not in self.mapped:
            self.huge_before.add(pages.start)

    def map(self, pages: range) -> None:
        self.mapped.update(pages)
        self.gone.difference_update(pages)

    def zap(self, pages: range) -> None:
        """Note that a notifier's range has zapped the SPTEs of these pages."""
        self._zap(set(pages))

    def _zap(self, pages: set[int]) -> None:
        self._zapped |= pages & self.mapped
        self.mapped -= pages
        self.gone |= pages
        self.huge -= {page - page % BLOCK for page in pages}

    def zap_all(self) -> None:
        """Note that all roots are obsolete."""
        self.obsolete = True
        self._zapped, self.mapped = self.mapped, set()

    def undo(self) -> None:
        """Take the last event of the host back: it was about another VM."""
        self.mapped |= self._zapped
        self.mapped -= self._added
        self.before -= self._added
        self.gone -= self._zapped
        self.obsolete = self._was_obsolete

    def redo(self, other: Pages) -> None:
        """Let the last event of the host, which another VM has taken back, be about this VM."""
        self.begin()
        pages = other._zapped | other._added
        self.was_mapped(pages)
        self._zap(pages & other._zapped)
