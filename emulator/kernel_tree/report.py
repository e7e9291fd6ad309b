"""Differences between a tree and the model, as data and as text of 80 columns."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from emulator.drift.c_source import definitions
from emulator.kernel_tree.build import MMU, SOURCES
from emulator.kernel_tree.compare import Difference
from emulator.kernel_tree.operations import WATCHED
from emulator.kernel_tree.sides import Outcome, spelled
from emulator.kvm.mmu import tdp_dirty, tdp_map, tdp_mmu, tdp_roots

_WIDTH: Final = 80
_MOST_STATES: Final = 6
# The kernel's function of each operation, in the order of preference, and the model's.
_FUNCTIONS: Final[dict[str, tuple[tuple[str, ...], Callable[..., Any] | None]]] = {
    "map": (("kvm_tdp_mmu_map",), tdp_map.kvm_tdp_mmu_map),
    "zap_leafs": (("kvm_tdp_mmu_zap_leafs",), tdp_mmu.kvm_tdp_mmu_zap_leafs),
    "unmap": (("kvm_tdp_mmu_unmap_gfn_range",), tdp_mmu.kvm_tdp_mmu_unmap_gfn_range),
    "age": (("kvm_tdp_mmu_age_gfn_range",), tdp_mmu.kvm_tdp_mmu_age_gfn_range),
    "wrprot_slot": (("kvm_tdp_mmu_wrprot_slot",), tdp_dirty.kvm_tdp_mmu_wrprot_slot),
    "write_protect_gfn": (("kvm_tdp_mmu_write_protect_gfn",), tdp_dirty.kvm_tdp_mmu_write_protect_gfn),
    "clear_dirty": (("kvm_tdp_mmu_clear_dirty_pt_masked",), tdp_dirty.kvm_tdp_mmu_clear_dirty_pt_masked),
    "split": (("kvm_tdp_mmu_try_split_huge_pages",), tdp_dirty.kvm_tdp_mmu_try_split_huge_pages),
    "recover": (
        ("kvm_tdp_mmu_recover_huge_pages", "kvm_tdp_mmu_zap_collapsible_sptes"),
        tdp_dirty.kvm_tdp_mmu_recover_huge_pages,
    ),
    "alloc_root": (
        ("kvm_tdp_mmu_alloc_root", "kvm_tdp_mmu_get_vcpu_root_hpa"),
        tdp_roots.kvm_tdp_mmu_alloc_root,
    ),
    "put_root": (("kvm_tdp_mmu_put_root",), tdp_roots.kvm_tdp_mmu_put_root),
    "invalidate_roots": (
        ("kvm_tdp_mmu_invalidate_roots", "kvm_tdp_mmu_invalidate_all_roots"),
        tdp_roots.kvm_tdp_mmu_invalidate_roots,
    ),
    "zap_invalidated_roots": (
        ("kvm_tdp_mmu_zap_invalidated_roots",),
        tdp_mmu.kvm_tdp_mmu_zap_invalidated_roots,
    ),
}
_RETURNS: Final = {-1: "not called", 1: "RET_PF_RETRY", 4: "RET_PF_FIXED", 5: "RET_PF_SPURIOUS"}


def as_dict(difference: Difference) -> dict[str, Any]:
    """Return a difference as a JSON document."""
    return {
        "seed": difference.seed,
        "ad_bits": difference.sequence.ad_bits,
        "before": [str(one) for one in difference.sequence.operations[:-1]],
        "operation": str(difference.operation),
        "name": difference.operation.name,
        "aspects": list(difference.aspects),
        "model": _outcome(difference.operation.name, difference.model),
        "tree": _outcome(difference.operation.name, difference.tree),
        "states": list(_states(difference.model.state, difference.tree.state)),
        "at": _first_moment(difference),
    }


def _outcome(name: str, outcome: Outcome) -> dict[str, Any]:
    returned = (
        _RETURNS.get(outcome.returned, str(outcome.returned)) if name == "map" else str(outcome.returned)
    )
    return {
        "returned": returned,
        "events": [str(one) for one in outcome.events],
        "tables": outcome.tables,
        "complaints": list(outcome.complaints),
    }


def _states(model: tuple[int, ...], tree: tuple[int, ...]) -> Iterator[dict[str, str]]:
    """Yield the SPTEs that differ, each with its root and gfn."""
    words = len(WATCHED) + 1
    if len(model) != len(tree):
        found = f"{len(model) // words} roots", f"{len(tree) // words} roots"
        yield {"where": "the list of roots", "model": found[0], "tree": found[1]}
        return
    for at, (ours, theirs) in enumerate(zip(model, tree, strict=True)):
        if ours != theirs:
            root, place = divmod(at, words)
            if place == 0:
                yield {"where": f"root {root}", "model": _root(ours), "tree": _root(theirs)}
            else:
                where = f"root {root}, gfn {WATCHED[place - 1]:#x}"
                yield {"where": where, "model": spelled(ours), "tree": spelled(theirs)}


def _root(word: int) -> str:
    return f"{'invalid' if word & 2 else 'valid'}, address space {word & 1}, {word >> 8} references"


def _first_moment(difference: Difference) -> dict[str, Any] | None:
    """Return the first flush or yield at which the tables differ, if the events are equal."""
    for ours, theirs in zip(difference.model.events, difference.tree.events, strict=False):
        if str(ours) != str(theirs):
            return None
        if ours.state != theirs.state:
            return {"event": str(ours), "states": list(_states(ours.state or (), theirs.state or ()))}
    return None


def places(name: str, top: Path) -> tuple[str, str]:
    """Return where an operation's function is in the model and in the tree."""
    kernel, function = _FUNCTIONS.get(name, ((), None))
    ours = "the test's own step"
    if function is not None:
        file = Path(inspect.getsourcefile(function) or "")
        short = "/".join(file.parts[file.parts.index("emulator") :])
        ours = f"{short}:{inspect.getsourcelines(function)[1]}"
    for source in SOURCES:
        path = top / MMU / source
        text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
        for one in definitions(text):
            if one.name in kernel:
                return ours, f"{MMU}/{source}:{one.first} {one.name}()"
    return ours, "no function of that name"


