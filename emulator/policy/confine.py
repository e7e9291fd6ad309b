"""Undo a policy file's changes to the process, or keep them to the executions of that policy alone.

A file may replace functions of `emulator.kvm` when it is executed: to model a bug, or an idea that has no
decision point.  Such changes are undone at once and applied while a machine runs under that policy
(`confined`), so that other policies of the same command run with KVM's code as it is.  All other changes of
modules are refused, because a policy must not change the code that judges it.  The emulator alone writes to
standard output; a file's prints go to standard error.
"""

from __future__ import annotations

import builtins
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from operator import is_
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Final, TypeVar

from emulator.policy.everywhere import other_uses
from emulator.policy.forbidden import forbid
from emulator.policy.guard import class_name
from emulator.policy.patience import Patience

T = TypeVar("T")

_OURS: Final = ("emulator", "native", "metrics")
# Definitions of these modules can be replaced, wherever their names were imported to.
_PATCHABLE: Final = "emulator.kvm"
_MISSING: Final = object()
_STREAMS: Final = ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__")
# Names that Python itself writes into modules and classes.
_PYTHONS: Final = frozenset({
    "__abstractmethods__", "__annotations__", "__doc__", "__slotnames__", "__warningregistry__", "_",
})  # fmt: skip


# What a module or a class is, which is not among its names: its class, and the bases of a class.
_SHAPE: Final = {"__class__": vars(object)["__class__"], "__bases__": vars(type)["__bases__"]}


@dataclass(frozen=True, slots=True)
class Change:
    """A name of a module or a class that has been bound to another object."""

    namespace: Any
    name: str
    old: Any
    new: Any

    def apply(self) -> None:
        _set(self.namespace, self.name, self.new)

    def undo(self) -> None:
        _set(self.namespace, self.name, self.old)

    @property
    def allowed(self) -> bool:
        if self.name in _SHAPE:
            return False
        owners = (_owner(self.namespace), getattr(self.old, "__module__", None))
        return any(isinstance(owner, str) and _is_in(owner, _PATCHABLE) for owner in owners)

    def __str__(self) -> str:
        where = _owner(self.namespace)
        if isinstance(self.namespace, type):
            where += f".{class_name(self.namespace)}"
        return f"{where}.{self.name}"


@dataclass(frozen=True, slots=True)
class Contents:
    """An object that can be changed in place: a function's code, or a container that a module has."""

    name: str
    obj: Any
    kept: Any

    def undo(self) -> None:
        obj, kept = self.obj, self.kept
        if isinstance(obj, FunctionType):
            obj.__code__, obj.__defaults__, obj.__kwdefaults__ = kept
        elif isinstance(obj, list):
            obj[:] = kept
        else:
            obj.clear()
            obj.update(kept)


