"""`flushlab show mutant:NAME`: a mutant's description, and its change within the function that it changes."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from difflib import unified_diff
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from emulator.cli.completion import mutants
from emulator.report.console import output_console, print_catalogue

if TYPE_CHECKING:
    from emulator.policy import Mutant

_WIDTH = 80
# The lines of a file outside of functions: imports, classes.
_REST = ""
_STYLES = {"-": "red", "+": "green"}


def show(
    mutant: Annotated[
        str, typer.Argument(metavar="MUTANT", help="The mutant: mutant:NAME.", autocompletion=mutants)
    ],
) -> None:
    """Show a mutant: the bug, and each function of KVM that it changes, with the change in it.

    The lines in front of which - stands are KVM's, those with + the mutant's.
    """
    from emulator.policy import find_mutant
    from emulator.policy.patch.diff import full_path

    found = find_mutant(mutant, "MUTANT")
    print_catalogue([(0, *entry_of(found))])
    for path, name, lines in _functions(found):
        print()
        mirrored = _mirrored(path, name) if name != _REST else ""
        print_catalogue([(0, f"{full_path(path)}{mirrored}", ())])
        _print_diff(lines)
    if found.patch is not None:
        print(f"\nIts file: emulator/policy/mutants/{found.name}.patch")


def entry_of(mutant: Mutant) -> tuple[str, list[str]]:
    """Return a mutant's names and the sentences about it, for a catalogue."""
    from emulator.policy import DEFAULT
    from emulator.policy.mutants import PREFIX

    base = "" if mutant.base == DEFAULT else f"Based on {mutant.base}. "
    how = " by explore --store-buffers" if mutant.store_buffers else ""
    caught = f"Caught{how} as {', '.join(mutant.expected)}."
    if mutant.cost_only:
        caught = "Causes no violation: it only costs flushes or memory."
    sentences = [mutant.doc, base + caught, f"From: {mutant.source}."]
    if mutant.settings:
        sentences.append(f"Answers {', '.join(f'{p}={a}' for p, a in mutant.settings.items())}.")
    return f"{PREFIX}{mutant.name} ({mutant.id})", sentences


def _functions(mutant: Mutant) -> Iterator[tuple[str, str, list[str]]]:
    """Yield path, name and diff of each function that changes; last in each file the other lines."""
    from emulator.policy.patch.code import SHIPPED

    for path, text in sorted(mutant.patch.sources.items()) if mutant.patch is not None else ():
        before, after = _parts(SHIPPED.sources.get(path, "")), _parts(text or "")
        for name in dict.fromkeys([*before, *after]):
            old, new = before.get(name, []), after.get(name, [])
            if old != new:
                context = 1 if name == _REST else len(old)
                yield path, name, list(unified_diff(old, new, lineterm="", n=context))[2:]


def _parts(source: str) -> dict[str, list[str]]:
    """Return the lines of each function, by name, and those outside of functions."""
    lines = source.splitlines()
    parts: dict[str, list[str]] = {}
    inside: set[int] = set()
    tree = ast.parse(source)
    owners: list[ast.Module | ast.ClassDef] = [tree]
    owners += [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for owner in owners:
        for node in owner.body:
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
                prefix = f"{owner.name}." if isinstance(owner, ast.ClassDef) else ""
                parts[prefix + node.name] = lines[first : node.end_lineno]
                inside.update(range(first, node.end_lineno or 0))
    return {**parts, _REST: [line for i, line in enumerate(lines) if line and i not in inside]}


def _mirrored(path: str, name: str) -> str:
    """Return the kernel functions that a function of the model mirrors, with their files, as text."""
    from emulator.drift.citations import How, in_python
    from emulator.drift.record import shipped_record
    from emulator.policy.patch.code import SHIPPED

    source = SHIPPED.sources.get(path, "")
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    line = next((node.lineno for node in nodes if node.name == name.rpartition(".")[2]), 0)
    known = shipped_record().functions
    found = {
        kernel: known[kernel][-1].file
        for kernel, at, how in in_python(source)
        if at == line and how is not How.MENTIONED and kernel in known
    }
    return ": " + ", ".join(f"{kernel}() of {file}" for kernel, file in found.items()) if found else ""


def _print_diff(lines: list[str]) -> None:
    """Print the lines of a diff, without the headers of hunks; fold those that are too wide."""
    console = output_console(_WIDTH, highlight=False)
    for line in lines:
        if line.startswith("@@"):
            continue
        sign, code = line[:1], line[1:]
        indent = " " * (len(code) - len(code.lstrip()))
        folded = textwrap.wrap(
            code,
            console.width - 1,
            drop_whitespace=False,
            break_on_hyphens=False,
            subsequent_indent=indent + " " * 8,
        )
        for part in folded or [""]:
            console.print(Text((sign + part).rstrip(), style=_STYLES.get(sign, "")))
