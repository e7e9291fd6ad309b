"""The state of a recorded execution right before one of its steps; the execution ends there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from emulator.errors import BadInput
from emulator.explain.events import request_name
from emulator.explore.engine.scheduler import Task, spelled, stands_in
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.observe import tlb_entries
from emulator.explore.results.record import recorded
from emulator.explore.results.replay import Stored, compare_steps
from emulator.explore.strategies.sampling import Replay
from emulator.kvm.kvm_host import VCPU_MODES
from emulator.litmus.ops import Op
from native import ffi, lib
from native.types import NO_FRAME, CpuId, Gfn, SignalSlot, VmId

# Bits of oracle_right().
_READABLE, _WRITABLE, _READ_REVOKED, _WRITE_REVOKED = 1, 2, 4, 8


def state_before(stored: Stored, step: int) -> dict[str, Any]:
    """Replay a recording up to this step, and return the state right before it.

    Raises BadInput if it has no such step, and Divergence if a step before differs from its recording.
    """
    steps = stored.document["steps"]
    if step >= len(steps):
        known = f"0 to {len(steps) - 1}, the steps of {stored.path}" if steps else f"a step in {stored.path}"
        raise BadInput("--stop-at", f"found {step}", known if steps else f"{known}, which has none")
    trace = stored.document.get("trace") is not None
    with stored.told():
        with stored.program() as program:
            strategy = _Until(stored.schedule(program), step)
            found_state: list[dict[str, Any]] = []
            strategy.at_stop = lambda enabled: found_state.append(_state(program, enabled))
            execution, recorder = recorded(program, strategy, trace=trace)
            if execution.failure is not None:
                raise execution.failure
            program.abandon(execution)
        compare_steps(steps[:step], recorder.steps)
    (state,) = found_state
    document = stored.document
    around = {"test": document["test"], "policy": document["policy"], "step": step, "steps": len(steps)}
    around |= {"thread": steps[step]["thread"], "next": steps[step]["text"]}
    return {"flushlab_state": 1, **around, **state}


class _Until(Replay):
    """Replays a schedule up to a step, and gives the execution up there."""

    def __init__(self, schedule: tuple[int, ...], stop: int) -> None:
        super().__init__(schedule)
        self.stop = stop
        self.at_stop: Callable[[int], None] = lambda enabled: None

    def choose(self, enabled: int, last: int) -> int:
        if len(self.schedule()) < self.stop:
            return super().choose(enabled, last)
        self.at_stop(enabled)
        return -1


def _state(program: LitmusProgram, enabled: int) -> dict[str, Any]:
    execution = program.control.execution
    assert execution is not None
    return {
        "tasks": [_task(program, task, enabled) for task in execution.tasks if not _idle(task, enabled)],
        "vcpus": list(_vcpus(program)),
        "locks": list(_locks(program)),
        "rcu": _rcu(program),
        "tlbs": list(_tlbs(program)),
        "rights": list(_rights(program)),
    }


def _idle(task: Task, enabled: int) -> bool:
    """Return whether this is a daemon of the machine with nothing to do."""
    return task.daemon and not enabled >> task.index & 1


def _task(program: LitmusProgram, task: Task, enabled: int) -> dict[str, Any]:
    names = program.names()
    thread = program.harness.threads.get(task.name)
    progress = 0 if thread is None else int(lib.signal_get(program.machine.m, SignalSlot(thread.number)))
    ops = () if thread is None else thread.section.ops
    op = {"n": progress + 1, "of": len(ops), "text": ops[progress]} if progress < len(ops) else None
    able = bool(enabled >> task.index & 1)
    return {
        "name": task.name,
        "cpu": names.get(program.cpu_of(task), ""),
        "done": task.done,
        "operation": op,
        "function": "" if task.done else stands_in(task),
        "next": "" if task.done else spelled(*task.label[:2]),
        "can_go_on": able,
        "waits_for": "" if able or task.done else task.waits_for or "a change of a value that it has read",
        "held_by": [] if able else [names.get(cpu, f"CPU {cpu}") for cpu in task.holders()],
    }


def _vcpus(program: LitmusProgram) -> Iterator[dict[str, Any]]:
    m, names = program.machine.m, program.names()
    asking = program.reads is not None and program.reads.asking
    for kvm in program.harness.kvms:
        for vcpu in kvm.vcpus:
            cpu, mode = lib.vcpu_cpu(m, vcpu.id), lib.vcpu_mode(m, vcpu.id)
            requests = lib.kvm_requests(m, vcpu.id)
            # A read of KVM's objects would count as the policy's while it is asked.
            root = None if asking or vcpu.mmu.root is None else vcpu.mmu.root.hfn
            yield {
                "vcpu": vcpu.id,
                "vm": kvm.id,
                "mode": VCPU_MODES[mode],
                "cpu": names.get(cpu, "") if cpu >= 0 else "",
                "root": root,
                "requests": [request_name(bit) for bit in range(64) if requests >> bit & 1],
            }


def _locks(program: LitmusProgram) -> Iterator[dict[str, Any]]:
    """Yield the mmu_locks that are held or waited for."""
    names = program.names()
    for vm, lock in sorted(program.control.mmu_locks.items()):
        if lock.holders or lock.waiting:
            held = [names.get(cpu, f"CPU {cpu}") for cpu in dict.fromkeys(lock.holders)]
            mode = "write" if lock.writer else "read"
            yield {"vm": vm, "held_by": held, "for": mode, "waiting": len(lock.waiting)}


def _rcu(program: LitmusProgram) -> dict[str, Any]:
    names, control = program.names(), program.control
    readers = [names.get(cpu, f"CPU {cpu}") for cpu, _ in control.rcu.now()]
    return {"readers": readers, "callbacks": int(lib.rcu_pending(program.machine.m))}


def _tlbs(program: LitmusProgram) -> Iterator[dict[str, Any]]:
    """Yield each pCPU's cached translations, with KVM's current view of each."""
    m = program.machine.m
    for cpu in map(CpuId, range(program.machine.pcpus)):
        entries = [{**entry, "now": _now(program, entry)} for entry in tlb_entries(m, cpu)]
        tables = lib.psc_dump(lib.cpu_tlb(m, cpu), ffi.NULL, 0)
        yield {"cpu": int(cpu), "entries": entries, "tables": int(tables)}


def _now(program: LitmusProgram, entry: Mapping[str, Any]) -> str:
    """Return whether the host's right behind a small entry is still granted; "" for a huge one."""
    if entry["size"] != "4K" or entry["kind"] == "linear":
        return ""
    bits, frame = _right(program, VmId(entry["vm"]), Gfn(entry["gfn"]))
    if frame != entry["frame"]:
        return "stale: the page has another frame now"
    return _told(bits)


