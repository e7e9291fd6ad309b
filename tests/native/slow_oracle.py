"""The slow, obvious oracle: the whole history is kept, each access is judged by reading it from the start.

It knows nothing of tags, ledgers or custody.  A right is (vm, gfn, frame, kind of access).  An access is
legal iff its right was valid at some moment since the last completed revocation of (vm, gfn, kind), and the
frame has not been freed since the translation was made: the same frame granted again is another right.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

READ, WRITE = 0, 1


class Event(NamedTuple):
    """`what`: grant, ungrant, revoke (valid rights stay valid) or withdraw (none stays)."""

    what: str
    vm: int
    gfn: int
    frame: int
    kind: int


@dataclass
class History:
    """Everything that happened to rights, in order."""

    events: list[Event] = field(default_factory=list)

    def add(self, what: str, vm: int, gfn: int, frame: int, kinds: tuple[int, ...]) -> None:
        self.events += [Event(what, vm, gfn, frame, kind) for kind in kinds]

    def legal(self, vm: int, gfn: int, frame: int, kind: int) -> bool:
        """Judge one access by the rule above."""
        valid = valid_since_revocation = False
        for event in self.events:
            if (event.vm, event.gfn, event.kind) != (vm, gfn, kind):
                continue
            if event.what == "revoke":
                valid_since_revocation = valid
            elif event.what == "withdraw":
                valid = valid_since_revocation = False
            elif event.frame == frame:
                valid = event.what == "grant"
                valid_since_revocation |= valid
        return valid_since_revocation


class Translation(NamedTuple):
    """A TLB entry: the frame, whether it may be written through, how often the frame had been freed."""

    frame: int
    write: bool
    life: int


@dataclass
class Model:
    """One VM's SPTEs and the guest-physical mappings that each pCPU may hold, none ever evicted."""

    pcpus: int
    history: History = field(default_factory=History)
    sptes: dict[int, Translation] = field(default_factory=dict)
    cached: list[dict[int, Translation]] = field(default_factory=list)
    behind: dict[int, int] = field(default_factory=dict)
    freed: Counter[int] = field(default_factory=Counter)
    violations: int = 0
    stale: int = 0

    def __post_init__(self) -> None:
        self.cached = [{} for _ in range(self.pcpus)]

    def map(self, gfn: int, frame: int) -> None:
        old = self.sptes.get(gfn)
        if old and old.frame != frame:
            self.zap(gfn)
        if old and old.frame == frame:
            self.history.add("grant", 0, gfn, frame, (WRITE,))
        else:
            self.history.add("grant", 0, gfn, frame, (READ, WRITE))
        self.behind[gfn] = frame
        self.sptes[gfn] = Translation(frame, True, self.freed[frame])

    def zap(self, gfn: int) -> None:
        if old := self.sptes.pop(gfn, None):
            self.history.add("ungrant", 0, gfn, old.frame, (READ, WRITE) if old.write else (READ,))

    def write_protect(self, gfn: int) -> None:
        old = self.sptes.get(gfn)
        if old and old.write:
            self.history.add("ungrant", 0, gfn, old.frame, (WRITE,))
            self.sptes[gfn] = old._replace(write=False)

    def free(self, gfn: int) -> None:
        """The host takes the frame behind the page away, whatever SPTEs and TLBs hold."""
        self.history.add("withdraw", 0, gfn, -1, (READ, WRITE))
        if gfn in self.behind:
            self.freed[self.behind.pop(gfn)] += 1

    def flush(self) -> None:
        for tlb in self.cached:
            tlb.clear()

    def use(self, gfn: int, entry: Translation, kind: int) -> bool:
        """A translation is used: True if that is legal."""
        legal = self.history.legal(0, gfn, entry.frame, kind) and entry.life == self.freed[entry.frame]
        self.violations += not legal
        return legal

    def access(self, cpu: int, gfn: int, kind: int) -> bool:
        """One access.  False: it needs a mapping first (EPT violation), then try again."""
        entry = self.cached[cpu].get(gfn)
        if entry and (kind == READ or entry.write):
            if self.use(gfn, entry, kind):
                return True
            del self.cached[cpu][gfn]
        spte = self.sptes.get(gfn)
        if spte is None or (kind == WRITE and not spte.write):
            self.cached[cpu].pop(gfn, None)
            return False
        self.cached[cpu][gfn] = spte
        if not self.use(gfn, spte, kind):
            self.cached[cpu].pop(gfn, None)
        return True
