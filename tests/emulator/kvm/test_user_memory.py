"""Two of the host's operations on one page at a time: those that Linux lets overlap, and the results."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from emulator.host import memory as user_memory
from emulator.host.memory import UserMemory
from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES
from emulator.kvm.mmu.mmu import (
    kvm_mmu_zap_all_fast,
    kvm_mmu_zap_all_fast_back,
    kvm_mmu_zap_all_fast_front,
)
from emulator.kvm.structs import Kvm
from emulator.kvm.virt.kvm_main import (
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
    kvm_set_memory_region,
)
from emulator.machine.runtime import HPAGE_PMD_NR, Cpu
from emulator.policy import MUTANTS, Policy, preset
from native import lib
from native.types import Gfn, Hva, WordIndex
from tests.emulator.kvm.rig import GFNS, SLOT, Guest, Rig
from tests.support import wait_until

PAGE = HPAGE_PMD_NR + 16
Operation = Callable[[UserMemory, Cpu], None]

OPERATIONS: dict[str, Operation] = {
    "reclaim": lambda memory, cpu: memory.reclaim(cpu, Hva(PAGE), Hva(PAGE + 1)),
    "discard": lambda memory, cpu: memory.discard(cpu, Hva(PAGE), Hva(PAGE + 1)),
    "protect": lambda memory, cpu: memory.protect(cpu, Hva(PAGE), Hva(PAGE + 1), writable=False),
    "migrate": lambda memory, cpu: memory.migrate(cpu, Hva(PAGE), Hva(PAGE + 1)),
    "collapse": lambda memory, cpu: memory.collapse(cpu, Hva(HPAGE_PMD_NR)),
    "split": lambda memory, cpu: memory.split(cpu, Hva(HPAGE_PMD_NR)),
}
# mmap_lock and anon_vma, as Linux takes them: "r" shared, "w" alone.
LOCKS = {
    "reclaim": ("", "r"),
    "discard": ("r", ""),
    "protect": ("w", ""),
    "migrate": ("", "r"),
    "collapse": ("w", "w"),
    "split": ("r", ""),
}


def exclude(first: str, second: str) -> bool:
    pairs = zip(LOCKS[first], LOCKS[second], strict=True)
    return any(mine and theirs and "w" in (mine, theirs) for mine, theirs in pairs)


def during(monkeypatch: pytest.MonkeyPatch, cpu: Cpu, action: Callable[[], None], nth: int = 0) -> None:
    """Do `action` when that CPU's invalidate_range_start has returned, the page is still there."""
    # As it stands there now: several of these may be in place.
    start = vars(user_memory)["kvm_mmu_notifier_invalidate_range_start"]
    seen: list[int] = []

    def hooked(at: Cpu, *args: object) -> None:
        start(at, *args)
        if at is cpu:
            seen.append(1)
            if len(seen) == nth + 1:
                action()

    monkeypatch.setattr(user_memory, "kvm_mmu_notifier_invalidate_range_start", hooked)


def used_page(rig: Rig, huge: bool = False) -> tuple[Kvm, Guest, UserMemory]:
    kvm = rig.vm()
    guest, memory = rig.guest(kvm), UserMemory(kvm)
    guest.write(0, PAGE)
    if huge:
        memory.collapse(rig.host, Hva(HPAGE_PMD_NR))
        guest.write(0, PAGE)
    return kvm, guest, memory


@pytest.mark.parametrize("second", OPERATIONS)
@pytest.mark.parametrize("first", OPERATIONS)
def test_what_overlaps(rig: Rig, monkeypatch: pytest.MonkeyPatch, first: str, second: str) -> None:
    kvm, guest, memory = used_page(rig, huge=first == "split")
    done: list[int] = []

    def body() -> None:
        OPERATIONS[second](memory, rig.other)
        done.append(1)

    thread = threading.Thread(target=body)

    def waits() -> bool:
        return rig.other.id in (*memory.mmap_lock._waiters, *memory.anon_vma._waiters)

    def action() -> None:
        thread.start()
        wait_until(lambda: bool(done) or waits(), "the second operation ends or waits")
        assert waits() == exclude(first, second)

    during(monkeypatch, rig.host, action)
    OPERATIONS[first](memory, rig.host)
    thread.join()
    assert done
    guest.read(0, PAGE)
    guest.read(0, PAGE + 1)
    assert not rig.violations()
    # Only a huge page is split.
    invalidates = second != "split" or first == "split"
    assert bool(rig.stats(kvm)["overlaps"]) == (invalidates and not exclude(first, second))


