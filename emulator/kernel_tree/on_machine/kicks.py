"""The primitives under a tree's requests and kicks: the fields of vCPUs that CPUs share, and interrupts.

The tree's own kvm_make_all_cpus_request() and kvm_flush_remote_tlbs() call these.  Each does on the machine
as the model's functions do (emulator/kvm/virt/requests.py), so explore sees the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from emulator.kvm.kvm_host import KVM_REQ_TLB_FLUSH, KVM_REQUEST_MASK, READING_SHADOW_PAGE_TABLES
from emulator.kvm.kvm_onhyperv import ALL_PAGES, hv_flush_remote_tlbs_range, hv_flushes_remotely
from emulator.kvm.structs import Kvm
from emulator.machine.runtime import timed
from native import lib
from native.types import Gfn, VcpuId

if TYPE_CHECKING:
    from emulator.kernel_tree.on_machine.core import Handler, Thread

_FLUSH: Final = KVM_REQ_TLB_FLUSH & KVM_REQUEST_MASK
_WORD: Final = (1 << 64) - 1
# To a caller in C: there is no Hyper-V, so the tree's code flushes by requests.
_NO_HYPERV: Final = 1


def handlers(code: Any) -> dict[int, Handler]:
    """Return the functions by the numbers that the shim calls them by."""
    fields: dict[int, Callable[[Thread, VcpuId], int]] = {
        code.FIELD_MODE: _mode,
        code.FIELD_REQUESTS: _requests,
        code.FIELD_CPU: _vcpu_cpu,
    }

    def field(thread: Thread, vcpu: int, which: int, text: Any) -> None:
        thread.state.value = fields[which](thread, VcpuId(vcpu)) & _WORD

    return {
        code.CALL_VCPU: field,
        code.CALL_EXITING: _exiting,
        code.CALL_REQUEST: _request,
        code.CALL_CHECK: _check,
        code.CALL_TEST: _test,
        code.CALL_KICK: _kick,
        code.CALL_FLUSH_DUE: _flush_due,
        code.CALL_FLUSH_RANGE_DUE: _flush_range_due,
        code.CALL_FLUSHED: _flushed,
    }


# --- fields of a vCPU ---------------------------------------------------------------------------------------


def _mode(thread: Thread, vcpu: VcpuId) -> int:
    thread.cpu.point("mode", vcpu, "read")
    return lib.vcpu_mode(thread.cpu.m, vcpu)


def _requests(thread: Thread, vcpu: VcpuId) -> int:
    thread.cpu.point("requests", vcpu, "read")
    return lib.kvm_requests(thread.cpu.m, vcpu)


def _vcpu_cpu(thread: Thread, vcpu: VcpuId) -> int:
    thread.cpu.point("vcpu->cpu", vcpu, "read")
    return lib.vcpu_cpu(thread.cpu.m, vcpu)


def _exiting(thread: Thread, vcpu: int, b: int, text: Any) -> None:
    """kvm_vcpu_exiting_guest_mode(): its cmpxchg"""
    cpu = thread.cpu
    cpu.point("mode", vcpu, "write")
    mode = lib.vcpu_exiting_guest_mode(cpu.m, VcpuId(vcpu))
    cpu.stat(_of(thread).id, lib.STAT_READERS_AWAITED, mode == READING_SHADOW_PAGE_TABLES)
    thread.state.value = mode


def _request(thread: Thread, vcpu: int, request: int, text: Any) -> None:
    """Set a bit of vcpu->requests."""
    cpu, number = thread.cpu, VcpuId(vcpu)
    if request == _FLUSH:
        lib.vcpu_add_flush_reason(cpu.m, number, thread.reason)
    cpu.point("requests", vcpu, "write")
    lib.kvm_make_request(cpu.m, number, request)
    cpu.event(lib.EVENT_REQUEST, vcpu, request)


def _check(thread: Thread, vcpu: int, request: int, text: Any) -> int:
    """Clear a bit of vcpu->requests, and return whether it was set."""
    thread.cpu.point("requests", vcpu, "write")
    return lib.kvm_check_request(thread.cpu.m, VcpuId(vcpu), request)


def _test(thread: Thread, vcpu: int, request: int, text: Any) -> int:
    thread.cpu.point("requests", vcpu, "read")
    return lib.kvm_test_request(thread.cpu.m, VcpuId(vcpu), request)


# --- interrupts and flushes ---------------------------------------------------------------------------------


def _kick(thread: Thread, wait: int, b: int, text: Any) -> None:
    """smp_call_function_many(), with a function that does nothing"""
    cpu, kvm, mask = thread.cpu, _of(thread), thread.state.kick_mask
    for word in range(cpu.kick_mask_words):
        cpu.kick_mask[word] = mask[word]
    waits = lib.IPI_WAIT if wait else lib.IPI_NO_WAIT
    cpu.point("call_queue", kvm.id, "write")
    cpu.check(lib.smp_call_function_many(cpu.m, cpu.id, cpu.kick_mask, lib.IPI_ACK_KICK, kvm.id << 32, waits))


def _flush_due(thread: Thread, a: int, b: int, text: Any) -> int:
    """Begin kvm_flush_remote_tlbs(): on Hyper-V flush by hypercalls, else leave the flush to the tree."""
    cpu, kvm = thread.cpu, _of(thread)
    thread.flushed = True
    thread.timing = timed(cpu, lib.HISTOGRAM_REMOTE_FLUSH)
    thread.timing.__enter__()
    cpu.stat(kvm.id, lib.STAT_REMOTE_TLB_FLUSH_REQUESTS)
    if kvm.heard.remote_flush_due is not None:
        kvm.heard.remote_flush_due(cpu, kvm, thread.reason)
    if hv_flushes_remotely(cpu, kvm):
        hv_flush_remote_tlbs_range(cpu, kvm, ALL_PAGES, thread.reason)
        return 0
    cpu.stat(kvm.id, lib.STAT_MAKE_ALL_CPUS_REQUEST)
    return _NO_HYPERV


def _flush_range_due(thread: Thread, gfn: int, npages: int, text: Any) -> int:
    """Begin a flush of a range: on Hyper-V make it, else leave it to kvm_flush_remote_tlbs()."""
    cpu, kvm = thread.cpu, _of(thread)
    if not hv_flushes_remotely(cpu, kvm):
        return _NO_HYPERV
    if kvm.heard.remote_flush_due is not None:
        kvm.heard.remote_flush_due(cpu, kvm, thread.reason)
    hv_flush_remote_tlbs_range(cpu, kvm, (Gfn(gfn), npages), thread.reason)
    return 0


def _flushed(thread: Thread, a: int, b: int, text: Any) -> None:
    """End a flush that _flush_due() began: no vCPU was in guest mode, or the interrupts were sent."""
    timing, thread.timing = thread.timing, None
    if timing is not None:
        timing.__exit__(None, None, None)


def _of(thread: Thread) -> Kvm:
    assert thread.kvm is not None
    return thread.kvm
