"""MOV to CR3, INVLPG, INVPCID and CR4.PGE without EPT, against cr3_model.py, on programs by hypothesis.

The guest edits the tables of processes that are loaded and of others, by stores that KVM lets pass, and
invalidates or does not.  After each instruction the SPTEs that it can use must be among those that its own
reference allows, and KVM's loads, flushes and cached roots must be those that KVM's reference counts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from emulator.kvm.kvm_host import (
    KVM_REQ_LOAD_MMU_PGD,
    KVM_REQ_TLB_FLUSH,
    X86_CR3_PCID_NOFLUSH,
    X86_CR4_PCIDE,
    X86_CR4_PGE,
)
from emulator.kvm.mmu.fault import RET_PF_FIXED, RET_PF_INJECTED, RET_PF_SPURIOUS
from emulator.kvm.mmu.roots import kvm_mmu_load_pgd
from emulator.kvm.mmu.shadow_spte import kvm_mmu_page_get_gfn
from emulator.kvm.mmu.spte import is_last_spte, is_shadow_present_pte, is_writable_pte
from emulator.kvm.regs import kvm_handle_invpcid, kvm_mmu_invlpg, kvm_set_cr3, kvm_set_cr4
from emulator.kvm.tlb import kvm_service_local_tlb_flush_requests
from emulator.kvm.virt.requests import kvm_check_request
from emulator.policy import Policy, preset
from tests.emulator.kvm.cr3_model import PAGES, PROCESSES, Cr3Model, Mapping, pcid_of
from tests.emulator.kvm.rig import running_rig
from tests.emulator.kvm.shadow_rig import PAGE, ShadowedGuest, W, shadowed_guest

LINEAR = 0x7F00_0000_0000
GLOBAL = 1 << 8
COUNTED = ("mmu_load", "cached_roots", "flush_current", "flush_guest")
GFNS = (10, 11, 12)


class SwitchingGuest(ShadowedGuest):
    def enter(self) -> None:
        super().enter()
        if kvm_check_request(self.cpu, self.vcpu, KVM_REQ_LOAD_MMU_PGD):
            kvm_mmu_load_pgd(self.cpu, self.vcpu)
        kvm_check_request(self.cpu, self.vcpu, KVM_REQ_TLB_FLUSH)
        kvm_service_local_tlb_flush_requests(self.cpu, self.vcpu)


def page_at(page: int) -> int:
    return LINEAR + (page << 12)


def alias_of(process: int) -> int:
    """Return the address, in every process, of a process's last table."""
    return page_at(500 + process)


class Programs:
    """The guest and the model side by side."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.live = ExitStack()
        rig = self.live.enter_context(running_rig())
        self.guest = self.live.enter_context(shadowed_guest(rig, SwitchingGuest, policy=policy))
        self.table = []
        for process in range(PROCESSES):
            self.guest.vcpu.arch.cr3 = self._pml4(process) << 12
            self.guest.next_table = self._pml4(process) + 1
            for page in range(PAGES):
                table = self.guest.map(page_at(page), GFNS[0])
            self.table.append(table)
        for process in range(PROCESSES):
            for other in range(PROCESSES):
                index = self.guest.index(alias_of(other), 1)
                self.guest.write(self.table[process], index, self.table[other] << 12 | PAGE)
        self.guest.vcpu.arch.cr4 |= X86_CR4_PCIDE
        self.guest.vcpu.arch.cr3 = self._cr3(0)
        mapped = Mapping(GFNS[0], True)
        self.model = Cr3Model({(p, i): mapped for p in range(PROCESSES) for i in range(PAGES)})
        # A new vCPU owes the flush of its reset.
        self.guest.enter()
        self.model.root = self.model.current
        self.before = rig.stats(self.guest.kvm)
        self.legal = 0  # translations from before a change, which the guest could have used

    @staticmethod
    def _pml4(process: int) -> int:
        return 100 * (process + 1)

    def _cr3(self, process: int) -> int:
        return self._pml4(process) << 12 | pcid_of(process)

    def enter(self) -> None:
        self.guest.enter()
        self.model.enter()

    def mov_cr3(self, process: int, noflush: bool) -> None:
        cr3 = self._cr3(process) | (X86_CR3_PCID_NOFLUSH if noflush else 0)
        kvm_set_cr3(self.guest.cpu, self.guest.vcpu, cr3)
        self.model.mov_cr3(process, noflush)
        self.enter()

    def invlpg(self, page: int) -> None:
        kvm_mmu_invlpg(self.guest.cpu, self.guest.vcpu, page_at(page))
        self.model.invlpg(page)
        self.enter()

    def invpcid(self, kind: int, process: int, page: int) -> None:
        kvm_handle_invpcid(self.guest.cpu, self.guest.vcpu, kind, pcid_of(process), page_at(page))
        self.model.invpcid(kind, process, page)
        self.enter()

    def toggle_pge(self) -> None:
        assert kvm_set_cr4(self.guest.cpu, self.guest.vcpu, self.guest.vcpu.arch.cr4 ^ X86_CR4_PGE)
        self.model.toggle_pge()
        self.enter()

    def store(self, process: int, page: int, to: Mapping | None) -> None:
        """Store to a process's last table: where its SPTE is not writable, the guest faults first."""
        self.enter()
        if not is_writable_pte(self.guest.spte(alias_of(process))):
            self._fault(alias_of(process), True)
        assert is_writable_pte(self.guest.spte(alias_of(process)))
        value = 0
        if to is not None:
            rights = PAGE if to.writable else PAGE & ~W
            value = to.gfn << 12 | rights | (GLOBAL if to.is_global else 0)
        self.guest.write(self.table[process], self.guest.index(page_at(page), 1), value)
        self.model.store(process, page, to)

    def access(self, page: int, write: bool) -> None:
        """The guest's fault is its own if its table does not permit the access now."""
        self.enter()
        seen = self.seen(page)
        if seen is not None and seen.permits(write):
            return
        now = self.model.now[self.model.current, page]
        permitted = now is not None and now.permits(write)
        assert (self._fault(page_at(page), write) != RET_PF_INJECTED) == permitted

    def _fault(self, linear: int, write: bool) -> int:
        present = is_shadow_present_pte(self.guest.spte(linear))
        result = self.guest.fault(linear, write=write, present=present)
        assert result in (RET_PF_FIXED, RET_PF_SPURIOUS, RET_PF_INJECTED)
        if result != RET_PF_INJECTED:
            self.model.shadowed.add(self.model.current)
        return result

    def seen(self, page: int) -> Mapping | None:
        """Return the translation by which the guest would access the page now."""
        leaf, spte = self.guest.leaf(page_at(page)), self.guest.spte(page_at(page))
        if not is_shadow_present_pte(spte) or not is_last_spte(spte, leaf.sp.role.level):
            return None
        return Mapping(kvm_mmu_page_get_gfn(self.guest.cpu, leaf.sp, leaf.idx), bool(is_writable_pte(spte)))

    def check(self) -> None:
        self.enter()
        for page in range(PAGES):
            seen, current = self.seen(page), self.model.current
            if seen is None:
                continue
            allowed = self.model.allowed(current, page)
            assert any(one.gfn == seen.gfn and one.permits(seen.writable) for one in allowed)
            now = self.model.now[current, page]
            self.legal += now is None or now.gfn != seen.gfn or not now.permits(seen.writable)
        stats = self.guest.rig.stats(self.guest.kvm)
        assert {name: stats[name] - self.before[name] for name in COUNTED} == {
            name: self.model.stats[name] for name in COUNTED
        }

    def close(self) -> None:
        self.live.close()