def test_a_frame_is_freed_by_one_of_two(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second finds nothing to zap, promises all the same, and frees nothing; the contents are kept."""
    kvm, guest, memory = used_page(rig)
    lib.mm_fault(rig.host.m, rig.host.id, kvm.id, Hva(PAGE), True, rig.host.page)
    hfn = rig.host.page.hfn
    lib.frame_write(rig.host.m, hfn, WordIndex(5), 77)
    freed = rig.counter(lib.COUNT_FRAMES_FREED)
    zapped = rig.counter(lib.COUNT_SPTES_ZAPPED)
    during(monkeypatch, rig.host, lambda: memory.reclaim(rig.other, Hva(PAGE), Hva(PAGE + 1)))
    memory.reclaim(rig.host, Hva(PAGE), Hva(PAGE + 1))
    assert rig.counter(lib.COUNT_SPTES_ZAPPED) == zapped + 1
    assert rig.counter(lib.COUNT_FRAMES_FREED) == freed + 1
    assert lib.frame_life_of(rig.host.m, hfn) == 1
    assert lib.mm_read(rig.host.m, kvm.id, Hva(PAGE), WordIndex(5)) == 77
    assert rig.stats(kvm)["overlaps"] == 1
    guest.read(0, PAGE)
    assert not rig.violations()


def test_faults_wait_for_both(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner one has ended, the outer one has not: the merged range still holds a fault off."""
    kvm, guest, memory = used_page(rig)

    def action() -> None:
        memory.migrate(rig.other, Hva(PAGE + 1), Hva(PAGE + 4))
        for gfn, held_off in ((PAGE, 1), (PAGE + 3, 1), (PAGE + 4, 0), (PAGE - 1, 0)):
            seq = lib.mmu_invalidate_seq(rig.host.m, kvm.id)
            assert lib.mmu_invalidate_retry_gfn(rig.host.m, kvm.id, seq, Gfn(gfn)) == held_off

    during(monkeypatch, rig.host, action)
    memory.reclaim(rig.host, Hva(PAGE), Hva(PAGE + 2))
    seq = lib.mmu_invalidate_seq(rig.host.m, kvm.id)
    assert not lib.mmu_invalidate_retry_gfn(rig.host.m, kvm.id, seq, Gfn(PAGE))
    assert rig.stats(kvm)["overlaps"] == 1
    guest.write(0, PAGE)
    assert not rig.violations()


def test_the_same_range_twice_is_one_invalidation(rig: Rig) -> None:
    """The address space of SMM has the pages, too: both slots belong to one notifier."""
    kvm, _, memory = used_page(rig)
    rig.smm_slots(kvm)
    memory.reclaim(rig.host, Hva(PAGE), Hva(PAGE + 1))
    assert rig.stats(kvm)["overlaps"] == 0


@pytest.mark.parametrize("first", ["reclaim", "discard", "protect"])
def test_part_of_a_huge_page(rig: Rig, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """It is split in a bracket of its own, over all of it; then the caller's is for the caller's range."""
    kvm, guest, memory = used_page(rig, huge=True)
    seen: list[list[int]] = []

    def held_off() -> None:
        m, pages = rig.host.m, (HPAGE_PMD_NR, PAGE, PAGE + 1, 2 * HPAGE_PMD_NR - 1)
        seq = lib.mmu_invalidate_seq(m, kvm.id)
        seen.append([int(lib.mmu_invalidate_retry_gfn(m, kvm.id, seq, Gfn(gfn))) for gfn in pages])

    during(monkeypatch, rig.host, held_off)
    during(monkeypatch, rig.host, held_off, nth=1)
    OPERATIONS[first](memory, rig.host)
    assert seen == [[1, 1, 1, 1], [0, 1, 0, 0]]
    guest.read(0, PAGE)
    guest.read(0, HPAGE_PMD_NR)
    assert not rig.violations()


def mapped_pages(rig: Rig, action: Callable[[], object]) -> int:
    """Pages of the leafs that `action` installs."""
    before = rig.counter(lib.COUNT_SPTES_MAPPED)
    action()
    return rig.counter(lib.COUNT_SPTES_MAPPED) - before


def test_a_host_that_does_not_split_a_huge_page(rig: Rig) -> None:
    """A fault beside the invalidated page maps the huge page again, which no notifier zaps before the frame
    goes.  Using the fault's frame is no violation until then."""
    kvm, guest, _ = used_page(rig, huge=True)
    m, cpu = rig.host.m, rig.host.id
    kvm_mmu_notifier_invalidate_range_start(rig.host, kvm, Hva(PAGE), Hva(PAGE + 1))
    assert mapped_pages(rig, lambda: guest.read(0, PAGE + 1)) == HPAGE_PMD_NR
    guest.read(0, PAGE)
    assert not rig.violations()
    assert lib.mm_unmap(m, cpu, kvm.id, Hva(PAGE), Hva(PAGE + 1), True) == 1
    guest.read(0, PAGE + 2)
    assert not rig.violations(), "only that frame is gone"
    guest.read(0, PAGE)
    assert set(rig.violations()) == {"use-after-free"}
    kvm_mmu_notifier_invalidate_range_end(rig.host, kvm, Hva(PAGE), Hva(PAGE + 1))


def test_promises_about_a_part_leave_the_page_huge(rig: Rig) -> None:
    """The guest uses a few pages by 4K SPTEs, so the rights on the block's frames end at different times."""
    kvm, guest, memory = used_page(rig, huge=True)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
    memory.protect(rig.host, Hva(HPAGE_PMD_NR), Hva(2 * HPAGE_PMD_NR), writable=False)
    memory.protect(rig.host, Hva(HPAGE_PMD_NR), Hva(2 * HPAGE_PMD_NR), writable=True)
    assert mapped_pages(rig, lambda: guest.write(0, PAGE)) == 1
    memory.migrate(rig.host, Hva(HPAGE_PMD_NR), Hva(2 * HPAGE_PMD_NR))
    assert mapped_pages(rig, lambda: guest.write(0, PAGE + 1)) == 1
    # Recovery looks at the host's mapping of now.
    assert (
        mapped_pages(rig, lambda: kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0)))
        == HPAGE_PMD_NR
    )
    memory.migrate(rig.host, Hva(HPAGE_PMD_NR), Hva(2 * HPAGE_PMD_NR))
    assert mapped_pages(rig, lambda: guest.write(0, PAGE)) == HPAGE_PMD_NR
    guest.read(0, PAGE + 1)
    assert not rig.violations()


