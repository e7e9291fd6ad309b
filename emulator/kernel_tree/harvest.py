"""Takes from a tree's headers the declarations that its TDP MMU needs, and no others.

The compiler names a missing declaration; it is taken as text from the tree, and the compiler is asked
again, until it has no complaint.  Of a struct only those members are taken that the code uses, in their
order, so that the rest of the kernel is not pulled in behind them.  A patch that adds a field or a helper is
thus picked up by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from emulator.kernel_tree.compiler import Diagnostic
from emulator.kernel_tree.headers import Headers, Item, Kind

_VALUES: Final = (Kind.MACRO, Kind.ENUM, Kind.FUNCTION, Kind.VARIABLE)
# The compiler's complaints about a name, each with the kinds of declarations that answer it.
_NAMES: Final = (
    (re.compile(r"unknown type name '(\w+)'"), (Kind.TYPEDEF, Kind.MACRO)),
    (re.compile(r"'(\w+)' undeclared"), (*_VALUES, Kind.TYPEDEF)),
    (re.compile(r"implicit declaration of function '(\w+)'"), (Kind.MACRO, Kind.FUNCTION)),
    (re.compile(r"expected .* before '(\w+)'"), (Kind.MACRO, Kind.TYPEDEF)),
    (re.compile(r"type defaults to 'int' in declaration of '(\w+)'"), (Kind.MACRO,)),
    (re.compile(r"'(\w+)' used but never defined"), (Kind.FUNCTION,)),
)
_MEMBER: Final = re.compile(r"'(?:const )?(?:struct|union) (\w+)'\}? has no member named '(\w+)'")
_INCOMPLETE: Final = re.compile(r"incomplete|undefined type|isn't known|undefined .*enum|forward declaration")
_TAG: Final = re.compile(r"\b(struct|union|enum) (\w+)")
# More rounds than any tree has needed; each takes a tenth of a second.
ROUNDS: Final = 60
_HEAD: Final = "/* Taken from the headers of {top}; not part of flushlab. */\n"


class Incomplete(Exception):
    """The tree's headers lack a declaration that the compiler misses.  `missing`: the names that were looked
    for."""

    def __init__(self, said: list[Diagnostic], missing: list[str]) -> None:
        super().__init__(missing)
        self.said = said
        self.missing = missing


@dataclass(slots=True)
class Harvest:
    """The declarations taken so far: macros and others by name; structs by tag, with the members taken of
    each."""

    headers: Headers
    taken: dict[str, Item] = field(default_factory=dict)
    structs: dict[str, Item] = field(default_factory=dict)
    members: dict[str, set[int]] = field(default_factory=dict)
    rounds: int = 0

    def until_complete(self, check: Callable[[str], list[Diagnostic]]) -> None:
        """Compile and take missing declarations until none is; raise Incomplete if the tree does not have
        it."""
        errors: list[Diagnostic] = []
        for self.rounds in range(1, ROUNDS + 1):
            errors = [one for one in check(self.text()) if one.error]
            if not errors:
                return
            missing: list[str] = []
            found = [self._answer(one, missing) for one in errors]
            if not any(found):
                raise Incomplete(errors, list(dict.fromkeys(missing)))
        raise Incomplete(errors, [])

    def _answer(self, error: Diagnostic, missing: list[str]) -> bool:
        """Take a declaration that answers a complaint; return whether one was taken, and else note the
        name."""
        if match := _MEMBER.search(error.message):
            return self._take_member(match[1], match[2], missing)
        for pattern, kinds in _NAMES:
            if match := pattern.search(error.message):
                return self._take(match[1], kinds, missing)
        if not _INCOMPLETE.search(error.message):
            return False
        tags = _TAG.findall(error.message) or _TAG.findall(source_line(error))
        # A list, so that all tags are taken before one of them decides.
        taken = [self._take_tag(how, tag, missing) for how, tag in tags]
        return any(taken)

    def _take(self, name: str, kinds: tuple[Kind, ...], missing: list[str]) -> bool:
        if name in self.taken:
            return False
        item = self.headers.find(name, kinds)
        if item is None:
            missing.append(name)
            return False
        for one in item.names:
            self.taken[one] = item
        return True

    def _take_tag(self, how: str, tag: str, missing: list[str]) -> bool:
        if how == "enum":
            return self._take(tag, (Kind.ENUM,), missing)
        if tag in self.structs:
            return False
        item = self.headers.find(tag, (Kind.STRUCT,))
        if item is None:
            missing.append(f"{how} {tag}")
            return False
        self.structs[tag] = item
        # A name does not tell which member of a union is meant, so the union is taken whole.
        self.members[tag] = set(range(len(item.members))) if item.text.startswith("union") else set()
        return True

    def _take_member(self, tag: str, name: str, missing: list[str]) -> bool:
        new = self._take_tag("struct", tag, missing)
        item = self.structs.get(tag)
        if item is None:
            return False
        for at, (_, names) in enumerate(item.members):
            if name in names and at not in self.members[tag]:
                self.members[tag].add(at)
                return True
        missing.append(f"{tag}.{name}")
        return new

    def text(self) -> str:
        """Return the declarations as C source, each with the place that it was taken from."""
        chosen = {id(item): item for item in self.taken.values()}
        macros = [item for item in chosen.values() if item.kind is Kind.MACRO]
        bodies = {tag: self._struct(tag) for tag in self.structs}
        others = [item for item in chosen.values() if item.kind is not Kind.MACRO]
        mentioned = [item.text for item in others] + list(bodies.values())
        tags = sorted({(how, tag) for text in mentioned for how, tag in _TAG.findall(text) if how != "enum"})
        lines = [_HEAD.format(top=self.headers.top)]
        lines += [f"{how} {tag};" for how, tag in tags]
        lines += [f"#undef {item.names[0]}\n{_at(item)}{item.text}" for item in macros]
        lines += _Order(self.taken, self.structs, bodies).run(others)
        return "\n".join(lines) + "\n"

    def _struct(self, tag: str) -> str:
        item = self.structs[tag]
        how = item.text.split()[0]
        members = [text for at, (text, _) in enumerate(item.members) if at in self.members[tag]]
        # Two members of which only the addresses matter must not share one.
        padding = [] if how == "union" else ["unsigned long shim_not_empty;"]
        return "\n".join([f"{_at(item)}{how} {tag} {{", *members, *padding, "};"])


@dataclass(slots=True)
class _Order:
    """Puts declarations into an order in which each stands behind those that it needs."""

    taken: dict[str, Item]
    structs: dict[str, Item]
    bodies: dict[str, str]
    done: set[object] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)

    def run(self, items: list[Item]) -> list[str]:
        for item in items:
            self._item(item)
        for tag in self.bodies:
            self._struct(tag)
        return self.lines

    def _item(self, item: Item) -> None:
        if id(item) in self.done:
            return
        self.done.add(id(item))
        self._needs(item.text)
        if item.kind is not Kind.MACRO:
            self.lines.append(_at(item) + item.text)

    def _struct(self, tag: str) -> None:
        if tag in self.done:
            return
        self.done.add(tag)
        self._needs(self.bodies[tag])
        self.lines.append(self.bodies[tag])

    def _needs(self, text: str) -> None:
        for match in re.finditer(r"\b(?:(struct|union) )?(\w+)\b( \*)?", text):
            how, name, pointer = match.groups()
            if how:
                if not pointer and name in self.bodies:
                    self._struct(name)
            elif name in self.taken:
                self._item(self.taken[name])
        # A function's body needs each struct of which it names a member; a prototype needs none.
        if text.endswith("}") and "(" in text:
            for how, name in _TAG.findall(text):
                if how != "enum" and name in self.bodies:
                    self._struct(name)
            for word in set(re.findall(r"(?:->|\.) (\w+)", text)):
                for tag in [tag for tag, item in self.structs.items() if _has(item, word)]:
                    self._struct(tag)


def _has(item: Item, name: str) -> bool:
    return any(name in names for _, names in item.members)


def _at(item: Item) -> str:
    return f"/* {item.file}:{item.line} */\n"


def source_line(error: Diagnostic) -> str:
    """Return the line of source that an error is about."""
    try:
        return Path(error.file).read_text("utf-8", "replace").splitlines()[error.line - 1]
    except (OSError, IndexError):
        return ""
