"""The modules of emulator.kvm by name, and the names that other modules import from them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.abc import InspectLoader
from types import ModuleType
from typing import Final

PACKAGE: Final = "emulator.kvm"
# Values without an identity of their own: equal ones may be one object.
_VALUES: Final = (int, float, complex, str, bytes, bool, type(None), type(Ellipsis))

Source = tuple[str, str]  # a module, and a name in it
# A name that a module imports, its source, and whether it is imported when the module is loaded.
Import = tuple[str, Source, bool]
_imported: dict[str, tuple[Import, ...]] = {}


def is_kvm(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def is_value(value: object) -> bool:
    return isinstance(value, _VALUES) or (isinstance(value, tuple | frozenset) and not value)


def imports_of_kvm(module: ModuleType) -> tuple[Import, ...]:
    """Return the names that a module, as it is shipped, imports from emulator.kvm."""
    name = module.__name__
    if name not in _imported:
        source = _source(module)
        found = _all_imports(source) if PACKAGE in source else ()
        _imported[name] = tuple(one for one in found if is_kvm(one[1][0]))
    return _imported[name]


def names_of_others(module: ModuleType) -> frozenset[str]:
    """Return the names that a module of emulator.kvm imports from elsewhere."""
    return frozenset(name for name, (source, _), _ in _all_imports(_source(module)) if not is_kvm(source))


def _source(module: ModuleType) -> str:
    loader = module.__loader__
    return (loader.get_source(module.__name__) or "") if isinstance(loader, InspectLoader) else ""


def _all_imports(source: str) -> Iterator[Import]:
    pending: list[tuple[ast.stmt, bool]] = [(node, True) for node in ast.parse(source).body]
    while pending:
        node, loading = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, (node.module or "", alias.name), loading
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], (alias.name, ""), loading
        loading = loading and not isinstance(node, ast.FunctionDef)
        pending += [(child, loading) for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
