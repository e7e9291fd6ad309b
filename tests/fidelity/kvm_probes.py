"""Which of KVM's functions the driver counts calls of."""

from __future__ import annotations

from collections import Counter
from typing import Any

from emulator.kvm import kvm_host
from emulator.kvm.mmu.shadow_structs import Sptep
from emulator.kvm.mmu.spte import is_last_spte
from emulator.kvm.mmu.tdp_iter import TdpIter
from emulator.kvm.structs import Kvm
from emulator.machine.runtime import Cpu
from native import lib

from .probes import Probes


def probe_kvm(probes: Probes) -> None:
    """The functions that the recordings traced, and the signs that an operation took effect."""
    names = {
        getattr(kvm_host, name): name.removeprefix("KVM_REQ_") for name in dir(kvm_host) if "_REQ_" in name
    }

    def each_call(function: str, what: str) -> None:
        probes.probe(function, lambda args, _: (what, args[1].id, 1))

    for scope in ("all", "current", "guest"):
        each_call(f"vmx_flush_tlb_{scope}", f"flush_{scope}")
    each_call("kvm_mmu_load", "kvm_mmu_load")
    each_call("kvm_flush_remote_tlbs", "remote_tlb_flush_requests")
    each_call("kvm_sched_in", "sched_in")
    each_call("vmx_handle_exit", "exits")
    each_call("handle_instruction", "instructions")
    each_call("emulator_leave_smm", "rsm")
    probes.probe("kvm_make_all_cpus_request", lambda args, _: (f"request {names[args[2]]}", args[1].id, 1))
    # kvm_vcpu_flush_tlb_{all,current,guest} count here, on the pCPU on which the vCPU is loaded.
    probes.probe_method(
        Cpu,
        "stat",
        lambda args, _: ("tlb_flush", args[0].vcpu.id, 1) if args[2] == lib.STAT_TLB_FLUSH else None,
    )
    probes.probe(
        "tdp_mmu_iter_cond_resched", lambda args, yielded: ("yields", args[1].id, yielded and args[3])
    )
    _probe_rmap_yields(probes)
    _probe_second_copies(probes)
    probes.probe_method(TdpIter, "step", lambda args, n: _walked(args[0].chunk.walk, args[2], n), cpu=1)
    probes.probe(
        "tdp_mmu_map_handle_target_level",
        lambda args, _: ("huge leaves", args[1].kvm.id, args[3].level > kvm_host.PG_LEVEL_4K),
    )
    # The shadow MMU's counterparts.
    probes.probe(
        "mmu_set_spte", lambda args, _: ("huge leaves", args[1].id, _level(args[3]) > kvm_host.PG_LEVEL_4K)
    )
    probes.probe("mmu_spte_update", _updated)
    probes.probe("tdp_mmu_make_huge_spte", lambda args, spte: ("recovered", args[1].id, spte is not None))
    probes.probe(
        "tdp_mmu_zap_spte_atomic",
        lambda args, zapped: (
            "recovered",
            args[1].id,
            zapped and not is_last_spte(args[2].spte, args[2].level),
        ),
    )


def _probe_rmap_yields(probes: Probes) -> None:
    """Count the flushes of walks over rmaps at yields, less one that comes in place of that at the end."""
    flushes: Counter[int] = Counter()

    def yielded(args: tuple[Any, ...], flushed: bool) -> None:
        flushes[args[0].id] += flushed

    def walked(args: tuple[Any, ...], pending: bool) -> tuple[str, int, int]:
        n = flushes.pop(args[0].id, 0)
        return "yields", args[1].id, n if pending else max(n - 1, 0)

    probes.probe("walk_slot_rmaps_yield", yielded)
    probes.probe("walk_slot_rmaps", walked)


def _probe_second_copies(probes: Probes) -> None:
    """Count the flushes for a page that was copied on write, and was mapped again before another vCPU, which
    had met the shared page as well, came to its own notifier range."""
    copied: set[tuple[int, int]] = set()

    def unmapped(args: tuple[Any, ...], flush: bool) -> tuple[str, int, int]:
        _, kvm, _, start, end, *_ = args
        if not flush or end != start + 1:
            return "refaults", kvm.id, 0
        second = (kvm.id, start) in copied
        copied.add((kvm.id, start))
        return "refaults", kvm.id, second

    probes.probe("kvm_unmap_gfn_range", unmapped)


def _updated(args: tuple[Any, ...], flushes: bool) -> tuple[str, int, int]:
    _, kvm, _, _, new_spte = args
    if new_spte & lib.SPTE_WRITABLE:
        return "refaults", kvm.id, flushes
    return "protected", kvm.id, 1


def _level(sptep: Sptep) -> int:
    return sptep.sp.role.level


def _walked(walk: int, kvm: Kvm, n: int) -> tuple[str, int, int] | None:
    protects = walk in (lib.TDP_WRPROT, lib.TDP_CLEAR_DIRTY)
    return ("protected", kvm.id, n) if protects else None
