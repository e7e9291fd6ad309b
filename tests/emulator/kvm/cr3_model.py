"""KVM's half of a guest's MOV to CR3, INVLPG and INVPCID without EPT, slow and obvious.

Two references.  The guest's: a translation may be used if its tables say so now, or have said so since the
last invalidation that covers it (SDM vol. 3A, 4.10.4).  KVM's: each instruction makes these loads and
flushes, and goes back to these roots (regs.c, mmu.c).  Processes are numbers; some share a PCID.  KVM's SPTEs
have no global flag, so that its half is the same for global pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

PROCESSES = 6
PAGES = 3
PREVIOUS = 3


class Mapping(NamedTuple):
    gfn: int
    writable: bool
    is_global: bool = False

    def permits(self, write: bool) -> bool:
        return self.writable or not write


def pcid_of(process: int) -> int:
    return process % 4 + 1


@dataclass
class Cr3Model:
    now: dict[tuple[int, int], Mapping | None]
    current: int = 0
    root: int | None = None
    previous: list[int | None] = field(default_factory=lambda: [None] * PREVIOUS)
    #: Mappings before changes that the guest has not invalidated.
    before: dict[tuple[int, int], set[Mapping]] = field(default_factory=dict)
    #: Processes whose last table KVM shadows, and those whose shadow may be out of date.
    shadowed: set[int] = field(default_factory=set)
    unsync: set[int] = field(default_factory=set)
    stats: Counter[str] = field(default_factory=Counter)

    # -- the guest's tables

    def store(self, process: int, page: int, to: Mapping | None) -> None:
        old = self.now[process, page]
        if old is not None:
            self.before.setdefault((process, page), set()).add(old)
        self.now[process, page] = to
        if process in self.shadowed:
            self.unsync.add(process)

    def allowed(self, process: int, page: int) -> set[Mapping]:
        now = self.now[process, page]
        return self.before.get((process, page), set()) | ({now} if now else set())

    def _invalidated(self, covers: Callable[[int, int, bool], bool]) -> None:
        """Forget the former mappings that `covers` names: by process, page, and whether they are global."""
        for (process, page), before in self.before.items():
            self.before[process, page] = {one for one in before if not covers(process, page, one.is_global)}

    # -- instructions

    def mov_cr3(self, process: int, noflush: bool) -> None:
        if process != self.current:
            self._new_pgd(process)
        self.current = process
        if not noflush:
            self._invalidated(lambda q, page, is_global: not is_global and pcid_of(q) == pcid_of(process))
            self._invalidate_pcid(pcid_of(process))

    def invlpg(self, page: int) -> None:
        pcid = pcid_of(self.current)
        self._invalidated(lambda q, at, is_global: at == page and (is_global or pcid_of(q) == pcid))

    def invpcid(self, kind: int, process: int, page: int) -> None:
        pcid = pcid_of(process)
        self._invalidated(
            lambda q, at, is_global: kind == 2
            or (not is_global and (kind == 3 or (pcid_of(q) == pcid and (kind == 1 or at == page))))
        )
        if kind == 1:
            self._invalidate_pcid(pcid)
        elif kind >= 2:
            self._flush_guest()

    def toggle_pge(self) -> None:
        """MOV to CR4: all PCIDs, with global pages."""
        self._invalidated(lambda q, at, is_global: True)
        self._flush_guest()

    def _flush_guest(self) -> None:
        self.stats["flush_guest"] += 1
        self.unsync.discard(self.current)
        self.previous = [None if root in self.unsync else root for root in self.previous]

    # -- KVM's roots

    def enter(self) -> None:
        """Load the root if there is none, which flushes and syncs."""
        if self.root is None:
            self.root = self.current
            self.unsync.discard(self.current)
            self.stats["mmu_load"] += 1
            self.stats["flush_current"] += 1

    def _new_pgd(self, process: int) -> None:
        root = self.root
        for i in range(PREVIOUS):
            root, self.previous[i] = self.previous[i], root
            if root == process:
                self.root = root
                self.stats["cached_roots"] += 1
                return
        self.root = None

    def _invalidate_pcid(self, pcid: int) -> None:
        """Sync and flush the current context if the PCID is its own; free previous roots of the PCID."""
        if pcid_of(self.current) == pcid:
            self.enter()
            self.unsync.discard(self.current)
            self.stats["flush_current"] += 1
        self.previous = [
            None if root is not None and pcid_of(root) == pcid else root for root in self.previous
        ]
