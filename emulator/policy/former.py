"""Former names of modules of emulator.kvm, for policy files that were written when they had them.

A file that replaces functions names their modules.  While it is executed, a module that has moved is found
under its former name, too, and hands each access on to the module that has the name now.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, Final

from emulator.policy.imports import PACKAGE, is_patchable

# Modules that were directly in emulator.kvm, and where most of the code of each is now.
_FORMER: Final = {
    "dirty_log": "virt.dirty_log",
    "kvm_main": "virt.kvm_main",
    "memslots": "virt.memslots",
    "mmu": "mmu.mmu",
    "mmu_notifier": "virt.mmu_notifier",
    "page_fault": "mmu.page_fault",
    "requests": "virt.requests",
    "root_tracking": "mmu.roots",
    "roots": "mmu.roots",
    "spte": "mmu.spte",
    "tdp_iter": "mmu.tdp_iter",
    "tdp_map": "mmu.tdp_map",
    "tdp_mmu": "mmu.tdp_mmu",
    "tdp_remove": "mmu.tdp_remove",
    "tdp_roots": "mmu.tdp_roots",
    "tdp_slot": "mmu.tdp_dirty",
    "vcpu": "virt.vcpu",
    "vm": "virt.vm",
    "vmx": "vmx.vmx",
}


class Former(ModuleType):
    """A module under its former name; its own attributes are those that Python gives every module."""

    def __getattr__(self, name: str) -> Any:
        there = _holder(self.__name__, name)
        if there is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return vars(there)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        there = None if name in vars(self) else _holder(self.__name__, name)
        (ModuleType if there is None else type(there)).__setattr__(there or self, name, value)

    def __delattr__(self, name: str) -> None:
        there = None if name in vars(self) else _holder(self.__name__, name)
        (ModuleType if there is None else type(there)).__delattr__(there or self, name)


def _holder(former: str, name: str) -> ModuleType | None:
    """Return the module that has a name that was once in the former module."""
    now = _FORMER.get(former.removeprefix(f"{PACKAGE}."))
    successor = sys.modules.get(f"{PACKAGE}.{now}")
    if successor is not None and name in vars(successor):
        return successor
    return home_of(name)


def home_of(name: str) -> ModuleType | None:
    """Return the module of emulator.kvm that defines a function, class or constant."""
    found = [
        module
        for one, module in sorted(sys.modules.items())
        if is_patchable(one) and name in vars(module) and not isinstance(vars(module)[name], ModuleType)
    ]
    for module in found:
        value = vars(module)[name]
        if isinstance(value, FunctionType | type) and value.__module__ == module.__name__:
            return module
    return found[0] if found else None


# Assigns a module's class.  Former.__setattr__ would use builtins, which a file may have changed.
_set_class: Final = vars(object)["__class__"].__set__


class FormerNames:
    """A context in which the former names are known.

    Each undo is bound on entry, and the exit uses neither builtins nor globals (contextlib would use next()),
    so it works whatever a file has done.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def __enter__(self) -> None:
        parent = importlib.import_module(PACKAGE)
        for name in _FORMER:
            full = f"{PACKAGE}.{name}"
            there = sys.modules.get(full)
            if there is None:
                sys.modules[full] = Former(full)
                vars(parent)[name] = sys.modules[full]
                self._undo += [partial(sys.modules.pop, full, None), partial(vars(parent).pop, name, None)]
            elif type(there) is ModuleType and hasattr(there, "__path__"):
                # A package has the name of a module now; its modules are found as ever.
                _set_class(there, Former)
                self._undo.append(partial(_set_class, there, ModuleType))

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()
