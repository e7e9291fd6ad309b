"""Parts of the guide that are generated from the code: decision points, moments, state, instructions."""

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
from emulator.kvm.notifications import Notifications
from emulator.kvm.vmx.vmcs import LoadedVmcs
from emulator.machine.runtime import Cpu, Machine
from emulator.policy import POINTS, instructions
from emulator.policy.acting import MOMENTS
from emulator.policy.state import Bitmap, Flag, Generation, OwnList, PerCpu, Private, State

# Arguments of a policy's methods, by the name of the parameter.
ARGUMENTS: Final[dict[str, type]] = {
    "cpu": Cpu,
    "cpu.machine": Machine,
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


# The types of state, in the order in which they are described.
STATES: Final[tuple[type[State], ...]] = (Bitmap, Generation, PerCpu, Flag, Private, OwnList)


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
        parameters = ", ".join(map(_parameter, inspect.signature(method).parameters.values()))
        parts.append(f"### `{point.name}({parameters})`\n\n{point.doc} Asked when: {_sentences(method)}\n")
        for number, one in enumerate(point.alternatives):
            marks = ["Linux 7.3"] * (not number) + ["known to be wrong"] * one.mutant
            mark = f" ({', '.join(marks)})" if marks else ""
            parts.append(f"* `{one.name}`{mark}: {' '.join(one.doc.split())}")
        parts.append("")
    return "\n".join(parts).rstrip()


def _moments() -> str:
    parts = []
    for name in MOMENTS:
        method = getattr(Notifications, name)
        parameters = ", ".join(map(_parameter, inspect.signature(method).parameters.values()))
        parts.append(f"* `{name}({parameters})`: {_sentences(method)}")
    return "\n".join(parts)


def _state() -> str:
    parts = []
    for kind in STATES:
        parts.append(f"* `{kind.__name__}`: {_sentences(kind)}")
        for name, method in vars(kind).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                doc = _sentences(method)
                parts.append(f"    * `.{_call(name, method)}`{': ' if doc else ''}{doc}")
    return "\n".join(parts)


def _instructions() -> str:
    functions = ((name, getattr(instructions, name)) for name in instructions.__all__)
    return "\n".join(
        f"* `{_call(name, function)}`: {_sentences(function)}"
        for name, function in functions
        if inspect.isfunction(function)
    )


def _call(name: str, function: Callable[..., object]) -> str:
    """Return a call's text: its parameters without `self`, with defaults."""
    parts = []
    for one in inspect.signature(function).parameters.values():
        if one.name != "self":
            mark = "*, " if one.kind is one.KEYWORD_ONLY else ""
            default = "" if one.default is one.empty else f"={one.default!r}"
            parts.append(f"{mark}{_parameter(one)}{default}")
    return f"{name}({', '.join(parts)})"


def _parameter(one: inspect.Parameter) -> str:
    """Return a parameter's name, and the type of a root: a vCPU's root and its shadow page share the name."""
    return f"{one.name}: {one.annotation}" if one.name == "root" else one.name


def _sentences(obj: object) -> str:
    return " ".join((inspect.getdoc(obj) or "").split())


def _arguments() -> str:
    parts = []
    for name, cls in ARGUMENTS.items():
        attributes = ", ".join(f"`{one}`" for one in attributes_of(cls))
        parts.append(f"* `{name}`, a `{cls.__name__}`: {_sentences(cls)}\n  Attributes: {attributes}.")
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
    "moments": _moments,
    "state": _state,
    "instructions": _instructions,
}
