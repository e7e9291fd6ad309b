"""Core functions during which Python keeps the GIL.

cffi releases the GIL around every call.  Around a call of a few dozen nanoseconds that costs more than it
gains: if other threads wait, each release wakes one of them in vain, and the caller may lose the GIL for a
whole switch interval.  A VM exit makes some twenty such calls.

The functions listed here access a few words, never wait, and never need the GIL's owner to make progress.  A
function that waits, copies pages or loops over more than a cache line's worth of state must not be listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

BRIEF = (
    # cpu.h, watch.h
    "cpu_attention",
    "cpu_clear_attention",
    "cpu_event",
    "cpu_notify",
    "cpu_power",
    "cpu_wake",
    "ipi_pending",
    "irqs_disabled",
    "local_irq_disable",
    "local_irq_enable",
    "machine_stopping",
    "mmu_lock_contended",
    "mmu_lock_held",
    "rcu_read_depth",
    # counters.h, oracle.h
    "counter_add",
    "event_record",
    "histogram_record",
    # rcu.h, mmu_lock.h
    "mmu_lock_needbreak",
    "mmu_read_trylock",
    "mmu_read_unlock",
    "mmu_write_trylock",
    "mmu_write_unlock",
    "rcu_read_lock",
    "rcu_read_unlock",
    "srcu_read_lock",
    "srcu_read_unlock",
    # vm.h, vmcs.h, guest.h
    "guest_skip",
    "kvm_check_request",
    "kvm_make_request",
    "kvm_requests",
    "kvm_test_request",
    "mmu_invalidate_begin",
    "mmu_invalidate_end",
    "mmu_invalidate_overlaps",
    "mmu_invalidate_range_add",
    "mmu_invalidate_retry_gfn",
    "mmu_invalidate_retry_range",
    "mmu_invalidate_seq",
    "vcpu_add_flush_reason",
    "vcpu_cpu",
    "vcpu_exiting_guest_mode",
    "vcpu_mode",
    "vcpu_set_cpu",
    "vcpu_set_mode",
    "vcpu_take_flush_reasons",
    "vm_stat",
    "vm_stat_add",
    "vmcs_write_eptp",
    "vmptrld",
    "vmptrst",
    # ept.h, mm.h
    "make_nonleaf_spte",
    "make_spte",
    "mm_huge",
    "spte_read",
    "tdp_mmu_get_walk",
    "tdp_mmu_set_spte_atomic",
)

_CALL = re.compile(
    r"  Py_BEGIN_ALLOW_THREADS\n"
    r"  _cffi_restore_errno\(\);\n"
    r"(?P<call>  \{ (?:result = )?(?P<name>\w+)\([^\n]*\); \}\n)"
    r"  _cffi_save_errno\(\);\n"
    r"  Py_END_ALLOW_THREADS\n"
)


def keep_gil(wrappers: str, names: Iterable[str] = BRIEF) -> str:
    """Return cffi's generated C with the GIL kept around calls of these functions, all of which it calls."""
    brief = set(names)
    kept: set[str] = set()

    def replace(match: re.Match[str]) -> str:
        if match["name"] not in brief:
            return match[0]
        kept.add(match["name"])
        return match["call"]

    changed = _CALL.sub(replace, wrappers)
    if kept != brief:
        raise ValueError(f"brief functions that cffi does not call as expected: {sorted(brief - kept)}")
    return changed
