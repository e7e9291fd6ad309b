"""Parts of the guide that are generated from the code: decision points, their arguments, where KVM asks."""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

from emulator.kvm import structs
from emulator.kvm.decisions import Decisions
from emulator.kvm.mmu import structs as mmu_structs
from emulator.kvm.vmx.vmcs import LoadedVmcs
from emulator.machine.runtime import Cpu
from emulator.policy import POINTS

# Arguments of a policy's methods, by the name of the parameter.
ARGUMENTS: Final[dict[str, type]] = {
    "cpu": Cpu,
    "vcpu": structs.Vcpu,
    "vcpu.mmu": mmu_structs.KvmMmu,
    "vcpu.mmu.root": mmu_structs.KvmMmuRootInfo,
    "vcpu.arch": structs.VcpuArch,
    "vcpu.loaded_vmcs": LoadedVmcs,
    "kvm": structs.Kvm,
    "root": mmu_structs.KvmMmuPage,
    "root.role": mmu_structs.KvmMmuPageRole,
    "slot": structs.KvmMemorySlot,
}


def questions() -> dict[str, list[str]]:
    """Return where KVM's code asks: places such as `mmu_notifier.py: notifier_flush()`, by decision point."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, tree in _sources(resources.files("emulator.kvm"), ""):
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for point in _asked_in(function):
                    place = f"{name}: {function.name}()"
                    if place not in found[point]:
                        found[point].append(place)
    return dict(found)


def _sources(folder: Traversable, prefix: str) -> Iterator[tuple[str, ast.Module]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _sources(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".py"):
            yield f"{prefix}{entry.name}", ast.parse(entry.read_text("utf-8"))


def _asked_in(function: ast.FunctionDef) -> Iterator[str]:
    """Yield the points of calls such as `kvm.policy.zap(...)`, but not those of functions within."""
    names = {point.name for point in POINTS}
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef):
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
            owner = node.func.value
            if isinstance(owner, ast.Attribute | ast.Name) and ast.unparse(owner).endswith("policy"):
                yield node.func.attr


def _questions_table() -> str:
    places = questions()
    rows = [f"| `{point.name}` | {', '.join(f'`{p}`' for p in places[point.name])} |" for point in POINTS]
    return "\n".join(["| decision point | asked in emulator/kvm |", "|---|---|", *rows])


def _points() -> str:
    parts = []
    for point in POINTS:
        method = getattr(Decisions, point.name)
        parameters = ", ".join(inspect.signature(method).parameters)
        when = " ".join((inspect.getdoc(method) or "").split())
        parts.append(f"### `{point.name}({parameters})`\n\n{point.doc} Asked when: {when}\n")
        for number, one in enumerate(point.alternatives):
            marks = ["Linux 7.3"] * (not number) + ["known to be wrong"] * one.mutant
            mark = f" ({', '.join(marks)})" if marks else ""
            parts.append(f"* `{one.name}`{mark}: {' '.join(one.doc.split())}")
        parts.append("")
    return "\n".join(parts).rstrip()


def _arguments() -> str:
    parts = []
    for name, cls in ARGUMENTS.items():
        summary = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
        attributes = ", ".join(f"`{one}`" for one in attributes_of(cls))
        parts.append(f"* `{name}`, a `{cls.__name__}`: {summary}\n  Attributes: {attributes}.")
    return "\n".join(parts)


def attributes_of(cls: type) -> list[str]:
    """Return the public data attributes and properties of a class, its bases' among them."""
    found: set[str] = set()
    for base in cls.__mro__[:-1]:
        slots = vars(base).get("__slots__", ())
        found.update((slots,) if isinstance(slots, str) else slots)
        found.update(vars(base).get("__annotations__", {}))
        found.update(name for name, value in vars(base).items() if isinstance(value, property))
        found.update(_assigned_in_init(base))
    return sorted(name for name in found if not name.startswith("_"))


def _assigned_in_init(cls: type) -> Iterator[str]:
    init = vars(cls).get("__init__")
    if not inspect.isfunction(init):
        return
    try:
        tree = ast.parse(inspect.cleandoc("if True:\n" + inspect.getsource(init)))
    except (OSError, SyntaxError):
        return
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                yield target.attr


GENERATED: Final[dict[str, Callable[[], str]]] = {
    "questions": _questions_table,
    "points": _points,
    "arguments": _arguments,
}
