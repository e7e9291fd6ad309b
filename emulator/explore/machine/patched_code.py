"""State of patched code that explore cannot watch, as far as the code shows: it proves nothing.

Objects of KVM's classes are watched while they are explored (watching.py), and restored for each execution.
State that a patch keeps in a module's globals, a class, a function or its defaults is neither watched nor
restored.  KVM's shipped code has no such state; a patch that has it is reported.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from importlib.abc import InspectLoader
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final, Protocol

from emulator.explore.machine.handed import CONTAINERS
from emulator.explore.machine.policy_code import uses_of
from emulator.machine.runtime import Machine
from emulator.policy import Policy
from emulator.policy.imports import is_patchable
from emulator.policy.patch.code import SHIPPED
from native import ffi

# Modules with code that runs while KVM's code is explored.
_EXPLORED: Final = ("emulator.kvm", "emulator.machine", "emulator.actors", "emulator.litmus")
# Functions that no task calls: they change CPUs before an execution, or after the last one.
_BETWEEN: Final = frozenset({"Machine.destroy", "Machine.install"})
_BUILTINS: Final = (list, dict, set, bytearray)
# Built-in functions that reach state without an access that an object would show.
_BEHIND: Final = frozenset({"globals", "locals", "vars", "setattr", "delattr"})


def shared_classes() -> list[type]:
    """Return the classes of emulator.kvm with objects that can change."""
    found = []
    for name, module in sorted(sys.modules.items()):
        if is_patchable(name):
            found += [
                value
                for value in vars(module).values()
                if isinstance(value, type) and value.__module__ == name and _can_change(value)
            ]
    return found


def _can_change(cls: type) -> bool:
    frozen = bool(getattr(getattr(cls, "__dataclass_params__", None), "frozen", False))
    return not frozen and not issubclass(cls, tuple | Enum | BaseException) and Protocol not in cls.__bases__


def constant_attributes() -> frozenset[str]:
    """Return the names of attributes that explored code writes in constructors only."""
    written: set[str] = set()
    every: set[str] = set()
    for name, module in list(sys.modules.items()):
        if name.startswith(_EXPLORED) and isinstance(module.__loader__, InspectLoader):
            code = module.__loader__.get_code(name)
            for one in _codes(code) if code is not None else ():
                if name != Machine.__module__ or one.co_qualname not in _BETWEEN:
                    written |= _written(one)
                every.update(one.co_names)
    return frozenset(every - written)


@lru_cache(maxsize=4096)
def _written(code: CodeType) -> frozenset[str]:
    """Return the attributes that a function writes, or a constructor of objects other than its own."""
    own = code.co_varnames[0] if code.co_name == "__init__" and code.co_argcount else ""
    found, last = set(), ""
    for instruction in dis.get_instructions(code):
        stores = instruction.opname in ("STORE_ATTR", "DELETE_ATTR")
        if stores and not (own and last == own):
            found.add(instruction.argval)
        # A constructor with a closure over its object finds it in a cell.
        last = instruction.argval if instruction.opname in ("LOAD_FAST", "LOAD_DEREF") else ""
    return frozenset(found)


def unwatched_state(policy: Policy) -> tuple[str, ...]:
    """Return a sentence for each piece of state, or use, of the policy's patch that explore cannot watch.

    Call it while the patched code is live.
    """
    if policy.patch is None or not policy.is_patched_by_user():
        return ()
    found: dict[str, None] = {}
    for name in sorted(policy.patch.code.changed):
        module = sys.modules.get(name)
        if module is not None:
            code = policy.patch.code.units[name].code
            found.update(dict.fromkeys(_of_module(module, code, _place(policy.patch.name, name))))
    return tuple(found)


def kept_in_proposals(policy: Policy) -> tuple[str, ...]:
    """Return a sentence for each attribute that patched code keeps in a proposal's object.

    No execution restores such attributes, and no ordering point orders their accesses.
    """
    if policy.patch is None or not policy.is_patched_by_user():
        return ()
    own = vars(Policy()).keys()
    return tuple(
        f"{_place(policy.patch.name, type(part).__module__)}: {type(part).__name__}.{name} is kept in the "
        "policy, not in a state of its own"
        for part in policy.parts()
        for name in sorted(vars(part).keys() - own)
    )


def _place(patch: str, module: str) -> str:
    return f"{patch}: {module.removeprefix('emulator.kvm.').replace('.', '/')}.py"


def _of_module(module: ModuleType, now: CodeType, place: str) -> Iterator[str]:
    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__ == module.__name__:
            yield from _of_class(value, place)
    before = SHIPPED.code_of(module.__name__)
    imported = set() if before is None else {what for _, what in uses_of(before, False)}
    yield from (f"{place}:{line}: {what}" for line, what in uses_of(now, False) if what not in imported)
    # A function that the patch leaves alone has the shipped one's code, apart from its lines.
    shipped = frozenset() if before is None else frozenset(before.co_names)
    known = set() if before is None else {_body(code) for code in _codes(before)}
    for code in _codes(now):
        if code is not now and _body(code) not in known:
            yield from _of_code(code, module, place, shipped)
    for name, value in vars(module).items():
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            given = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            if any(map(_is_mutable, given)):
                yield f"{place}: {name}() has a default that can change"


def _of_class(cls: type, place: str) -> Iterator[str]:
    if issubclass(cls, _BUILTINS):
        yield f"{place}: {cls.__name__} derives from {cls.__mro__[1].__name__}"
    if _can_change(cls):
        for name, value in vars(cls).items():
            if _is_mutable(value) and not (name.startswith("__") and name.endswith("__")):
                yield f"{place}: {cls.__name__}.{name} is the state of a class"
        for name in ("__getattribute__", "__setattr__", "__getattr__"):
            if isinstance(vars(cls).get(name), FunctionType):
                yield f"{place}: {cls.__name__}.{name}()"


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _body(code: CodeType) -> tuple[Any, ...]:
    constants = tuple(_body(c) if isinstance(c, CodeType) else (type(c), c) for c in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, repr(constants)


def _of_code(code: CodeType, module: ModuleType, place: str, shipped: frozenset[str]) -> Iterator[str]:
    """Yield what one function does that is not watched; the functions within it are code of their own.

    shipped: globals of the shipped module, which never change.
    """
    line, last = code.co_firstlineno, None
    for instruction in dis.get_instructions(code):
        if instruction.positions is not None and instruction.positions.lineno is not None:
            line = instruction.positions.lineno
        name = instruction.argval
        what = ""
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            what = f"changes the global {name}"
        elif instruction.opname == "LOAD_GLOBAL":
            last = name
            if name in _BEHIND:
                what = f"calls {name}()"
            elif name not in shipped and _is_mutable(vars(module).get(name)):
                what = f"uses {name}, the state of a module"
            if what:
                yield f"{place}:{line}: {what}"
            continue
        elif instruction.opname in ("STORE_ATTR", "DELETE_ATTR") and last is not None:
            owner = vars(module).get(last)
            if isinstance(owner, type | FunctionType | ModuleType):
                what = f"changes {last}.{name}"
        if what:
            yield f"{place}:{line}: {what}"
        last = None
    for line, what in uses_of(code, True):
        yield f"{place}:{line}: {what}"


def _is_mutable(value: object) -> bool:
    """Return whether a value of a module or a class is state: a container, memory, or an object that can
    change."""
    if type(value) in CONTAINERS or isinstance(value, _BUILTINS):
        return True
    if isinstance(value, ffi.CData):
        return " owning " in repr(value)
    return is_patchable(type(value).__module__) and _can_change(type(value))
