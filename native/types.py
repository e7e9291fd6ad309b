"""Types for the kinds of numbers that the core's functions take, for mypy.

The core distinguishes CPUs, VMs and vCPUs by the positions of arguments alone: a call with two of them
swapped acts on another CPU and another VM, and succeeds.  `native/_native.pyi` gives each argument the type
that its name stands for (native/stub.py), so that such a call is a type error.  At run time all are ints.
"""

from __future__ import annotations

from typing import Final, NewType

__all__ = [
    "NO_FRAME",
    "CounterId",
    "CpuId",
    "FlushReason",
    "FrameKind",
    "Hfn",
    "HistogramId",
    "IpiFunction",
    "PromiseKind",
    "VcpuId",
    "VmId",
    "VmStat",
    "VmcsId",
    "Vpid",
]

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

# Members of the core's enums.
CounterId = NewType("CounterId", int)
HistogramId = NewType("HistogramId", int)
FlushReason = NewType("FlushReason", int)
FrameKind = NewType("FrameKind", int)
IpiFunction = NewType("IpiFunction", int)
PromiseKind = NewType("PromiseKind", int)
VmStat = NewType("VmStat", int)
