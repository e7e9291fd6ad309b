"""The driver: the steps of ground_truth.toml on an emulated machine (driver.py explains each)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from emulator.kvm import kvm_host
from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES
from emulator.kvm.smm import kvm_inject_smi
from emulator.kvm.structs import KvmParams, Vcpu
from emulator.kvm.virt.kvm_main import (
    kvm_destroy_vm,
    kvm_vm_ioctl_clear_dirty_log,
    kvm_vm_ioctl_get_dirty_log,
)
from emulator.machine.runtime import HPAGE_PMD_NR
from emulator.policy import preset as preset_named
from native import lib
from native.types import CpuId, GuestInsn

from .lines import Machine, Step
from .machine import EmulatedMachine, Vm
from .probes import Probes
from .program import CODE_GFN
from .tables import entry_of

# Instructions that the guest executes on request: CR0.WP exits or not, which is the same to KVM with EPT.
TOGGLES: dict[str, tuple[int, int]] = {
    "cr0_ts": (lib.GUEST_INSN_MOV_CR0, 1 << 3),
    "cr4_osfxsr": (lib.GUEST_INSN_MOV_CR4, 1 << 9),
    "cr0_pg": (lib.GUEST_INSN_MOV_CR0, kvm_host.X86_CR0_PG),
    "cr0_wp": (lib.GUEST_INSN_MOV_CR0, kvm_host.X86_CR0_WP),
    "cr4_smep": (lib.GUEST_INSN_MOV_CR4, kvm_host.X86_CR4_SMEP),
    "cr4_pse": (lib.GUEST_INSN_MOV_CR4, kvm_host.X86_CR4_PSE),
    "cr4_pge": (lib.GUEST_INSN_TOGGLE_PGE, 0),
}
# Without EPT these exit as well.
TOGGLES_WITHOUT_EPT = {**TOGGLES, "cr4_pge": (lib.GUEST_INSN_MOV_CR4, kvm_host.X86_CR4_PGE)}
# Instructions that exit, and change nothing of the vCPU's paging.
OTHERS = {"cpuid": lib.GUEST_INSN_CPUID, "io_out": lib.GUEST_INSN_OUT}
# Memory of the process that no slot covers.
UNBACKED = 0x8000
# Exits of a vCPU that faults over and over.
STUCK = 64


class EmulatorDriver:
    capabilities = frozenset(
        {
            "force_yield",
            "memslot_move",
            "thp",
            "collapse",
            "zap_collapsible",
            "pageout",
            "smm",
            "guest_cr",
            "zero_page",
        }
    )

    @contextmanager
    def boot(
        self, machine: Machine, vcpus: int, preset: str, settings: Mapping[str, str] = MappingProxyType({})
    ) -> Iterator[EmulatedBench]:
        """`settings` are answers to decision points that differ from the preset's."""
        with Probes() as probes:
            bench = EmulatedBench(machine, vcpus, preset_named(preset).with_settings(settings), probes)
            try:
                bench.start()
                yield bench
            finally:
                bench.close()


