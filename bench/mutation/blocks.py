"""Functions, their blocks of statements, and the units of these blocks that rules drop, move and swap."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from bench.mutation.names import EVENTS, SECTIONS
from bench.mutation.source import called, calls, only_accounts

# A function by its qualified name.
Function = tuple[str, ast.FunctionDef]


@dataclass(frozen=True, slots=True)
class Unit:
    """A statement with the ordering points that stand right before it, in a block."""

    first: ast.stmt
    main: ast.stmt
    block: list[ast.stmt]

    @property
    def events(self) -> tuple[str, ...]:
        """Return the kinds of events of a unit that is an event, and nothing else."""
        return events_of(self.main)


def functions(tree: ast.Module) -> Iterator[Function]:
    """Yield functions and methods; a nested function belongs to its outer one."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    yield f"{node.name}.{method.name}", method


def blocks(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    """Yield each block of statements, the function's own first."""
    for node in ast.walk(function):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block
    # Handlers of exceptions are for the emulator's own errors.


def units(block: list[ast.stmt]) -> list[Unit]:
    """Divide a block; a docstring is no unit."""
    found = []
    first = None
    for statement in block:
        if isinstance(statement, ast.Expr) and called(statement.value) == "point":
            first = first or statement
            continue
        if not _is_docstring(statement):
            found.append(Unit(first or statement, statement, block))
        first = None
    return found


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def events_of(statement: ast.stmt) -> tuple[str, ...]:
    """Return the kinds of a statement that is an event: a call for its effect alone, or an `if` (or a
    `for`) around such calls; its test may be one."""
    if isinstance(statement, ast.Expr):
        return _kinds(_unchecked(statement.value))
    if isinstance(statement, ast.For) and not statement.orelse:
        return _all_events(statement.body)
    if isinstance(statement, ast.If) and not statement.orelse:
        inner = _all_events(statement.body)
        tested = _kinds(statement.test)
        if inner or (tested and all(map(only_accounts, statement.body))):
            return tuple(dict.fromkeys((*tested, *inner)))
    return ()


def _all_events(body: list[ast.stmt]) -> tuple[str, ...]:
    """Return the kinds if each statement is an event or an account, and one is an event."""
    found: list[str] = []
    for statement in body:
        kinds = events_of(statement)
        if not kinds and not only_accounts(statement):
            return ()
        found += kinds
    return tuple(dict.fromkeys(found))


def _unchecked(value: ast.expr) -> ast.expr:
    """Return the call within cpu.check(...)."""
    if isinstance(value, ast.Call) and called(value) == "check" and value.args:
        return value.args[0]
    return value


def _kinds(value: ast.expr) -> tuple[str, ...]:
    return tuple(kind for kind, names in EVENTS.items() if called(value) in names)


def is_section(statement: ast.AST) -> bool:
    """Return whether a statement is a `with` over a lock or a read section, and nothing else."""
    return isinstance(statement, ast.With) and any(
        calls(item.context_expr) & SECTIONS for item in statement.items
    )
