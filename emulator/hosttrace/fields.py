"""The text of KVM's and the kernel's events, as the versions since 5.10 print it.

An event is read by the names of its fields, not by their places: `kvm_exit` has `vcpu` since 5.10, names its
last two fields since 5.10, and tells `requests` since 6.13; numbers come with and without 0x.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

_NUMBER: Final = r"(?:0x)?([0-9a-fA-F]+)"
_VCPU: Final = re.compile(r"\bvcpu (\d+)")
_REASON: Final = re.compile(r"\breason (\S+)")
_INTERRUPT: Final = re.compile(r"\bintr_info 0x([0-9a-f]+)")
_REQUESTS: Final = re.compile(r"\brequests 0x([0-9a-f]+)")
_RANGE: Final = re.compile(rf"{_NUMBER} -- {_NUMBER}")
_SPTE: Final = re.compile(
    r"as id (?P<as_id>\d+) gfn (?P<gfn>[0-9a-f]+) level (?P<level>\d) "
    r"old_spte (?P<old>[0-9a-f]+) new_spte (?P<new>[0-9a-f]+)"
)
_PROBE: Final = re.compile(
    r"\((?P<function>[\w.]+)\+0x(?P<offset>[0-9a-f]+)/0x[0-9a-f]+(?: \[\w+\])?\)(?P<rest>.*)"
)
_RETURN: Final = re.compile(r"\([^()]* <- (?P<function>[\w.]+)\)")
_REQUEST: Final = re.compile(r"\breq=0x([0-9a-f]+)")
_MASK: Final = re.compile(r"\bcpumask=([0-9a-f,]+)")
_CPU: Final = re.compile(r"\bcpu=(\d+)")
_CALL_SITE: Final = re.compile(r"\bcallsite=([\w.]+)")
_FUNC: Final = re.compile(r"\bfunc=([\w.]+)")
_PAGES: Final = re.compile(r"\bpages:(-?\d+) reason:([^(]+?) \(")
_PAIR: Final = re.compile(r"(\w+)=(\S+)")

# A kprobe at a function's start stands behind endbr64 (4 bytes) or ftrace's call (5).
_ENTRY: Final = 8
# SPTE_MMU_PRESENT_MASK, since 5.13.
_PRESENT: Final = 1 << 11
_WRITABLE: Final = 1 << 1
_PAGE_SIZE: Final = 1 << 7
PAGE_SHIFT: Final = 12

# Vectors of arch/x86/include/asm/irq_vectors.h.
VECTORS: Final = {
    0xEC: "timer",
    0xFB: "call function, one CPU",
    0xFC: "call function",
    0xFD: "reschedule",
}
_ARCH: Final = 8
# arch/x86/include/asm/kvm_host.h of 6.12; numbers by which requests stand in kvm_exit and in probes.
REQUESTS: Final = {
    0: "TLB_FLUSH",
    1: "VM_DEAD",
    2: "UNBLOCK",
    3: "DIRTY_RING_SOFT_FULL",
    _ARCH + 3: "MMU_SYNC",
    _ARCH + 4: "CLOCK_UPDATE",
    _ARCH + 5: "LOAD_MMU_PGD",
    _ARCH + 6: "EVENT",
    _ARCH + 8: "STEAL_UPDATE",
    _ARCH + 13: "MASTERCLOCK_UPDATE",
    _ARCH + 14: "MCLOCK_INPROGRESS",
    _ARCH + 15: "SCAN_IOAPIC",
    _ARCH + 17: "APIC_PAGE_RELOAD",
    _ARCH + 25: "APICV_UPDATE",
    _ARCH + 26: "TLB_FLUSH_CURRENT",
    _ARCH + 27: "TLB_FLUSH_GUEST",
    _ARCH + 31: "MMU_FREE_OBSOLETE_ROOTS",
    _ARCH + 32: "HV_TLB_FLUSH",
}


class Exit(NamedTuple):
    """kvm_exit: -1 for a vCPU, an interrupt's vector or requests that the line does not tell."""

    vcpu: int
    reason: str
    vector: int
    requests: int


