"""The adversary of the architecture: evictions and speculative fills of TLBs become the scheduler's choices.

A processor may drop any cached mapping at any time, and may cache translations that no access has needed (SDM
vol. 3A, 4.10.2.3, 4.10.3.1; vol. 3C, 29.4). KVM can therefore neither elide a flush because the guest has not
touched a page, nor rely on an entry because the guest has just used it.

Each candidate is a daemon for one pCPU and one page, which it names by address, so it is equal in every
execution. It conflicts with uses of that page on that pCPU, and with all other candidates, because they share
its budget. It takes no step after the last access that it can affect.

Evictions happen at any time. Fills need the current VPID and EP4TA and happen in guest mode, between two
instructions: an access with its whole walk is one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine.control import Control
from emulator.explore.machine.lib import ControlledLib
from emulator.explore.machine.options import ExploreOptions
from emulator.litmus.model import LitmusTest
from emulator.litmus.syntax import GuestOp, Op
from native import ffi, lib
from native.types import CpuId, EventKind, Gva, MappingKind, VcpuId, VmId

if TYPE_CHECKING:
    from emulator.litmus.harness import Harness
    from native._native import GuestOp as CoreOp
    from native._native import MachinePtr, TlbEntry, VcpuExitPtr

_ACCESSES: Final = ("READ", "WRITE", "EXECUTE")
_ACCESS_OPS: Final = frozenset(getattr(lib, f"GUEST_OP_{name}") for name in _ACCESSES)
_MOST: Final = 4096
# Number of 4 KiB pages in each page_size.
_PAGES: Final = {lib.PAGE_4K: 1, lib.PAGE_2M: 1 << 9, lib.PAGE_1G: 1 << 18}
_LARGE: Final = 9


@dataclass(frozen=True, slots=True)
class Place:
    """A page that guests of VM `vm` (its number in the test) access, and a pCPU that they may run on.

    paging: the page is a linear one.
    """

    pcpu: CpuId
    vm: int
    page: int
    paging: bool


def places(test: LitmusTest) -> list[Place]:
    """Return each page on each pCPU that a vCPU of its VM can run on."""
    pcpus: dict[int, set[CpuId]] = {}
    pages: dict[int, set[int]] = {}
    for name, thread in test.threads.items():
        if not thread.is_vcpu:
            continue
        ops = [*thread.parsed, *(op for who, op in (*test.parsed_init, *test.parsed_final) if who == name)]
        pcpus.setdefault(thread.vm, set()).update([CpuId(thread.pcpu)], *(_pcpus(op) for op in ops))
        pages.setdefault(thread.vm, set()).update(*(_pages(op) for op in ops))
    return [
        Place(pcpu, vm, page, test.vm[vm].paging)
        for vm in sorted(pages)
        for pcpu in sorted(pcpus[vm])
        for page in sorted(pages[vm])
    ]


def _pcpus(op: Op) -> list[CpuId]:
    return [CpuId(op.number(arg.name)) for arg in op.args if arg.kind == "pcpu"]


def _pages(op: Op) -> list[int]:
    instructions = op.instructions() if isinstance(op, GuestOp) else []
    return [one.linear >> 12 for one in instructions if one.kind in _ACCESSES]


class Adversary:
    """The candidates of one test, and the pCPUs that are in guest mode."""

    def __init__(self, test: LitmusTest, control: Control, options: ExploreOptions) -> None:
        self.control = control
        self.options = options
        self.places = places(test)
        self.pcpus = sorted({place.pcpu for place in self.places})
        self.paging = {place.pcpu for place in self.places if place.paging}
        self.several = len(test.vm) > 1
        self.inside: dict[CpuId, VmId] = {}  # by pCPU in guest mode: its guest's VM
        self.evictions = self.fills = 0  # the budgets that are left in this execution
        self.cpu_of: dict[str, CpuId] = {}  # by the task's name
        self._ids: list[VmId] = []  # by a VM's number in the test
        self._ept = True
        self._masks: dict[tuple[CpuId, VmId, int], tuple[int, int]] = {}
        self._entry = ffi.new("struct tlb_entry *")
        self._entries = ffi.new("struct tlb_entry[]", _MOST)
        self.names = [name for name, _, _ in self._daemons(None)]

    def spawn(self, execution: Execution, harness: Harness) -> None:
        """Spawn the candidates of one execution."""
        self.inside.clear()
        self.evictions, self.fills = self.options.evict, self.options.speculate
        self._ids = [kvm.id for kvm in harness.kvms]
        self._ept = all(kvm.params.ept for kvm in harness.kvms)
        for name, _, body in self._daemons(execution):
            execution.spawn(name, body, daemon=True)

    def _daemons(self, execution: Execution | None) -> Iterator[tuple[str, CpuId, Callable[[], None]]]:
        found: list[tuple[str, CpuId, Callable[[], None]]] = []
        for place in self.places:
            what = f"{place.pcpu}:{place.page:#x}" + (f":vm{place.vm}" if self.several else "")
            if self.options.evict:
                found.append((f"evict{what}", place.pcpu, self._evicts(execution, place)))
            if self.options.speculate:
                found.append((f"fill{what}", place.pcpu, self._fills(execution, place)))
        if self.options.evict:
            for pcpu in self.pcpus:
                found.append((f"evict{pcpu}:tables", pcpu, self._evicts_tables(execution, pcpu)))
                if pcpu in self.paging:
                    found.append((f"evict{pcpu}:physical", pcpu, self._evicts_physical(execution, pcpu)))
        self.cpu_of = {name: pcpu for name, pcpu, _ in found}
        yield from found

    # --- events that candidates depend on -------------------------------------------------------------------

    def entered(self, execution: Execution, cpu: CpuId, vm: VmId) -> None:
        self.inside[cpu] = vm
        execution.touch(0, self.control.bit("guest mode", cpu))

    def left(self, execution: Execution, cpu: CpuId) -> None:
        self.inside.pop(cpu, None)
        execution.touch(0, self.control.bit("guest mode", cpu))

    def accessed(self, cpu: CpuId, vm: VmId, page: int) -> int:
        """Return the candidates' objects that the guest's access conflicts with."""
        alone, region = self._mask(cpu, vm, page)
        return region if self.is_large(cpu, vm, page) else alone

    def walked(self, cpu: CpuId) -> int:
        """Return the caches that a walk uses and fills, too."""
        return self.control.bit("walk caches", cpu) | self.control.bit("physical", cpu)

    def everything_on(self, cpu: CpuId, vm: VmId) -> int:
        """Return the objects of an instruction that changes the TLB other than by an access."""
        mask = self.walked(cpu)
        for place in self.places:
            if place.pcpu == cpu and self._ids[place.vm] == vm:
                mask |= self.control.bit("cached", cpu, vm, place.page)
        return mask

    def _mask(self, cpu: CpuId, vm: VmId, page: int) -> tuple[int, int]:
        """Return the object of a page, and those of all pages that one large translation maps with it."""
        found = self._masks.get((cpu, vm, page))
        if found is None:
            bit = self.control.bit
            alone = region = bit("cached", cpu, vm, page)
            for place in self.places:
                if self._ids[place.vm] == vm and place.page >> _LARGE == page >> _LARGE:
                    region |= bit("cached", cpu, vm, place.page)
            found = self._masks[cpu, vm, page] = alone, region
        return found

    def is_large(self, cpu: CpuId, vm: VmId, page: int) -> bool:
        """Return whether a cached translation of the page maps its neighbours, too."""
        t = lib.cpu_tlb(self.control.machine.m, cpu)
        entries = self._entries
        for i in range(lib.tlb_dump(t, entries, _MOST)):
            e = entries[i]
            if e.size != lib.PAGE_4K and e.vm == vm and _covers(e, page):
                return True
        return False

    def _kind(self, place: Place) -> MappingKind:
        """Return the kind of the mappings that accesses to a page use."""
        if not self._ept:
            return lib.KIND_LINEAR
        return lib.KIND_COMBINED if place.paging else lib.KIND_GUEST_PHYSICAL

    # --- candidates -----------------------------------------------------------------------------------------

    def _evicts(self, execution: Execution | None, place: Place) -> Callable[[], None]:
        what = f"the translation of page {place.page:#x}"

        def body() -> None:
            assert execution is not None
            vm, bit = self._ids[place.vm], self.control.bit
            cached = bit("cached", place.pcpu, vm, place.page)
            while True:
                self._evicts_now(execution, what, cached, 0)
                if self.is_large(place.pcpu, vm, place.page):
                    execution.touch(self._mask(place.pcpu, vm, place.page)[1], 0)
                self._evict(
                    place.pcpu,
                    vm,
                    place.page,
                    lambda e: e.kind == self._kind(place) and e.vm == vm and _covers(e, place.page),
                )

        return body

    def _evicts_tables(self, execution: Execution | None, pcpu: CpuId) -> Callable[[], None]:
        def body() -> None:
            assert execution is not None
            caches = self.control.bit("walk caches", pcpu)
            while True:
                self._evicts_now(execution, "the paging-structure caches", 0, caches)
                m = self.control.machine.m
                t, n = lib.cpu_tlb(m, pcpu), 0
                while lib.psc_evict(t, 0):
                    n += 1
                if n:
                    lib.event_record(m, pcpu, lib.EVENT_EVICT, n, lib.EVICT_TABLES)

        return body

    def _evicts_physical(self, execution: Execution | None, pcpu: CpuId) -> Callable[[], None]:
        """Evict guest-physical mappings, which walks use in guests with page tables."""

        def body() -> None:
            assert execution is not None
            mappings = self.control.bit("physical", pcpu)
            while True:
                self._evicts_now(execution, "the guest-physical mappings", 0, mappings)
                self._evict(pcpu, -1, 0, lambda e: e.kind == lib.KIND_GUEST_PHYSICAL)

        return body

    def _evicts_now(self, execution: Execution, what: str, reads: int, writes: int) -> None:
        control = self.control
        reads |= control.everything
        writes |= control.bit("evictions")
        label = ("evicts", what, "write")
        execution.step(label, reads, writes, lambda: self.evictions > 0, "an eviction to be left")
        self.evictions -= 1

    def _evict(self, cpu: CpuId, vm: int, page: int, wanted: Callable[[TlbEntry], bool]) -> None:
        m, entries = self.control.machine.m, self._entries
        t, evicted = lib.cpu_tlb(m, cpu), 0
        # Backwards: an eviction moves no entry before it.
        for i in range(lib.tlb_dump(t, entries, _MOST) - 1, -1, -1):
            if wanted(entries[i]):
                evicted += lib.tlb_evict(t, i)
        if evicted:
            scope = lib.EVICT_PHYSICAL if vm < 0 else lib.EVICT_PAGE
            kind = EventKind((vm + 1) << 16 | lib.EVENT_EVICT)
            lib.event_record(m, cpu, kind, page if vm >= 0 else evicted, scope)

    def _fills(self, execution: Execution | None, place: Place) -> Callable[[], None]:
        pcpu, page = place.pcpu, place.page

        def body() -> None:
            assert execution is not None
            vm, bit, m = self._ids[place.vm], self.control.bit, self.control.machine.m
            reads = bit("guest mode", pcpu) | self.control.everything
            # Two fills commute, whatever caches of table pointers they share on the way.
            walks = bit("custody") | bit("custody of tables") | bit("ept") | self.walked(pcpu)
            walks |= self.control.custody_of_root()
            # The walk sets flags in the guest's tables.
            flags = bit("memory", vm) | self.control.contents(vm, None) if place.paging else 0
            cached = bit("cached", pcpu, vm, page)
            fills = cached | bit("speculative fills")
            label = ("speculative fill of", f"page {page:#x}", "write")
            while True:
                execution.step(
                    label,
                    reads,
                    fills,
                    lambda: self.fills > 0 and self.inside.get(pcpu, -1) == vm,
                    "guest mode",
                )
                self.fills -= 1
                if lib.tlb_lookup(lib.cpu_tlb(m, pcpu), self._kind(place), page, self._entry) == 1:
                    continue
                # Even a fill that fails reads tables, sets flags, and fills caches on the way.
                execution.touch(walks, flags)
                before = self.control.walks(pcpu)
                self.control.machine.cpus[pcpu].check(lib.guest_speculate(m, pcpu, Gva(page << 12)))
                if self.control.walks(pcpu).updates != before.updates:
                    execution.touch(0, bit("ept"))
                if self.is_large(pcpu, vm, page):
                    execution.touch(0, self._mask(pcpu, vm, page)[1])

        return body


def _covers(entry: TlbEntry, page: int) -> bool:
    first: int = entry.page
    return first <= page < first + _PAGES[entry.size]


class AdversarialLib(ControlledLib):
    """A ControlledLib in which guest accesses conflict with the adversary's candidates."""

    def guest_run(self, m: MachinePtr, cpu: CpuId, vcpu: VcpuId, budget: int, out: VcpuExitPtr) -> int:
        control = self.control
        execution, adversary = control.execution, control.adversary
        if execution is None or adversary is None:
            return super().guest_run(m, cpu, vcpu, budget, out)
        # No other task takes a step before the guest's first one.
        adversary.entered(execution, cpu, control.vm_of(vcpu))
        try:
            return super().guest_run(m, cpu, vcpu, budget, out)
        finally:
            adversary.left(execution, cpu)

    def _performed(self, execution: Execution, cpu: CpuId, vm: VmId, op: CoreOp, walked: bool) -> None:
        adversary = self.control.adversary
        if adversary is None:
            return
        if op.kind not in _ACCESS_OPS:
            execution.touch(0, adversary.everything_on(cpu, vm))
            return
        execution.touch(0, adversary.accessed(cpu, vm, op.linear >> 12))
        if walked:
            execution.touch(0, adversary.walked(cpu))
