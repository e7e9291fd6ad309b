"""The hypervisor of a guest OS: its operations between two VM entries, without KVM.

The test plays KVM: it makes the nested guest the vCPU's guest at VM entry, and L1 at VM exit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from native import ffi, lib
from native.types import Hfn, Vpid
from tests.native.hypervisor import Hypervisor
from tests.support import CPU0

NAMES = {
    getattr(lib, f"GUEST_INSN_{name}"): name
    for name in (
        *("VMXON", "VMXOFF", "VMPTRLD", "VMCLEAR", "VMWRITE", "VMWRITE_EPTP"),
        *("VMLAUNCH", "VMCALL", "INVEPT", "INVVPID"),
    )
}
PAGES = range(0x100, 0x108)
# A page that no OS hands out.
APIC_GFN = 0x3FF


@pytest.fixture
def machine() -> Iterator[Hypervisor]:
    with Hypervisor(l2_entries=0, psc_entries=0) as h:
        yield h


class Played:
    """A vCPU of which L1 runs nested guests; `seen` has its exits in their order, with operand and type."""

    def __init__(self, machine: Hypervisor, guests: int = 1, **settings: int) -> None:
        self.machine = machine
        self.vcpu = machine.vcpu(machine.vm(1024), 1, **self._settings(0))
        for number in range(guests + 1):
            if number:
                assert lib.guest_create_nested(machine.m, self.vcpu, number) == 0
                lib.vcpu_set_guest_mode(machine.m, self.vcpu, number)
                values = ffi.new("struct guest_config *", {**self._settings(number), "seed": number})
                assert lib.guest_configure(machine.m, self.vcpu, values) == 0
            machine.process(self.vcpu, [page << 12 for page in PAGES], list(PAGES))
        lib.vcpu_set_guest_mode(machine.m, self.vcpu, 0)
        self.current = 0
        self.seen: list[tuple[str, int, int]] = []
        config = ffi.new("struct hypervisor_config *", {"guests": guests, **settings})
        assert lib.guest_hypervise(machine.m, self.vcpu, config) == 0

    @staticmethod
    def _settings(number: int) -> dict[str, int]:
        """Return the configuration of an OS: each has pages of its own, and no events but exits to L1."""
        rates = dict.fromkeys(("switch_every", "unmap_every", "protect_every"), 0)
        first = 64 * number
        return {
            "paging": 1,
            "pcid": 0,
            "transition_every": 20,
            "first_gfn": first,
            "end_gfn": first + 64,
            **rates,
        }

    def go_on(self, exits: int) -> None:
        """Run until there are so many exits to KVM besides EPT violations."""
        m, h = self.machine.m, self.machine
        end = len(self.seen) + exits
        while len(self.seen) < end:
            h.enter(CPU0, self.vcpu)
            reason = lib.guest_run(m, CPU0, self.vcpu, 1000, h.exit)
            assert reason >= 0, ffi.string(lib.machine_error_text(m, CPU0))
            if reason == lib.EXIT_EPT_VIOLATION:
                h.map(CPU0, h.vm_of[self.vcpu], h.exit.gpa >> 12)
            elif reason == lib.EXIT_APIC_ACCESS:
                self._note("APIC", int(h.exit.gpa >> 12), 0)
                self._choose(0)
            elif reason == lib.EXIT_INSTRUCTION:
                self._emulate(NAMES[h.exit.access])

    def _note(self, name: str, operand: int, kind: int) -> None:
        self.seen.append((name, operand, kind))

    def _emulate(self, name: str) -> None:
        h = self.machine
        self._note(name, int(h.exit.invpcid_pcid), int(h.exit.invpcid_type))
        if name == "VMPTRLD":
            self.current = int(h.exit.invpcid_pcid)
        elif name == "VMLAUNCH":
            self._choose(self.current)
        elif name == "VMCALL":
            self._choose(0)

    def _choose(self, number: int) -> None:
        """Let the vCPU enter this guest next, with a VPID of its own."""
        m, h = self.machine.m, self.machine
        lib.vcpu_set_guest_mode(m, self.vcpu, number)
        lib.vmcs_write_vpid(m, h.vmcs[self.vcpu], Vpid(1 + number))

    def names(self) -> Counter[str]:
        return Counter(name for name, _, _ in self.seen)


def test_l1_sets_up_its_nested_guests_and_enters_one(machine: Hypervisor) -> None:
    l1 = Played(machine, guests=2, vpid=1, ept=1, ad=1)
    l1.go_on(10)
    each = ["VMPTRLD", "INVVPID", "VMWRITE", "VMWRITE_EPTP"]
    assert [name for name, _, _ in l1.seen] == ["VMXON", *each, *each, "VMLAUNCH"]


def test_without_vpid_and_ept_there_is_nothing_to_write(machine: Hypervisor) -> None:
    l1 = Played(machine)
    l1.go_on(4)
    assert [name for name, _, _ in l1.seen] == ["VMXON", "VMPTRLD", "VMLAUNCH", "VMCALL"]


@pytest.mark.parametrize(
    ("rate", "instruction"),
    [("switch_every", "VMPTRLD"), ("vpid_every", "VMWRITE"), ("vmxoff_every", "VMXOFF")],
)
def test_an_operation_has_a_rate(machine: Hypervisor, rate: str, instruction: str) -> None:
    l1 = Played(machine, guests=2, vpid=1, **{rate: 1})
    l1.go_on(10)
    before = l1.names()
    l1.go_on(60)
    done = l1.names() - before
    assert done["VMLAUNCH"] > 5
    # Before each VM entry, and one more or less at the ends.
    assert abs(done[instruction] - done["VMLAUNCH"]) <= 1


def test_a_nested_guest_asks_l1_for_the_invalidation_of_a_page(machine: Hypervisor) -> None:
    l1 = Played(machine, vpid=1, invvpid_every=1)
    l1.go_on(200)
    calls = l1.names()["VMCALL"]
    assert calls > 20
    # Two before each VM entry: one that L1 executes anyway, and one that the nested guest has asked for.
    assert calls * 1.8 < l1.names()["INVVPID"] <= calls * 2 + 2
    assert {kind for name, _, kind in l1.seen if name == "INVVPID"} == {0, 1, 2, 3}


def test_a_page_is_not_used_behind_the_invalidation_that_was_asked_for(machine: Hypervisor) -> None:
    l1 = Played(machine, vpid=1, invvpid_every=1)
    l1.go_on(200)
    # The test executes none: the processor uses the translations that L1 has invalidated.
    assert set(machine.violations()) == {"l1-stale"}
    assert machine.violations()["l1-stale"] > 10


@pytest.mark.parametrize("stale", [False, True])
def test_l1_uses_the_apic_page_of_its_nested_guest_as_memory(machine: Hypervisor, stale: bool) -> None:
    """stale: L1 and its nested guest have one root and no flush in between, as no KVM would let them."""
    l1 = Played(machine, apic_gfn=APIC_GFN)
    vmcs = machine.vmcs[l1.vcpu]
    hfn = machine.map(CPU0, machine.vm_of[l1.vcpu], APIC_GFN)
    for _ in range(60):
        l1.go_on(1)
        if l1.seen[-1][0] in ("VMLAUNCH", "VMCALL", "APIC"):
            inside = l1.seen[-1][0] == "VMLAUNCH"
            lib.vmcs_write_apic_page(machine.m, vmcs, hfn if inside else Hfn(0))
            if not stale:
                machine.flush(machine.vm_of[l1.vcpu])
    assert l1.names()["APIC"] > 2
    assert l1.names()["VMCALL"] > 5
    assert {gfn for name, gfn, _ in l1.seen if name == "APIC"} == {APIC_GFN}
    assert ("apic-stale" in machine.violations()) == stale
