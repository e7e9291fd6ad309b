"""Every wrong answer that one thread can show wrong: the oracle fires, and the right answer stays silent.

Each scenario says how often its danger was there, so that no test passes because nothing happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES
from emulator.kvm.structs import Kvm
from emulator.kvm.virt.kvm_main import (
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
    kvm_set_memory_region,
)
from emulator.machine.runtime import rcu_read_lock
from emulator.policy import Policy
from native import lib
from native.types import Gfn, Hva
from tests.emulator.kvm.rig import GFNS, SLOT, Guest, Rig, at_point, page_is_a_root_again

Scenario = Callable[[Rig, Policy], None]


def one_guest(rig: Rig, policy: Policy, **params: int) -> tuple[Kvm, Guest]:
    kvm = rig.vm(policy, True, **params)
    return kvm, rig.guest(kvm)


@contextmanager
def freed_and_walked(rig: Rig, walker: Guest) -> Iterator[None]:
    """RCU frees all it can as soon as the host leaves a read section, and a guest walks at that moment."""

    def free_and_walk() -> None:
        rig.other.check(lib.rcu_barrier(rig.machine.m, rig.other.id))
        walker.read(1, 1025)

    with at_point(rig, rig.host.id, "rcu", "write", free_and_walk):
        yield


def away_and_back(rig: Rig, policy: Policy) -> None:
    """The page goes while the vCPU is on another pCPU."""
    kvm, guest = one_guest(rig, policy)
    guest.read(0, 5)
    guest.write(1, 6)
    rig.unmap(kvm, 0, 64)
    guest.read(1, 5)
    guest.read(0, 5)


def root_page_reused(rig: Rig, policy: Policy) -> None:
    """A root's page becomes a root again on the same pCPU."""
    _, guest = one_guest(rig, policy)
    guest.write(0, 5)
    # A reader: the page is not free before the next root has another one.
    page_is_a_root_again(rig, guest, 0, lambda: rcu_read_lock(rig.other))
    guest.read(0, 5)


def table_replaced(rig: Rig, policy: Policy) -> None:
    """A huge leaf replaces a table that another pCPU has a pointer to.

    Logging maps huge memory by 4K pages, one of which is missing.  It ends, and before the table as a whole
    is turned into a huge page, a fault on the missing page does so.
    """
    kvm = rig.vm(policy)
    first, second = rig.guest(kvm), rig.guest(kvm)
    first.write(0, 1024)
    rig.collapse(kvm, 1024)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
    second.read(1, 1024)
    with at_point(rig, rig.host.id, "mmu_lock", "read", lambda: first.read(0, 1030)):
        kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0))
    rig.rcu()
    second.read(1, 1031)


def logging_armed(rig: Rig, policy: Policy) -> None:
    """A writable translation outlives the moment from which writes are logged."""
    kvm, guest = one_guest(rig, policy)
    guest.write(0, 5)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
    guest.write(0, 5)


def page_freed(rig: Rig, policy: Policy) -> None:
    """A page is taken back and read again on the pCPU that has its translation."""
    kvm, guest = one_guest(rig, policy)
    guest.write(0, 5)
    rig.unmap(kvm, 0, 64)
    guest.read(0, 5)


def used_before_range_end(rig: Rig, policy: Policy) -> None:
    """As page_freed, but the guest runs before invalidate_range_end."""
    kvm, guest = one_guest(rig, policy)
    guest.write(0, 5)
    kvm_mmu_notifier_invalidate_range_start(rig.host, kvm, Hva(0), Hva(64))
    assert lib.mm_unmap(rig.machine.m, rig.host.id, kvm.id, Hva(0), Hva(64), True) == 1
    guest.read(0, 5)
    kvm_mmu_notifier_invalidate_range_end(rig.host, kvm, Hva(0), Hva(64))


def fault_races(rig: Rig, policy: Policy) -> None:
    """The page goes between the fault's look-up and its mapping."""
    kvm, guest = one_guest(rig, policy)
    guest.write(0, 70)
    with at_point(rig, 0, "mmu_lock", "read", lambda: rig.unmap(kvm, 0, 64)):
        guest.write(0, 5)
    assert rig.stats(kvm)["fault_retries"] == (policy.answers()["fault_retry"] == "invalidate-seq")


def zap_yields(rig: Rig, policy: Policy) -> None:
    """All SPTEs of a range lie before the point where the zap yields."""
    kvm, guest = one_guest(rig, policy, chunk=32, resched_chunks=1)
    guest.write(0, 5)
    with rig.counting(kvm) as counts:
        rig.unmap(kvm, 0, 128)
    assert counts["yields"] == 3
    guest.read(0, 5)