def _right(program: LitmusProgram, vm: VmId, gfn: Gfn) -> tuple[int, int]:
    frame = ffi.new("uint32_t[]", 1)
    bits = lib.oracle_right(program.machine.m, vm, gfn, frame)
    return int(bits), int(frame[0])


def _told(bits: int) -> str:
    if bits & _READABLE:
        if bits & _WRITABLE:
            return "mapped"
        return "mapped, write access revoked" if bits & _WRITE_REVOKED else "mapped read-only"
    if bits & _READ_REVOKED:
        return "revoked: a use would be a violation"
    return "zapped, not promised to be gone: a use is allowed"


def _rights(program: LitmusProgram) -> Iterator[dict[str, Any]]:
    """Yield the custody of the pages that are cached or that operations name, and that were ever mapped."""
    pages = {(VmId(e["vm"]), e["gfn"]) for tlb in _tlbs(program) for e in tlb["entries"]}
    test = program.test
    sequences = (*test.parsed_init, *test.parsed_final)
    ops = [(section.vm, op) for section in test.threads.values() for op in section.parsed]
    ops += [(test.threads[name].vm, op) for name, op in sequences]
    pages |= {(program.harness.kvms[vm].id, page) for vm, op in ops for page in _named(op, test.vm[vm].pages)}
    for vm, gfn in sorted(pages):
        bits, frame = _right(program, vm, gfn)
        if frame != NO_FRAME:
            present = bool(lib.mm_present(program.machine.m, vm, gfn, gfn + 1))
            yield {"vm": vm, "gfn": gfn, "frame": frame, "now": _told(bits), "host_has_it": present}


def _named(op: Op, pages: int) -> Iterator[int]:
    page = op.values.get("page")
    if isinstance(page, int) and page < pages:
        yield page