class EmulatedBench(EmulatedMachine):
    """The machine under the test's steps."""

    after_pt_store: Callable[[], None] | None = None

    def start(self) -> None:
        super().start()
        self.probes.probe("kvm_mmu_track_write", self._pt_stored)

    def _pt_stored(self, args: tuple[Any, ...], _: Any) -> tuple[str, int, int]:
        after, self.after_pt_store = self.after_pt_store, None
        if after is not None:
            after()
        return "pt stores", args[1].id, 1

    def step(self, step: Step) -> int:
        perform: Callable[[Step], int] = getattr(self, f"_{step.op}")
        return perform(step)

    def _vm(self, step: Step) -> Vm:
        return self.vms[step.number("vm", 0)]

    # --- the guest ------------------------------------------------------------------------------------------

    def _guest(self, step: Step) -> int:
        for vm in [self._vm(step)] if "vm" in step.args else self.vms:
            match step.word("do"):
                case "stop":
                    self.leave_kvm_run(vm)
                case "idle":
                    for program in vm.programs:
                        program.idle()
                case "write":
                    slot = vm.slots[step.number("slot")]
                    for program in vm.programs:
                        program.access(slot.gfn, step.number("n", slot.pages), lib.ACCESS_WRITE)
        return 0

    def _touch(self, step: Step) -> int:
        vm = self._vm(step)
        slot = vm.slots[step.number("slot")]
        kind = lib.ACCESS_READ if step.word("access") == "read" else lib.ACCESS_WRITE
        faults = lib.vm_stat(self.native.m, vm.kvm.id, lib.STAT_FAULTS)
        at_once = step.args.get("concurrent") == "yes"
        for turn in [vm.programs] if at_once else [[program] for program in vm.programs]:
            before = [program.accesses for program in turn]
            for program in turn:
                program.access(slot.gfn, slot.pages, kind)
            self.whole_round(vm)
            for program, earlier in zip(turn, before, strict=True):
                program.access(*earlier)
        return int(lib.vm_stat(self.native.m, vm.kvm.id, lib.STAT_FAULTS) - faults)

    # --- the host's memory ----------------------------------------------------------------------------------

    def _range(self, vm: Vm, step: Step) -> tuple[int, int]:
        if step.args.get("slot") == "none":
            return UNBACKED, UNBACKED + step.number("n")
        start = vm.slots[step.number("slot")].gfn + step.number("first")
        return start, start + step.number("n")

    def _zapped(self) -> int:
        return self.counter(self.cpu.id, lib.COUNT_SPTES_ZAPPED)

    def _unmap(self, step: Step) -> int:
        vm, before = self._vm(step), self._zapped()
        if "split" in step.args:
            return self._unmap_of_huge(vm, *self._range(vm, step))
        if "yield_after" in step.args:
            vm.kvm.params = YieldOnce(vm.kvm.params, step.number("yield_after"))  # type: ignore[assignment]
        self.mm.unmap(vm.kvm, *self._range(vm, step))
        return self._zapped() - before

    def _unmap_of_huge(self, vm: Vm, start: int, end: int) -> int:
        before, leaves = self._zapped(), self.probes.count("huge leaves", vm.kvm.id)
        exits = [self._exits(task) for task in vm.tasks]
        between = []

        def refaulted() -> None:
            between.append(self._zapped())
            # Without a flush the vCPUs get as far as the page being unmapped, and fault on it over and over.
            self.wait(
                lambda: (
                    self.probes.count("huge leaves", vm.kvm.id) > leaves
                    or all(self._exits(task) > n + STUCK for task, n in zip(vm.tasks, exits, strict=True))
                ),
                "a fault on the huge page",
            )

        self.mm.unmap(vm.kvm, start, end, before_split=refaulted)
        return (between[0] > before) + (self._zapped() > between[0])

    def _pageout(self, step: Step) -> int:
        vm, before = self._vm(step), self._zapped()
        for page in range(*self._range(vm, step)):
            self.mm.unmap(vm.kvm, page, page + 1, keep=True)
        return self._zapped() - before

    def _age(self, step: Step) -> int:
        vm = self._vm(step)
        return sum(self.mm.age(vm.kvm, page) for page in range(*self._range(vm, step)))

    def _fork(self, step: Step) -> int:
        """Each slot is a VMA of its own."""
        vm, zapped = self._vm(step), 0
        for slot in vm.slots.values():
            before = self._zapped()
            self.mm.protect(vm.kvm, slot.gfn, slot.gfn + slot.pages, "r")
            zapped += self._zapped() > before
        for slot in vm.slots.values():
            self.mm.own_again(vm.kvm, slot.gfn, slot.gfn + slot.pages)
        return zapped

    def _mprotect(self, step: Step) -> int:
        vm = self._vm(step)
        start, end = self._range(vm, step)
        vm.protected = range(start, end) if step.word("prot") != "rw" else range(0)
        before = split = self._zapped()
        if "split" in step.args:
            self.mm.split(vm.kvm, start & -HPAGE_PMD_NR)
            split = self._zapped()
        self.mm.protect(vm.kvm, start, end, step.word("prot"))
        if "split" in step.args:
            return (split > before) + (self._zapped() > split)
        return self._zapped() - before

    def _collapse(self, step: Step) -> int:
        vm = self._vm(step)
        before = self.probes.count("huge leaves", vm.kvm.id)
        start, end = self._range(vm, step)
        for block in range(start, end, HPAGE_PMD_NR):
            self.mm.collapse(vm.kvm, block)
            self.whole_round(vm)
        return self.probes.count("huge leaves", vm.kvm.id) - before

    # --- memslots and dirty logging -------------------------------------------------------------------------

    def _memslot_create(self, step: Step) -> int:
        vm, number = self._vm(step), step.number("slot")
        self.set_slot(vm, number, vm.slots[number])
        return 0

    def _memslot_delete(self, step: Step) -> int:
        vm, number = self._vm(step), step.number("slot")
        self.set_slot(vm, number, replace(vm.slots[number], pages=0))
        return 0

    def _memslot_move(self, step: Step) -> int:
        vm, number = self._vm(step), step.number("slot")
        vm.slots[number] = replace(vm.slots[number], gfn=step.number("gpa") >> 12)
        self.set_slot(vm, number, vm.slots[number])
        return 0

    def _dirty_log_enable(self, step: Step) -> int:
        vm, number = self._vm(step), step.number("slot")
        before = self.probes.count("protected", vm.kvm.id)
        self.set_slot(vm, number, vm.slots[number], KVM_MEM_LOG_DIRTY_PAGES)
        return self.probes.count("protected", vm.kvm.id) - before

    def _dirty_log_disable(self, step: Step) -> int:
        vm, number = self._vm(step), step.number("slot")
        before = self.probes.count("recovered", vm.kvm.id)
        self.set_slot(vm, number, vm.slots[number])
        return self.probes.count("recovered", vm.kvm.id) - before

    def _get_dirty_log(self, step: Step) -> int:
        words = kvm_vm_ioctl_get_dirty_log(self.cpu, self._vm(step).kvm, step.number("slot"))
        return sum(word.bit_count() for word in words)

    def _clear_dirty_log(self, step: Step) -> int:
        vm, first, n = self._vm(step), step.number("first"), step.number("n")
        before = self.probes.count("protected", vm.kvm.id)
        words = [(1 << 64) - 1] * (n // 64)
        kvm_vm_ioctl_clear_dirty_log(self.cpu, vm.kvm, step.number("slot"), first, n, words)
        return self.probes.count("protected", vm.kvm.id) - before

    # --- the scheduler --------------------------------------------------------------------------------------

    def _migrate(self, step: Step) -> int:
        used = {task.pcpu for vm in self.vms for task in vm.tasks}
        free = min(set(range(self.pcpus)) - used)
        self.move(self._vm(step).tasks[step.number("vcpu")], free)
        return 0

    def _share_pcpus(self, step: Step) -> int:
        if step.word("with") == "vcpu0":
            for task in self._vm(step).tasks:
                self.move(task, self._vm(step).tasks[0].pcpu)
        else:
            for vm in self.vms[1:]:
                for task, host in zip(vm.tasks, self.vms[0].tasks, strict=True):
                    self.move(task, host.pcpu)
        return 0

    def _run(self, step: Step) -> int:
        def switches() -> int:
            return sum(self.probes.count("sched_in", task.vcpu.id) for vm in self.vms for task in vm.tasks)

        before = switches()
        self.wait(lambda: switches() - before >= step.number("switches"), "context switches")
        return switches() - before

    def _nothing(self, step: Step) -> int:
        time.sleep(0.02)
        return 0

    def _smi(self, step: Step) -> int:
        vcpu = self._vm(step).tasks[step.number("vcpu")].vcpu
        before = self.probes.count("rsm", vcpu.id)
        kvm_inject_smi(self.cpu, vcpu)
        self.wait(lambda: self.probes.count("rsm", vcpu.id) > before, "RSM")
        return 0

    def _guest_insn(self, step: Step) -> int:
        insn = step.word("insn")
        if insn in OTHERS:
            vcpu = self._vm(step).tasks[step.number("vcpu")].vcpu
            for _ in range(step.number("n")):
                self._execute(vcpu, OTHERS[insn], 0, str(step))
            return step.number("n")
        if not self.config.ept:
            with self._spinning(step):
                toggles = TOGGLES_WITHOUT_EPT.get(insn)
                return self._toggle(step, *toggles) if toggles else self._emulated_insn(step)
        if insn == "mov_cr3" and self.tables:
            return self._emulated_insn(step)
        return self._toggle(step, *TOGGLES[insn]) if insn in TOGGLES else self._counted_insn(step)

    def _pt_store(self, step: Step) -> int:
        """The store ends as KVM emulates it, on the vCPU's thread: it is made once."""
        vm = self._vm(step)
        program = vm.programs[step.number("vcpu")]
        linear = vm.slots[step.number("slot")].gfn
        with self._spinning(step):
            before = self.probes.count("pt stores", vm.kvm.id)
            self.after_pt_store = program.spin
            program.store(*entry_of(linear, step.number("level")))
            self.wait(lambda: self.probes.count("pt stores", vm.kvm.id) > before, str(step))
        return self.probes.count("pt stores", vm.kvm.id) - before

    @contextmanager
    def _spinning(self, step: Step) -> Iterator[None]:
        """The guest is in its own code when it executes the instruction: its next access is a fetch there."""
        vm = self._vm(step)
        program = vm.programs[step.number("vcpu")]
        accesses = program.accesses
        program.spin()
        self.whole_round(vm)
        yield
        self.whole_round(vm)
        program.access(*accesses)

    def _toggle(self, step: Step, insn: int, bit: int) -> int:
        """A register bit, there and back again, each time in an instruction of its own."""
        vcpu = self._vm(step).tasks[step.number("vcpu")].vcpu
        for _ in range(step.number("n")):
            old = vcpu.arch.cr0 if insn == lib.GUEST_INSN_MOV_CR0 else vcpu.arch.cr4
            self._execute(vcpu, insn, old ^ bit, str(step))
        return step.number("n")

    def _emulated_insn(self, step: Step) -> int:
        """MOV to CR3 of the current address space, or of `spaces` in turn; or INVLPG of a mapped page."""
        vcpu = self._vm(step).tasks[step.number("vcpu")].vcpu
        spaces = [int(space) for space in str(step.args.get("spaces", "")).split(",") if space]
        for i in range(step.number("n")):
            if step.word("insn") == "invlpg":
                self._execute(vcpu, lib.GUEST_INSN_INVLPG, CODE_GFN << 12, str(step))
                continue
            cr3 = self.spaces[spaces[i % len(spaces)]] << 12 if spaces else vcpu.arch.cr3
            self._execute(vcpu, lib.GUEST_INSN_MOV_CR3, cr3, str(step))
        return step.number("n")

    def _execute(self, vcpu: Vcpu, insn: int, operand: int, what: str) -> None:
        """Return once the guest has executed the instruction, and KVM has emulated it if it exits."""
        before = self.probes.count("instructions", vcpu.id)
        assert lib.guest_execute(self.native.m, vcpu.id, GuestInsn(insn), operand) == 0
        without_exit = insn == lib.GUEST_INSN_TOGGLE_PGE or (
            insn == lib.GUEST_INSN_MOV_CR3 and self.config.ept
        )
        if without_exit:
            self.wait(lambda: bool(lib.guest_executed(self.native.m, vcpu.id)), what)
        else:
            self.wait(lambda: self.probes.count("instructions", vcpu.id) > before, what)

    def _counted_insn(self, step: Step) -> int:
        counter = {"mov_cr3": lib.COUNT_GUEST_SWITCHES, "invlpg": lib.COUNT_GUEST_INVALIDATIONS}[
            step.word("insn")
        ]
        pcpu = CpuId(self._vm(step).tasks[step.number("vcpu")].pcpu)
        before = self.counter(pcpu, counter)
        self.wait(lambda: self.counter(pcpu, counter) - before >= step.number("n"), str(step))
        return self.counter(pcpu, counter) - before

    # --- a VM's life ----------------------------------------------------------------------------------------

    def _vm_create(self, step: Step) -> int:
        self.create_vm()
        return 0

    def _vm_destroy(self, step: Step) -> int:
        vm = self._vm(step)
        vm.exists = False
        kvm_destroy_vm(self.cpu, vm.kvm)
        return 0


class YieldOnce:
    """Module parameters under which the next zap finds need_resched() set after its first so many SPTEs."""

    def __init__(self, params: KvmParams, after: int) -> None:
        self._params = params
        self.chunk = after
        self._set = True

    @property
    def resched_chunks(self) -> int:
        was, self._set = self._set, False
        return int(was)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._params, name)
