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
* A block that a vCPU maps by a huge page is backed by one from this fault on, until a notifier's range zaps
  SPTEs of it.
* A fault on a page that a notifier's range has zapped maps nothing if the vCPU sets no SPTE before it enters
  again: KVM retries it while the range is in progress.
* If a task zaps tables outside of a notifier's range and then flushes, KVM recovers NX huge pages.
* VMRUN of a nested guest, and its exit to L1, flush the current context (nested_svm_transition_tlb_flush()),
  and the nested guest has a root of its own.
* If RSM makes a vCPU flush its current context before it loads a root, the guest has CR4.PGE clear, and
  CR4.PAE set; otherwise CR4.PGE is set.
* Guest pages are numbered anew by blocks of 2 MiB, in their order and without gaps.
* A vCPU had run before the recording began, unless a probe tells that it loads a root before its first entry.
* Without processes (record-tgid), vCPUs of different numbers are those of one VM (vms.py).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Final

from emulator.hosttrace.fields import PAGE_SHIFT, call_site_of, cpus_of, probe_of, range_of, spte_of, vcpu_of
from emulator.hosttrace.lines import Event
from emulator.hosttrace.memslots import Memslot, Memslots, NotifierRange
from emulator.hosttrace.numbering import numbered
from emulator.hosttrace.observed import KICK, Observed
from emulator.hosttrace.pages import Pages
from emulator.hosttrace.registers import Registers
from emulator.hosttrace.residency import Residency
from emulator.hosttrace.vms import Vms, kvm_of
from emulator.hosttrace.workload import BLOCK, RECORDED, Step, Workload

_PAUSE_NS: Final = 5_000_000
# A task may lose its CPU between the event of a notifier's range and the first SPTE that it zaps.
_RANGE_NS: Final = 20_000_000
_ADDRESS: Final = re.compile(r"\baddress (?:0x)?([0-9a-f]+) error_code (?:0x)?([0-9a-f]+)")
# PFERR_WRITE_MASK, which is also the bit of a write in the exit qualification of an EPT violation.
_WRITE: Final = 1 << 1
_FLUSH: Final = "kvm_flush_remote_tlbs"
_FLUSH_RANGE: Final = "kvm_flush_remote_tlbs_range"
_RANGE_END: Final = "kvm_mmu_notifier_invalidate_range_end"
_LOAD: Final = "kvm_mmu_load"
_FLUSH_CURRENT: Final = ("vmx_flush_tlb_current", "svm_flush_tlb_current")
# When the range of a task that unmaps none has ended, and the range's step.
_NEVER: Final = (-1, None)


