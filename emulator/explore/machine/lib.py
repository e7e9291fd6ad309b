"""The native library for explored code.

KVM's modules call `lib.f(...)` of their own global `lib`, which is a ControlledLib while a machine is
explored.  A call that touches shared state is a step with a footprint (most of them are in footprints.py).  A
call that would wait is a step with a condition, so that the native call behind it does not wait.  All other
attributes are the native functions themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from emulator.explore.machine.calls import Calls
from emulator.explore.machine.control import Control
from emulator.explore.machine.described import LOCAL, NO_STEPS
from emulator.explore.machine.endless import steps_that_end
from emulator.explore.machine.footprints import FOOTPRINTS, Announced, Footprint
from emulator.explore.machine.guest import GuestMode
from emulator.explore.machine.locks import Locks
from emulator.explore.machine.patched_code import constant_attributes, shared_classes
from emulator.explore.machine.watching import watching
from emulator.policy import instructions, proposals, state
from native import lib

_PACKAGES = (
    "emulator.kvm",
    "emulator.litmus",
    "emulator.actors.image",
    "emulator.actors.task",
    "emulator.host.memory",
    "emulator.kernel_tree.on_machine",
    proposals.__name__,
)
# Policies that act are imported here: a module that is imported later is not instrumented.
_MODULES = (
    "emulator.machine.locks",
    "emulator.machine.runtime",
    instructions.__name__,
    state.__name__,
)


def instrumented_modules() -> list[ModuleType]:
    """Return the modules with code that is explored."""
    return [
        module
        for name, module in sorted(sys.modules.items())
        if (name.startswith(_PACKAGES) or name in _MODULES) and vars(module).get("lib") is not None
    ]


@contextmanager
def instrument(control: Control) -> Iterator[None]:
    """Make explored code call this library, and report its ordering points to `control`."""
    modules = instrumented_modules()
    originals = [module.__dict__["lib"] for module in modules]
    controlled = control.lib = (control.lib_class or ControlledLib)(control)
    control.machine.install(control.point)
    for module in modules:
        module.__dict__["lib"] = controlled
    try:
        with ExitStack() as stack:
            if control.policy_reads is not None:
                stack.enter_context(control.policy_reads.watching())
            if control.races is not None:
                stack.enter_context(watching(control.races, shared_classes(), constant_attributes()))
            if control.patch:
                stack.enter_context(steps_that_end(control, control.patch))
            yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.__dict__["lib"] = original
        control.machine.install(None)


class ControlledLib(Locks, Calls, GuestMode):
    """The native library: attributes are native functions and constants, or stand-ins for them."""

    def __init__(self, control: Control) -> None:
        self.control = control
        super().__init__()
        own = {name for name in dir(type(self)) if not name.startswith("_")}
        for name in dir(lib):
            if name in own:
                continue
            value = getattr(lib, name)
            if callable(value) and name not in NO_STEPS:
                footprint = FOOTPRINTS.get(name)
                if footprint is None:
                    value = self._undescribed(name, value)
                else:
                    value = self._stepped(name, value, footprint)
            elif callable(value) and control.policy_reads is not None and name not in LOCAL:
                value = self._unstepped(name, value)
            self.__dict__[name] = value

    def _unstepped(self, name: str, native: Any) -> Any:
        """Wrap a call that is no step, because no later step of KVM depends on it; a policy's answer may."""
        reads = self.control.policy_reads
        assert reads is not None

        def unstepped(*args: Any) -> Any:
            if reads.asking and reads.asks():
                reads.cannot_watch(f"calls {name}()")
            return native(*args)

        return unstepped

    def _undescribed(self, name: str, native: Any) -> Any:
        """Wrap a call without a footprint as a step that conflicts with every other."""
        control = self.control
        everything, policy_reads = control.everything, control.policy_reads

        def unknown(*args: Any) -> Any:
            execution = control.execution
            if control.audit is not None and execution is not None:
                control.audit.undescribed(name)
            if execution is not None:
                execution.step((name, None, "write"), 0, everything)
            if policy_reads is not None and policy_reads.asks():
                policy_reads.cannot_watch(f"calls {name}()")
            return native(*args)

        return unknown

    def _stepped(self, name: str, native: Any, footprint: Footprint) -> Any:
        """Wrap a call with a footprint: as a step, or as a part of the current one."""
        control = self.control
        everything, policy_reads = control.everything, control.policy_reads
        key, after, step = footprint.key(), footprint.after(control), footprint.step
        known: dict[Hashable, Announced] = {}

        def stepped(*args: Any) -> Any:
            execution = control.execution
            if execution is None:
                return native(*args)
            announced = known.get(key(args))
            if announced is None:
                announced = known[key(args)] = footprint.before(name, control, args)
            label, reads, writes = announced
            if step or (policy_reads is not None and policy_reads.asks()):
                if control.audit is not None and not execution.aborting:
                    control.audit.access(name)
                execution.step(label, reads | everything, writes)
            else:
                execution.touch(reads, writes)
            result = native(*args)
            if after is not None:
                reads, writes = after(args, result)
                if reads or writes:
                    execution.touch(reads, writes)
            return result

        return stepped
