"""Operations of litmus tests for a vCPU's local APIC, in a VM with `apic = true`.

Its registers are at the guest-physical page behind memslot 0: at page 0x800 of a VM with pages = 0x800.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.errors import shown
from emulator.kvm.kvm_host import LAPIC_MODE_DISABLED, LAPIC_MODE_X2APIC, LAPIC_MODE_XAPIC
from emulator.kvm.lapic import kvm_apic_set_base
from emulator.litmus.syntax import Arg, Context, GuestOp, Instruction, Op, OpError, VcpuOp

if TYPE_CHECKING:
    from emulator.litmus.model import LitmusTest


class _ApicAccess(GuestOp):
    args = (Arg("page", "page"),)
    kind = ""
    exits = True

    def instructions(self) -> list[Instruction]:
        return [Instruction(self.kind, self.number("page") << 12, 1, frozenset({"apic"}))]


class ApicRead(_ApicAccess):
    verb = "apic-read"
    doc = "The guest reads a register of its APIC, in xAPIC mode, at PAGE: a linear page if paging is on."
    kind = "READ"


class ApicWrite(_ApicAccess):
    verb = "apic-write"
    doc = "The guest writes to a register of its APIC, in xAPIC mode, at PAGE: a linear page if paging is on."
    kind = "WRITE"


class ApicMode(VcpuOp):
    verb = "apic-mode"
    doc = (
        "The guest executes WRMSR of IA32_APIC_BASE, which sets the MODE of its APIC (disabled, xapic, "
        "x2apic) and exits to KVM. Only in xapic mode do accesses to the APIC's page reach the APIC."
    )
    args = (Arg("mode", "name"),)

    def check(self, test: LitmusTest, thread: str) -> None:
        modes = (LAPIC_MODE_DISABLED, LAPIC_MODE_XAPIC, LAPIC_MODE_X2APIC)
        if self.name("mode") not in modes:
            raise OpError(shown(self.text), f"{self.verb} {'|'.join(modes)}")

    def run(self, context: Context) -> None:
        kvm_apic_set_base(context.cpu, context.vcpu, self.name("mode"))


APIC_OPS: tuple[type[Op], ...] = (ApicRead, ApicWrite, ApicMode)