class Builder:
    """Collects the events of a trace; `workload` numbers pages and CPUs and ends it."""

    def __init__(self, memslots: tuple[Memslot, ...] = (), told: Mapping[int, str] | None = None) -> None:
        self._given = memslots
        self._memslots = Memslots(memslots)
        self._range_of: dict[int, NotifierRange] = {}  # by task
        self._has_sptes = False
        self._pages: defaultdict[int, Pages] = defaultdict(Pages)  # by VM
        self._by_address: list[tuple[Step, set[int]]] = []  # ranges by memslots, and pages mapped before
        self._steps: list[Step] = []
        self._residency = Residency(self._steps)
        self._first = -1
        self._vms = Vms(told)
        self._kvms: defaultdict[int, set[str]] = defaultdict(set)  # by task: each struct kvm that probes tell
        self._cpu: dict[int, int] = {}  # the CPU of a vCPU's last entry, by task
        self._stale: set[int] = set()  # tasks of vCPUs that have not entered since an event of their VM
        self._last: dict[int, Step] = {}  # by task that is no vCPU, its last event
        self._subject: dict[int, int] = {}  # by task, the VM that its last probe was about
        self._faulting: dict[int, Step] = {}  # by task, its fault that has set no SPTE
        self._tables: defaultdict[int, set[int]] = defaultdict(set)  # by task: blocks of zapped tables
        self._zapping_all: set[int] = set()  # tasks that zap obsolete roots
        self._unmapping: dict[int, tuple[int, Step | None]] = {}  # by task, when a range ends, its step
        self._logging: dict[int, tuple[int, Step]] = {}  # by task, the last protection and its step
        self._access: dict[int, Step] = {}  # by task, its last access
        self._loaded: set[int] = set()  # tasks that have loaded a root before they entered a guest
        self._new: set[tuple[int, int]] = set()  # vCPUs that have not run before
        self._unseen: Counter[str] = Counter()  # KVM's counts for VMs of which the trace shows no vCPU
        self.left_out: Counter[str] = Counter()
        self._registers = Registers(self._of_vcpu, self.left_out)

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
        if vcpu < 0:
            self._last[event.tid] = step
            self._pages[vm].begin()
            self._residency.change(event.tid, step, self._vms.numbers[vm])
            self._flushed(vm)
        elif vcpu >= 0:
            self._residency.own(event.tid, verb, event.cpu)
        self._steps.append(step)
        return step

    # --- VMs and vCPUs ------------------------------------------------------------------------------------

    def again(self) -> Builder | None:
        """Return a builder for a second reading, by which vCPU is of which VM; None if one is enough."""
        if len({kvm for told in self._kvms.values() for kvm in told}) < 2:
            return None
        vcpus = {task: told for task, told in self._kvms.items() if task in self._vms.tasks}
        clear = {task: next(iter(told)) for task, told in vcpus.items() if len(told) == 1}
        return Builder(self._given, clear)

    def _vcpu(self, event: Event) -> tuple[int, int]:
        known = event.tid in self._vms.tasks
        found = self._vms.vcpu(event, vcpu_of(event.fields))
        if not known and event.tid in self._loaded:
            self._new.add(found)
        return found

    def _about(self, event: Event) -> int:
        """Return the VM that an event is about; -1: one of which the trace shows no vCPU."""
        if event.tid in self._vms.tasks:
            return self._vms.tasks[event.tid][0]
        return self._subject.get(event.tid, self._vms.of_process(event.tgid))

    def _told(self, event: Event, kvm: str) -> None:
        """A probe tells the VM: if the task's last event was taken to be another's, correct it."""
        self._kvms[event.tid].add(kvm)
        if event.tid in self._vms.tasks:
            return
        step = self._last.get(event.tid)
        guess = self._vms.of_process(event.tgid) if step is None else step.vm
        vm = self._subject[event.tid] = self._vms.of_kvm(kvm, guess)
        if step is None or step.vm == vm:
            return
        self._pages[guess].undo()
        if vm < 0:
            del self._steps[self._place(step)]
            del self._last[event.tid]
            self.left_out["events of VMs of which the trace shows no vCPU"] += 1
            return
        step.vm = vm
        self._pages[vm].redo(self._pages[guess])
        if step.verb == "zap-all":
            self._pages[vm].zap_all()
        self._residency.moved(event.tid, self._vms.numbers[vm])
        self._flushed(vm)

    def _entry(self, event: Event) -> None:
        vm, number = self._vcpu(event)
        self._unmapping.pop(event.tid, None)
        self._residency.entry(event.tid, event.cpu)
        self._registers.entry(event.tid)
        self._retried(event.tid, vm)
        if self._cpu.get(event.tid) != event.cpu or event.tid in self._stale:
            self._stale.discard(event.tid)
            self._cpu[event.tid] = event.cpu
            self._step(event, "enter", vm, number, event.cpu)

    def _exit(self, event: Event) -> None:
        self._residency.exit(event.tid)
        self._registers.exit(event)

    def _fault(self, event: Event) -> None:
        found = _ADDRESS.search(event.fields)
        if found is None or event.tid not in self._cpu:
            self.left_out["page faults without an address, or before the vCPU's first entry"] += 1
            return
        if self._registers.shadows(event.tid):
            return
        vm, number = self._vms.tasks[event.tid]
        verb = "write" if int(found[2], 16) & _WRITE else "read"
        page = int(found[1], 16) >> PAGE_SHIFT
        self._pages[vm].touched.add(page)
        self._access[event.tid] = self._faulting[event.tid] = self._step(event, verb, vm, number, page)

    def _retried(self, task: int, vm: int) -> None:
        """Leave out the task's last fault if KVM has mapped nothing, so that the guest faults again."""
        fault = self._faulting.pop(task, None)
        if fault is not None and fault.start in self._pages[vm].gone:
            del self._steps[self._place(fault)]
            del self._access[task]
            self.left_out["page faults that mapped nothing, because a notifier's range was in progress"] += 1

    def _place(self, step: Step) -> int:
        place = len(self._steps) - 1
        while self._steps[place] is not step:
            place -= 1
        return place

    def _of_vcpu(self, event: Event, verb: str, start: int) -> Step:
        return self._step(event, verb, *self._vms.tasks[event.tid], start)

    def _smm(self, event: Event) -> None:
        if event.tid in self._vms.tasks:
            self._registers.smm(event)
            self._stale.add(event.tid)

    def _cr_write(self, event: Event) -> None:
        if event.tid in self._vms.tasks:
            self._registers.cr_write(event)

    def _enter_nested(self, event: Event) -> None:
        if event.tid in self._vms.tasks:
            self._registers.enter_nested(event)

    def _exit_nested(self, event: Event) -> None:
        if event.tid in self._vms.tasks:
            self._registers.exit_nested(event)

    # --- the MMU ------------------------------------------------------------------------------------------

    def _range(self, event: Event) -> None:
        self._unmapping[event.tid] = event.time + _RANGE_NS, None
        self._range_of.pop(event.tid, None)
        if (found := range_of(event.fields)) is None:
            return
        vm = self._vms.of_process(event.tgid)
        self._range_of[event.tid] = self._memslots.begin(vm, *found)
        if not self._has_sptes:
            for pages in self._memslots.pages(vm, *found):
                step = self._step(event, "unmap", vm, start=pages.start, end=pages.stop)
                self._by_address.append((step, set(pages) - self._pages[vm].touched))

    def _zap_all(self, event: Event) -> None:
        vm = self._vms.of_process(event.tgid)
        self._unmapping.pop(event.tid, None)
        self._zapping_all.add(event.tid)
        self._step(event, "zap-all", vm)
        self._pages[vm].zap_all()

    def _spte(self, event: Event) -> None:
        self._has_sptes = True
        change = spte_of(event.fields)
        if change is None:
            return
        self._faulting.pop(event.tid, None)
        if not (change.leaf or change.replaces_table):
            if change.zapped and change.level == 2 and event.tid not in self._zapping_all:
                self._tables[event.tid].add(change.gfn)
            return
        vm = self._vm_with(event, change.gfn)
        pages = range(change.gfn, change.gfn + (BLOCK if change.level == 2 else 1))
        if change.replaces_table:
            self._flushed(vm)
        if change.mapped or change.replaces_table:
            self._map(event, vm, change.level, pages)
        elif change.zapped:
            self._zap(event, vm, pages)
        elif change.protected and event.tid not in self._vms.tasks:
            self._protect(event, vm, pages)

    def _vm_with(self, event: Event, gfn: int) -> int:
        """Return the VM that owns the page: the process's, or else the first that has it mapped."""
        if event.tid in self._vms.tasks:
            return self._vms.tasks[event.tid][0]
        vms = range(len(self._vms.numbers)) if event.tgid < 0 else ()
        return next((vm for vm in vms if gfn in self._pages[vm].mapped), self._vms.of_process(event.tgid))

    def _map(self, event: Event, vm: int, level: int, pages: range) -> None:
        self._pages[vm].map(pages)
        access = self._access.get(event.tid)
        huge = self._pages[vm].huge
        if level == 2 and access is not None and access.start in pages and pages.start not in huge:
            huge.add(pages.start)
            step = Step(access.microseconds, "huge", vm, start=pages.start)
            self._steps.insert(self._place(access), step)

    def _zap(self, event: Event, vm: int, pages: range) -> None:
        until, step = self._unmapping.get(event.tid, _NEVER)
        if event.time > until:
            self.left_out["zapped SPTEs outside of a notifier's range"] += 1
            return
        if event.tid in self._range_of:
            self._range_of[event.tid].zap(pages)
        if pages.start not in self._pages[vm].mapped and not self._may_be_older(vm):
            return  # of an obsolete root
        if step is None:
            step = self._step(event, "unmap", vm, start=pages.start, end=pages.stop)
        if len(pages) == BLOCK and self._may_be_older(vm):
            self._pages[vm].was_huge(pages)
        self._was_mapped(vm, pages)
        self._pages[vm].zap(pages)
        self._unmapping[event.tid] = event.time + _PAUSE_NS, step
        step.start, step.end = min(step.start, pages.start), max(step.end, pages.stop)

    def _flushed(self, vm: int) -> None:
        """Keep the next entry of each vCPU of the VM, at which it flushes."""
        self._stale.update(task for task, (number, _) in self._vms.tasks.items() if number == vm)

    def _protect(self, event: Event, vm: int, pages: range) -> None:
        last = self._logging.get(event.tid)
        step = None if last is None or event.time - last[0] > _PAUSE_NS else last[1]
        self._logging[event.tid] = event.time, step or self._step(event, "log", vm)
        self._was_mapped(vm, pages)

    def _was_mapped(self, vm: int, pages: range) -> None:
        """Record pages that are not known to be mapped as mapped when the recording began."""
        if self._may_be_older(vm):
            self._pages[vm].was_mapped(pages)

    def _may_be_older(self, vm: int) -> bool:
        """Return whether an SPTE of the VM may be older than the recording."""
        run = any((vm, vcpu) not in self._new for vcpu in self._vms.numbers[vm])
        return not self._pages[vm].obsolete and (run or not self._vms.numbers[vm])

    def _called(self, event: Event, function: str) -> None:
        if kvm := kvm_of(event.fields):
            self._told(event, kvm)
        if function in _FLUSH_CURRENT:
            self._registers.flush_current(event.tid)
        elif function == _LOAD and event.tid in self._vms.tasks:
            self._registers.load(event)
        elif function == _LOAD:
            self._loaded.add(event.tid)
        elif function == _RANGE_END:
            self._unmapping.pop(event.tid, None)
        elif function == _FLUSH_RANGE:
            self._tables.pop(event.tid, None)  # recovered at the end of dirty logging, with a flush each
        elif function == KICK:
            self._kicks(event, bool(kvm))
        elif function == _FLUSH:
            self._flushes(event, bool(kvm))

    def _kicks(self, event: Event, told: bool) -> None:
        vm = self._about(event)
        if vm >= 0:
            self._residency.flush(event.tid, vm, self._vms.numbers[vm])
        elif told:
            self._unseen["make_all_cpus_request"] += 1

    def _flushes(self, event: Event, told: bool) -> None:
        """SPTEs that are zapped or protected after this flush get a flush of their own."""
        vm = self._about(event)
        self._flushed(vm)
        self._unseen["remote_tlb_flush_requests"] += told and vm < 0
        self._logging.pop(event.tid, None)
        tables = self._tables.pop(event.tid, None)
        if event.tid in self._unmapping:
            self._unmapping[event.tid] = event.time + _PAUSE_NS, None
        elif tables and vm >= 0 and event.tid not in self._vms.tasks:
            # kvm_recover_nx_huge_pages(): the task has zapped these blocks' tables, and flushes for them.
            self._step(event, "recover", vm, start=min(tables), end=max(tables) + BLOCK)

    def _ipi(self, event: Event) -> None:
        vm = self._about(event) if call_site_of(event.fields) == KICK else -1
        if vm >= 0:
            self._residency.interrupt(event.tid, vm, self._vms.numbers[vm], cpus_of(event.fields))

    # --- the end ------------------------------------------------------------------------------------------

    def workload(self, source: str, observed: Observed) -> Workload:
        """Return the workload; pages and CPUs get their numbers."""
        self._resolve()
        self._leave_out_unknown()
        clear = (self._vms.tasks[task] for task in self._registers.without_pge)
        found = numbered(source, self._steps, self._vms, self._pages, self._new, clear)
        found.recorded = self._recorded(observed)
        found.left_out = dict(self.left_out)
        found.memslots = self._memslots.all()
        return found

    def _recorded(self, observed: Observed) -> dict[str, int]:
        """Return KVM's counts, without those of VMs of which the trace shows no vCPU."""
        seen = {
            name: max((observed.calls(function) for function in functions), default=0) - self._unseen[name]
            for name, functions in RECORDED.items()
        }
        # Requests for the clock (KVM_REQ_MCLOCK_INPROGRESS) do not come from the MMU.
        clock = sum(cause.requests["MCLOCK_INPROGRESS"] for cause in observed.causes.values())
        seen["make_all_cpus_request"] -= clock
        seen["kick_ipis"] = observed.senders[KICK].targets if KICK in observed.senders else 0
        seen["vmcs_clear_ipis"] = observed.vmcs_clears
        return {name: n for name, n in seen.items() if n}

    def _resolve(self) -> None:
        """Keep the ranges by memslots if the trace shows no SPTE, else count those that zapped none."""
        if self._has_sptes:
            dropped = {id(step) for step, _ in self._by_address}
            self._steps = [step for step in self._steps if id(step) not in dropped]
            inside, outside = self._memslots.silent()
            self.left_out["notifier ranges in memslots, of which no page was mapped"] += inside
            self.left_out["notifier ranges of which no page was mapped, in no known memslot"] += outside
        for step, before in self._by_address if not self._has_sptes else ():
            self._pages[step.vm].before |= before
        self.left_out = +self.left_out

    def _leave_out_unknown(self) -> None:
        """Leave out writes of CR4 that change no role, and those of which the change is not known."""
        if unknown := self._registers.unknown():
            self.left_out["first writes of CR4, whose change the trace does not show"] += unknown
        self._steps = [step for step in self._steps if step.verb != "cr4" or step.start]


_READERS: Final = {
    "kvm_entry": Builder._entry,
    "kvm_exit": Builder._exit,
    "kvm_page_fault": Builder._fault,
    "kvm_cr": Builder._cr_write,
    "kvm_nested_vmenter": Builder._enter_nested,
    "kvm_nested_vmrun": Builder._enter_nested,
    "kvm_nested_vmexit_inject": Builder._exit_nested,
    "ipi_send_cpu": Builder._ipi,
    "ipi_send_cpumask": Builder._ipi,
    "kvm_smm_transition": Builder._smm,
    "kvm_unmap_hva_range": Builder._range,
    "kvm_mmu_zap_all_fast": Builder._zap_all,
    "kvm_tdp_mmu_spte_changed": Builder._spte,
}
