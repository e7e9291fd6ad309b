"""A workload: the events of a traced host on which KVM's flushing depends, in their order.

A trace does not show everything, so these rules make a workload from it:

* A vCPU's page fault stands for an access of its guest to the page.  A trace shows no access without a fault.
* If a page is zapped that no fault in the trace has mapped, it was mapped when the recording began.
* If a task zaps SPTEs within 20 ms of a notifier's range, with pauses below 5 ms, these SPTEs are one range
  of host memory that is unmapped.  A range without an SPTE is left out.  Where a probe shows flushes, a flush
  in the middle of a range, at which KVM yields, divides it into two.
* Zaps for other reasons are left out.  After a memslot's deletion such zaps are those of obsolete roots.
* If a task write-protects SPTEs outside of a notifier's range, with pauses below 5 ms, this burst is an
  operation on the dirty log: the first burst arms it, each later one reads it.
* A vCPU's entry is left out if it is on the same CPU as its last one, and neither an event of its VM nor a
  flush by another of its vCPUs came in between.
* A vCPU's first write of CR4 changes the bits that its second one changes.  Bits that are part of no role
  are left out: with EPT the guest owns those that flush.
* A block that a vCPU maps by a huge page is backed by one from this fault on.  If the host collapsed it
  before, and the fault of another vCPU came in between, the replay has a flush more.
* Guest pages are numbered anew by blocks of 2 MiB, in their order and without gaps.
* A vCPU had run before the recording began, unless a probe tells that it loads a root before its first entry.
* Without processes (record-tgid), vCPUs of different numbers are those of one VM.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from emulator.hosttrace.fields import PAGE_SHIFT, probe_of, spte_of, vcpu_of
from emulator.hosttrace.lines import Event
from emulator.hosttrace.observed import Observed
from emulator.kvm.kvm_host import KVM_MMU_CR4_ROLE_BITS

BLOCK: Final = 512
_PAUSE_NS: Final = 5_000_000
# A task may lose its CPU between the event of a notifier's range and the first SPTE that it zaps.
_RANGE_NS: Final = 20_000_000
_ADDRESS: Final = re.compile(r"\baddress (?:0x)?([0-9a-f]+) error_code (?:0x)?([0-9a-f]+)")
_SMM: Final = re.compile(r"vcpu (\d+): (entering|leaving) SMM")
# PFERR_WRITE_MASK, which is also the bit of a write in the exit qualification of an EPT violation.
_WRITE: Final = 1 << 1
_FLUSH: Final = "kvm_flush_remote_tlbs"
_RANGE_END: Final = "kvm_mmu_notifier_invalidate_range_end"
_LOAD: Final = "kvm_mmu_load"
_CR: Final = re.compile(r"cr_write (\d+) = (?:0x)?([0-9a-f]+)")
# KVM's counts, by the functions of VMX or SVM of which a recording may show the calls.
RECORDED: Final = {
    "remote_tlb_flush_requests": ("kvm_flush_remote_tlbs",),
    "make_all_cpus_request": ("kvm_make_all_cpus_request",),
    "flush_all": ("vmx_flush_tlb_all",),
    # On SVM a vCPU that moves gets a new ASID, without a call of svm_flush_tlb_all().
    "flush_all_but_moves": ("svm_flush_tlb_all",),
    "flush_current": ("vmx_flush_tlb_current", "svm_flush_tlb_current"),
    "flush_guest": ("vmx_flush_tlb_guest", "svm_flush_tlb_guest"),
    "mmu_load": ("kvm_mmu_load",),
}


@dataclass(slots=True)
class Step:
    """One event.  `verb` is one of VERBS; `vcpu` is -1 for events of a VM; pages are those of the guest."""

    microseconds: int
    verb: str
    vm: int
    vcpu: int = -1
    start: int = -1
    end: int = -1


# The arguments behind VM or VM.VCPU: the number of them, and whether the event is a vCPU's.
VERBS: Final[dict[str, tuple[int, bool]]] = {
    "enter": (1, True),  # CPU
    "read": (1, True),  # page
    "write": (1, True),  # page
    "cr4": (1, True),  # the bits that change
    "smi": (0, True),
    "rsm": (0, True),
    "huge": (1, False),  # first page of a block that the host backs by a huge page
    "unmap": (2, False),  # pages from START to END, which is not included
    "log": (0, False),
    "zap-all": (0, False),
}


@dataclass
class Workload:
    """The events of a recording, and the machine and the VMs that they are about.

    `vms` has the number of vCPUs of each VM, `pages` the size of its memory, `mapped` the pages that were
    mapped when the recording began; `new` the vCPUs that had not run by then, by VM and number; `recorded`
    KVM's own counts as far as the trace shows them, and `left_out` the events that are not in the workload.
    """

    source: str
    pcpus: int
    vms: list[int]
    pages: list[int]
    mapped: list[list[int]]
    steps: list[Step]
    new: list[tuple[int, int]] = field(default_factory=list)
    recorded: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.steps[-1].microseconds / 1e6 if self.steps else 0.0


class Builder:
    """Collects the events of a trace; `workload` numbers pages and CPUs and ends it."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._first = -1
        self._vms: dict[int, int] = {}  # by process
        self._numbers: list[dict[int, int]] = []  # by VM: the vCPUs' tasks by their numbers
        self._tasks: dict[int, tuple[int, int]] = {}  # VM and number by task
        self._cpu: dict[int, int] = {}  # the CPU of a vCPU's last entry, by task
        self._stale: set[int] = set()  # tasks of vCPUs that have not entered since an event of their VM
        self._mapped: list[set[int]] = []
        self._before: list[set[int]] = []
        self._obsolete: set[int] = set()  # VMs of which zaps may be those of obsolete roots
        self._unmapping: dict[int, tuple[int, Step | None]] = {}  # by task, when a range ends, its step
        self._logging: dict[int, tuple[int, Step]] = {}  # by task, the last protection and its step
        self._access: dict[int, Step] = {}  # by task, its last access
        self._loaded: set[int] = set()  # tasks that have loaded a root before they entered a guest
        self._new: set[tuple[int, int]] = set()  # vCPUs that have not run before
        self._cr4: dict[int, tuple[int, Step | None]] = {}  # by task, its last CR4, and a first write's step
        self.left_out: Counter[str] = Counter()

    def add(self, event: Event) -> None:
        if event.time < 0:
            return
        if self._first < 0:
            self._first = event.time
        if (read := _READERS.get(event.name)) is not None:
            read(self, event)
        elif event.caller:
            self._called(event, event.name)
        elif (probe := probe_of(event.fields)) is not None and probe.at_start:
            self._called(event, probe.function)

    def _step(self, event: Event, verb: str, vm: int, vcpu: int = -1, start: int = -1, end: int = -1) -> Step:
        step = Step((event.time - self._first) // 1000, verb, vm, vcpu, start, end)
        self._steps.append(step)
        if vcpu < 0 and verb != "huge":
            self._flushed(vm)
        return step

    # --- VMs and vCPUs ------------------------------------------------------------------------------------

    def _vcpu(self, event: Event, number: int) -> tuple[int, int]:
        """Return the VM and the number of the vCPU that the event's task runs."""
        if event.tid not in self._tasks:
            vm = self._vm_of(event.tgid, number)
            number = len(self._numbers[vm]) if number < 0 else number
            self._numbers[vm].setdefault(number, event.tid)
            if event.tid in self._loaded:
                self._new.add((vm, number))
            self._tasks[event.tid] = vm, number
        return self._tasks[event.tid]

    def _vm_of(self, tgid: int, number: int) -> int:
        if tgid >= 0 and tgid in self._vms:
            return self._vms[tgid]
        if tgid < 0:
            for vm, numbers in enumerate(self._numbers):
                if number not in numbers:
                    return vm
        self._numbers.append({})
        self._mapped.append(set())
        self._before.append(set())
        if tgid >= 0:
            self._vms[tgid] = len(self._numbers) - 1
        return len(self._numbers) - 1

    def _entry(self, event: Event) -> None:
        vm, number = self._vcpu(event, vcpu_of(event.fields))
        self._unmapping.pop(event.tid, None)
        if self._cpu.get(event.tid) != event.cpu or event.tid in self._stale:
            self._stale.discard(event.tid)
            self._cpu[event.tid] = event.cpu
            self._step(event, "enter", vm, number, event.cpu)

    def _fault(self, event: Event) -> None:
        found = _ADDRESS.search(event.fields)
        if found is None or event.tid not in self._cpu:
            self.left_out["page faults without an address, or before the vCPU's first entry"] += 1
            return
        vm, number = self._tasks[event.tid]
        verb = "write" if int(found[2], 16) & _WRITE else "read"
        page = int(found[1], 16) >> PAGE_SHIFT
        self._access[event.tid] = self._step(event, verb, vm, number, page)

    def _smm(self, event: Event) -> None:
        if (found := _SMM.search(event.fields)) is not None and event.tid in self._tasks:
            vm, number = self._tasks[event.tid]
            self._step(event, "smi" if found[2] == "entering" else "rsm", vm, number)
            self._stale.add(event.tid)

    def _cr_write(self, event: Event) -> None:
        found = _CR.search(event.fields)
        if found is None or event.tid not in self._tasks or found[1] not in ("0", "4"):
            return
        if found[1] == "0":
            self.left_out["writes of CR0"] += 1
            return
        value, (last, first) = int(found[2], 16), self._cr4.get(event.tid, (-1, None))
        vm, number = self._tasks[event.tid]
        changed = 0 if last < 0 else (last ^ value) & KVM_MMU_CR4_ROLE_BITS
        step = self._step(event, "cr4", vm, number, changed)
        if first is not None:
            first.start = changed
        self._cr4[event.tid] = value, step if last < 0 else None

    def _nested(self, event: Event) -> None:
        self.left_out["entries of nested guests"] += 1

    # --- the MMU ------------------------------------------------------------------------------------------

    def _range(self, event: Event) -> None:
        self._unmapping[event.tid] = event.time + _RANGE_NS, None

    def _zap_all(self, event: Event) -> None:
        vm = self._vm_of(event.tgid, -1)
        self._unmapping.pop(event.tid, None)
        self._obsolete.add(vm)
        self._mapped[vm].clear()
        self._step(event, "zap-all", vm)

    def _spte(self, event: Event) -> None:
        change = spte_of(event.fields)
        if change is None or not (change.leaf or change.replaces_table):
            return
        vm = self._vm_with(event, change.gfn)
        pages = range(change.gfn, change.gfn + (BLOCK if change.level == 2 else 1))
        if change.replaces_table:
            self._flushed(vm)
        if change.mapped or change.replaces_table:
            self._map(event, vm, change.level, pages)
        elif change.zapped:
            self._zap(event, vm, pages)
        elif change.protected and event.tid not in self._tasks:
            self._protect(event, vm, pages)

    def _vm_with(self, event: Event, gfn: int) -> int:
        """Return the VM that owns the page: the process's, or else the first that has it mapped."""
        if event.tid in self._tasks:
            return self._tasks[event.tid][0]
        having = (vm for vm, mapped in enumerate(self._mapped) if gfn in mapped and event.tgid < 0)
        return next(having, self._vm_of(event.tgid, -1))

    def _map(self, event: Event, vm: int, level: int, pages: range) -> None:
        self._mapped[vm].update(pages)
        access = self._access.get(event.tid)
        if level == 2 and access is not None and access.start in pages:
            place = len(self._steps) - 1
            while self._steps[place] is not access:
                place -= 1
            self._steps.insert(place, Step(access.microseconds, "huge", vm, start=pages.start))

    def _zap(self, event: Event, vm: int, pages: range) -> None:
        until, step = self._unmapping.get(event.tid, (-1, None))
        if event.time > until:
            self.left_out["zapped SPTEs outside of a notifier's range"] += 1
            return
        self._was_mapped(vm, pages)
        if pages.start not in self._mapped[vm]:
            return  # of an obsolete root
        self._mapped[vm].difference_update(pages)
        if step is None:
            step = self._step(event, "unmap", vm, start=pages.start, end=pages.stop)
        self._unmapping[event.tid] = event.time + _PAUSE_NS, step
        step.start, step.end = min(step.start, pages.start), max(step.end, pages.stop)

    def _flushed(self, vm: int) -> None:
        """Keep the next entry of each vCPU of the VM, at which it flushes."""
        self._stale.update(task for task, (number, _) in self._tasks.items() if number == vm)

    def _protect(self, event: Event, vm: int, pages: range) -> None:
        self._was_mapped(vm, pages)
        last = self._logging.get(event.tid)
        step = None if last is None or event.time - last[0] > _PAUSE_NS else last[1]
        self._logging[event.tid] = event.time, step or self._step(event, "log", vm)

    def _was_mapped(self, vm: int, pages: range) -> None:
        """Record pages that are not known to be mapped as mapped when the recording began."""
        run = any(number not in self._new for number in ((vm, vcpu) for vcpu in self._numbers[vm]))
        if vm not in self._obsolete and (run or not self._numbers[vm]):
            self._before[vm].update(page for page in pages if page not in self._mapped[vm])
            self._mapped[vm].update(pages)

    def _called(self, event: Event, function: str) -> None:
        if function == _RANGE_END:
            self._unmapping.pop(event.tid, None)
        elif function == _LOAD and event.tid not in self._tasks:
            self._loaded.add(event.tid)
        elif function == _FLUSH:
            # SPTEs that are zapped or protected after this flush get a flush of their own.
            self._logging.pop(event.tid, None)
            if event.tid in self._tasks:
                self._flushed(self._tasks[event.tid][0])
            if event.tid in self._unmapping:
                self._unmapping[event.tid] = event.time + _PAUSE_NS, None

    # --- the end ------------------------------------------------------------------------------------------

    def workload(self, source: str, observed: Observed) -> Workload:
        """Return the workload; pages and CPUs get their numbers."""
        blocks = [self._blocks(vm) for vm in range(len(self._numbers))]
        order = [dict(zip(sorted(found), range(len(found)), strict=True)) for found in blocks]

        def page(vm: int, number: int) -> int:
            return order[vm][number // BLOCK] * BLOCK + number % BLOCK

        cpus = sorted({step.start for step in self._steps if step.verb == "enter"})
        numbers = [sorted(found) for found in self._numbers]
        self._leave_out_unknown()
        for step in self._steps:
            step.vcpu = numbers[step.vm].index(step.vcpu) if step.vcpu >= 0 else -1
            if step.verb == "enter":
                step.start = cpus.index(step.start)
            elif step.verb != "cr4" and step.start >= 0:
                step.end = page(step.vm, step.end - 1) + 1 if step.end >= 0 else -1
                step.start = page(step.vm, step.start)
        seen = {
            name: max((observed.calls(function) for function in functions), default=0)
            for name, functions in RECORDED.items()
        }
        # Requests for the clock (KVM_REQ_MCLOCK_INPROGRESS) do not come from the MMU.
        clock = sum(cause.requests["MCLOCK_INPROGRESS"] for cause in observed.causes.values())
        seen["make_all_cpus_request"] -= clock
        return Workload(
            source=source,
            pcpus=max(len(cpus), 1),
            vms=[max(len(found), 1) for found in self._numbers],
            pages=[max(len(found), 1) * BLOCK for found in blocks],
            mapped=[sorted(page(vm, number) for number in found) for vm, found in enumerate(self._before)],
            new=sorted((vm, numbers[vm].index(number)) for vm, number in self._new),
            steps=self._steps,
            recorded={name: n for name, n in seen.items() if n},
            left_out=dict(self.left_out),
        )

    def _leave_out_unknown(self) -> None:
        """Leave out writes of CR4 that change no role, and those of which the change is not known."""
        if unknown := sum(step is not None for _, step in self._cr4.values()):
            self.left_out["first writes of CR4, whose change the trace does not show"] += unknown
        self._steps = [step for step in self._steps if step.verb != "cr4" or step.start]

    def _blocks(self, vm: int) -> set[int]:
        found = {number // BLOCK for number in self._before[vm]}
        for step in self._steps:
            if step.vm == vm and step.verb not in ("enter", "cr4", "log", "zap-all", "smi", "rsm"):
                found.add(step.start // BLOCK)
                if step.end >= 0:
                    found.add((step.end - 1) // BLOCK)
        return found


_READERS: Final = {
    "kvm_entry": Builder._entry,
    "kvm_page_fault": Builder._fault,
    "kvm_cr": Builder._cr_write,
    "kvm_nested_vmenter": Builder._nested,
    "kvm_nested_vmrun": Builder._nested,
    "kvm_smm_transition": Builder._smm,
    "kvm_unmap_hva_range": Builder._range,
    "kvm_mmu_zap_all_fast": Builder._zap_all,
    "kvm_tdp_mmu_spte_changed": Builder._spte,
}
