"""Operations of litmus tests on a vCPU: what its guest executes, and what happens to it outside."""

from __future__ import annotations

from emulator.litmus.syntax import Arg, Context, GuestOp, Instruction, Op, VcpuOp

_PAGE = Arg("page", "page")


class _Access(GuestOp):
    args = (_PAGE,)
    kind = ""

    def instructions(self) -> list[Instruction]:
        return [Instruction(self.kind, self.number("page") << 12, 1)]


class Read(_Access):
    verb = "read"
    doc = "the guest reads from PAGE (linear with paging, else guest-physical)"
    kind = "READ"


class Write(_Access):
    verb = "write"
    doc = "the guest writes to PAGE"
    kind = "WRITE"


class Exec(_Access):
    verb = "exec"
    doc = "the guest fetches an instruction from PAGE"
    kind = "EXECUTE"


class Invlpg(GuestOp):
    verb = "invlpg"
    doc = "INVLPG of linear PAGE"
    args = (_PAGE,)

    def instructions(self) -> list[Instruction]:
        return [Instruction("INVLPG", self.number("page") << 12)]


class Invpcid(GuestOp):
    verb = "invpcid"
    doc = "INVPCID of TYPE 0 (address), 1 (single), 2 (all, globals too) or 3 (all but globals)"
    args = (Arg("type", "number"), Arg("process", "number", 0), Arg("page", "page", 0))

    def instructions(self) -> list[Instruction]:
        # The type travels as a flag, so that operand and value keep their meaning.
        return [
            Instruction(
                "INVPCID",
                self.number("page") << 12,
                self.number("process"),
                frozenset({f"type{self.number('type')}"}),
            )
        ]


class MovCr3(GuestOp):
    verb = "mov-cr3"
    doc = "MOV to CR3: switch to the address space of PROCESS; `noflush` sets bit 63"
    args = (Arg("process", "number"),)
    words = ("noflush",)

    def instructions(self) -> list[Instruction]:
        return [Instruction("MOV_CR3", 0, self.number("process"), self.flags)]


class Map(GuestOp):
    verb = "map"
    doc = "the guest maps LINEAR to guest-physical PAGE in its tables"
    args = (Arg("linear", "page"), _PAGE)
    words = ("ro", "global", "huge")

    def instructions(self) -> list[Instruction]:
        return [Instruction("MAP", self.number("linear") << 12, self.number("page"), self.flags)]


class Unmap(GuestOp):
    verb = "unmap"
    doc = "the guest clears its table entry of LINEAR; invalidating it is up to the guest"
    args = (Arg("linear", "page"),)

    def instructions(self) -> list[Instruction]:
        return [Instruction("UNMAP", self.number("linear") << 12)]


class Protect(GuestOp):
    verb = "protect"
    doc = "the guest takes write access from its table entry of LINEAR"
    args = (Arg("linear", "page"),)

    def instructions(self) -> list[Instruction]:
        return [Instruction("PROTECT", self.number("linear") << 12)]


class Migrate(VcpuOp):
    verb = "migrate"
    doc = "the vCPU's thread goes to PCPU"
    args = (Arg("pcpu", "pcpu"),)

    def run(self, context: Context) -> None:
        context.migrate(self.number("pcpu"))


class Preempt(VcpuOp):
    verb = "preempt"
    doc = "... to PCPU the next time that KVM is preemptible between serving requests and VM entry"
    args = (Arg("pcpu", "pcpu"),)

    def run(self, context: Context) -> None:
        context.preempt(self.number("pcpu"))


GUEST_OPS: tuple[type[Op], ...] = (Read, Write, Exec, Map, Unmap, Protect, Invlpg, Invpcid, MovCr3)
VCPU_OPS: tuple[type[Op], ...] = (Migrate, Preempt)
