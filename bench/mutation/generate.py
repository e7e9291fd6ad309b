"""Mutants of emulator/kvm by rule: edits of its sources, each a unified diff under a stable name."""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent

import emulator.kvm
from bench.mutation.blocks import functions
from bench.mutation.rules import RULES
from bench.mutation.source import Edit, Source

PACKAGE = "emulator.kvm"
# Modules without code of KVM: accounts, constants, structures, proposals, and the emulator's own work.
_WITHOUT = frozenset({
    "emulator.kvm.accounting",
    "emulator.kvm.decisions",
    "emulator.kvm.host_work",
    "emulator.kvm.kvm_host",
    "emulator.kvm.notifications",
    "emulator.kvm.mmu.shadow_structs",
    "emulator.kvm.mmu.structs",
    "emulator.kvm.structs",
})  # fmt: skip
# Modules of shadow paging: code that runs without EPT only.
_SHADOW = frozenset({
    "emulator.kvm.emulate",
    "emulator.kvm.mmu.page_track",
    "emulator.kvm.mmu.guest_walk",
    "emulator.kvm.mmu.paging",
    "emulator.kvm.mmu.rmap",
    "emulator.kvm.mmu.shadow",
    "emulator.kvm.mmu.shadow_map",
    "emulator.kvm.mmu.shadow_roots",
    "emulator.kvm.mmu.shadow_slots",
    "emulator.kvm.mmu.shadow_spte",
    "emulator.kvm.mmu.sync",
    "emulator.kvm.mmu.track_write",
    "emulator.kvm.virt.guest_memory",
})  # fmt: skip
PARTS = ("tdp", "shadow")
# Functions that Linux does not have: those of proposals.
_PROPOSED = frozenset({
    "_kick_all",
    "elides_spte_replace",
    "elides_table_protect",
    "migration_vpid",
})  # fmt: skip
# Functions that are no code of KVM: they make and end VMs and vCPUs, as no thread of a test does, check
# arguments, read the emulator's bitmaps, choose its fault-around, cut walks into steps, slice guests, or
# judge.
_NOT_IN = frozenset({
    "__repr__",
    "__init__",
    "_check",
    "_logged_slot",
    "_revoke",
    "_revoke_range",
    "_unwind_entry",
    "_word",
    "_words",
    "fault_around_range",
    "free_loaded_vmcs",
    "kvm_arch_vcpu_ioctl_set_sregs",
    "kvm_create_vm",
    "kvm_destroy_vm",
    "kvm_mmu_after_set_cpuid",
    "kvm_mmu_destroy",
    "kvm_mmu_uninit_tdp_mmu",
    "kvm_mmu_zap_all",
    "kvm_tdp_mmu_zap_all",
    "kvm_vm_ioctl_create_vcpu",
    "kvm_vm_ioctl_enable_manual_dirty_log",
    "need_resched",
    "shadow_mmu_zap_all",
    "step",
    "vmx_vcpu_free",
    "xfer_to_guest_mode_work_pending",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mutant.

    name: RULE@FUNCTION#n, n counting the rule's mutants of this function from 1 in the source's order.
    module, path: the mutated file.  line: the first line of the original that the edits touch; statements:
    the lines of the statements that they touch.
    """

    name: str
    rule: str
    function: str
    module: str
    path: str
    line: int
    statements: tuple[int, ...]
    diff: str
    text: str

    @property
    def mark(self) -> str:
        """Return a short hash of the changed lines.  Its name may pass to another mutant as code changes."""
        changed = (line for line in self.diff.splitlines()[2:] if line[:1] in ("+", "-"))
        return hashlib.sha256("\n".join(changed).encode()).hexdigest()[:8]

    @property
    def digest(self) -> str:
        """Return a hash that does not depend on the mutant's number and lines."""
        lines = (line for line in self.diff.splitlines() if not line.startswith("@@"))
        return hashlib.sha256("\n".join([f"{self.rule}@{self.function}", *lines]).encode()).hexdigest()


@cache
def sources() -> dict[str, tuple[str, str]]:
    """Return path and text of each module of emulator.kvm, by name."""
    root = Path(next(iter(emulator.kvm.__path__)))
    found = {}
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root.parent.parent)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        found[module] = (relative.as_posix(), file.read_text("utf-8"))
    return found


@cache
def mutants() -> tuple[Mutant, ...]:
    """Return all mutants, by file and line."""
    found: list[Mutant] = []
    for module, (path, text) in sources().items():
        if module not in _WITHOUT:
            found += mutants_of(module, path, text)
    _check_names(found)
    return tuple(found)


def mutants_of(module: str, path: str, text: str) -> Iterator[Mutant]:
    """Yield the mutants of one module that compile, each text once."""
    source = Source(text)
    counts: Counter[str] = Counter()
    for name, function in functions(source.tree):
        if name.rpartition(".")[2] in _NOT_IN | _PROPOSED:
            continue
        seen = {_tree(text, function, 0)}
        for rule, edits in (found for make in RULES for found in make(source, function)):
            mutated = source.apply(edits)
            try:
                tree = _tree(mutated, function, mutated.count("\n") - text.count("\n"))
            except SyntaxError as error:
                raise AssertionError(f"{rule}@{name}, line {edits[0].start[0]}: {error}") from error
            if tree in seen:
                continue
            seen.add(tree)
            counts[f"{rule}@{name}"] += 1
            yield Mutant(
                f"{rule}@{name}#{counts[f'{rule}@{name}']}",
                rule,
                name,
                module,
                path,
                min(edit.start[0] for edit in edits),
                touched(function, edits),
                diff_of(path, text, mutated),
                mutated,
            )


def _tree(text: str, function: ast.FunctionDef, more: int) -> str:
    """Return the tree of a function that has `more` lines than in its module's source."""
    assert function.end_lineno is not None
    lines = text.splitlines(keepends=True)[function.lineno - 1 : function.end_lineno + more]
    return ast.dump(ast.parse(dedent("".join(lines))))


def part_of(mutant: Mutant) -> str:
    """Return which of PARTS a mutant's module is."""
    return PARTS[mutant.module in _SHADOW]


def touched(function: ast.FunctionDef, edits: Sequence[Edit]) -> tuple[int, ...]:
    """Return the first lines of the statements within the edits; of an edit within one statement, that one's.

    An insertion touches the statement before it.
    """
    starts = sorted(
        {one.lineno for one in ast.walk(function) if isinstance(one, ast.stmt)} - {function.lineno}
    )
    found: set[int] = set()
    for edit in edits:
        end = edit.end[0] - (edit.end[1] == 0)
        within = [line for line in starts if edit.start[0] <= line <= end]
        found.update(within or [line for line in starts if line <= edit.start[0]][-1:] or starts[:1])
    return tuple(sorted(found))


def diff_of(path: str, before: str, after: str) -> str:
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"a/{path}", f"b/{path}"
    )
    return "".join(lines)


