"""Events of the core's rings, which hold the last actions of each CPU, in the kernel's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emulator.kvm import kvm_host
from native import EXIT_REASONS, FLUSH_REASONS, FLUSH_SCOPES, enum_names, ffi, lib
from native.types import CpuId

if TYPE_CHECKING:
    from native._native import Event as CoreEvent
    from native._native import MachinePtr

EVENT_KINDS = enum_names("event_kind", "EVENT_", count="EVENTS")
PROMISES = enum_names("promise", "PROMISE_", count="PROMISES")
_FUNCTIONS = enum_names("ipi_function", "IPI_", count="IPI_FUNCTIONS")

NO_VM = 0xFFFF
# The page of a guest's invalidation that drops all pages (MOV CR3, INVPCID).
WHOLE = (1 << 64) - 1
_IPI_FUNCTION = lib.EVENT_IPI_WAITS - 1
# The previous pCPU of a VMCS that has not been loaded before.
_NOWHERE = 1 << 31

PROMISED_BY = {
    "none": "nothing",
    "notifier": "an mmu_notifier's invalidate_range_start returned",
    "notifier_write": "an mmu_notifier's invalidate_range_start returned (write access only)",
    "memslot": "the memslot was deleted",
    "zap_range": "kvm_zap_gfn_range returned",
    "dirty_log": "the dirty log's ioctl returned (write access only)",
    "free": "the page was freed",
    "guest": "the guest itself invalidated it on this vCPU",
    "l1": "L1 invalidated it (INVVPID, or a VM entry or VM exit of L2 without a VPID)",
    "l1-ept": "L1 invalidated it (INVEPT, INVVPID, or a VM entry to L2 or VM exit from it)",
}


def name_of(names: tuple[str, ...], index: int) -> str:
    return names[index] if 0 <= index < len(names) else str(index)


def request_name(number: int) -> str:
    """Return the name that KVM's code, which may be patched, has for a request now."""
    for name, value in vars(kvm_host).items():
        if (
            name.startswith("KVM_REQ_")
            and not value & kvm_host.KVM_REQUEST_NO_ACTION
            and value & kvm_host.KVM_REQUEST_MASK == number
        ):
            return name
    return str(number)


@dataclass(frozen=True, slots=True)
class Event:
    """One action of a CPU.  `time` is in nanoseconds; in explore, where time stands still, it is a number
    that only grows."""

    time: int
    kind: str
    cpu: int
    a: int
    b: int
    vm: int = NO_VM
    more: int = 0
    said: str = ""

    @classmethod
    def of_core(cls, e: CoreEvent) -> Event:
        """Convert the core's struct event."""
        return cls(e.time, name_of(EVENT_KINDS, e.kind), e.cpu, e.a, e.b, e.vm, e.more)

    @classmethod
    def of_dict(cls, value: Mapping[str, Any], time: int | None = None) -> Event:
        """Convert a dictionary that `as_dict` has written."""
        numbers = {name: int(value.get(name, default)) for name, default in _NUMBERS.items()}
        kind = str(value["kind"])
        # Keep the text of a kind that this version does not know: it cannot be derived from the numbers.
        said = "" if kind in _TEXTS else str(value.get("text", ""))
        return cls(int(value["time_ns"]) if time is None else time, kind, said=said, **numbers)

    def as_dict(self, *, timed: bool = False) -> dict[str, Any]:
        when = {"time_ns": self.time} if timed else {}
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return {**when, "kind": self.kind, **numbers, "text": self.describe()}

    def describe(self) -> str:
        text = _TEXTS.get(self.kind)
        return text(self) if text else self.said or f"{self.kind} {self.a:#x} {self.b:#x}"

    @property
    def scope(self) -> str:
        """Return the scope of a flush."""
        return name_of(FLUSH_SCOPES, self.a >> 32)

    @property
    def reason(self) -> str:
        """Return the reason of a flush, whether it was done or elided."""
        return name_of(FLUSH_REASONS, self.a & 0xFFFF)

    @property
    def function(self) -> str:
        """Return the function that an IPI asks other CPUs to run."""
        return name_of(_FUNCTIONS, self.more & _IPI_FUNCTION)

    @property
    def waits(self) -> bool:
        """Return whether the sender of an IPI waits until the called CPUs have run its function."""
        return bool(self.more & lib.EVENT_IPI_WAITS)

    @property
    def targets(self) -> tuple[int, ...]:
        """Return the pCPUs that an IPI called, out of the one word of the mask that the event holds."""
        first = (self.more >> lib.EVENT_IPI_WORD) * 64
        return tuple(first + bit for bit in range(64) if self.a >> bit & 1)

    @property
    def nested(self) -> int:
        """Return the number of the nested guest that a VM entry enters; 0: the vCPU's own guest (L1)."""
        return self.b >> lib.EVENT_ENTRY_GUEST

    @property
    def root(self) -> int:
        """Return the root of a VM entry."""
        return self.b & (1 << lib.EVENT_ENTRY_GUEST) - 1

    @property
    def promise(self) -> str:
        return name_of(PROMISES, self.a)

    @property
    def request(self) -> str:
        return request_name(self.b)

    def covers(self, gfn: int) -> bool:
        """Return whether a zap, a mapping or a promise is about this page."""
        first = self.b if self.kind == "promise" else self.a
        return first <= gfn < first + max(self.more, 1)


