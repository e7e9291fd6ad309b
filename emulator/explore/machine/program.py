"""A litmus test as a program: its threads are tasks, on a machine that is restored for each execution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from emulator.actors.task import VcpuTask
from emulator.explain.document import VMM
from emulator.explore.engine.objects import Objects
from emulator.explore.engine.scheduler import Execution, Task, Wait
from emulator.explore.engine.snapshot import CannotRestore, Snapshot
from emulator.explore.machine.adversary import AdversarialLib, Adversary
from emulator.explore.machine.calls import Calls
from emulator.explore.machine.control import Control
from emulator.explore.machine.handed import Handed
from emulator.explore.machine.options import NONE, ExploreOptions
from emulator.explore.machine.policy_attributes import PolicyAttributes, remembers
from emulator.explore.machine.policy_reads import NOTHING, Known, PolicyReads
from emulator.explore.machine.races import Races
from emulator.explore.machine.store_buffer_lib import BufferedAdversarialLib, BufferedLib
from emulator.explore.machine.store_buffers import BufferedControl, buffer_name
from emulator.explore.strategies.search import Met
from emulator.litmus.evidence import Evidence
from emulator.litmus.failure import Told
from emulator.litmus.harness import Harness, machine_config, rcu_cpu
from emulator.litmus.leftovers import at_the_end
from emulator.litmus.model import LitmusTest, Section
from emulator.litmus.ops import Op
from emulator.litmus.thread import LitmusThread
from emulator.litmus.verdict import proven
from emulator.machine.runtime import Cpu, Machine, OutOfMemory
from emulator.policy import Policy
from emulator.policy.user import source_of
from native import lib
from native.types import CpuId, SignalSlot

DEADLOCK = "deadlock"


class ExploredHarness(Harness):
    """A harness in which the scheduler knows the threads' progress.  Before and after an execution, pending
    grace periods end between any two operations."""

    control: Control | None = None
    single = True  # one SPTE changes in a step

    def _run_sequence(self, sequence: list[tuple[LitmusThread, tuple[Op, ...]]]) -> None:
        for thread, ops in sequence:
            super()._run_sequence([(thread, ops)])
            if self.control is not None:
                self.control.run_callbacks()
                if self.control.on_alone is not None:
                    self.control.on_alone(thread.name, ops)

    def progressed(self, thread: int) -> None:
        super().progressed(thread)
        if self.control is not None and self.control.execution is not None:
            self.control.execution.current.rests = True

    def wait_progress(self, cpu: Cpu, thread: int, n: int) -> None:
        control = self.control
        if control is None or control.execution is None:
            super().wait_progress(cpu, thread, n)
            return
        m, name = self.machine.m, tuple(self.threads)[thread]
        control.execution.step(
            ("progress", name, "read"),
            control.bit("progress", thread),
            0,
            lambda: lib.signal_get(m, SignalSlot(thread)) >= n,
            f"operation {n} of {name}",
        )


def _is_constant(obj: object) -> bool:
    """Return whether an object does not change in an execution, or belongs to the search."""
    return (
        isinstance(obj, LitmusTest | Section | Op | Control | Calls | Races)
        or type(obj) is Policy
        or type(obj) is Handed
    )


def wait_text(wait: Mapping[str, Any]) -> str:
    """Name the thread that waits, the place in KVM's code, the object, and the threads that hold it."""
    where = f" in {wait['function']}()" if wait["function"] else ""
    held = f", held by {' and '.join(wait['held_by'])}" if wait["held_by"] else ""
    return f"{wait['thread']}{where} waits for {wait['waits_for']}{held}"


