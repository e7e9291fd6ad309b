"""Types for the kinds of numbers that the core's functions take, for mypy.

The core distinguishes CPUs, VMs and vCPUs by the positions of arguments alone: a call with two of them
swapped acts on another CPU and another VM, and succeeds.  `native/_native.pyi` gives each argument the type
that its name stands for (native/kinds.py), so that such a call is a type error.  At run time all are ints.

Names and members of enums are NewTypes.  Quantities, with which code computes, keep their type in sums: a gfn
plus a number of pages is a gfn, and the difference of two gfns is a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NewType

__all__ = [
    "NO_FRAME",
    "NO_GFN",
    "NO_TICKET",
    "AccessKind",
    "CounterId",
    "CpuId",
    "Custody",
    "Ep4ta",
    "EventKind",
    "EventSeq",
    "FlushReason",
    "FrameKind",
    "Gfn",
    "GuestInsn",
    "Gva",
    "Hfn",
    "HistogramId",
    "HostWritable",
    "Hva",
    "InvalidateSeq",
    "IpiFunction",
    "IpiWait",
    "KernelSpteStep",
    "Level",
    "LinearPage",
    "MappingKind",
    "Pcid",
    "PromiseKind",
    "RcuCallback",
    "ReportNumber",
    "Right",
    "SignalSlot",
    "SpteIndex",
    "Ticket",
    "VcpuId",
    "VmId",
    "VmStat",
    "VmcsId",
    "Vpid",
    "WordIndex",
    "span",
]

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self, TypeVar, overload

    _T = TypeVar("_T", bound=int)

    class _Quantity(int):
        def __add__(self, other: int, /) -> Self: ...
        def __radd__(self, other: int, /) -> Self: ...
        @overload
        def __sub__(self, other: Self, /) -> int: ...  # type: ignore[overload-overlap]
        @overload
        def __sub__(self, other: int, /) -> Self: ...
        def __sub__(self, other: int, /) -> int: ...
        def __and__(self, other: int, /) -> Self: ...
        def __or__(self, other: int, /) -> Self: ...

    class Gfn(_Quantity):
        """The number of a guest-physical page."""

    class Hva(_Quantity):
        """The number of a page of host virtual memory: addresses of the host are in pages here."""

    class Level(_Quantity):
        """A level of page tables, and the size of a page that an entry of that level maps."""

    class SpteIndex(_Quantity):
        """The place of an SPTE in its table."""

    class Gva(_Quantity):
        """A linear address of a guest."""

    class LinearPage(_Quantity):
        """The number of a page of a guest's linear addresses."""

    class WordIndex(_Quantity):
        """The place of a 64-bit word in its page."""

    def span(start: _T, end: _T, step: int = 1) -> Sequence[_T]:
        """Return range(start, end, step), of numbers of their type."""
else:
    Gfn = Gva = Hva = Level = LinearPage = SpteIndex = WordIndex = int
    span = range

# The gfn of an SPTE that maps no page; the core ignores it.
NO_GFN: Final = Gfn(0)

CpuId = NewType("CpuId", int)
# A host frame: a table page, a root, or a page of a guest.
Hfn = NewType("Hfn", int)
# No frame: mm_fault_range() found no page, or oracle_right() was asked about one that was never mapped.
NO_FRAME: Final = Hfn(0xFFFFFFFF)
VmId = NewType("VmId", int)
# A machine-wide number, not KVM's vcpu_id.
VcpuId = NewType("VcpuId", int)
# A vCPU may have several VMCSs.
VmcsId = NewType("VmcsId", int)
Vpid = NewType("Vpid", int)

Pcid = NewType("Pcid", int)
# Bits 51:12 of the EPTP, by which hardware tags what it caches.
Ep4ta = NewType("Ep4ta", int)
# The host tag that a frame had when a fault read it: an SPTE is void as soon as the frame has another tag.
Custody = NewType("Custody", int)
# A place in the ledger of rights.
Right = NewType("Right", int)
# Whether the host's own mapping permits writes, whatever the SPTE permits.
HostWritable = NewType("HostWritable", bool)
# Values of counters: of a CPU's events, of a VM's invalidations, of the ledger's promises, of reports.
EventSeq = NewType("EventSeq", int)
InvalidateSeq = NewType("InvalidateSeq", int)
Ticket = NewType("Ticket", int)
# The ticket of promises about all rights, whenever they were granted.
NO_TICKET: Final = Ticket(0)
ReportNumber = NewType("ReportNumber", int)
SignalSlot = NewType("SignalSlot", int)

# Members of the core's enums.
AccessKind = NewType("AccessKind", int)
CounterId = NewType("CounterId", int)
EventKind = NewType("EventKind", int)
HistogramId = NewType("HistogramId", int)
FlushReason = NewType("FlushReason", int)
FrameKind = NewType("FrameKind", int)
GuestInsn = NewType("GuestInsn", int)
IpiFunction = NewType("IpiFunction", int)
IpiWait = NewType("IpiWait", int)
KernelSpteStep = NewType("KernelSpteStep", int)
MappingKind = NewType("MappingKind", int)
PromiseKind = NewType("PromiseKind", int)
RcuCallback = NewType("RcuCallback", int)
VmStat = NewType("VmStat", int)