def as_text(number: int, found: dict[str, Any], model: str, tree: str, top: Path) -> str:
    """Return one difference, side by side."""
    ours, theirs = places(found["name"], top)
    lines = [f"Difference {number}: {found['operation']}"]
    lines += _pair(model, ours, tree, theirs)
    flags = "" if found["ad_bits"] else "; EPT has no A/D bits"
    lines.append(f"  after (sequence {found['seed']}{flags}):")
    lines += [f"    {at}. {text}" for at, text in enumerate(found["before"], 1)] or ["    nothing"]
    for key, title in (("returned", "returns"), ("tables", "table pages in use")):
        if found["model"][key] != found["tree"][key]:
            lines += _pair(f"{model}: {title}", found["model"][key], f"{tree}: {title}", found["tree"][key])
    if "events" in found["aspects"]:
        for name, side in ((model, "model"), (tree, "tree")):
            lines.append(f"  {name}:")
            lines += [f"    {text}" for text in found[side]["events"] or ["nothing that others notice"]]
    moment = found["at"]
    if moment is not None:
        lines.append(f"  at the {moment['event']} the tables differ:")
        lines += _states_text(moment["states"], model, tree)
    elif found["states"]:
        lines.append("  SPTEs afterwards:")
        lines += _states_text(found["states"], model, tree)
    lines += [f"  {tree} complains: {text}" for text in found["tree"]["complaints"]]
    return "\n".join(wrapped for line in lines for wrapped in _wrapped(line)) + "\n"


def _pair(first: str, one: object, second: str, two: object) -> list[str]:
    width = max(len(first), len(second))
    return [f"  {first:<{width}}  {one}", f"  {second:<{width}}  {two}"]


def _states_text(states: list[dict[str, str]], model: str, tree: str) -> Iterator[str]:
    for one in states[:_MOST_STATES]:
        yield f"    {one['where']}"
        yield from (f"    {line}" for line in _pair(model, one["model"], tree, one["tree"]))
    if len(states) > _MOST_STATES:
        yield f"    and {len(states) - _MOST_STATES} more"


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, _WIDTH, subsequent_indent=indent, break_long_words=False) or [line]
