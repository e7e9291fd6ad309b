"""Stretches of a litmus test's guest operations, executed by the guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.kvm.structs import Vcpu
from emulator.litmus.ops import GuestOp, Op
from native import ffi, lib

if TYPE_CHECKING:
    from emulator.litmus.world import LitmusThread

_TYPES = {"READ": lib.ACCESS_READ, "WRITE": lib.ACCESS_WRITE, "EXECUTE": lib.ACCESS_EXECUTE}


class GuestProgram:
    """One vCPU's."""

    def __init__(self, thread: LitmusThread, vcpu: Vcpu) -> None:
        cpu = thread.world.main
        config = {"first_gfn": 0, "end_gfn": 64, "seed": 1}
        self.vcpu = vcpu
        self._config = ffi.new("struct guest_config *", config)
        cpu.check(lib.guest_configure(cpu.m, vcpu.id, self._config))
        self.records = ffi.new("uint64_t[]", 1)
        self.pages = ffi.new("uint64_t[]", [0])
        cpu.check(lib.guest_add_process(cpu.m, vcpu.id, self.records, 1, self.pages, 1))
        self.ops: list[Op] = []
        self.report = False
        self.clock = 0

    def load(self, thread: LitmusThread, ops: tuple[Op, ...], report: bool) -> None:
        self.ops = list(ops)
        self.report = report
        self.armed = False

    def done(self, thread: LitmusThread) -> bool:
        m = thread.world.machine.m
        while self.ops:
            op = self.ops[0]
            if self.armed:
                if self.vcpu.exit.accesses == 0 or self.vcpu.exit.reason != lib.EXIT_MESSAGE:
                    pass
                if lib.guest_clock(m, self.vcpu.id) == self.clock:
                    return False
                self.armed = False
                self.ops.pop(0)
                if self.report:
                    thread.world.progressed(thread.number)
                continue
            waits = op.waits_for()
            if waits is not None:
                thread.wait_for(*waits)
                self.ops.pop(0)
                if self.report:
                    thread.world.progressed(thread.number)
                continue
            assert isinstance(op, GuestOp)
            (ins,) = op.instructions()
            self.records[0] = _TYPES[ins.kind] << 62 | ins.linear
            self.clock = lib.guest_clock(m, self.vcpu.id)
            self.armed = True
            return False
        return True