@pytest.mark.parametrize(
    ("policy", "marks"), [("linux-7.3", False), ("linux-6.12", True), ("linux-5.14", True)]
)
def test_kvm_marks_the_pages_that_it_zaps(rig: Rig, policy: str, marks: bool) -> None:
    kvm = rig.vm(preset(policy))
    guest, memory = rig.guest(kvm), UserMemory(kvm)
    for gfn in (PAGE, PAGE + 1):
        guest.write(0, gfn)
    memory.reclaim(rig.host, Hva(PAGE), Hva(PAGE + 1))
    assert rig.counter(lib.COUNT_PFNS_SET) == marks
    with kvm.slots_lock.held(rig.host):
        kvm_mmu_zap_all_fast(rig.host, kvm)
    assert rig.counter(lib.COUNT_PFNS_SET) == 2 * marks
    assert not rig.violations()


@pytest.mark.parametrize(
    ("policy", "violations"),
    [
        (preset("linux-5.14"), {}),
        (preset("linux-6.12"), {}),
        (preset("mutant:notifier-skips-invalid-roots"), {"use-after-free": 1}),
        # No vCPU reaches the SPTE, and since 6.13 its zap does not use the page.
        (MUTANTS["notifier-skips-invalid-roots"].policy(Policy("linux-7.3")), {}),
    ],
    ids=lambda value: value.name if isinstance(value, Policy) else "",
)
def test_a_notifier_beside_the_zap_of_an_invalid_root(
    rig: Rig, policy: Policy, violations: dict[str, int]
) -> None:
    kvm = rig.vm(policy)
    guest, memory = rig.guest(kvm), UserMemory(kvm)
    guest.write(0, PAGE)
    kvm_mmu_zap_all_fast_front(rig.host, kvm)
    memory.reclaim(rig.other, Hva(PAGE), Hva(PAGE + 1))
    kvm_mmu_zap_all_fast_back(rig.host, kvm)
    assert rig.violations() == violations
    guest.read(0, PAGE)
    assert rig.violations() == violations
