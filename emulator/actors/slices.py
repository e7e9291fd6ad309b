"""A shorter time slice for the machine's threads, where the kernel supports it (EEVDF, since Linux 6.12).

With more pCPUs than cores, a thread that runs a guest sometimes preempts the thread that holds the GIL, for a
whole slice of some milliseconds, and all Python waits.  With slices of a tenth of that it goes on sooner.
"""

from __future__ import annotations

import ctypes
import os
import platform

# The kernel's least (sched(7): 100 us to 100 ms).
SLICE_NANOSECONDS = 100_000

_SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}.get(platform.machine())


class _SchedAttr(ctypes.Structure):
    """struct sched_attr, version 0."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("sched_policy", ctypes.c_uint32),
        ("sched_flags", ctypes.c_uint64),
        ("sched_nice", ctypes.c_int32),
        ("sched_priority", ctypes.c_uint32),
        ("sched_runtime", ctypes.c_uint64),
        ("sched_deadline", ctypes.c_uint64),
        ("sched_period", ctypes.c_uint64),
    )


def shorten_slice(nanoseconds: int = SLICE_NANOSECONDS) -> bool:
    """Request the slice for the calling thread; return False if the kernel does not support it or refuses."""
    if _SYS_SCHED_SETATTR is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    attr = _SchedAttr(
        size=ctypes.sizeof(_SchedAttr),
        sched_policy=os.SCHED_OTHER,
        sched_nice=os.getpriority(os.PRIO_PROCESS, 0),
        sched_runtime=nanoseconds,
    )
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_SYS_SCHED_SETATTR, 0, ctypes.byref(attr), 0) == 0)
