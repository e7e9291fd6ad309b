"""Mutated code in this process: a function of emulator.kvm gets the code that its changed source compiles to.

The mutants change bodies of functions only, so no module is imported anew: each function object keeps its
place wherever it was imported to, and gets another `__code__`.  A child process that was forked for one
mutant does this once, and ends with it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from bench.mutation.generate import sources

_COVER = "_mutation_cover"


def apply(module: str, path: str, text: str) -> None:
    """Give all functions of a module the code of `text`."""
    compiled = _codes(compile(text, path, "exec", dont_inherit=True))
    for name, function in _functions(module):
        code = compiled.get(name)
        if code is not None and code != function.__code__:
            function.__code__ = code


def cover(reached: Callable[[int], Any]) -> list[tuple[str, int]]:
    """Make each statement of emulator.kvm call `reached` with its number before it is executed; return the
    module and line of each number."""
    places: list[tuple[str, int]] = []
    for module, (path, text) in sources().items():
        tree = _Cover(module, places).visit(ast.parse(text))
        compiled = _codes(compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True))
        for name, function in _functions(module):
            function.__globals__[_COVER] = reached
            function.__code__ = compiled[name]
    return places


class _Cover(ast.NodeTransformer):
    def __init__(self, module: str, places: list[tuple[str, int]]) -> None:
        self.module = module
        self.places = places

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        for inner in ast.walk(node):
            for field in ("body", "orelse", "finalbody"):
                block = getattr(inner, field, None)
                if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                    setattr(inner, field, [one for statement in block for one in self._marked(statement)])
        return node

    def _marked(self, statement: ast.stmt) -> list[ast.stmt]:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return [statement]
        self.places.append((self.module, statement.lineno))
        mark = ast.parse(f"{_COVER}({len(self.places) - 1})").body[0]
        return [ast.copy_location(mark, statement), statement]


def _codes(code: CodeType) -> dict[str, CodeType]:
    """Return the code of each function and method, by qualified name."""
    found = {}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found[constant.co_qualname] = constant
            found |= _codes(constant)
    return found


def _functions(module: str) -> Iterator[tuple[str, FunctionType]]:
    """Yield the functions and methods that a module defines."""
    namespace = vars(sys.modules[module])
    for value in [*namespace.values()]:
        if getattr(value, "__module__", "") != module:
            continue
        members = vars(value).values() if isinstance(value, type) else [value]
        for member in members:
            function = _function(member)
            if function is not None and function.__code__.co_filename == sys.modules[module].__file__:
                yield function.__qualname__, function


def _function(member: Any) -> FunctionType | None:
    member = member.fget if isinstance(member, property) else member
    member = getattr(member, "__func__", member)
    member = getattr(member, "__wrapped__", member)
    return member if isinstance(member, FunctionType) else None


def load() -> None:
    """Import all modules of emulator.kvm, before processes are forked."""
    for module in sources():
        __import__(module)