class State:
    """A snapshot of the contents of the emulator's modules and of the bindings in Python's own modules."""

    def __init__(self, others: bool = False) -> None:
        self._names: list[tuple[Any, dict[str, Any]]] = []
        # (module or class, name, function or container, contents)
        self._contents: list[tuple[Any, str, Any, Any]] = []
        self._shapes: list[tuple[Any, str, Any]] = []
        self._loaded = {name for name in sys.modules if name.partition(".")[0] in _OURS}
        seen: set[int] = set()
        for name in sorted(self._loaded):
            module = sys.modules[name]
            if isinstance(module, ModuleType):
                self._keep(module, seen)
        self._names.append((sys, dict(vars(sys))))
        self._shapes.append((sys, "__class__", ModuleType))
        self._builtins = dict(vars(builtins))
        self._others = _functions_of_others() if others else {}

    def _keep(self, namespace: Any, seen: set[int]) -> None:
        if id(namespace) in seen:
            return
        seen.add(id(namespace))
        names = dict(vars(namespace))
        self._names.append((namespace, names))
        self._shapes += [(namespace, name, value) for name, value in _shape(namespace)]
        for name, value in names.items():
            kind = type(value)
            if issubclass(kind, type):
                if str(value.__module__).partition(".")[0] in _OURS:
                    self._keep(value, seen)
            elif kind is FunctionType or (
                kind in (list, dict, set)
                and isinstance(namespace, ModuleType)
                and not (name.startswith("__") and name.endswith("__"))
            ):
                self._contents.append((namespace, name, value, _contents(value)))

    def changes(self) -> list[Change]:
        """Return the names that were rebound since the snapshot, except in modules loaded since."""
        now = builtins.__dict__.copy()
        # First, because the code below uses builtins.
        builtins.__dict__.update(self._builtins)
        found = [
            Change(builtins, name, self._builtins.get(name, _MISSING), now.get(name, _MISSING))
            for name in now.keys() | self._builtins.keys()
            if name != "_" and self._builtins.get(name, _MISSING) is not now.get(name, _MISSING)
        ]
        for namespace, name, old in self._shapes:
            new = _SHAPE[name].__get__(namespace)
            if new is not old:
                # At once, because the code below reads attributes of modules.
                found.append(Change(namespace, name, old, new))
                found[-1].undo()
        for namespace, before in self._names:
            now = vars(namespace)
            if len(now) == len(before) and all(map(is_, now.values(), before.values())):
                continue
            for name in before.keys() | now.keys():
                old, new = before.get(name, _MISSING), now.get(name, _MISSING)
                if old is not new and not _is_pythons(namespace, name, new):
                    found.append(Change(namespace, name, old, new))
        for (module, name), old in self._others.items():
            new = vars(module).get(name, _MISSING)
            if new is not old:
                found.append(Change(module, name, old, new))
        return sorted(found, key=str)

    def contents(self) -> list[Contents]:
        """Return functions and containers that were changed in place."""
        return [
            Contents(f"{_owner(namespace)}.{name}", obj, kept)
            for namespace, name, obj, kept in self._contents
            if not _same(_contents(obj), kept)
        ]

    def put_back(self) -> list[str]:
        """Undo changes of names and of functions; return the names of the changed objects."""
        changes = self.changes()
        for change in changes:
            change.undo()
        functions = [kept for kept in self.contents() if isinstance(kept.obj, FunctionType)]
        for kept in functions:
            kept.undo()
        return [*map(str, changes), *(kept.name for kept in functions)]

    def forget_new_modules(self) -> None:
        """Unload the emulator's modules that were loaded since, so that the next import loads them afresh.

        The file may have changed them before a snapshot could include them.
        """
        for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
            if name not in self._loaded:
                parent, _, child = name.rpartition(".")
                del sys.modules[name]
                with suppress(KeyError):
                    vars(sys.modules[parent]).pop(child, None)


@dataclass(frozen=True, slots=True)
class Patches:
    """Changes of emulator.kvm that a file makes when it is executed."""

    changes: tuple[Change, ...] = ()
    contents: tuple[tuple[Contents, Any], ...] = ()
    # Further names for objects that the file replaces, in modules that have imported it.
    everywhere: tuple[Change, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes or self.contents)

    def apply(self) -> None:
        for change in (*self.changes, *self.everywhere):
            change.apply()
        for kept, new in self.contents:
            Contents(kept.name, kept.obj, new).undo()

    def undo(self) -> None:
        for change in (*self.changes, *self.everywhere):
            change.undo()
        for kept, _ in self.contents:
            kept.undo()

    @property
    def new_names(self) -> Iterator[Change]:
        """Return the changes of names that did not exist: nothing asks for them."""
        return (change for change in self.changes if change.old is _MISSING)


def _elsewhere(changes: list[Change]) -> Iterator[Change]:
    replaced = (change for change in changes if change.old is not _MISSING and change.new is not _MISSING)
    for namespace, name, new in other_uses(replaced):
        yield Change(namespace, name, vars(namespace)[name], new)


NO_PATCHES: Final = Patches()
# Makes the error for a refused change of the object with this name.
Refuse = Callable[[str], Exception]


def collected(execute: Callable[[], T], refuse: Refuse, *, others: bool) -> tuple[T, Patches]:
    """Execute a file and undo its changes of modules; return the result of `execute`, and the changes.

    Raises the error made by `refuse` for a change that a policy must not make.
    """
    before = State(others)
    try:
        result = execute()
    finally:
        changes, contents = before.changes(), before.contents()
        patches = Patches(tuple(changes), tuple((kept, _contents(kept.obj)) for kept in contents))
        patches.undo()
        patches = replace(patches, everywhere=tuple(_elsewhere(changes)))
        before.forget_new_modules()
        # Also if the file raised an error: its changes may be the cause.
        for change in changes:
            if not change.allowed:
                raise refuse(str(change))
        for kept in contents:
            if not _is_in(kept.name, _PATCHABLE):
                raise refuse(kept.name)
    return result, patches