_NUMBERS = {"cpu": 0, "vm": NO_VM, "a": 0, "b": 0, "more": 0}


def pages_text(n: int) -> str:
    return "1 page" if n == 1 else f"{n or 'no'} pages"


def _targets(e: Event) -> str:
    return f"pCPU {e.targets[0]}" if e.b == 1 and e.targets else f"{e.b} pCPUs"


def _what(e: Event) -> str:
    return "all its pages" if e.b == WHOLE else f"page {e.b:#x}"


def _range(e: Event) -> str:
    return f"{pages_text(e.more)} from gfn {e.b:#x} on"


def _evicted(e: Event) -> str:
    what = {
        lib.EVICT_TABLES: "the paging-structure caches",
        lib.EVICT_PHYSICAL: "the guest-physical mappings",
    }.get(e.b, f"the translation of page {e.a:#x}")
    return f"evicts {what}"


def _entered(e: Event) -> str:
    guest = f" to nested guest {e.nested}" if e.nested else ""
    return f"VM entry of vCPU {e.a}{guest}, root {e.root:#x}"


_TEXTS: dict[str, Callable[[Event], str]] = {
    "entry": _entered,
    "exit": lambda e: f"VM exit of vCPU {e.a}: {name_of(EXIT_REASONS, e.b)}",
    "load": lambda e: f"VMCS of vCPU {e.a} loaded" + ("" if e.b >= _NOWHERE else f", was on pCPU {e.b}"),
    "flush": lambda e: f"{e.scope} for {e.reason}",
    "vmfail": lambda e: f"{e.scope} for {e.reason} FAILS: operand {e.b:#x}",
    "elided": lambda e: f"flush for {e.reason} ELIDED by the policy",
    "zap": lambda e: f"zapped {e.b} pages from gfn {e.a:#x} on",
    "protect": lambda e: f"write-protected {e.b} pages from gfn {e.a:#x} on",
    "map": lambda e: f"mapped gfn {e.a:#x} to frame {e.b:#x}",
    "request": lambda e: f"{e.request} to vCPU {e.a}",
    "ipi": lambda e: f"IPI ({e.function}) to {_targets(e)}",
    "hypercall": lambda e: f"hypercall flushes root {e.a:#x}, " + (_range(e) if e.more else "all pages"),
    "promise": lambda e: f"promise: {PROMISED_BY.get(e.promise, e.promise)}, gfn {e.b:#x}",
    "free": lambda e: f"frame {e.a:#x} freed",
    "root_load": lambda e: f"vCPU {e.a} loads root {e.b:#x}",
    "root_free": lambda e: f"root {e.a:#x} freed",
    "guest_invalidate": lambda e: f"guest of vCPU {e.a} invalidates {_what(e)}",
    "speculate": lambda e: f"speculative fill of page {e.b:#x} for vCPU {e.a}",
    "evict": _evicted,
    "root_invalid": lambda e: f"root {e.a:#x} is invalid: no vCPU finds it any more",
    "lost": lambda e: f"earlier events of this CPU are lost: {e.a}",
    "unload": lambda e: f"VMCLEAR of vCPU {e.a}, which is loaded elsewhere",
    "yield": lambda e: f"zap of VM {e.a} yields, {'flushed' if e.b else 'not flushed'}",
    "store": lambda e: f"guest of vCPU {e.a} writes to gfn {e.b:#x}",
    "log_arm": lambda e: "dirty logging begins, user space copies all memory",
    "log_get": lambda e: f"KVM_GET_DIRTY_LOG names {pages_text(e.b)}",
    "log_clear": lambda e: f"KVM_CLEAR_DIRTY_LOG of {pages_text(e.b.bit_count())} from gfn {e.a:#x} on",
    "log_end": lambda e: "dirty logging ends",
    "copy": lambda e: f"user space copies {pages_text(e.b.bit_count())} from page {e.a:#x} on",
}


class EventTail:
    """Reads a machine's new events piece by piece, from its construction on.

    The machine must run one step at a time: events of different CPUs in a piece are sorted by their times.
    """

    def __init__(self, m: MachinePtr, cpus: int) -> None:
        self._m = m
        self._counts = [lib.events_count(m, cpu) for cpu in map(CpuId, range(cpus))]

    def take(self) -> list[Event]:
        """Return the events since the previous call, at most 1024 of each CPU."""
        events: list[Event] = []
        for number, seen in enumerate(self._counts):
            cpu = CpuId(number)
            count = lib.events_count(self._m, cpu)
            if count != seen:
                self._counts[cpu] = count
                events += read_events(self._m, cpu, count - seen)
        return sorted(events, key=lambda event: event.time)


def read_events(m: MachinePtr, cpu: CpuId, most: int) -> list[Event]:
    """Return the last events of a CPU, oldest first."""
    buffer = ffi.new("struct event[]", min(most, 1024))
    n = lib.events_read(m, cpu, buffer, len(buffer))
    return [Event.of_core(buffer[i]) for i in range(n)]
