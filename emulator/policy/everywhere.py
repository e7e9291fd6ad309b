"""Makes a replacement of KVM's function hold wherever the function is used, not in one module alone.

A module that imports a function by name has a reference of its own.  A policy file replaces the function in
one module, as a rule the one that defines it, and means KVM's function.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final

from emulator.policy.imports import imports_of_kvm, is_patchable, is_value, names_of_others

if TYPE_CHECKING:
    from emulator.policy.confine import Change

_OURS: Final = ("emulator", "metrics")

Site = tuple[Any, str, Any]  # a module or class, a name, and its new value


def other_uses(changes: Iterable[Change]) -> Iterator[Site]:
    """Yield the other names under which modules and classes have the objects that these changes replace.

    While the changes are undone.  Where a file replaces one object by several, each module keeps the one that
    the file gave it, and all others use the one of the module that defines the object.
    """
    given = [change for change in changes if isinstance(change.namespace, ModuleType) and _is_kvms(change)]
    own = {(id(change.namespace), change.name) for change in given}
    objects: dict[int, Change] = {}
    for change in sorted(given, key=_defines):
        if not is_value(change.old):
            objects[id(change.old)] = change
    if objects:
        for namespace in _namespaces():
            for name, value in list(vars(namespace).items()):
                found = objects.get(id(value))
                if found is not None and (id(namespace), name) not in own:
                    yield namespace, name, found.new
    for change in given:
        if is_value(change.old):
            yield from _importers(change, own)


def _is_kvms(change: Change) -> bool:
    """Return whether the change replaces something that emulator.kvm defines, not what it has imported."""
    namespace, old = change.namespace, change.old
    if isinstance(old, FunctionType | type):
        return is_patchable(old.__module__)
    return is_patchable(namespace.__name__) and change.name not in names_of_others(namespace)


def _defines(change: Change) -> bool:
    return bool(getattr(change.old, "__module__", None) == change.namespace.__name__)


def _importers(change: Change, own: set[tuple[int, str]]) -> Iterator[Site]:
    source = change.namespace.__name__, change.name
    for module in _modules():
        for name, imported, loading in imports_of_kvm(module):
            if loading and imported == source and name in vars(module) and (id(module), name) not in own:
                yield module, name, change.new


def _modules() -> list[ModuleType]:
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in _OURS and type(module) is ModuleType
    ]


def _namespaces() -> Iterator[Any]:
    for module in _modules():
        yield module
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield value
