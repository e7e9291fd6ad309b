"""Flushes are accounted under the reason that KVM had for them, also those that other pCPUs do for it."""

from __future__ import annotations

import pytest

from emulator.kvm.mmu.roots import kvm_mmu_new_pgd
from emulator.kvm.mmu.structs import KvmMmuPageRole
from emulator.kvm.mmu.tdp_roots import kvm_tdp_mmu_alloc_root, kvm_tdp_mmu_put_root
from emulator.kvm.virt.kvm_main import kvm_set_memory_region
from emulator.policy import Policy, preset
from native import FLUSH_REASONS, FLUSH_SCOPES, ffi, lib
from native.types import Gfn, Hva, Level
from tests.emulator.kvm.rig import GFNS, SLOT, Rig
from tests.support import CPU0

SMM = KvmMmuPageRole(level=Level(4), smm=1)


def flushes(rig: Rig, reason: int) -> int:
    size = rig.machine.config["vms"] * len(FLUSH_SCOPES) * len(FLUSH_REASONS)
    values, necessary = ffi.new("uint64_t[]", size), ffi.new("uint64_t[]", size)
    lib.flushes_sum(rig.machine.m, values, necessary)
    return sum(values[i] for i in range(reason, size, len(FLUSH_REASONS)))


def test_reasons_fit_into_a_flush_number() -> None:
    assert len(FLUSH_REASONS) <= 16


@pytest.mark.parametrize(("answer", "flushed"), [("none", 0), ("vm-pcpu-mask", 1)])
def test_a_new_root(rig: Rig, answer: str, flushed: int) -> None:
    kvm = rig.vm(Policy().with_settings({"root_alloc": answer}))
    guest = rig.guest(kvm)
    guest.read(0, 5)
    assert lib.cpu_take(rig.machine.m, CPU0) == 0
    assert lib.cpu_idle(rig.machine.m, CPU0) == 0
    before = flushes(rig, lib.REASON_ROOT_ALLOC), flushes(rig, lib.REASON_OTHER)
    root = kvm_tdp_mmu_alloc_root(rig.host, kvm, SMM)
    after = flushes(rig, lib.REASON_ROOT_ALLOC), flushes(rig, lib.REASON_OTHER)
    lib.cpu_offline(rig.machine.m, CPU0)
    with kvm.mmu_lock.read_lock(rig.host):
        kvm_tdp_mmu_put_root(rig.host, kvm, root)
    assert (after[0] - before[0], after[1] - before[1]) == (flushed, 0)


def test_a_pcpu_that_joins(rig: Rig) -> None:
    kvm = rig.vm(preset("lkml-2025-vm-pcpu-mask"))
    guest = rig.guest(kvm)
    guest.read(0, 5)
    before = flushes(rig, lib.REASON_PCPU_MASK)
    guest.read(1, 5)
    guest.read(0, 5)
    assert flushes(rig, lib.REASON_PCPU_MASK) - before == 1


def test_a_root_that_is_put(rig: Rig) -> None:
    kvm = rig.vm(Policy().with_settings({"root_put": "flush"}))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    before = flushes(rig, lib.REASON_ROOT_PUT)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), 0, Hva(0))
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0))
    guest.write(0, 5)

    assert flushes(rig, lib.REASON_ROOT_PUT) - before == 1


@pytest.mark.parametrize("answer", ["none", "flush-current"])
def test_a_cached_root(rig: Rig, answer: str) -> None:
    kvm = rig.vm(Policy().with_settings({"cached_root": answer}))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    before = flushes(rig, lib.REASON_CACHED_ROOT)
    kvm_mmu_new_pgd(rig.machine.cpus[0], guest.vcpu, 0)
    guest.read(0, 5)
    assert flushes(rig, lib.REASON_CACHED_ROOT) - before == (answer == "flush-current")