class SpteChange(NamedTuple):
    """kvm_tdp_mmu_spte_changed: a leaf or a table came, went, or lost its write permission."""

    gfn: int
    level: int
    old: int
    new: int

    @property
    def leaf(self) -> bool:
        return self.level == 1 or bool((self.old if self.old & _PRESENT else self.new) & _PAGE_SIZE)

    @property
    def mapped(self) -> bool:
        return not self.old & _PRESENT and bool(self.new & _PRESENT)

    @property
    def zapped(self) -> bool:
        return bool(self.old & _PRESENT) and not self.new & _PRESENT

    @property
    def replaces_table(self) -> bool:
        """Return whether a huge page takes the place of a table."""
        return not self.leaf and bool(self.old & self.new & _PRESENT) and bool(self.new & _PAGE_SIZE)

    @property
    def protected(self) -> bool:
        both = self.old & self.new & _PRESENT
        return bool(both) and bool(self.old & _WRITABLE) and not self.new & _WRITABLE


class Probe(NamedTuple):
    """A kprobe's event: the function, and whether the probe stands at its start."""

    function: str
    at_start: bool
    rest: str


def vcpu_of(fields: str) -> int:
    """Return the number behind `vcpu`, -1 if there is none."""
    found = _VCPU.search(fields)
    return int(found[1]) if found else -1


def exit_of(fields: str) -> Exit:
    """Return what a kvm_exit says.  Without `reason` the reason is "?"."""
    reason, info, requests = _REASON.search(fields), _INTERRUPT.search(fields), _REQUESTS.search(fields)
    raw = int(info[1], 16) if info else 0
    # Bit 31 says that the field is valid, bits 10:8 are 0 for an external interrupt (SDM 26.9.2).
    vector = raw & 0xFF if raw >> 31 and not raw >> 8 & 7 else -1
    return Exit(
        vcpu_of(fields), reason[1] if reason else "?", vector, int(requests[1], 16) if requests else -1
    )


def range_of(fields: str) -> tuple[int, int] | None:
    """Return start and end of a notifier's range in bytes, None if the text has none."""
    found = _RANGE.search(fields)
    return (int(found[1], 16), int(found[2], 16)) if found else None


def spte_of(fields: str) -> SpteChange | None:
    """Return the change of an SPTE, None if the text has none."""
    found = _SPTE.search(fields)
    if found is None:
        return None
    return SpteChange(
        int(found["gfn"], 16), int(found["level"]), int(found["old"], 16), int(found["new"], 16)
    )


def probe_of(fields: str) -> Probe | None:
    """Return the function of a kprobe's event; None for other events and for a function's return."""
    found = _PROBE.match(fields)
    if found is None or _RETURN.match(fields):
        return None
    return Probe(found["function"], int(found["offset"], 16) <= _ENTRY, found["rest"])


def request_of(rest: str) -> int:
    """Return a request's number without its flags, from `req=0x300`; -1 if there is none."""
    found = _REQUEST.search(rest)
    return int(found[1], 16) & 0xFF if found else -1


def request_names(requests: int) -> list[str]:
    """Return the names of the bits of vcpu->requests, a number for a bit without a name here."""
    bits = (bit for bit in range(requests.bit_length()) if requests >> bit & 1)
    return [REQUESTS.get(bit, f"request {bit}") for bit in bits]


def cpus_of(fields: str) -> list[int]:
    """Return the CPUs of `cpumask=00000000,00000006` or `cpu=2`."""
    if (mask := _MASK.search(fields)) is not None:
        bits = int(mask[1].replace(",", ""), 16)
        return [cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1]
    one = _CPU.search(fields)
    return [int(one[1])] if one else []


def call_site_of(fields: str) -> str:
    """Return the function that sent an IPI, an empty string if the text has none."""
    found = _CALL_SITE.search(fields)
    return found[1] if found else ""


def function_of(fields: str) -> str:
    """Return the function that an IPI is to run, from `func=`."""
    found = _FUNC.search(fields)
    return found[1] if found else ""


def host_flush_of(fields: str) -> tuple[int, str] | None:
    """Return pages (-1: all) and reason of the host's own tlb_flush."""
    found = _PAGES.search(fields)
    return (int(found[1]), found[2]) if found else None


def pairs_of(fields: str) -> dict[str, str]:
    """Return the `key=value` pairs of a line."""
    return dict(_PAIR.findall(fields))
