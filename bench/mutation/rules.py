"""The rules: each yields edits of one function, every edit a mutant.

A rule knows the names of names.py and the shape of the code, not its meaning, and is not told which of its
mutants matter.
"""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Final

from bench.mutation.blocks import Unit, blocks, events_of, is_section, units
from bench.mutation.names import (
    ACCOUNTS,
    EVENTS,
    IDEMPOTENT,
    LOWER,
    ORDERED,
    PRIVATE,
    RANGELESS,
    STEPPING,
    UPPER,
    YIELDS,
)
from bench.mutation.source import (
    Edit,
    Source,
    called,
    calls,
    depends,
    indented,
    leaves,
    mentions,
    only_accounts,
)

# One mutant: the name of its rule, and its edits.
Mutation = tuple[str, list[Edit]]
Rule = Callable[[Source, ast.FunctionDef], Iterator[Mutation]]


# --- events: drop, duplicate, move ------------------------------------------------------------------------


def drop(source: Source, function: ast.FunctionDef) -> Iterator[Mutation]:
    """Drop a flush, a kick, a barrier, a sequence bump, a request, a reference."""
    for unit in _events(function):
        for kind in unit.events[:1]:
            yield f"drop-{kind}", [source.drop(unit.first, unit.main, unit.block)]


def duplicate(source: Source, function: ast.FunctionDef) -> Iterator[Mutation]:
    """Do an event twice."""
    for unit in _events(function):
        if isinstance(unit.main, ast.Expr) and not calls(unit.main) & IDEMPOTENT:
            text = source.statement_lines(unit.first, unit.main)
            yield f"twice-{unit.events[0]}", [source.insert_after(unit.main, text)]


def move(source: Source, function: ast.FunctionDef) -> Iterator[Mutation]:
    """Move an event out of its critical section, to either side, or to either end of its block."""
    for unit in _events(function):
        kind = unit.events[0]
        section = source.parents[unit.block[0]]
        removed = source.drop(unit.first, unit.main, unit.block)
        text = source.statement_lines(unit.first, unit.main)
        around = is_section(section) or isinstance(section, ast.For | ast.While)
        if around and isinstance(section, ast.With | ast.For | ast.While) and unit.block is section.body:
            out = indented(text, section.col_offset - unit.main.col_offset)
            others = [one for one in units(unit.block) if one.main is not unit.main]
            at = unit.block.index(unit.main)
            before = [one for one in others if unit.block.index(one.main) < at]
            after = [one for one in others if unit.block.index(one.main) > at]
            if _passes(unit, after):
                yield f"late-{kind}", [removed, source.insert_after(section, out)]
            if _passes(unit, before) and isinstance(section, ast.With) and not _binds(section, unit):
                yield f"early-{kind}", [removed, source.insert_before(section, out)]
        found = units(unit.block)
        at = [one.main for one in found].index(unit.main)
        if at >= 2 and _passes(unit, found[:at]):
            yield f"first-{kind}", [removed, source.insert_before(found[0].first, text)]
        if at < len(found) - 2 and _passes(unit, found[at + 1 :]):
            yield f"last-{kind}", [removed, source.insert_after(found[-1].main, text)]


def split(source: Source, function: ast.FunctionDef) -> Iterator[Mutation]:
    """Release the lock before an event, and take it again for it."""
    for block in blocks(function):
        for section in block:
            if not isinstance(section, ast.With) or not is_section(section):
                continue
            for unit in units(section.body):
                if unit.events and unit.first is not section.body[0]:
                    head = " " * section.col_offset + _header(source, section)
                    yield f"split-{unit.events[0]}", [source.insert_before(unit.first, head)]


def _header(source: Source, section: ast.With) -> str:
    items = ", ".join(source.segment(item.context_expr) for item in section.items)
    return f"with {items}:\n"


def _binds(section: ast.With, unit: Unit) -> bool:
    return any(depends(item, unit.main) for item in section.items)


def _events(function: ast.FunctionDef) -> Iterator[Unit]:
    for block in blocks(function):
        for unit in units(block):
            if unit.events:
                yield unit


def _passes(unit: Unit, others: list[Unit]) -> bool:
    """Return whether a unit can pass others without another value of a local name, and no path leaves."""
    return not any(depends(unit.main, one.main) or leaves(one.main) for one in others)


# --- order --------------------------------------------------------------------------------------------------


def swap(source: Source, function: ast.FunctionDef) -> Iterator[Mutation]:
    """Swap two neighbours of which one releases, leaves, clears, sets or publishes."""
    for block in blocks(function):
        found = units(block)
        for one, other in pairwise(found):
            if not _is_ordered(one.main) and not _is_ordered(other.main):
                continue
            if not _acts(one.main) or not _acts(other.main):
                continue
            if depends(one.main, other.main) or leaves(one.main) or leaves(other.main):
                continue
            first = source.statement_lines(one.first, one.main)
            between = "".join(source.lines[one.main.end_lineno or 0 : other.first.lineno - 1])
            second = source.statement_lines(other.first, other.main)
            yield "swap", [source.replace_lines(one.first, other.main, second + between + first)]


