"""A machine that is put back: every byte as at the snapshot, and its next steps are the earlier ones."""

from __future__ import annotations

import random
from typing import Any

import pytest

from native import ffi, lib
from native.types import CpuId, FrameKind, Hfn, Hva, VcpuId, VmId, WordIndex
from tests.native.hypervisor import READ, WRITE, Hypervisor
from tests.support import CPU0, VCPU0, VM0

GFNS = 512
VCPUS = 2


def rig(**changes: int) -> Hypervisor:
    h = Hypervisor(snapshots=1, l2_entries=0, psc_entries=0, **changes)
    vm = h.vm(1024)
    for number in range(VCPUS):
        vcpu = h.vcpu(vm, number + 1, first_gfn=GFNS * number, end_gfn=GFNS * (number + 1), paging=number)
        h.process(vcpu, [], list(range(number, 300, 7)))
    return h


def turn(h: Hypervisor, choose: random.Random) -> None:
    """One operation of a hypervisor, or an access of a guest."""
    vcpu = VcpuId(choose.randrange(VCPUS))
    gfn, cpu = choose.randrange(GFNS), CpuId(vcpu)
    kind = choose.randrange(12)
    if kind < 6:
        linear = gfn << 12 if vcpu == 0 else choose.randrange(1, 300, 7) << 12
        h.access(cpu, vcpu, linear, choose.choice((READ, WRITE)))
    elif kind == 6:
        h.zap(cpu, VM0, gfn)
        h.flush(VM0)
        h.promise(cpu, VM0, gfn, lib.PROMISE_NOTIFIER)
        lib.mm_unmap(h.m, cpu, VM0, Hva(gfn), Hva(gfn + 1), bool(choose.randrange(2)))
    elif kind == 7:
        h.write_protect(cpu, VM0, gfn)
    elif kind == 8:
        assert lib.call_rcu(h.m, cpu, lib.RCU_NOTHING, gfn) == 0
    elif kind == 9:
        other = VmId(lib.vm_create(h.m, 64))
        if other >= 0:
            lib.vm_destroy(h.m, other)
    elif kind == 10:
        ops = ffi.new("struct guest_op[]", choose.randrange(1, 9))
        assert lib.guest_set_program(h.m, vcpu, ops, len(ops)) == 0
    else:
        lib.mm_image_create(h.m, VM0, Hva(gfn), choose.randrange(8))


def seen(h: Hypervisor) -> list[object]:
    """Describe the machine's state, without times."""
    entries = ffi.new("struct tlb_entry[]", 4096)
    n = lib.tlb_dump(lib.cpu_tlb(h.m, CPU0), entries, 4096)
    found: list[object] = [bytes(ffi.buffer(entries, n * ffi.sizeof("struct tlb_entry")))]
    counters = ffi.new("uint64_t[]", lib.COUNTERS)
    lib.counters_sum(h.m, counters)
    found.append(list(counters))
    found.append(h.violations())
    found.append([h.leaf(CPU0, VM0, gfn, False) for gfn in range(0, GFNS, 5)])
    found.append([lib.frames_in_use(h.m, kind) for kind in map(FrameKind, range(lib.FRAME_KINDS))])
    found.append(
        [lib.frame_read(h.m, Hfn(hfn), WordIndex(word)) for hfn in range(1, 400) for word in (0, 1, 511)]
    )
    return found


@pytest.mark.slow
def test_a_restored_machine_is_the_one_of_the_snapshot() -> None:
    with rig() as h:
        choose = random.Random(1)
        for _ in range(200):
            turn(h, choose)
        assert lib.machine_snapshot(h.m) == 0
        before, looks = lib.machine_fingerprint(h.m), seen(h)
        assert lib.machine_fingerprint(h.m) == before, "looking changes nothing"
        for _ in range(40):
            for _ in range(choose.randrange(100)):
                turn(h, choose)
            assert lib.machine_restore(h.m) == 0
            assert lib.machine_fingerprint(h.m) == before
        assert seen(h) == looks


