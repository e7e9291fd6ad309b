"""Makes other modules of KVM's code the ones that the whole process uses.

Modules outside of emulator.kvm and of the proposals hold their functions and classes in many ways: as
imported names, in tables and class attributes, as default arguments.  `Rebinding` replaces each by its
counterpart, the object of that name in the same module of the other code, and puts the former ones back at
the end.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, Final

from emulator.policy.imports import imports_of_kvm, is_patchable, is_value, names_of_others
from emulator.policy.patch.code import Modules, install
from emulator.policy.patch.diff import PatchError

_OURS: Final = ("emulator", "metrics", "bench", "tests")
_MISSING: Final = object()


class Rebinding:
    """The replacement of the modules `old` by the modules `new`, of which the modules `changed` differ.

    who: the patch, for errors.
    """

    def __init__(self, who: str, old: Modules, new: Modules, changed: Collection[str]) -> None:
        self._who = who
        self._changed = changed
        self._old, self._new = old, new
        self.counterparts: dict[int, tuple[Any, Any]] = {}
        # (module, name) -> the new value, for names that no identity tells apart.
        self._by_name: dict[tuple[str, str], Any] = {}
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, object] = {}
        for name, module in old.items():
            self._pair(module, new.get(name))

    def _pair(self, old: ModuleType, new: ModuleType | None) -> None:
        if new is not None:
            self.counterparts[id(old)] = old, new
        there = {} if new is None else vars(new)
        others = names_of_others(old) if old.__name__ in self._changed else frozenset()
        for name, value in vars(old).items():
            if (name.startswith("__") and name.endswith("__")) or name in others:
                continue
            now = there.get(name, _MISSING)
            if now is value:
                continue
            if now is _MISSING or is_value(value):
                if now is _MISSING or type(now) is not type(value) or now != value:
                    self._by_name[old.__name__, name] = now
                continue
            self.counterparts.setdefault(id(value), (value, now))
            if isinstance(value, type) and isinstance(now, type):
                self._pair_members(value, now)

    def _pair_members(self, old: type, new: type) -> None:
        for name, value in vars(old).items():
            now = vars(new).get(name, _MISSING)
            if isinstance(value, FunctionType) and now is not _MISSING:
                self.counterparts.setdefault(id(value), (value, now))

    # --- replacing ------------------------------------------------------------------------------------------

    def apply(self) -> None:
        """Replace all references."""
        for module in _outside():
            self._namespace(module)
        for module, name, value in self._imported_values(_outside()):
            self._set(module, name, value)
        install(self._new)

    def undo(self) -> None:
        """Put everything back, also in modules that were imported meanwhile."""
        install(self._old)
        known = self._seen
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        late = [module for module in _outside() if id(module) not in known]
        if late:
            back = Rebinding(self._who, self._new, self._old, self._changed)
            for module in late:
                back._namespace(module)
            for module, name, value in back._imported_values(late):
                back._set(module, name, value)

    def check(self) -> None:
        """Raise PatchError if a module outside imports a name that is gone."""
        gone = {key for key, value in self._by_name.items() if value is _MISSING}
        if not gone:
            return
        for module in _outside():
            for _, source, _ in imports_of_kvm(module):
                if source in gone:
                    file = f"{source[0].replace('.', '/')}.py"
                    found = f"takes {source[1]} away, which {_file(module)} uses"
                    raise PatchError(f"{self._who}: {file}", found, "a patch that keeps it")

    def _imported_values(self, modules: list[ModuleType]) -> Iterator[tuple[ModuleType, str, Any]]:
        """Yield the names under which other modules have imported values that differ, and the new values."""
        if not self._by_name:
            return
        for module in modules:
            for name, source, loading in imports_of_kvm(module):
                value = self._by_name.get(source, _MISSING)
                if loading and value is not _MISSING and name in vars(module):
                    yield module, name, value

    def _namespace(self, namespace: Any) -> None:
        """Replace the references of a module or a class."""
        if id(namespace) in self._seen:
            return
        self._seen[id(namespace)] = namespace
        for name, value in list(vars(namespace).items()):
            if not (name.startswith("__") and name.endswith("__")):
                now = self._value(value)
                if now is not value:
                    self._set(namespace, name, now)

    def _set(self, namespace: Any, name: str, value: Any) -> None:
        before = vars(namespace)[name]
        put = type.__setattr__ if isinstance(namespace, type) else ModuleType.__setattr__
        put(namespace, name, value)
        self._undo.append(lambda: put(namespace, name, before))

    def _value(self, value: Any) -> Any:
        """Return the counterpart of a value, or the value with its references replaced."""
        found = self.counterparts.get(id(value))
        if found is not None:
            return found[1]
        kind = type(value)
        if kind in (tuple, frozenset):
            now = kind(map(self._value, value))
            return value if all(a is b for a, b in zip(now, value, strict=True)) else now
        if kind is partial:
            return self._partial(value)
        if id(value) in self._seen:
            return value
        if kind in (dict, list, set, deque):
            self._seen[id(value)] = value
            self._container(value)
        elif kind is FunctionType:
            self._function(value)
        elif kind in (staticmethod, classmethod):
            self._value(value.__func__)
        elif kind is property:
            for part in (value.fget, value.fset, value.fdel):
                self._value(part)
        elif kind is MethodType:
            self._value(value.__func__)
        elif issubclass(kind, type) and _is_ours(getattr(value, "__module__", "")):
            self._namespace(value)
        return value

    def _container(self, value: Any) -> None:
        if isinstance(value, dict):
            items = list(value.items())
            now: Any = [(self._value(key), self._value(one)) for key, one in items]
            same = all(a is c and b is d for (a, b), (c, d) in zip(now, items, strict=True))
        else:
            items = list(value)
            now = list(map(self._value, items))
            same = all(a is b for a, b in zip(now, items, strict=True))
        if not same:
            _fill(value, now)
            self._undo.append(lambda: _fill(value, items))

    def _function(self, function: FunctionType) -> None:
        self._seen[id(function)] = function
        if not _is_ours(function.__module__):
            return
        for name in ("__defaults__", "__kwdefaults__"):
            before = getattr(function, name)
            now = self._value(before)
            if now is not before:
                setattr(function, name, now)
                self._undo.append(partial(setattr, function, name, before))
        for cell in function.__closure__ or ():
            self._cell(cell)
        for value in vars(function).values():
            self._value(value)

    def _cell(self, cell: CellType) -> None:
        try:
            before = cell.cell_contents
        except ValueError:
            return  # empty
        now = self._value(before)
        if now is not before:
            cell.cell_contents = now
            self._undo.append(partial(setattr, cell, "cell_contents", before))

    def _partial(self, value: Any) -> Any:
        func, args, keywords = self._value(value.func), self._value(value.args), dict(value.keywords)
        now = {name: self._value(one) for name, one in keywords.items()}
        if func is value.func and args is value.args and all(now[k] is keywords[k] for k in keywords):
            return value
        return partial(func, *args, **now)


def _fill(container: Any, contents: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(contents)


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and name.partition(".")[0] in _OURS and not is_patchable(name)


def _outside() -> list[ModuleType]:
    """Return the project's loaded modules that no patch may change."""
    return [
        module for name, module in list(sys.modules.items()) if _is_ours(name) and type(module) is ModuleType
    ]


def _file(module: ModuleType) -> str:
    return f"{module.__name__.replace('.', '/')}.py"