def release(source: Source, function: ast.FunctionDef) -> Iterator[Mutation]:
    """Do the last step of a critical section after it, or the step after it inside."""
    for block in blocks(function):
        for section, after in zip(block, [*block[1:], None], strict=True):
            if not isinstance(section, ast.With) or not is_section(section):
                continue
            found = units(section.body)
            last = found[-1] if found else None
            if last is not None and len(found) > 1 and _moves(last.main) and not last.events:
                text = indented(
                    source.statement_lines(last.first, last.main), section.col_offset - last.main.col_offset
                )
                removed = source.drop(last.first, last.main, section.body)
                yield "release-early", [removed, source.insert_after(section, text)]
            if after is not None and _moves(after) and not leaves(section):
                text = indented(source.statement_lines(after), section.body[0].col_offset - after.col_offset)
                removed = source.drop(after, after, block)
                yield "release-late", [removed, source.insert_after(section, text)]


def _moves(statement: ast.stmt) -> bool:
    """Return whether a statement acts, and can pass the end of a section."""
    simple = isinstance(statement, ast.Expr | ast.Assign | ast.AugAssign | ast.If)
    return simple and _acts(statement) and bool(calls(statement)) and not leaves(statement)


def _is_ordered(statement: ast.stmt) -> bool:
    """Return whether a statement is an event, one of ORDERED, or sets a field that other threads may read."""
    if events_of(statement) or is_section(statement):
        return True
    if isinstance(statement, ast.Expr):
        return bool(calls(statement) & ORDERED)
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AugAssign):
        targets = [statement.target]
    return any(_is_shared(target) for target in targets)


def _is_shared(target: ast.expr) -> bool:
    """Return whether other threads may read a field: not one of a vCPU, a pCPU, or a walk of this thread."""
    if not isinstance(target, ast.Attribute):
        return False
    return not any(isinstance(one, ast.Name) and one.id in PRIVATE for one in ast.walk(target))


def _acts(statement: ast.stmt) -> bool:
    """Return whether a statement does something that other threads may notice besides accounts."""
    if isinstance(statement, ast.Assign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return any(map(_is_shared, targets)) or bool(calls(statement.value) - ACCOUNTS)
    if isinstance(statement, ast.With):
        return is_section(statement)
    return isinstance(statement, ast.Expr | ast.If | ast.For) and bool(calls(statement) - ACCOUNTS)


# --- conditions -----------------------------------------------------------------------------------------


def weaken(source: Source, function: ast.FunctionDef) -> Iterator[Mutation]:
    """Drop an operand of `and` or `or`, move a comparison by one, remove a `not`."""
    for node in _own(function):
        if mentions(node, STEPPING):
            continue
        if isinstance(node, ast.BoolOp) and not _is_assertion(source, node):
            name = "drop-operand" if isinstance(node.op, ast.And) else "drop-alternative"
            for i, operand in enumerate(node.values):
                if not _compares_answer(operand):
                    yield name, [_without_operand(source, node, i)]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield "drop-not", [source.replace(node, source.segment(node.operand))]
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and not _is_assertion(source, node):
            sign = _OFF_BY_ONE.get(type(node.ops[0]))
            if sign is not None:
                left, right = source.segment(node.left), source.segment(node.comparators[0])
                yield "off-by-one", [source.replace(node, f"{left} {sign} {right}")]


_OFF_BY_ONE: Final = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}


def guard(source: Source, function: ast.FunctionDef) -> Iterator[Mutation]:
    """Drop a test that ends a function or goes on with the next turn."""
    for block in blocks(function):
        for statement in block:
            if (
                isinstance(statement, ast.If)
                and not statement.orelse
                and isinstance(statement.body[-1], ast.Return | ast.Continue | ast.Break)
                and len(statement.body) <= 2
            ):
                yield "drop-guard", [source.drop(statement, statement, block)]
            if (
                isinstance(statement, ast.If)
                and statement.orelse
                and not isinstance(statement.orelse[0], ast.If)
                and not _compares_answer(statement.test)
            ):
                last = statement.orelse
                text = indented(
                    source.statement_lines(last[0], last[-1]), statement.col_offset - last[0].col_offset
                )
                yield "drop-branch", [source.replace_lines(statement, statement, text)]


def _compares_answer(test: ast.expr) -> bool:
    """Return whether a test compares a policy's answer: without it, the code is another policy's."""
    return any(isinstance(one, ast.Constant) and isinstance(one.value, str) for one in ast.walk(test))