def test_it_does_the_same_again() -> None:
    with rig() as h:
        for seed in range(100):
            turn(h, random.Random(seed))
        assert lib.machine_snapshot(h.m) == 0
        for seed in range(20):
            came_of_it = []
            for _ in range(2):
                choose = random.Random(seed)
                for _ in range(60):
                    turn(h, choose)
                came_of_it.append(seen(h))
                assert lib.machine_restore(h.m) == 0
            assert came_of_it[0] == came_of_it[1]


def test_reports_and_counts_go_back_too() -> None:
    with rig() as h:
        h.access(CPU0, VCPU0, 0x5000, WRITE)
        assert lib.machine_snapshot(h.m) == 0
        for _ in range(3):
            h.zap(CPU0, VM0, 5)
            h.promise(CPU0, VM0, 5, lib.PROMISE_NOTIFIER)
            h.access(CPU0, VCPU0, 0x5000)
            assert h.violations() == {"stale-after-revoke": 1}
            assert len(h.reports()) == 1
            assert lib.machine_restore(h.m) == 0
            assert not h.violations()
            assert not h.reports()


def test_a_machine_without_snapshots_says_so() -> None:
    with Hypervisor() as h:
        assert lib.machine_snapshot(h.m) == lib.MACHINE_MISUSE
        assert lib.machine_restore(h.m) == lib.MACHINE_MISUSE
        assert lib.machine_fingerprint(h.m) == 0


def test_there_is_nothing_to_restore_before_a_snapshot() -> None:
    with rig() as h:
        assert lib.machine_restore(h.m) == lib.MACHINE_MISUSE


@pytest.mark.parametrize("frames", [256, 1 << 16])
def test_large_machines_can_be_kept(frames: int) -> None:
    with rig(guest_frames=frames) as h:
        assert lib.machine_snapshot(h.m) == 0
        before = h.violations()
        for gfn in range(100):
            h.access(CPU0, VCPU0, gfn << 12, WRITE)
        assert lib.machine_restore(h.m) == 0
        assert not h.mapped(VM0, 5)
        assert h.violations() == before


def digest(h: Hypervisor) -> tuple[int, int]:
    words: Any = ffi.new("uint64_t[2]")
    assert lib.machine_digest(h.m, words) == 0
    return words[0], words[1]


def test_the_digest_is_the_state_without_times() -> None:
    with rig() as h:
        for seed in range(100):
            turn(h, random.Random(seed))
        assert lib.machine_snapshot(h.m) == 0
        found = []
        for seed in range(10):
            digests = []
            for _ in range(2):
                choose = random.Random(seed)
                for _ in range(30):
                    turn(h, choose)
                digests.append(digest(h))
                assert lib.machine_restore(h.m) == 0
                assert digest(h) == (0, 0)
            assert digests[0] == digests[1]
            found.append(digests[0])
        assert len({*found, (0, 0)}) == 11


@pytest.mark.parametrize("change", ["tlb", "spte", "frame", "request"])
def test_a_single_change_changes_the_digest(change: str) -> None:
    with rig() as h:
        h.access(CPU0, VCPU0, 0x5000, WRITE)
        assert lib.machine_snapshot(h.m) == 0
        if change == "tlb":
            h.flush(VM0)
        elif change == "spte":
            h.zap(CPU0, VM0, 5)
        elif change == "frame":
            lib.mm_unmap(h.m, CPU0, VM0, Hva(9), Hva(10), True)
            h.access(CPU0, VCPU0, 0x9000)
        else:
            lib.kvm_make_request(h.m, VCPU0, 3)
        assert digest(h) != (0, 0)


def test_there_is_no_digest_without_a_snapshot() -> None:
    words: Any = ffi.new("uint64_t[2]")
    with rig() as h:
        assert lib.machine_digest(h.m, words) == lib.MACHINE_MISUSE
    with Hypervisor() as h:
        assert lib.machine_digest(h.m, words) == lib.MACHINE_MISUSE
