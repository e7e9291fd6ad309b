"""Operations of litmus tests on a vCPU: its guest's instructions, and events outside of guest mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from emulator.errors import shown
from emulator.kvm import kvm_host
from emulator.kvm.regs import kvm_set_cr0, kvm_set_cr3, kvm_set_cr4, set_efer, set_sregs, sregs_of
from emulator.kvm.reset import apic_send_init
from emulator.kvm.smm import emulator_leave_smm, kvm_inject_smi
from emulator.kvm.structs import tdp_enabled
from emulator.litmus.syntax import (
    Arg,
    Context,
    GuestOp,
    Instruction,
    Op,
    OpError,
    VcpuOp,
    check_huge,
)
from emulator.machine.runtime import HPAGE_PMD_NR, MachineError
from native import lib

if TYPE_CHECKING:
    from emulator.litmus.model import LitmusTest

_PAGE = Arg("page", "page")
# native/vm/guest_state.h: GUEST_PROCESSES
_LAST_PROCESS = 15
# native/memory/frame.h: FRAME_WORDS
FRAME_WORDS = 512
# The core records guest-physical pages in 32 bits, and the last value means none.
_LAST_GUEST_PAGE = (1 << 32) - 2
# native/vm/guest_state.h: GUEST_KERNEL_BASE, GUEST_KERNEL_PAGES
_END_OF_KERNEL_PAGES = 0x8_0000_0000 + 8


class _Access(GuestOp):
    args = (_PAGE,)
    words = ("fault",)
    kind = ""

    def check(self, test: LitmusTest, thread: str) -> None:
        super().check(test, thread)
        if "fault" in self.flags:
            check_shadowed(self, test, thread)

    def instructions(self) -> list[Instruction]:
        return [Instruction(self.kind, self.number("page") << 12, 1, self.flags)]


class Read(_Access):
    verb = "read"
    doc = (
        "The guest reads from PAGE: linear with paging, else guest-physical. fault: KVM injects a page "
        "fault, and the guest goes on behind the access; if it injects none, the test fails. Without EPT "
        "only."
    )
    kind = "READ"


class Write(_Access):
    verb = "write"
    doc = "The guest writes to PAGE. fault: as for `read`."
    kind = "WRITE"


class _SupervisorAccess(_Access):
    def check(self, test: LitmusTest, thread: str) -> None:
        super().check(test, thread)
        check_shadowed(self, test, thread)

    def instructions(self) -> list[Instruction]:
        return [Instruction(self.kind, self.number("page") << 12, 1, self.flags | {"supervisor"})]


class KernelRead(_SupervisorAccess):
    verb = "kernel-read"
    doc = "The guest's kernel reads from linear PAGE, without EPT."
    kind = "READ"


class KernelWrite(_SupervisorAccess):
    verb = "kernel-write"
    doc = "The guest's kernel writes to linear PAGE, without EPT; read-only ones too while CR0.WP is clear."
    kind = "WRITE"


class Exec(_Access):
    verb = "exec"
    doc = "The guest fetches an instruction from PAGE. fault: as for `read`."
    kind = "EXECUTE"


class Invlpg(GuestOp):
    verb = "invlpg"
    doc = "The guest executes INVLPG of linear PAGE."
    args = (_PAGE,)

    def instructions(self) -> list[Instruction]:
        return [Instruction("INVLPG", self.number("page") << 12)]


class Invpcid(GuestOp):
    verb = "invpcid"
    doc = (
        "The guest executes INVPCID of TYPE 0 (one address), 1 (one PCID), 2 (all, with global entries) or 3 "
        "(all but global entries)."
    )
    args = (
        Arg("type", "number", most=3),
        Arg("process", "number", 0, _LAST_PROCESS),
        Arg("page", "page", 0),
    )

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
    doc = (
        "The guest executes MOV to CR3, which switches to the address space of PROCESS; `noflush` sets bit "
        "63."
    )
    args = (Arg("process", "number", most=_LAST_PROCESS),)
    words = ("noflush",)

    def instructions(self) -> list[Instruction]:
        return [Instruction("MOV_CR3", 0, self.number("process"), self.flags)]


class Map(GuestOp):
    verb = "map"
    doc = (
        "The guest maps LINEAR to guest-physical PAGE in its tables; `dirty` sets the entry's accessed and "
        "dirty flags at once."
    )
    args = (Arg("linear", "page"), Arg("page", "page", most=_LAST_GUEST_PAGE))
    words = ("ro", "global", "huge", "dirty")

    def check(self, test: LitmusTest, thread: str) -> None:
        super().check(test, thread)
        if "huge" in self.flags:
            check_huge(self, "linear", "page")
        if self.number("linear") + self.span() > _END_OF_KERNEL_PAGES:
            # The guest's OS keeps no record of others, so the oracle could not judge them.
            raise OpError(shown(self.text), f"a LINEAR below {_END_OF_KERNEL_PAGES:#x}")

    def span(self) -> int:
        return HPAGE_PMD_NR if "huge" in self.flags else 1

    def instructions(self) -> list[Instruction]:
        return [Instruction("MAP", self.number("linear") << 12, self.number("page"), self.flags)]


class Unmap(GuestOp):
    verb = "unmap"
    doc = "The guest clears its table entry of LINEAR; invalidating it is up to the guest."
    args = (Arg("linear", "page"),)

    def instructions(self) -> list[Instruction]:
        return [Instruction("UNMAP", self.number("linear") << 12)]


class Protect(GuestOp):
    verb = "protect"
    doc = (
        "The guest clears the write permission in its table entry of LINEAR; invalidating it is up to the "
        "guest."
    )
    args = (Arg("linear", "page"),)

    def instructions(self) -> list[Instruction]:
        return [Instruction("PROTECT", self.number("linear") << 12)]


class Store(GuestOp):
    verb = "store"
    doc = (
        "The guest's OS stores VALUE to the 8 bytes number INDEX of guest-physical PAGE, as to an entry of a "
        "table that it does not record as its own; invalidating it is up to the guest. Without EPT only."
    )
    args = (
        Arg("page", "page"),
        Arg("index", "number", most=FRAME_WORDS - 1),
        Arg("value", "number", most=(1 << 64) - 1),
    )

    def check(self, test: LitmusTest, thread: str) -> None:
        super().check(test, thread)
        check_shadowed(self, test, thread)

    def _physical(self, test: LitmusTest, thread: str) -> bool:
        return True

    def instructions(self) -> list[Instruction]:
        linear = self.number("page") << 12 | self.number("index") * 8
        return [Instruction("STORE", linear, self.number("value"))]


def check_shadowed(op: Op, test: LitmusTest, thread: str) -> None:
    """Check that KVM shadows the guest's tables.  Raises OpError.

    The core's walks with EPT know neither reserved bits nor NX in a guest's entry.
    """
    if test.machine.ept or not test.vm[test.threads[thread].vm].paging:
        raise OpError(shown(op.text), "machine.ept = false, and paging = true in its VM")


class PowerOn(GuestOp):
    """The boot of a guest without EPT, before `init`; no operation of the language.

    The guest boots as it first enters, and leaves no trace of its own.
    """

    verb = "power-on"
    doc = "The guest boots."

    def instructions(self) -> list[Instruction]:
        # The last signal is no thread's.
        return [Instruction("SIGNAL", 0, lib.MACHINE_SIGNALS - 1)]


class Join(VcpuOp):
    verb = "join"
    doc = (
        "The vCPU switches to the address spaces of vCPU VCPU, as another thread of its processes; in `init` "
        "only."
    )
    args = (Arg("vcpu", "number", most=3),)

    def check(self, test: LitmusTest, thread: str) -> None:
        super().check(test, thread)
        section = test.threads[thread]
        others = [t for t in test.threads.values() if t.vm == section.vm and t.vcpu == self.number("vcpu")]
        if not others or section.vcpu == self.number("vcpu"):
            raise OpError(shown(self.text), "the number of another thread's vCPU, of the same VM")

    def run(self, context: Context) -> None:
        other = context.kvm.vcpus[self.number("vcpu")]
        cr3 = lib.guest_join_tables(context.cpu.m, context.vcpu.id, other.id)
        if not tdp_enabled(context.kvm):
            kvm_set_cr3(context.cpu, context.vcpu, cr3)


class Migrate(VcpuOp):
    verb = "migrate"
    doc = "The vCPU's thread moves to PCPU."
    args = (Arg("pcpu", "pcpu"),)

    def run(self, context: Context) -> None:
        context.migrate(self.number("pcpu"))


class Preempt(VcpuOp):
    verb = "preempt"
    doc = (
        "The vCPU's thread moves to PCPU when KVM is preemptible between servicing requests and VM entry, "
        "for the NTH time from now."
    )
    args = (Arg("pcpu", "pcpu"), Arg("nth", "count", 1))

    def run(self, context: Context) -> None:
        context.preempt(self.number("pcpu"), self.number("nth"))


class Exit(VcpuOp):
    verb = "exit"
    doc = "The vCPU leaves guest mode; the next operation enters it again."

    def run(self, context: Context) -> None:
        pass


class Smi(VcpuOp):
    verb = "smi"
    doc = "An SMI arrives: the vCPU enters SMM, with its address space and root, before its guest continues."

    def run(self, context: Context) -> None:
        kvm_inject_smi(context.cpu, context.vcpu)


class Rsm(VcpuOp):
    verb = "rsm"
    doc = "The guest executes RSM: the vCPU leaves SMM."

    def run(self, context: Context) -> None:
        emulator_leave_smm(context.cpu, context.vcpu)


class Init(VcpuOp):
    verb = "init"
    doc = "An INIT arrives: the vCPU is reset, without paging, before its guest continues."

    def run(self, context: Context) -> None:
        apic_send_init(context.cpu, context.vcpu)


class _ControlRegister(VcpuOp):
    args = (Arg("bit", "name"), Arg("value", "number"))
    words: ClassVar[tuple[str, ...]] = ("gp",)
    bits: ClassVar[tuple[str, ...]] = ()

    def check(self, test: LitmusTest, thread: str) -> None:
        if self.name("bit") not in self.bits or self.number("value") > 1:
            raise OpError(repr(self.text), f"{self.verb} {'|'.join(self.bits)} 0|1")

    def register(self) -> str:
        """Return the register that the bit is in."""
        return self.verb

    def changed(self, value: int) -> int:
        name = f"{self.register()}_{self.name('bit')}".upper()
        mask: int = getattr(kvm_host, name if name.startswith("EFER") else f"X86_{name}")
        return value | mask if self.number("value") else value & ~mask

    def complete(self, done: bool) -> None:
        """Fail unless the guest has got a general-protection fault just if the operation says so."""
        if done == ("gp" in self.flags):
            found = "no" if done else "a"
            raise MachineError(f"{self.text!r} is {found} general-protection fault (kvm_complete_insn_gp)")


class Cr0(_ControlRegister):
    verb = "cr0"
    doc = (
        "The guest executes MOV to CR0, which sets or clears BIT (pg, wp) and exits to KVM. gp: it raises a "
        "general-protection fault, and the guest goes on behind it; if it raises none, the test fails."
    )
    bits = ("wp", "pg")

    def run(self, context: Context) -> None:
        self.complete(kvm_set_cr0(context.cpu, context.vcpu, self.changed(context.vcpu.arch.cr0)))


class Cr4(_ControlRegister):
    verb = "cr4"
    doc = (
        "The guest executes MOV to CR4, which sets or clears BIT (pse, pae, pge, pcide, smep, smap) and "
        "exits to KVM. gp: as for `cr0`."
    )
    bits = ("pse", "pae", "pge", "pcide", "smep", "smap")

    def run(self, context: Context) -> None:
        cpu, vcpu = context.cpu, context.vcpu
        self.complete(kvm_set_cr4(cpu, vcpu, self.changed(vcpu.arch.cr4)))
        if self.name("bit") == "pcide" and "gp" not in self.flags:
            lib.vcpu_set_pcide(cpu.m, vcpu.id, bool(self.number("value")))


class Efer(_ControlRegister):
    verb = "efer"
    doc = (
        "The guest executes WRMSR of EFER, which sets or clears BIT (lme, nx) and exits to KVM. gp: as for "
        "`cr0`."
    )
    bits = ("lme", "nx")

    def run(self, context: Context) -> None:
        self.complete(set_efer(context.cpu, context.vcpu, self.changed(context.vcpu.arch.efer)))


class SetSregs(_ControlRegister):
    verb = "set-sregs"
    doc = (
        "User space executes KVM_SET_SREGS, which sets or clears BIT of CR0 (pg, wp) or of CR4 (pge, smep, "
        "smap), as when it restores a snapshot."
    )
    words = ()
    bits = (*Cr0.bits, "pge", "smep", "smap")

    def run(self, context: Context) -> None:
        sregs = sregs_of(context.vcpu)
        if self.name("bit") in Cr0.bits:
            sregs = sregs._replace(cr0=self.changed(sregs.cr0))
        else:
            sregs = sregs._replace(cr4=self.changed(sregs.cr4))
        set_sregs(context.cpu, context.vcpu, sregs)

    def register(self) -> str:
        return Cr0.verb if self.name("bit") in Cr0.bits else Cr4.verb


class SetSregsCr3(VcpuOp):
    verb = "set-sregs-cr3"
    doc = "User space executes KVM_SET_SREGS with the CR3 of PROCESS, which has run before."
    args = (Arg("process", "number", most=_LAST_PROCESS),)

    def run(self, context: Context) -> None:
        cpu, vcpu = context.cpu, context.vcpu
        cr3 = lib.guest_set_process(cpu.m, vcpu.id, self.number("process"))
        if not cr3:
            raise MachineError(f"{self.text!r}: the process has no tables yet")
        set_sregs(cpu, vcpu, sregs_of(vcpu)._replace(cr3=cr3))


GUEST_OPS: tuple[type[Op], ...] = (
    Read,
    Write,
    KernelRead,
    KernelWrite,
    Exec,
    Map,
    Unmap,
    Protect,
    Store,
    Invlpg,
    Invpcid,
    MovCr3,
)
VCPU_OPS: tuple[type[Op], ...] = (
    Join, Migrate, Preempt, Exit, Smi, Rsm, Init, Cr0, Cr4, Efer, SetSregs, SetSregsCr3
)  # fmt: skip