def _check_names(found: Sequence[Mutant]) -> None:
    twice = [name for name, n in Counter(one.name for one in found).items() if n > 1]
    if twice:
        raise AssertionError(f"two functions of one name in {PACKAGE}: {', '.join(twice)}")


def sample(found: Sequence[Mutant], n: int, seed: int) -> list[Mutant]:
    """Return n of the mutants.  A larger sample of one seed contains the smaller ones.

    The sample has a proportional share of each pair of a rule and a function.  Of the pair's m mutants,
    ordered by a hash of their names, the k-th has the place (k + u) / m, where u is a hash of the pair; the
    sample is the n first places.  So a mutant that is added or removed changes no places of other pairs.
    """

    def at(text: str) -> float:
        return int(hashlib.sha256(f"{seed} {text}".encode()).hexdigest()[:12], 16) / 16**12

    cells: dict[tuple[str, str], list[Mutant]] = {}
    for one in found:
        cells.setdefault((one.rule, one.function), []).append(one)
    placed = []
    for (rule, function), members in cells.items():
        members.sort(key=lambda one: at(one.name))
        u = at(f"{rule}@{function}")
        placed += [((k + u) / len(members), one.name, one) for k, one in enumerate(members)]
    return [one for _, _, one in sorted(placed, key=lambda entry: entry[:2])[:n]]
