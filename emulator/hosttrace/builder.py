"""Makes a workload from the events of a trace.

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
* If a vCPU is in guest mode when the host changes its VM's memory, it stays in guest mode meanwhile, so that
  a flush interrupts it (residency.py).
* If a vCPU exits for a write of CR4 and then loads a root, without a kvm_cr, it has changed CR4.PSE.
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
from typing import Final

from emulator.hosttrace.fields import PAGE_SHIFT, call_site_of, cpus_of, probe_of, range_of, spte_of, vcpu_of
from emulator.hosttrace.lines import Event
from emulator.hosttrace.memslots import Memslot, Memslots, NotifierRange
from emulator.hosttrace.observed import KICK, Observed
from emulator.hosttrace.residency import Residency
from emulator.hosttrace.workload import BLOCK, PLACING, RECORDED, Step, Workload
from emulator.kvm.kvm_host import KVM_MMU_CR4_ROLE_BITS, X86_CR4_PSE

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
# On SVM the reason's name, on VMX an exit qualification with CR4 and MOV to CR (SDM table 29-3).
_CR4_WRITE: Final = re.compile(r"reason (?:write_cr4|CR_ACCESS\b.*\binfo1 (?:0x)?[0-9a-f]*04)\b")
_WITHOUT_PAGES: Final = frozenset({"enter", "stay", "leave", "cr4", "log", "zap-all", "smi", "rsm"})


class Builder:
    """Collects the events of a trace; `workload` numbers pages and CPUs and ends it."""

    def __init__(self, memslots: tuple[Memslot, ...] = ()) -> None:
        self._memslots = Memslots(memslots)
        self._range_of: dict[int, NotifierRange] = {}  # by task
        self._has_sptes = False
        self._touched: list[set[int]] = []  # by VM: pages that faults have mapped, if the trace shows no SPTE
        self._by_address: list[tuple[Step, set[int]]] = []  # ranges by memslots, and pages mapped before
        self._writing_cr4: set[int] = set()  # tasks after an exit for a write of CR4
        self._steps: list[Step] = []
        self._residency = Residency(self._steps)
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
        if vcpu < 0 and verb != "huge":
            self._residency.change(event.tid, step, self._numbers[vm])
            self._flushed(vm)
        elif vcpu >= 0:
            self._residency.own(event.tid, verb, event.cpu)
        self._steps.append(step)
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
        self._touched.append(set())
        if tgid >= 0:
            self._vms[tgid] = len(self._numbers) - 1
        return len(self._numbers) - 1

    def _entry(self, event: Event) -> None:
        vm, number = self._vcpu(event, vcpu_of(event.fields))
        self._unmapping.pop(event.tid, None)
        self._residency.entry(event.tid, event.cpu)
        self._writing_cr4.discard(event.tid)
        if self._cpu.get(event.tid) != event.cpu or event.tid in self._stale:
            self._stale.discard(event.tid)
            self._cpu[event.tid] = event.cpu
            self._step(event, "enter", vm, number, event.cpu)

    def _exit(self, event: Event) -> None:
        self._residency.exit(event.tid)
        if _CR4_WRITE.search(event.fields):
            self._writing_cr4.add(event.tid)

    def _fault(self, event: Event) -> None:
        found = _ADDRESS.search(event.fields)
        if found is None or event.tid not in self._cpu:
            self.left_out["page faults without an address, or before the vCPU's first entry"] += 1
            return
        vm, number = self._tasks[event.tid]
        verb = "write" if int(found[2], 16) & _WRITE else "read"
        page = int(found[1], 16) >> PAGE_SHIFT
        self._touched[vm].add(page)
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
        self._writing_cr4.discard(event.tid)
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
        self._range_of.pop(event.tid, None)
        if (found := range_of(event.fields)) is None:
            return
        vm = self._vm_of(event.tgid, -1)
        self._range_of[event.tid] = self._memslots.begin(vm, *found)
        if not self._has_sptes:
            for pages in self._memslots.pages(vm, *found):
                step = self._step(event, "unmap", vm, start=pages.start, end=pages.stop)
                self._by_address.append((step, set(pages) - self._touched[vm]))

    def _zap_all(self, event: Event) -> None:
        vm = self._vm_of(event.tgid, -1)
        self._unmapping.pop(event.tid, None)
        self._obsolete.add(vm)
        self._mapped[vm].clear()
        self._step(event, "zap-all", vm)

    def _spte(self, event: Event) -> None:
        self._has_sptes = True
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
        if event.tid in self._range_of:
            self._range_of[event.tid].zap(pages)
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
        elif function == _LOAD and event.tid in self._writing_cr4:
            self._writing_cr4.discard(event.tid)
            self._step(event, "cr4", *self._tasks[event.tid], X86_CR4_PSE)
        elif function == KICK:
            vm = self._vm_of(event.tgid, -1)
            self._residency.flush(event.tid, vm, self._numbers[vm])
        elif function == _FLUSH:
            # SPTEs that are zapped or protected after this flush get a flush of their own.
            self._logging.pop(event.tid, None)
            if event.tid in self._tasks:
                self._flushed(self._tasks[event.tid][0])
            if event.tid in self._unmapping:
                self._unmapping[event.tid] = event.time + _PAUSE_NS, None

    def _ipi(self, event: Event) -> None:
        if call_site_of(event.fields) == KICK:
            vm = self._vm_of(event.tgid, -1)
            self._residency.interrupt(event.tid, vm, self._numbers[vm], cpus_of(event.fields))

    # --- the end ------------------------------------------------------------------------------------------

    def workload(self, source: str, observed: Observed) -> Workload:
        """Return the workload; pages and CPUs get their numbers."""
        self._resolve()
        blocks = [self._blocks(vm) for vm in range(len(self._numbers))]
        order = [dict(zip(sorted(found), range(len(found)), strict=True)) for found in blocks]

        def page(vm: int, number: int) -> int:
            return order[vm][number // BLOCK] * BLOCK + number % BLOCK

        cpus = sorted({step.start for step in self._steps if step.verb in PLACING})
        numbers = [sorted(found) for found in self._numbers]
        self._leave_out_unknown()
        for step in self._steps:
            step.vcpu = numbers[step.vm].index(step.vcpu) if step.vcpu >= 0 else -1
            if step.verb in PLACING:
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
        seen["kick_ipis"] = observed.senders[KICK].targets if KICK in observed.senders else 0
        seen["vmcs_clear_ipis"] = observed.vmcs_clears
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
            memslots=self._memslots.all(),
        )

    def _resolve(self) -> None:
        """Keep the ranges by memslots if the trace shows no SPTE, else count those that zapped none."""
        if self._has_sptes:
            dropped = {id(step) for step, _ in self._by_address}
            self._steps = [step for step in self._steps if id(step) not in dropped]
            inside, outside = self._memslots.silent()
            self.left_out["notifier ranges in memslots, of which no page was mapped"] += inside
            self.left_out["notifier ranges of which no page was mapped, in no known memslot"] += outside
        for step, before in self._by_address if not self._has_sptes else ():
            self._before[step.vm] |= before
        self.left_out = +self.left_out

    def _leave_out_unknown(self) -> None:
        """Leave out writes of CR4 that change no role, and those of which the change is not known."""
        if unknown := sum(step is not None for _, step in self._cr4.values()):
            self.left_out["first writes of CR4, whose change the trace does not show"] += unknown
        self._steps = [step for step in self._steps if step.verb != "cr4" or step.start]

    def _blocks(self, vm: int) -> set[int]:
        found = {number // BLOCK for number in self._before[vm]}
        for step in self._steps:
            if step.vm == vm and step.verb not in _WITHOUT_PAGES:
                found.add(step.start // BLOCK)
                if step.end >= 0:
                    found.add((step.end - 1) // BLOCK)
        return found


_READERS: Final = {
    "kvm_entry": Builder._entry,
    "kvm_exit": Builder._exit,
    "kvm_page_fault": Builder._fault,
    "kvm_cr": Builder._cr_write,
    "kvm_nested_vmenter": Builder._nested,
    "kvm_nested_vmrun": Builder._nested,
    "ipi_send_cpu": Builder._ipi,
    "ipi_send_cpumask": Builder._ipi,
    "kvm_smm_transition": Builder._smm,
    "kvm_unmap_hva_range": Builder._range,
    "kvm_mmu_zap_all_fast": Builder._zap_all,
    "kvm_tdp_mmu_spte_changed": Builder._spte,
}