def load_patchable() -> None:
    """Import the modules that a file may change, so that their original contents are known."""
    package = importlib.import_module(_PATCHABLE)
    for module in pkgutil.walk_packages(package.__path__, f"{_PATCHABLE}."):
        importlib.import_module(module.name)


class Confinement:
    """The state of the process while code of a policy's file may run, of one policy at a time."""

    depth = 0
    patches: Patches = NO_PATCHES

    @classmethod
    @contextmanager
    def entered(cls, watch: bool = True) -> Iterator[None]:
        """Keep standard output from the file and, with `watch`, end its calls that do not return."""
        if cls.depth:
            yield
            return
        forbid()
        cls.depth += 1
        patience = Patience() if watch else None
        if patience is not None:
            patience.start()
        try:
            with _standard_output_is_error():
                yield
        finally:
            cls.depth -= 1
            if patience is not None:
                patience.stop()

    @classmethod
    @contextmanager
    def patched(cls, patches: Patches, refuse: Refuse) -> Iterator[None]:
        """Enter as `entered` does, with the file's changes of emulator.kvm applied.

        Raises the error made by `refuse` if other changes were made meanwhile.
        """
        with ExitStack() as stack:
            stack.enter_context(cls.entered())
            before = State()
            cls.swap(patches)
            try:
                yield
            finally:
                cls.swap(NO_PATCHES)
                # Also after an error: the changes may be its cause.
                for name in before.put_back():
                    raise refuse(name)

    @classmethod
    def swap(cls, patches: Patches) -> Patches:
        """Replace the applied changes by these; return the former ones."""
        before, cls.patches = cls.patches, patches
        before.undo()
        patches.apply()
        return before


@contextmanager
def _standard_output_is_error() -> Iterator[None]:
    """Redirect standard output to standard error, at the level of Python and of the file descriptor.

    The file's code may write by either; the emulator prints nothing to standard output meanwhile.
    """
    with ExitStack() as stack:
        if sys.stdout is not None and sys.stderr is not None:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            stack.enter_context(redirect_stdout(sys.stderr))
        with suppress(OSError):
            kept = os.dup(1)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 1)
            os.dup2(2, 1)
        yield


# --- one object -------------------------------------------------------------------------------------------


def _shape(namespace: Any) -> Iterator[tuple[str, Any]]:
    yield "__class__", type(namespace)
    if isinstance(namespace, type):
        yield "__bases__", namespace.__bases__


def _set(namespace: Any, name: str, value: Any) -> None:
    if name in _SHAPE:
        _SHAPE[name].__set__(namespace, value)
    elif isinstance(namespace, ModuleType):
        if value is _MISSING:
            vars(namespace).pop(name, None)
        else:
            vars(namespace)[name] = value
    elif value is not _MISSING:
        type.__setattr__(namespace, name, value)
    elif name in vars(namespace):
        type.__delattr__(namespace, name)


def _contents(obj: Any) -> Any:
    if isinstance(obj, FunctionType):
        return (obj.__code__, obj.__defaults__, obj.__kwdefaults__)
    return dict(obj) if isinstance(obj, dict) else list(obj)


def _same(one: Any, other: Any) -> bool:
    """Compare elements by identity, because a user's objects may define equality as they like."""
    if isinstance(one, dict):
        return _same([*one, *one.values()], [*other, *other.values()])
    return len(one) == len(other) and all(map(is_, one, other))


def _owner(namespace: Any) -> str:
    return str(namespace.__name__ if isinstance(namespace, ModuleType) else namespace.__module__)


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _is_pythons(namespace: Any, name: str, new: Any) -> bool:
    if name in _PYTHONS or name.startswith(("_abc_", "__pydantic")):
        return True
    if namespace is sys and name.startswith("last_"):
        return True
    # A package gets its modules' names when they are loaded.
    return isinstance(new, ModuleType) and new.__name__ == f"{_owner(namespace)}.{name}"


def _functions_of_others() -> Mapping[tuple[ModuleType, str], Any]:
    """Return the functions and classes that modules outside the emulator define, by module and name."""
    kinds = (FunctionType, BuiltinFunctionType, type)
    return {
        (module, name): value
        for loaded, module in list(sys.modules.items())
        if type(module) is ModuleType
        and loaded.partition(".")[0] not in _OURS
        and module not in (sys, builtins)
        for name, value in list(vars(module).items())
        if isinstance(value, kinds) and getattr(value, "__module__", None) == loaded
    }
