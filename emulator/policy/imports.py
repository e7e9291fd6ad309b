"""The modules that patches may change, by name, and the names that other modules import from them.

These are KVM's code, emulator.kvm, and the proposals beside it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.abc import InspectLoader
from types import ModuleType
from typing import Final

PACKAGE: Final = "emulator.kvm"
PROPOSALS: Final = "emulator.policy.proposals"
PACKAGES: Final = (PACKAGE, PROPOSALS)
# Values without an identity of their own: equal ones may be one object.
_VALUES: Final = (int, float, complex, str, bytes, bool, type(None), type(Ellipsis))

Source = tuple[str, str]  # a module, and a name in it
# A name that a module imports, its source, and whether it is imported when the module is loaded.
Import = tuple[str, Source, bool]
_imported: dict[str, tuple[Import, ...]] = {}


def is_patchable(name: str) -> bool:
    return name in PACKAGES or name.startswith(tuple(f"{package}." for package in PACKAGES))


def is_value(value: object) -> bool:
    return isinstance(value, _VALUES) or (isinstance(value, tuple | frozenset) and not value)


def imports_of_kvm(module: ModuleType) -> tuple[Import, ...]:
    """Return the names that a module, as it is shipped, imports from patchable ones."""
    name = module.__name__
    if name not in _imported:
        source = _source(module)
        found = _all_imports(source) if any(package in source for package in PACKAGES) else ()
        _imported[name] = tuple(one for one in found if is_patchable(one[1][0]))
    return _imported[name]


def names_of_others(module: ModuleType) -> frozenset[str]:
    """Return the names that a patchable module imports from elsewhere."""
    return frozenset(
        name for name, (source, _), _ in _all_imports(_source(module)) if not is_patchable(source)
    )


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