def _without_operand(source: Source, node: ast.BoolOp, i: int) -> Edit:
    """Remove an operand and its operator; where parentheses stand in between, write the others anew."""
    values = node.values
    start = source.replace(values[0], "").start if i == 0 else source.replace(values[i - 1], "").end
    end = source.replace(values[1], "").start if i == 0 else source.replace(values[i], "").end
    removed = source.between(start, end)
    if removed.count("(") == removed.count(")") and removed.find(")") >= removed.find("("):
        return Edit(start, end, "")
    kept = [one for n, one in enumerate(values) if n != i]
    texts = [source.segment(one) for one in kept]
    if len(kept) > 1:
        texts = [
            f"({text})" if isinstance(one, ast.BoolOp) else text
            for one, text in zip(kept, texts, strict=True)
        ]
    return source.replace(node, (" and " if isinstance(node.op, ast.And) else " or ").join(texts))


def _is_assertion(source: Source, node: ast.AST) -> bool:
    while not isinstance(node, ast.stmt):
        node = source.parents[node]
    return isinstance(node, ast.Assert | ast.Raise)


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yield the nodes of a function's body, without its annotations, its defaults, and its accounts, nor the
    conditions of accounts."""
    for statement in function.body:
        todo: deque[ast.AST] = deque([statement])
        while todo:
            node = todo.popleft()
            if called(node) not in ACCOUNTS and not _accounts_alone(node):
                yield node
                todo.extend(ast.iter_child_nodes(node))


def _accounts_alone(node: ast.AST) -> bool:
    """Return whether an `if` only decides about accounts, by a test that changes nothing."""
    if not isinstance(node, ast.If) or node.orelse or not all(map(only_accounts, node.body)):
        return False
    return not calls(node.test) & frozenset().union(*EVENTS.values()) and not calls(node.test) & ORDERED


# --- a pending flush ------------------------------------------------------------------------------------


def thread(source: Source, function: ast.FunctionDef) -> Iterator[Mutation]:
    """Forget a pending flush: `=` for `|=` in a loop, or it is not handed in, or not returned."""
    gathered = {
        node.target.id
        for node in _own(function)
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)
    }
    gathered |= {one.arg for one in function.args.args + function.args.kwonlyargs if one.arg == "flush"}
    for node in _own(function):
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            yield "forget", [source.replace(node, f"{node.target.id} = {source.segment(node.value)}")]
        elif isinstance(node, ast.Call):
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                if isinstance(argument, ast.Name) and argument.id in ("flush", "handed_in"):
                    yield "not-handed-in", [source.replace(argument, "False")]
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Name):
            if node.value.id in gathered | {"flush", "spte_set", "changed"}:
                yield "not-returned", [source.replace(node.value, "False")]
        elif isinstance(node, ast.Assign) and _is_false(node.value) and _is_pending(node.targets[0]):
            block = next(one for one in blocks(function) if node in one)
            if block is not function.body:
                yield "still-pending", [source.drop(node, node, block)]


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _is_pending(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("flush", "changed", "spte_set")


# --- ranges -----------------------------------------------------------------------------------------------


def ranges(source: Source, function: ast.FunctionDef) -> Iterator[Mutation]:
    """Narrow or widen a range by one page at either end, where it is passed on."""
    for node in _own(function):
        if not isinstance(node, ast.Call) or called(node) in RANGELESS:
            continue
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            name = argument.attr if isinstance(argument, ast.Attribute) else getattr(argument, "id", "")
            text = source.segment(argument)
            if name in LOWER:
                yield "narrow-start", [source.replace(argument, f"{text} + 1")]
                yield "widen-start", [source.replace(argument, f"max({text} - 1, 0)")]
            elif name in UPPER:
                yield "narrow-end", [source.replace(argument, f"{text} - 1")]
                yield "widen-end", [source.replace(argument, f"{text} + 1")]


# --- yields -------------------------------------------------------------------------------------------------


def skip(source: Source, function: ast.FunctionDef) -> Iterator[Mutation]:
    """Skip an iteration after a yield, or do not yield where another thread waits."""
    for node in _own(function):
        if isinstance(node, ast.If) and calls(node.test) & YIELDS:
            lines = ("it.chunk.next_gfn += 1", "it.chunk.done = it.chunk.next_gfn >= it.chunk.end_gfn")
            text = "".join(" " * node.body[-1].col_offset + f"{line}\n" for line in lines)
            yield "skip-after-yield", [source.insert_before(node.body[-1], text)]
            yield "no-yield", [source.replace(node.test, "False")]


RULES: Final[tuple[Rule, ...]] = (
    drop,
    duplicate,
    move,
    split,
    swap,
    release,
    weaken,
    guard,
    thread,
    ranges,
    skip,
)