@contextmanager
def programs_under(policy: Policy | None = None) -> Iterator[Programs]:
    programs = Programs(policy)
    try:
        yield programs
    finally:
        programs.close()


process = st.integers(0, PROCESSES - 1)
page = st.integers(0, PAGES - 1)
mapping = st.none() | st.builds(Mapping, st.sampled_from(GFNS), st.booleans(), st.booleans())


class Cr3Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.programs = Programs()

    def teardown(self) -> None:
        self.programs.close()

    @rule(process=process, noflush=st.booleans())
    def mov_cr3(self, process: int, noflush: bool) -> None:
        self.programs.mov_cr3(process, noflush)

    @rule(page=page)
    def invlpg(self, page: int) -> None:
        self.programs.invlpg(page)

    @rule(kind=st.integers(0, 3), process=process, page=page)
    def invpcid(self, kind: int, process: int, page: int) -> None:
        self.programs.invpcid(kind, process, page)

    @rule()
    def toggle_pge(self) -> None:
        self.programs.toggle_pge()

    @rule(process=process, page=page, to=mapping)
    def store(self, process: int, page: int, to: Mapping | None) -> None:
        self.programs.store(process, page, to)

    @rule(page=page, write=st.booleans())
    def access(self, page: int, write: bool) -> None:
        self.programs.access(page, write)

    @invariant()
    def agrees(self) -> None:
        self.programs.check()


Cr3Machine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestCr3 = pytest.mark.slow(Cr3Machine.TestCase)


def random_program(programs: Programs, seed: int, steps: int) -> None:
    """Half of the steps are about the page that was changed last."""
    r = random.Random(seed)
    last = 0, 0
    for _ in range(steps):
        process, page = last if r.random() < 0.5 else (r.randrange(PROCESSES), r.randrange(PAGES))
        step = r.randrange(8)
        if step == 0:
            programs.mov_cr3(process, r.random() < 0.7)
        elif step == 1:
            programs.invlpg(page)
        elif step == 2:
            programs.invpcid(r.choice((0, 0, 0, 0, 1, 2, 3)), process, page)
        elif step < 5:
            to = r.choice((None, Mapping(r.choice(GFNS), r.random() < 0.5, r.random() < 0.2)))
            last = process if step == 3 else programs.model.current, page
            programs.store(*last, to)
        elif step < 7 or r.random() < 0.8:
            programs.access(page, step == 5 or r.random() < 0.5)
        else:
            programs.toggle_pge()
        programs.check()


@pytest.mark.slow
def test_old_translations_are_met_while_they_are_legal() -> None:
    with programs_under() as programs:
        random_program(programs, 1, 900)
        assert programs.legal > 20
        assert all(programs.model.stats[name] > 10 for name in COUNTED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant",
    [
        "shadow-switch-without-sync",
        "shadow-invlpg-without-sync",
        "shadow-load-without-sync",
        "shadow-guest-flush-without-sync",
        "shadow-guest-flush-keeps-previous",
        "shadow-invlpg-current-only",
        "shadow-pge-flushes-current",
        "shadow-invpcid-current-only",
        "shadow-invpcid-retains-roots",
        "shadow-pcid-keeps-previous-roots",
        "shadow-sync-keeps-rights",
    ],
)
def test_the_references_refute_mutants(mutant: str) -> None:
    assert any(refuted(mutant, seed) for seed in range(1, 20))


def refuted(mutant: str, seed: int) -> bool:
    with programs_under(preset(f"mutant:{mutant}")) as programs:
        try:
            random_program(programs, seed, 400)
        except AssertionError:
            return True
    return False