class LitmusProgram:
    """One test under one policy.  Use inside `instrument(program.control)`.

    init is executed once and its result recorded; each execution begins by restoring it: the core's memory
    (machine_restore), and the Python objects (`Snapshot`).  A user's policy may keep state that cannot be
    restored; then, and with `rebuild`, each execution has a new machine.

    known, frozen: the accesses of a user's policy that are watched (policy_reads.py).
    constant, aside: types of objects, and attributes of such, that a subclass puts back itself.
    """

    constant: tuple[type, ...] = ()
    aside: Mapping[type, frozenset[str]] = MappingProxyType({VcpuTask: frozenset({"_run"})})

    def __init__(
        self,
        test: LitmusTest,
        policy: Policy,
        options: ExploreOptions = NONE,
        *,
        rebuild: bool = False,
        known: Known = NOTHING,
        frozen: bool = False,
    ) -> None:
        self.test = test
        self.policy = policy
        self.options = options
        self.objects = Objects()
        self._rebuilds = rebuild
        self._initial: Snapshot | None = None
        self._started = False
        self.waits: list[dict[str, Any]] = []
        self.machine = self._new_machine()
        self.control = self._control()
        self.reads: PolicyReads | None = None
        source = source_of(policy)
        if source is not None and policy.overrides():
            self.reads = self.control.policy_reads = PolicyReads(
                self.control, source.path, known, frozen=frozen
            )
        self.control.patch = "" if policy.patch is None else policy.patch.name
        # Looks for accesses that no step announces: KVM's shipped code has none.
        self.races: Races | None = None
        if policy.is_patched_by_user() and not frozen:
            self.races = self.control.races = Races(self.control)
        elif self.reads is not None and source is not None and not frozen and remembers(source):
            self.races = self.control.attributes = PolicyAttributes(self.control, source)
        self._build_harness()
        self._evidence = Evidence(self.machine)
        self._found: dict[str, int] | None = None  # the evidence of an execution that has come to its end
        self._buffers = {buffer_name(name): cpu for cpu, name in self._buffered().items()}

    @property
    def initial(self) -> Snapshot | None:
        """Return the snapshot of the Python objects with which each execution begins; None before the first
        execution, and if each execution has a new machine."""
        return self._initial

    def _control(self) -> Control:
        options = self.options
        control: Control
        if options.store_buffers:
            control = buffered = BufferedControl(self.machine, self.objects)
            buffered.cpu_of = self.cpu_of
            control.lib_class = BufferedAdversarialLib if options.adversary else BufferedLib
        else:
            control = Control(self.machine, self.objects)
            control.lib_class = AdversarialLib if options.adversary else None
        if options.adversary:
            control.adversary = Adversary(self.test, control, options)
        return control

    def _new_machine(self) -> Machine:
        return Machine({**machine_config(self.test, 0), "snapshots": int(not self._rebuilds)})

    def _build_harness(self) -> None:
        for cpu in self.machine.cpus[self.machine.pcpus :]:
            lib.cpu_online(self.machine.m, cpu.id)
        self.harness = ExploredHarness(self.test, self.policy, self.machine)
        self.harness.control = self.control

    def _rebuild(self) -> None:
        self._close_tasks()
        self.machine.destroy()
        self.machine = self.control.machine = self._new_machine()
        self.machine.install(self.control.point)
        self._evidence = Evidence(self.machine)
        self._build_harness()

    def _prepare(self) -> None:
        """Bring the harness to the state in which the threads begin."""
        control, harness = self.control, self.harness
        control.forget()
        if self.reads is not None:
            self.reads.forget()
        with Told(self.harness, "init"):
            harness.reset()
            control.memory.policy = harness.policy
            if self.reads is not None:
                self.reads.adopt(harness.policy)
            if control.attributes is not None:
                control.attributes.adopt(harness.policy)
            harness.run_init()
            control.run_callbacks()
        control.vm_of_vcpu = {vcpu.id: kvm.id for kvm in harness.kvms for vcpu in kvm.vcpus}
        control.paging = frozenset(
            kvm.id for kvm, section in zip(harness.kvms, self.test.vm, strict=True) if section.paging
        )
        control.logging = frozenset(harness.kvms[vm].id for vm in harness.logging)
        self._take_pcpus()
        if self.reads is not None:
            self.reads.keep()
        if not self._rebuilds:
            self._keep()

    def _keep(self) -> None:
        try:
            with self.policy.guarded():
                self._initial = Snapshot(
                    (self.harness, self.machine, self.control.programs),
                    lambda obj: _is_constant(obj) or isinstance(obj, self.constant),
                    self.aside,
                    self.harness.policy.module(),
                )
        except CannotRestore:
            self._rebuilds = True
            return
        with self.policy.guarded():
            self._initial.restore()  # as before each execution, the first one included
        rc = lib.machine_snapshot(self.machine.m)
        if rc == lib.MACHINE_NOMEM:
            raise OutOfMemory("a copy of the machine")
        self.harness.main.check(rc)

    def _put_back(self, initial: Snapshot) -> None:
        """Restore the initial state.  All tasks of the last execution have been unwound."""
        self._close_tasks()
        self.harness.main.check(lib.machine_restore(self.machine.m))
        with self.policy.guarded():
            initial.restore()
        if self.reads is not None:
            self.reads.put_back()
        for task in self._vcpu_tasks():
            task.restart()

    def _close_tasks(self) -> None:
        """End KVM's code on the vCPUs' threads now, not when the interpreter collects it, perhaps in a step
        of a later execution."""
        for task in self._vcpu_tasks():
            task.close()

    def _vcpu_tasks(self) -> Iterator[VcpuTask]:
        return (thread.task for thread in self.harness.threads.values() if thread.task is not None)

    def start(self, execution: Execution) -> None:
        control = self.control
        if self._initial is not None:
            # The core's counts are put back, too, so those that the evidence begins with still hold.
            self._put_back(self._initial)
        else:
            if self._started:
                self._rebuild()
            self._started = True
            self._prepare()
            self._evidence.begin(self.harness.kvms)
        control.reset()
        for thread in self.harness.threads.values():
            execution.spawn(thread.name, self._body(thread))
        control.spawn_daemons(execution)
        if isinstance(control, BufferedControl):
            control.spawn_buffers(execution, self._buffered())
        if control.adversary is not None:
            control.adversary.spawn(execution, self.harness)
        execution.on_step_end = self._step_ends(len(execution.tasks))
        control.execution = execution
        control.judge()

    def _step_ends(self, tasks: int) -> Callable[[Task], None] | None:
        """Return the function to call when a step ends, in an execution with so many tasks: it adds the
        policy's accesses, and then looks for races."""
        reads, races = self.reads, self.races
        if races is None:
            return None if reads is None else reads.step_ends
        races.begin(tasks)
        if reads is None:
            return races.step_ends

        def both(task: Task) -> None:
            reads.step_ends(task)
            races.step_ends(task)

        return both

    def _body(self, thread: LitmusThread) -> Callable[[], None]:
        def body() -> None:
            with Told(self.harness, thread.name):
                thread.run()

        return body

    def finish(self, execution: Execution) -> str:
        """Return the outcome: the violations, a deadlock, a leak, or "" for none.  Raises LitmusFailure."""
        control = self.control
        control.execution = None
        self._found = None
        if self.reads is not None:
            self.reads.check()
        if execution.deadlock:
            self.waits = [self._wait(execution, wait) for wait in execution.deadlock]
            return f"{DEADLOCK}: " + ", ".join(map(wait_text, self.waits))
        if not execution.stopped:
            if not execution.clean:
                return ""
            self._run_final()
            self._found = self._evidence.found(self.harness.kvms)
            self._end_migrations()
            self._found |= self._evidence.compared(self.harness.kvms)
        found = control.violations()
        return found if found or execution.stopped else self._left_over()

    def _left_over(self) -> str:
        """Return the violation in the state at the end of an execution without any other; "" for none."""
        with Told(self.harness, VMM):
            self.control.run_callbacks()
        self.waits = []
        return at_the_end(self.machine, self.harness.kvms)

    def _wait(self, execution: Execution, wait: Wait) -> dict[str, Any]:
        """Describe, for recordings, a thread that waits for ever, its CPU, and the holders of its lock."""
        task = next(task for task in execution.tasks if task.name == wait.task)
        names = self.names()
        return {
            "thread": wait.task,
            "cpu": self.cpu_of(task),
            "function": wait.function,
            "waits_for": wait.waits_for,
            "held_by": [names.get(cpu, f"CPU {cpu}") for cpu in wait.holders],
        }

    def met(self) -> Met:
        """Return the dangers of the execution that was finished last: none, if it was cut short."""
        found = self._found
        return Met(False, {}) if found is None else Met(proven(self.test, found), found)

    def evidence(self) -> dict[str, int]:
        """Return the dangers of the execution that was finished last, also if it was cut short."""
        return self._evidence.found(self.harness.kvms) if self._found is None else self._found

    def abandon(self, execution: Execution) -> None:
        """Drop an execution that has not finished: it was pruned, or a task has failed."""
        self.control.execution = None
        if self.reads is not None:
            self.reads.check()

    def _take_pcpus(self) -> None:
        """Take all pCPUs, with or without a thread, and let interrupts arrive when the scheduler chooses."""
        m = self.machine.m
        for number in map(CpuId, range(self.machine.pcpus)):
            self.harness.main.check(lib.cpu_take(m, number))
            lib.ipi_hold(m, number, 1)

    def _run_final(self) -> None:
        if not self.test.final and not self.harness.logging:
            return
        m = self.machine.m
        for number in map(CpuId, range(self.machine.pcpus)):
            lib.ipi_hold(m, number, 0)
            lib.ipi_arrive(m, number)
            lib.cpu_idle(m, number)
        with Told(self.harness, "final"):
            self.harness.run_final()

    def _end_migrations(self) -> None:
        with Told(self.harness, VMM):
            self.harness.end_migrations()

    # --- for recordings -------------------------------------------------------------------------------------

    def names(self) -> dict[int, str]:
        """Return the name of the thread or pCPU behind each CPU's number."""
        names = {number: f"pcpu{number}" for number in range(self.machine.pcpus)}
        for thread in self.harness.threads.values():
            names[thread.home.id] = thread.name
        return names | {rcu_cpu(self.machine).id: "rcu", self.harness.main.id: VMM}

    def task_names(self) -> list[str]:
        """Return the names of all tasks, in the order in which they are spawned."""
        names = [*self.harness.threads, *(f"irq{n}" for n in range(self.machine.pcpus)), "rcu"]
        if self.options.store_buffers:
            names += map(buffer_name, self._buffered().values())
        adversary = self.control.adversary
        return names if adversary is None else [*names, *adversary.names]

    def _buffered(self) -> dict[CpuId, str]:
        """Return the CPUs that KVM's code runs on: a vCPU's thread runs it on a pCPU."""
        names = {number: f"pcpu{number}" for number in map(CpuId, range(self.machine.pcpus))}
        others = (thread for thread in self.harness.threads.values() if not thread.section.is_vcpu)
        return names | {thread.home.id: thread.name for thread in others}

    def cpu_of(self, task: Task) -> CpuId:
        """Return the CPU that a task is on now."""
        thread = self.harness.threads.get(task.name)
        if thread is not None:
            return thread.cpu.id
        if task.name.startswith("irq"):
            return CpuId(int(task.name.removeprefix("irq")))
        if task.name in self._buffers:
            return self._buffers[task.name]
        if self.control.adversary is not None and task.name in self.control.adversary.cpu_of:
            return self.control.adversary.cpu_of[task.name]
        return rcu_cpu(self.machine).id

    def close(self) -> None:
        self._close_tasks()
        self.machine.destroy()
