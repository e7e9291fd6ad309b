"""Operations of litmus tests for a guest that is a hypervisor (L1): its VMX instructions, and its L2s.

A vCPU's operations stand in the order in which they are executed: those between `l2-enter` and `l2-exit` are
L2's, which has page tables of its own.  A VMCS12 is named by the number of its nested guest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from emulator.errors import shown
from emulator.litmus.syntax import Arg, GuestOp, Instruction, Op, OpError
from native import lib

if TYPE_CHECKING:
    from emulator.litmus.model import LitmusTest

NESTED_GUESTS: int = lib.NESTED_GUESTS
_LAST_VPID = lib.NESTED_VPIDS - 1
_VMCS12 = Arg("vmcs12", "count", most=NESTED_GUESTS)


class VmxOp(GuestOp):
    """A VMX instruction."""

    insn: ClassVar[str]
    exits = True

    def instructions(self) -> list[Instruction]:
        return [Instruction("VMX", 0, self.operand(), frozenset({self.insn}))]

    def operand(self) -> int:
        return 0


class Vmxon(VmxOp):
    verb = "vmxon"
    doc = "L1 executes VMXON: from here on it can have nested guests."
    insn = "vmxon"


class Vmxoff(VmxOp):
    verb = "vmxoff"
    doc = "L1 executes VMXOFF."
    insn = "vmxoff"


class _OfVmcs12(VmxOp):
    args = (_VMCS12,)

    def operand(self) -> int:
        return self.number("vmcs12")


class Vmptrld(_OfVmcs12):
    verb = "vmptrld"
    doc = "L1 executes VMPTRLD of VMCS12, the VMCS of its nested guest of that number, which becomes current."
    insn = "vmptrld"


class Vmclear(_OfVmcs12):
    verb = "vmclear"
    doc = "L1 executes VMCLEAR of VMCS12; if it was current, none is."
    insn = "vmclear"


class VmwriteVpid(VmxOp):
    verb = "vmwrite-vpid"
    doc = "L1 writes VPID into the current VMCS12 and sets the control `enable VPID`; 0 clears the control."
    args = (Arg("vpid", "number", most=_LAST_VPID),)
    insn = "vmwrite"

    def operand(self) -> int:
        return self.number("vpid")


class VmwriteApic(VmxOp):
    verb = "vmwrite-apic"
    doc = (
        "L1 writes the address of guest-physical PAGE into APIC_ACCESS_ADDR of the current VMCS12 and sets "
        "the control `virtualize APIC accesses`; 0 clears the control."
    )
    args = (Arg("page", "page"),)
    insn = "vmwrite"

    def check(self, test: LitmusTest, thread: str) -> None:
        super().check(test, thread)
        pages = test.vm[test.threads[thread].vm].pages
        if self.number("page") >= pages:
            raise OpError(shown(self.text), f"a page of memslot 0, which has {pages:#x}")

    def instructions(self) -> list[Instruction]:
        return [Instruction("VMX", 0, self.number("page"), frozenset({self.insn, "vmcs12-apic"}))]


class L2Enter(VmxOp):
    verb = "l2-enter"
    doc = (
        "L1 executes VMLAUNCH or VMRESUME: the operations up to `l2-exit` are those of the nested guest of "
        "the current VMCS12."
    )
    insn = "vmlaunch"


class L2Exit(VmxOp):
    verb = "l2-exit"
    doc = "L2 executes VMCALL, which exits to L1."
    insn = "vmcall"


class L2Apic(GuestOp):
    verb = "l2-apic"
    doc = (
        "L2 writes to linear PAGE, which is the APIC-access page of its VMCS12 (vmwrite-apic): an exit to "
        "L1, as `l2-exit`."
    )
    args = (Arg("page", "page"),)
    exits = True

    def instructions(self) -> list[Instruction]:
        return [Instruction("WRITE", self.number("page") << 12, 1, frozenset({"apic"}))]


class Invvpid(VmxOp):
    verb = "invvpid"
    doc = (
        "L1 executes INVVPID of TYPE 0 (linear PAGE of VPID), 1 (VPID), 2 (all VPIDs) or 3 (VPID, without "
        "global entries)."
    )
    args = (Arg("type", "number", most=3), Arg("vpid", "number", 0, _LAST_VPID), Arg("page", "page", 0))

    insn = "invvpid"

    def instructions(self) -> list[Instruction]:
        flags = frozenset({self.insn, f"vmx-type{self.number('type')}"})
        return [Instruction("VMX", self.number("page") << 12, self.number("vpid"), flags)]


NESTED_OPS: tuple[type[Op], ...] = (
    Vmxon,
    Vmxoff,
    Vmptrld,
    Vmclear,
    VmwriteVpid,
    VmwriteApic,
    L2Enter,
    L2Exit,
    L2Apic,
    Invvpid,
)
