"""Operations of litmus tests for a guest that is a hypervisor (L1): its VMX instructions, and its L2s.

A vCPU's operations stand in the order in which they are executed: those between `l2-enter` and `l2-exit` are
L2's, which has page tables of its own.  A VMCS12 is named by the number of its nested guest; the EPTs that L1
has for nested guests are numbered, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from emulator.errors import shown
from emulator.litmus.syntax import Arg, GuestOp, Instruction, Op, OpError, check_huge
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


class L2EnterFails(VmxOp):
    verb = "l2-enter-fails"
    doc = (
        "L1 executes VMLAUNCH or VMRESUME, and VM entry fails, so that L1 goes on. controls: for a control "
        "of the VMCS12, before anything changes. guest-state, msr-load: for the guest state or an MSR that "
        "VM entry loads; then L1 goes on as after a VM exit."
    )
    words = ("controls", "guest-state", "msr-load")
    insn = "vmlaunch"

    def check(self, test: LitmusTest, thread: str) -> None:
        super().check(test, thread)
        if len(self.flags) != 1:
            raise OpError(shown(self.text), f"one of {', '.join(self.words)}")

    def instructions(self) -> list[Instruction]:
        return [Instruction("VMX", 0, 0, frozenset({self.insn}) | self.flags)]


class L2EnterHalted(VmxOp):
    verb = "l2-enter-halted"
    doc = (
        "L1 executes VMLAUNCH or VMRESUME of a nested guest in the activity state HLT, and an event of L1's "
        "wakes the vCPU: the nested guest exits before its first instruction, and L1 goes on."
    )
    insn = "vmlaunch"

    def instructions(self) -> list[Instruction]:
        return [Instruction("VMX", 0, 0, frozenset({self.insn, "halted"}))]


class L2Exit(VmxOp):
    verb = "l2-exit"
    doc = "L2 executes VMCALL, which exits to L1."
    insn = "vmcall"


class L2Apic(GuestOp):
    verb = "l2-apic"
    doc = (
        "L2 writes to linear PAGE, which is the APIC-access page of its VMCS12 (vmwrite-apic), and so exits "
        "to L1, as with `l2-exit`."
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


_EPT12 = Arg("ept12", "count", most=lib.EPT12S)


class VmwriteEptp(VmxOp):
    verb = "vmwrite-eptp"
    doc = (
        "L1 writes the EPTP of its EPT number EPT12 into the current VMCS12 and sets the control `enable "
        "EPT`; 0 clears the control. ad: the EPTP enables accessed and dirty flags."
    )
    args = (Arg("ept12", "number", most=lib.EPT12S),)
    words = ("ad",)
    insn = "vmwrite-eptp"

    def instructions(self) -> list[Instruction]:
        flags = {self.insn} | ({"vmx-type1"} if "ad" in self.flags else set())
        return [Instruction("VMX", 0, self.number("ept12"), frozenset(flags))]


class L2Eptp(VmxOp):
    verb = "l2-eptp"
    doc = (
        "L2 executes VMFUNC for EPTP switching: it goes on with L1's EPT number EPT12, which L1 has put into "
        "its list of EPTPs. ad: that EPTP enables accessed and dirty flags."
    )
    args = (_EPT12,)
    words = ("ad",)
    insn = "vmfunc"

    def instructions(self) -> list[Instruction]:
        flags = {self.insn} | ({"vmx-type1"} if "ad" in self.flags else set())
        return [Instruction("VMX", 0, self.number("ept12"), frozenset(flags))]


class Invept(VmxOp):
    verb = "invept"
    doc = "L1 executes INVEPT of TYPE 1 (its EPT number EPT12) or 2 (all its EPTs)."
    args = (Arg("type", "count", most=2), Arg("ept12", "number", 0, lib.EPT12S))
    insn = "invept"

    def instructions(self) -> list[Instruction]:
        flags = frozenset({self.insn, f"vmx-type{self.number('type')}"})
        return [Instruction("VMX", 0, self.number("ept12"), flags)]


class _Ept12Op(GuestOp):
    """A store of L1's to the tables of one of its EPTs."""

    kind: ClassVar[str]

    def instructions(self) -> list[Instruction]:
        flags = frozenset({f"ept12-{self.number('ept12')}"}) | self.flags
        gfn = self.number("gfn") if "gfn" in self.values else 0
        return [Instruction(self.kind, self.number("page") << 12, gfn, flags)]

    def check(self, test: LitmusTest, thread: str) -> None:
        super().check(test, thread)
        vm = test.vm[test.threads[thread].vm]
        # The page of L1's APIC comes behind its memory.
        ends = {"page": vm.pages, "gfn": vm.pages + vm.apic}
        for name, end in ends.items():
            if name in self.values and self.number(name) >= end:
                raise OpError(shown(self.text), f"pages of its VM, which has {vm.pages:#x}")


class Ept12Map(_Ept12Op):
    verb = "ept12-map"
    doc = (
        "L1 maps PAGE of L2's guest-physical memory to its own page GFN in an EPT. ro: read-only. huge: 2 "
        "MiB, of which PAGE and GFN are the first pages; no page of them is mapped alone, before or later."
    )
    args = (_EPT12, Arg("page", "page"), Arg("gfn", "page"))
    words = ("ro", "huge")
    kind = "EPT12_MAP"

    def check(self, test: LitmusTest, thread: str) -> None:
        super().check(test, thread)
        if "huge" in self.flags:
            check_huge(self, "page", "gfn")


class Ept12Unmap(_Ept12Op):
    verb = "ept12-unmap"
    doc = (
        "L1 clears the entry for PAGE of L2's guest-physical memory in an EPT, without an invalidation; the "
        "entry may map 2 MiB. table: the entry that links the table of PAGE's 2 MiB."
    )
    args = (_EPT12, Arg("page", "page"))
    words = ("table",)
    kind = "EPT12_UNMAP"


class Ept12Protect(_Ept12Op):
    verb = "ept12-protect"
    doc = "L1 takes write access to PAGE of L2's guest-physical memory in an EPT, without an invalidation."
    args = (_EPT12, Arg("page", "page"))
    kind = "EPT12_PROTECT"


class Ept12Clean(_Ept12Op):
    verb = "ept12-clean"
    doc = (
        "L1 clears the accessed and the dirty flag of the entry for PAGE of L2's guest-physical memory in an "
        "EPT, without an invalidation. The entry maps 4 KiB. dirty: the dirty flag alone."
    )
    args = (_EPT12, Arg("page", "page"))
    words = ("dirty",)
    kind = "EPT12_CLEAN"


EPT12_OPS: tuple[type[Op], ...] = (Ept12Map, Ept12Unmap, Ept12Protect, Ept12Clean)
NESTED_OPS: tuple[type[Op], ...] = (
    Vmxon,
    Vmxoff,
    Vmptrld,
    Vmclear,
    VmwriteVpid,
    VmwriteApic,
    L2Enter,
    L2EnterFails,
    L2EnterHalted,
    L2Exit,
    L2Apic,
    Invvpid,
    VmwriteEptp,
    L2Eptp,
    Invept,
    *EPT12_OPS,
)
