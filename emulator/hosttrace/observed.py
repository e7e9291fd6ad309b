"""Adds up the events of a trace.

A flush, a zap or an interrupt is attributed to a cause: the last event of the task that is one (a
notifier's range, a fault, an exit, a memslot's deletion), if it is no older than a millisecond and the task
has not entered the guest since.  Otherwise the cause is unknown.  This is a rule and no observation, because
no tracepoint tells the end of a notifier's range.  Where probes at kvm_mmu_notifier_invalidate_range_start()
and _end() tell it, the cause lasts until the end.

A CPU runs a guest from a kvm_entry on it to the kvm_exit that follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from emulator.hosttrace.fields import (
    PAGE_SHIFT,
    REQUESTS,
    call_site_of,
    cpus_of,
    exit_of,
    function_of,
    host_flush_of,
    pairs_of,
    probe_of,
    range_of,
    request_names,
    request_of,
    spte_of,
    vcpu_of,
)
from emulator.hosttrace.lines import Event
from emulator.hosttrace.sums import Cause, Sender, Vcpu

UNKNOWN: Final = "unknown"
_RECENT_NS: Final = 1_000_000
# A longer step back of the clock means several recordings in one file.
_SEVERAL_NS: Final = 1_000_000_000
# Sends the interrupt of smp_call_function_single() and its like.
_QUEUES: Final = "generic_exec_single"
_RANGE_START: Final = "kvm_mmu_notifier_invalidate_range_start"
_RANGE_END: Final = "kvm_mmu_notifier_invalidate_range_end"
KICK: Final = "kvm_make_all_cpus_request"
_FLUSHES: Final = frozenset(("kvm_flush_remote_tlbs", "kvm_flush_remote_tlbs_range"))
# Events that are a cause of what the same task does next, and their names in the report.
_CAUSES: Final = {
    "kvm_unmap_hva_range": "notifier: unmap",
    "kvm_set_spte_hva": "notifier: change PTE",
    "kvm_age_hva": "notifier: age",
    "kvm_test_age_hva": "notifier: test age",
    "kvm_mmu_zap_all_fast": "kvm_mmu_zap_all_fast",
    "kvm_mmu_split_huge_page": "huge page split",
    "kvm_page_fault": "page fault",
    "kvm_smm_transition": "SMM",
}
# Functions that are a cause if a probe tells them.
_CAUSING_FUNCTIONS: Final = {
    _RANGE_START: "notifier",
    "kvm_flush_remote_tlbs_memslot": "dirty log",
    "kvm_mmu_free_obsolete_roots": "obsolete roots",
    "kvm_vm_ioctl_get_dirty_log": "dirty log",
}


@dataclass
class InvalidateSamples:
    """Samples of mmu_invalidate_seq and of the range in progress, as a bpftrace script prints them."""

    number: int = 0
    in_progress: int = 0
    lowest: int = -1
    highest: int = -1
    ranges: int = 0
    pages: int = 0
    _last: tuple[int, int] = (-1, -1)

    def add(self, times: int, seq: int, in_progress: bool, start: int, end: int) -> None:
        self.number += times
        self.in_progress += times if in_progress else 0
        self.lowest = seq if self.lowest < 0 else min(self.lowest, seq)
        self.highest = max(self.highest, seq)
        if (start, end) != self._last:
            self.ranges += 1
            self.pages += max(0, end - start) >> PAGE_SHIFT
            self._last = (start, end)


@dataclass
class Observed:
    """All sums of a trace.

    `kinds` counts events by name, `unread` those of which nothing is used.  `backwards` is how far the clock
    goes back at most: far, in a file of several recordings.  Times are in nanoseconds.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    functions: Counter[tuple[str, str]] = field(default_factory=Counter)
    vcpus: dict[int, Vcpu] = field(default_factory=dict)
    causes: dict[str, Cause] = field(default_factory=dict)
    senders: dict[str, Sender] = field(default_factory=dict)
    host_flushes: Counter[str] = field(default_factory=Counter)
    vmcs_clears: int = 0
    smis: int = 0
    tables_zapped: int = 0
    mapped: int = 0
    invalidate: InvalidateSamples = field(default_factory=InvalidateSamples)
    cpus: set[int] = field(default_factory=set)
    first: int = -1
    last: int = -1
    backwards: int = 0
    has_processes: bool = False
    _running: dict[int, tuple[Vcpu, int]] = field(default_factory=dict)
    _recent: dict[int, tuple[str, int]] = field(default_factory=dict)
    _was_on: dict[int, int] = field(default_factory=dict)
    _queued: dict[int, str] = field(default_factory=dict)
    _probes: dict[str, str] = field(default_factory=dict)  # by function, the event that counts
    _numbered: str = ""  # the event that tells the numbers of requests
    _notifying: set[int] = field(default_factory=set)

    def add(self, event: Event) -> None:
        self.kinds[event.name] += event.times
        if event.time >= 0:
            self._place(event)
        if event.caller:
            self._call(event, event.name)
        elif (read := _READERS.get(event.name)) is not None:
            read(self, event)
        elif (probe := probe_of(event.fields)) is not None:
            if probe.at_start:
                self._call(event, probe.function, probe.rest)
        elif not self._sample(event):
            self.unread[event.name] += event.times

    @property
    def seconds(self) -> float | None:
        """Return the time from the first event to the last; None without times, or of several recordings."""
        if self.first < 0 or self.backwards >= _SEVERAL_NS:
            return None
        return (self.last - self.first) / 1e9

    def calls(self, function: str) -> int:
        """Return how often a function was called.  Several probes at one function count once."""
        return max((n for (name, _), n in self.functions.items() if name == function), default=0)

    # --- time, place, cause -------------------------------------------------------------------------------

    def _place(self, event: Event) -> None:
        self.cpus.add(event.cpu)
        self.has_processes |= event.tgid >= 0
        if self.first < 0 or event.time < self.first:
            self.first = event.time
        self.backwards = max(self.backwards, self.last - event.time)
        self.last = max(self.last, event.time)
        if (cause := _CAUSES.get(event.name)) is not None:
            self._begin(event, cause)

    def _begin(self, event: Event, cause: str) -> None:
        self._recent[event.tid] = (cause, event.time)
        self._cause(cause).events += 1

    def _cause(self, name: str) -> Cause:
        return self.causes.setdefault(name, Cause())

    def _cause_of(self, event: Event) -> Cause:
        cause, since = self._recent.get(event.tid, (UNKNOWN, event.time))
        recent = event.tid in self._notifying or event.time - since <= _RECENT_NS
        return self._cause(cause if recent else UNKNOWN)

    def _vcpu(self, event: Event, number: int) -> Vcpu:
        vcpu = self.vcpus.get(event.tid)
        if vcpu is None:
            vcpu = self.vcpus[event.tid] = Vcpu(event.comm, event.tid, event.tgid)
        if number >= 0:
            vcpu.number = number
        return vcpu

    # --- events of a vCPU ---------------------------------------------------------------------------------

    def _entry(self, event: Event) -> None:
        vcpu = self._vcpu(event, vcpu_of(event.fields))
        vcpu.entries += 1
        vcpu.cpus.add(event.cpu)
        if self._was_on.setdefault(event.tid, event.cpu) != event.cpu:
            vcpu.moves += 1
            self._was_on[event.tid] = event.cpu
        self._running[event.cpu] = (vcpu, event.time)
        self._recent.pop(event.tid, None)

    def _exit(self, event: Event) -> None:
        what = exit_of(event.fields)
        vcpu = self._vcpu(event, what.vcpu)
        vcpu.exits[what.reason] += 1
        if what.vector >= 0:
            vcpu.vectors[what.vector] += 1
        if what.requests > 0:
            vcpu.requests.update(request_names(what.requests))
        running = self._running.pop(event.cpu, None)
        if running is not None and running[0] is vcpu:
            vcpu.guest_time += event.time - running[1]
        self._begin(event, f"{what.reason} exit")

    def _fault(self, event: Event) -> None:
        self._vcpu(event, vcpu_of(event.fields)).faults += 1

    def _smm(self, event: Event) -> None:
        self.smis += "entering" in event.fields

    # --- events of KVM's MMU ------------------------------------------------------------------------------

    def _range(self, event: Event) -> None:
        found = range_of(event.fields)
        if found is None:
            return
        cause = self._cause_of(event)
        cause.ranges += 1
        cause.pages += max(0, found[1] - found[0]) >> PAGE_SHIFT

    def _spte(self, event: Event) -> None:
        change = spte_of(event.fields)
        if change is None:
            self.unread[event.name] += 1
        elif not change.leaf:
            self.tables_zapped += change.zapped
        else:
            self.mapped += change.mapped
            if change.zapped or change.protected:
                cause = self._cause_of(event)
                cause.zapped += change.zapped
                cause.protected += change.protected

    def _call(self, event: Event, function: str, rest: str = "") -> None:
        self.functions[function, event.name] += 1
        if function == KICK:
            self._request(event, request_of(rest))
        if self._probes.setdefault(function, event.name) != event.name:
            return  # another probe stands at this function, too, and came first in the trace
        if function == _RANGE_START:
            self._notifying.add(event.tid)
        elif function == _RANGE_END:
            self._notifying.discard(event.tid)
            self._recent.pop(event.tid, None)
        if (cause := _CAUSING_FUNCTIONS.get(function)) is not None:
            self._begin(event, cause)
        elif function in _FLUSHES:
            self._cause_of(event).flushes += 1

    def _request(self, event: Event, number: int) -> None:
        """Count a request by its name.  The function tracer shows the call, too, but not its number."""
        if number >= 0:
            self._numbered = self._numbered or event.name
            if self._numbered == event.name:
                self._cause_of(event).requests[REQUESTS.get(number, f"request {number}")] += 1

    # --- interrupts ---------------------------------------------------------------------------------------

    def _ipi(self, event: Event) -> None:
        site = self._sender_of(event)
        targets = cpus_of(event.fields)
        sender = self.senders.setdefault(site, Sender())
        sender.calls += 1
        sender.targets += len(targets)
        guests = [self._running[cpu][0] for cpu in targets if cpu in self._running]
        sender.in_guest += len(guests)
        if event.tgid >= 0:
            sender.others += sum(vcpu.tgid not in (-1, event.tgid) for vcpu in guests)
        if site == KICK:
            cause = self._cause_of(event)
            cause.broadcasts += 1
            cause.targets += len(targets)
            cause.in_guest += len(guests)

    def _sender_of(self, event: Event) -> str:
        """Return the function that sends an interrupt; for a call queued just before, the function called."""
        site = call_site_of(event.fields) or UNKNOWN
        queued = self._queued.pop(event.tid, "")
        return queued if queued and site == _QUEUES else site

    def _csd(self, event: Event) -> None:
        function = function_of(event.fields)
        self._queued[event.tid] = function
        self.vmcs_clears += function == "__loaded_vmcs_clear"

    def _host_flush(self, event: Event) -> None:
        if (found := host_flush_of(event.fields)) is not None:
            self.host_flushes[found[1]] += 1

    def _used(self, event: Event) -> None:
        """Count the event as one that was read: its name says all."""

    # --- samples ------------------------------------------------------------------------------------------

    def _sample(self, event: Event) -> bool:
        pairs = pairs_of(event.fields)
        if not {"seq", "inprog", "start", "end"} <= pairs.keys():
            return False
        seq, start, end = (int(pairs[key], 16) for key in ("seq", "start", "end"))
        self.invalidate.add(event.times, seq, pairs["inprog"] != "0", start, end)
        return True


_READERS: Final[dict[str, Callable[[Observed, Event], None]]] = {
    "kvm_entry": Observed._entry,
    "kvm_exit": Observed._exit,
    "kvm_page_fault": Observed._fault,
    "kvm_unmap_hva_range": Observed._range,
    "kvm_age_hva": Observed._range,
    "kvm_set_spte_hva": Observed._used,
    "kvm_test_age_hva": Observed._used,
    "kvm_mmu_zap_all_fast": Observed._used,
    "kvm_mmu_split_huge_page": Observed._used,
    "kvm_smm_transition": Observed._smm,
    "kvm_cr": Observed._used,
    "kvm_tdp_mmu_spte_changed": Observed._spte,
    "ipi_send_cpumask": Observed._ipi,
    "ipi_send_cpu": Observed._ipi,
    "csd_queue_cpu": Observed._csd,
    "tlb_flush": Observed._host_flush,
    "sched_migrate_task": Observed._used,
    "sched_switch": Observed._used,
}