def table_zapped(rig: Rig, policy: Policy) -> None:
    """RCU frees a table as soon as the zap leaves its read section, and a guest walks at that moment."""
    kvm = rig.vm(policy)
    guest, walker = rig.guest(kvm), rig.guest(kvm)
    guest.write(0, 1024)
    walker.read(1, 1024)
    with freed_and_walked(rig, walker):
        rig.unmap(kvm, 1024, 1536)


def pages_recovered(rig: Rig, policy: Policy) -> None:
    """A guest walks as above when dirty logging ends and a huge page comes back."""
    kvm = rig.vm(policy)
    guest, walker = rig.guest(kvm), rig.guest(kvm)
    guest.write(0, 1024)
    rig.collapse(kvm, 1024)
    guest.write(0, 1024)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
    guest.write(0, 1024)
    walker.read(1, 1024)
    with freed_and_walked(rig, walker):
        kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0))


def request_at_entry(rig: Rig, policy: Policy) -> None:
    """A request is made just before mode becomes IN_GUEST_MODE."""
    kvm, guest = one_guest(rig, policy)
    guest.write(0, 5)
    with at_point(rig, 0, "mode", "write", lambda: rig.unmap(kvm, 0, 64)):
        guest.read(0, 5)


def guest_invalidates_elsewhere(rig: Rig, policy: Policy) -> None:
    """The guest changes its page tables and invalidates on one pCPU, and comes back to the other."""
    kvm = rig.vm(policy, slice_accesses=40)
    guest = Guest(rig, kvm, pages=16, paging=1, pcid=1, unmap_every=10, end_gfn=512)
    for turn in range(60):
        guest.run_slices(turn % 2, 4)
    assert rig.counter(lib.COUNT_GUEST_INVALIDATIONS) > 50


MUTANTS: list[tuple[Scenario, dict[str, str], str]] = [
    (away_and_back, {"migration": "none"}, "use-after-free"),
    (root_page_reused, {"root_load": "none"}, "foreign-root"),
    (table_replaced, {"map_replace": "none"}, "walk-after-free"),
    (logging_armed, {"write_protect": "none"}, "stale-after-revoke"),
    (page_freed, {"notifier_flush": "none"}, "use-after-free"),
    (used_before_range_end, {"notifier_flush": "at-range-end"}, "use-after-free"),
    (fault_races, {"fault_retry": "none"}, "use-after-free"),
    (zap_yields, {"zap_yield": "no-flush"}, "use-after-free"),
    (
        table_zapped,
        {"zap_yield": "unlock-then-flush", "zap_scope": "leafs-and-tables"},
        "walk-after-free",
    ),
    (pages_recovered, {"zap_yield": "unlock-then-flush"}, "walk-after-free"),
    (request_at_entry, {"entry_order": "requests-then-mode"}, "use-after-free"),
    (guest_invalidates_elsewhere, {"migration": "none", "migration_vpid": "none"}, "guest-stale"),
]

SOUND: list[tuple[Scenario, dict[str, str]]] = [
    *((scenario, {}) for scenario in dict.fromkeys(mutant[0] for mutant in MUTANTS)),
    (away_and_back, {"migration": "active-roots"}),
    (away_and_back, {"remote_flush": "active-roots"}),
    (page_freed, {"remote_flush": "active-roots"}),
    (away_and_back, {"remote_kick": "all-pcpus"}),
    (away_and_back, {"remote_kick": "vm-pcpu-mask"}),
    (root_page_reused, {"migration": "active-roots"}),
    (guest_invalidates_elsewhere, {"migration": "none", "migration_vpid": "invvpid"}),
    (guest_invalidates_elsewhere, {"migration": "active-roots", "migration_vpid": "none"}),
    (table_zapped, {"zap_scope": "leafs-and-tables"}),
    (table_zapped, {"zap_yield": "unlock-then-flush"}),
    (zap_yields, {"zap_yield": "unlock-then-flush"}),
    (zap_yields, {"zap_scope": "leafs-and-tables"}),
    (pages_recovered, {"huge_recovery": "zap-each"}),
    (root_page_reused, {"slot_delete": "zap-slot-leafs"}),
]


def _id(value: object) -> str | None:
    if isinstance(value, dict):
        return ",".join(f"{point}={answer}" for point, answer in value.items()) or "linux-7.3"
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("scenario", "settings", "kind"), MUTANTS, ids=_id)
def test_the_oracle_fires(rig: Rig, scenario: Scenario, settings: dict[str, str], kind: str) -> None:
    scenario(rig, Policy().with_settings(settings))
    assert kind in rig.violations()


@pytest.mark.parametrize(("scenario", "settings"), SOUND, ids=_id)
def test_sound_answers_stay_silent(rig: Rig, scenario: Scenario, settings: dict[str, str]) -> None:
    scenario(rig, Policy().with_settings(settings))
    assert rig.violations() == {}
