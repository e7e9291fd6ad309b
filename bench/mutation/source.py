"""Edits of a source that keep its formatting: lines or columns replaced, all else as it was."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from bench.mutation.names import ACCOUNTS


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace the text between two positions (line from 1, column in characters)."""

    start: tuple[int, int]
    end: tuple[int, int]
    text: str


class Source:
    """The text of one module, its lines, and its tree."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = text.splitlines(keepends=True)
        self._starts = [0]
        for line in self.lines:
            self._starts.append(self._starts[-1] + len(line))
        self.tree = ast.parse(text)
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def segment(self, node: ast.expr | ast.stmt) -> str:
        found = ast.get_source_segment(self.text, node)
        assert found is not None
        return found

    def statement_lines(self, first: ast.stmt, last: ast.stmt | None = None) -> str:
        """Return the whole lines of a statement, or of `first` to `last`."""
        assert (last or first).end_lineno is not None
        return "".join(self.lines[first.lineno - 1 : (last or first).end_lineno])

    def position(self, line: int, offset: int) -> tuple[int, int]:
        """Return a position in characters; the tree has offsets in bytes."""
        return line, len(self.lines[line - 1].encode()[:offset].decode())

    def replace(self, node: ast.expr | ast.stmt, text: str) -> Edit:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self.position(node.lineno, node.col_offset)
        return Edit(start, self.position(node.end_lineno, node.end_col_offset), text)

    def replace_lines(self, first: ast.stmt, last: ast.stmt, text: str) -> Edit:
        assert last.end_lineno is not None
        return Edit((first.lineno, 0), (last.end_lineno + 1, 0), text)

    def drop(self, first: ast.stmt, last: ast.stmt, block: list[ast.stmt]) -> Edit:
        """Drop statements of a block; `pass` remains if they are all that it has."""
        empty = block[0] is first and block[-1] is last
        return self.replace_lines(first, last, " " * first.col_offset + "pass\n" if empty else "")

    def insert_before(self, node: ast.stmt, text: str) -> Edit:
        return Edit((node.lineno, 0), (node.lineno, 0), text)

    def insert_after(self, node: ast.stmt, text: str) -> Edit:
        assert node.end_lineno is not None
        return Edit((node.end_lineno + 1, 0), (node.end_lineno + 1, 0), text)

    def between(self, start: tuple[int, int], end: tuple[int, int]) -> str:
        return self.text[self._at(start) : self._at(end)]

    def apply(self, edits: list[Edit]) -> str:
        """Return the text with the edits, which do not overlap."""
        text = self.text
        for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
            text = text[: self._at(edit.start)] + edit.text + text[self._at(edit.end) :]
        return text

    def _at(self, position: tuple[int, int]) -> int:
        return self._starts[position[0] - 1] + position[1]


def indented(text: str, by: int) -> str:
    """Shift whole lines by some columns."""
    if by >= 0:
        return "".join(" " * by + line if line.strip() else line for line in text.splitlines(keepends=True))
    return "".join(line[-by:] if line.strip() else line for line in text.splitlines(keepends=True))


# --- questions about nodes --------------------------------------------------------------------------------


def called(node: ast.AST) -> str:
    """Return the last part of the called function's name, "" if `node` is no call."""
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def calls(node: ast.AST) -> set[str]:
    """Return the names of all functions that are called in a statement or an expression."""
    return {called(one) for one in ast.walk(node)} - {""}


def only_accounts(statement: ast.stmt) -> bool:
    """Return whether a statement only accounts, announces or promises."""
    return isinstance(statement, ast.Expr | ast.Assign) and called(statement.value) in ACCOUNTS


def mentions(node: ast.AST, name: str) -> bool:
    """Return whether a field of this name is read or written."""
    return any(isinstance(one, ast.Attribute) and one.attr == name for one in ast.walk(node))


def stored(node: ast.AST) -> set[str]:
    """Return the local names that a statement binds."""
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}


def loaded(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)}


def depends(one: ast.AST, other: ast.AST) -> bool:
    """Return whether the order of two statements matters to local names."""
    return bool(
        stored(one) & (loaded(other) | stored(other)) or stored(other) & loaded(one)
    )  # names that both only read do not matter


def leaves(statement: ast.AST) -> bool:
    """Return whether a statement may leave its block: return, continue, break, raise, yield."""
    if isinstance(statement, ast.Return | ast.Continue | ast.Break | ast.Raise | ast.Yield | ast.YieldFrom):
        return True
    inner = [one for one in ast.iter_child_nodes(statement) if leaves(one)]
    if isinstance(statement, ast.For | ast.While):
        # A break or continue stays within the loop.
        return any(
            isinstance(one, ast.Return | ast.Raise | ast.Yield | ast.YieldFrom)
            for child in inner
            for one in ast.walk(child)
        )
    return bool(inner)
