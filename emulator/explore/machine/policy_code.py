"""Uses in the code of a user's policy that explore cannot watch, as far as its names show."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Final

from emulator.policy.source import Source

# Modules that keep no state, or with state that is watched.
_WATCHED: Final = frozenset((
    "__future__", "abc", "bisect", "collections", "contextlib", "copy", "dataclasses", "enum", "fractions",
    "functools", "heapq", "itertools", "math", "numbers", "operator", "re", "statistics", "string", "types",
    "typing", "emulator.kvm", "emulator.machine.locks", "emulator.machine.runtime", "emulator.policy",
    "native",
))  # fmt: skip
# Built-in functions that lead out of the file, or that return another result in the next process.
_ELSEWHERE: Final = frozenset({"__import__", "compile", "eval", "exec", "hash", "id", "input", "open"})
_BEHIND: Final = frozenset({"__builtins__", "__globals__", "__loader__", "__spec__", "f_back"})


def unwatched(source: Source) -> tuple[str, ...]:
    """Return a sentence for each such use in the policy's file, in the file's order."""
    name = Path(source.path).name
    uses = dict.fromkeys(f"{name}:{line}: {what}" for line, what in _uses(source.code))
    return (*uses, *(f"{name}:{line}: changes {what}" for line, what in _patches(source)))


def _patches(source: Source) -> Iterator[tuple[int, str]]:
    """Yield the parts of KVM that the file patches: no point announces the reads of patched code."""
    patches = source.patches
    for changed in (*map(str, patches.changes), *(kept.name for kept, _ in patches.contents)):
        yield source.stores.get(changed.rpartition(".")[2], 1), changed


def _uses(code: CodeType, nested: bool = False) -> Iterator[tuple[int, str]]:
    yield from uses_of(code, nested)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _uses(constant, True)


def uses_of(code: CodeType, nested: bool) -> Iterator[tuple[int, str]]:
    """Yield the line and a sentence for each such use in one code object, without the functions within it."""
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        line = instruction.positions.lineno or line if instruction.positions is not None else line
        what = _use(instruction, nested)
        if what:
            yield line, what


def _use(instruction: dis.Instruction, nested: bool) -> str:
    value = instruction.argval
    if instruction.opname == "IMPORT_NAME":
        return "" if _is_watched(value, nested) else f"imports {value}"
    if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and value in _ELSEWHERE:
        return f"calls {value}()"
    if isinstance(value, str) and value in _BEHIND:
        return f"uses {value}"
    return ""


def _is_watched(module: str, nested: bool) -> bool:
    """Return whether explore watches the module.  The core's functions are replaced under the file's
    global names only, so an import within a function finds the unwatched ones."""
    parts = module.split(".")
    if nested and parts[0] == "native":
        return False
    return any(".".join(parts[:n]) in _WATCHED for n in range(1, len(parts) + 1))
