"""Finds declarations in the headers of a Linux tree, by name, without preprocessing them.

A header is read as a list of items: macros, and declarations at file level.  The text has both branches of an
#if; the one that a 64-bit x86 kernel with KVM compiles is taken.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Final

from emulator.drift.c_source import END, Token, function_name, joined, token_lines

# Where declarations are looked for, in this order; the first directory of KVM's own has mmu.h and x86.h.
_PLACES: Final = (
    ("arch/x86/kvm", "*.h"),
    ("arch/x86/kvm/mmu", "*.h"),
    ("arch/x86/include/asm", "kvm*.h"),
    ("include/linux", "kvm*.h"),
    ("arch/x86/include/asm", "*.h"),
    ("arch/x86/include/uapi/asm", "*.h"),
    ("include/linux", "*.h"),
    ("include/uapi/linux", "*.h"),
    ("include/uapi/asm-generic", "*.h"),
    ("include/vdso", "*.h"),
    ("include/asm-generic", "*.h"),
    ("include/linux/atomic", "*.h"),
    ("include/linux/sched", "*.h"),
)
# The configuration: the symbols of these names are set, all others are not.
_SET: Final = frozenset(
    f"CONFIG_{name}"
    for name in [
        "X86_64",
        "64BIT",
        "X86",
        "SMP",
        "MMU",
        "KVM",
        "KVM_X86",
        "KVM_INTEL",
        "KVM_MMIO",
        "KVM_GENERIC_MMU_NOTIFIER",
        "HAVE_KVM",
        "KVM_SMM",
        "MMU_NOTIFIER",
        "SPARSEMEM_VMEMMAP",
    ]
) | {"__KERNEL__", "KVM_HAVE_MMU_RWLOCK", "KVM_ARCH_WANT_MMU_NOTIFIER", "KVM_ARCH_NR_OBJS_PER_MEMORY_CACHE"}
# Macros that conditions compare: regular memory and SMM's.
_NUMBERS: Final = {"KVM_MAX_NR_ADDRESS_SPACES": 2, "KVM_ADDRESS_SPACE_NUM": 2, "CONFIG_PGTABLE_LEVELS": 5}
_CONDITION: Final = re.compile(r"defined\s*\(\s*(\w+)\s*\)|defined\s+(\w+)|IS_\w+\s*\(\s*(\w+)\s*\)|(\w+)")


class Kind(StrEnum):
    MACRO = "macro"
    TYPEDEF = "typedef"
    # A struct or union with a body.
    STRUCT = "struct"
    ENUM = "enum"
    FUNCTION = "function"
    VARIABLE = "variable"


@dataclass(frozen=True, slots=True)
class Item:
    """A declaration.  `names` are those that it declares: an enum's tag and its enumerators, for example."""

    kind: Kind
    names: tuple[str, ...]
    text: str
    file: str
    line: int
    # The words in it, for the order of declarations.
    words: frozenset[str]
    # Of a struct or union: its members in order, each as text with the names that it declares.
    members: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def has_body(self) -> bool:
        return self.kind is Kind.FUNCTION and self.text.endswith("}")


@dataclass(slots=True)
class Headers:
    """The headers of a tree; each is read when a name is first looked for in it.

    `skip`: headers that are compiled as they are.
    """

    top: Path
    skip: frozenset[str]
    _texts: list[tuple[str, str]] = field(default_factory=list)
    _items: dict[str, dict[str, list[Item]]] = field(default_factory=dict)

    def find(self, name: str, kinds: tuple[Kind, ...]) -> Item | None:
        """Return the first declaration of `name` of one of these kinds."""
        word = re.compile(rf"\b{re.escape(name)}\b")
        for file, text in self._all():
            # A search in the text is much quicker than parsing.
            if name in text and word.search(text):
                for item in self._parsed(file, text).get(name, ()):
                    if item.kind in kinds:
                        return item
        return None

    def files(self) -> Iterator[Path]:
        """Yield the headers in the order in which they are searched.  Those of 32-bit kernels are left
        out."""
        seen = set(self.skip)
        for directory, names in _PLACES:
            for path in sorted((self.top / directory).glob(names)):
                file = path.relative_to(self.top).as_posix()
                if file not in seen and not file.endswith("_32.h") and path.is_file():
                    seen.add(file)
                    yield path

    def _all(self) -> list[tuple[str, str]]:
        if not self._texts:
            for path in self.files():
                text = path.read_bytes().decode("utf-8", "replace")
                self._texts.append((path.relative_to(self.top).as_posix(), text))
        return self._texts

    def _parsed(self, file: str, text: str) -> dict[str, list[Item]]:
        if file not in self._items:
            by_name: dict[str, list[Item]] = {}
            for item in items(text, file):
                for name in item.names:
                    by_name.setdefault(name, []).append(item)
            self._items[file] = by_name
        return self._items[file]


def items(source: str, file: str = "") -> Iterator[Item]:
    """Yield the items of a header in their order."""
    text, starts = joined(source)
    return _Reader(text, starts, file).run()


@dataclass(slots=True)
class _Reader:
    """The state of a pass over a header."""

    text: str
    starts: list[int]
    file: str
    # For each open #if: whether its branch is compiled, and whether an earlier one was.
    conditions: list[tuple[bool, bool]] = field(default_factory=list)
    current: list[Token] = field(default_factory=list)
    braces: int = 0
    parentheses: int = 0
    function: bool = False

    def run(self) -> Iterator[Item]:
        for line in token_lines(self.text):
            if not line[0].code:
                yield from self._directive(line)
            elif all(taken for taken, _ in self.conditions):
                for token in line:
                    yield from self._code(token)

    def _directive(self, line: list[Token]) -> Iterator[Item]:
        word, rest = line[1].text, " ".join(token.text for token in line[2:] if token.text != END)
        if word in ("if", "ifdef", "ifndef"):
            met = holds(rest if word == "if" else f"defined({rest})") != (word == "ifndef")
            # The guard of the header itself.
            guard = word == "ifndef" and not self.conditions and not rest.startswith("CONFIG_")
            self.conditions.append((met or guard, met or guard))
        elif word in ("elif", "else") and self.conditions:
            _, earlier = self.conditions.pop()
            met = not earlier and (word == "else" or holds(rest))
            self.conditions.append((met, earlier or met))
        elif word == "endif" and self.conditions:
            self.conditions.pop()
        elif word == "define" and all(taken for taken, _ in self.conditions):
            yield self._item(Kind.MACRO, (line[2].text.rstrip("("),), line[0].start, line[-1].start, line)

    def _code(self, token: Token) -> Iterator[Item]:
        self.current.append(token)
        text = token.text
        if text == "{":
            if self.braces == 0:
                self.function = function_name([one.text for one in self.current[:-1]]) is not None
            self.braces += 1
        elif text == "}":
            self.braces = max(0, self.braces - 1)
            if self.braces == 0 and self.function:
                yield from self._declared()
        elif text in "()":
            self.parentheses = max(0, self.parentheses + (1 if text == "(" else -1))
        elif text == ";" and self.braces == 0 and self.parentheses == 0:
            yield from self._declared()

    def _declared(self) -> Iterator[Item]:
        tokens, self.current = self.current, []
        function, self.function = self.function, False
        self.parentheses = 0
        found = classify([token.text for token in tokens], function)
        if found is not None:
            kind, names = found
            text = _laid_out(self.text, tokens)
            members = tuple(_members(tokens, self.text)) if kind is Kind.STRUCT else ()
            yield Item(kind, names, text, self.file, self._line(tokens[0].start), _words(tokens), members)

    def _item(self, kind: Kind, names: tuple[str, ...], start: int, end: int, tokens: list[Token]) -> Item:
        text = self.text[start:end].strip()
        return Item(kind, names, text, self.file, self._line(start), _words(tokens))

    def _line(self, offset: int) -> int:
        return bisect_right(self.starts, offset) + 1


def holds(condition: str) -> bool:
    """Return whether the condition of an #if holds in the configuration; False if it is more than a test of
    symbols."""

    def value(match: re.Match[str]) -> str:
        symbol = match[1] or match[2] or match[3] or match[4]
        if symbol.isdigit() and match[4]:
            return str(int(symbol))
        return str(_NUMBERS.get(symbol, int(symbol in _SET)))

    text = _CONDITION.sub(value, condition)
    if not re.fullmatch(r"[\s\d()<>=!&|]*", text):
        return False
    text = text.replace("&&", " and ").replace("||", " or ").replace("!=", "<>").replace("!", " not ")
    text = text.replace("<>", "!=")
    try:
        # Numbers, comparisons and parentheses alone, by the test above; no call, because no number is
        # followed by a parenthesis.
        return not re.search(r"\d\s*\(", text) and bool(eval(text.strip(), {"__builtins__": {}}))
    except SyntaxError:
        return False


def classify(words: list[str], function: bool) -> tuple[Kind, tuple[str, ...]] | None:
    """Return the kind and the names of a declaration at file level; None if it declares nothing."""
    if function:
        name = function_name(words[: words.index("{")])
        return (Kind.FUNCTION, (name,)) if name else None
    if words[0] == "typedef":
        name = _declared_name(words[1:-1])
        return (Kind.TYPEDEF, (name,)) if name else None
    head = words[0]
    if head in ("struct", "union", "enum") and "{" in words:
        opening = words.index("{")
        tag = words[1] if opening >= 2 and words[1].isidentifier() else ""
        names = [tag] if tag else []
        if head == "enum":
            return Kind.ENUM, (*names, *_enumerators(words[opening:]))
        return (Kind.STRUCT, tuple(names)) if names else None
    if "(" in words and "=" not in words:
        name = function_name(words[:-1])
        return (Kind.FUNCTION, (name,)) if name else None
    if "extern" in words or "static" in words or "const" in words:
        name = _declared_name(words[: words.index("=")] if "=" in words else words[:-1])
        return (Kind.VARIABLE, (name,)) if name else None
    return None


def _enumerators(words: list[str]) -> list[str]:
    """Return the names in the braces that open `words`."""
    names, depth, fresh = [], 0, True
    for word in words:
        if word in "{(":
            depth += 1
        elif word in "})":
            depth -= 1
            if depth == 0:
                break
        elif depth == 1 and word == ",":
            fresh = True
        elif depth == 1 and fresh and word.isidentifier():
            names.append(word)
            fresh = False
    return names


def _declared_name(words: list[str]) -> str | None:
    """Return the name that a declarator declares: `name`, `name[3]`, `name : 4`, `(*name)(int)`."""
    depth, name = 0, None
    for at, word in enumerate(words):
        if word in ("{", "["):
            depth += 1
        elif word in ("}", "]"):
            depth -= 1
        elif depth == 0 and word == "(" and words[at + 1 : at + 2] == ["*"]:
            inner = [one for one in words[at + 2 :] if one.isidentifier()]
            return inner[0] if inner else None
        elif depth == 0 and word in (":", "=", "__attribute__", "__aligned", "____cacheline_aligned_in_smp"):
            break
        elif depth == 0 and word == "(":
            # DECLARE_BITMAP(name, bits), DECLARE_STATIC_KEY_FALSE(name)
            inner = [one for one in words[at + 1 :] if one.isidentifier()]
            return inner[0] if inner else name
        elif depth == 0 and word.isidentifier() and not word.startswith("__"):
            name = word
    return name


def _members(tokens: list[Token], text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each member of a struct with the names that it declares; an unnamed struct or union declares
    those of its own members."""
    opening = next(at for at, token in enumerate(tokens) if token.text == "{")
    depth, first = 0, opening + 1
    for at in range(opening + 1, len(tokens)):
        word = tokens[at].text
        depth += (word in "{([") - (word in "})]") if word else 0
        if depth < 0:
            return
        if word == ";" and depth == 0:
            member = tokens[first : at + 1]
            yield _laid_out(text, member), tuple(_member_names([token.text for token in member]))
            first = at + 1


def _member_names(words: list[str]) -> Iterator[str]:
    if "{" in words:
        closing = len(words) - 1 - words[::-1].index("}")
        if closing == len(words) - 2 or not any(word.isidentifier() for word in words[closing + 1 :]):
            depth, first = 0, words.index("{") + 1
            for at in range(first, closing):
                depth += (words[at] in "{([") - (words[at] in "})]")
                if words[at] == ";" and depth == 0:
                    yield from _member_names(words[first : at + 1])
                    first = at + 1
            return
        words = words[closing + 1 :]
    # `int a, *b;` declares both.
    depth, part = 0, list[str]()
    for word in words[:-1]:
        depth += (word in "{([") - (word in "})]")
        if word == "," and depth == 0:
            if name := _declared_name(part):
                yield name
            part = []
        else:
            part.append(word)
    if name := _declared_name(part):
        yield name


def _words(tokens: list[Token]) -> frozenset[str]:
    return frozenset(token.text for token in tokens if token.text.isidentifier())


def _laid_out(text: str, tokens: list[Token]) -> str:
    """Return the tokens as text, on as many lines as in the header: directives and comments are not in it."""
    parts = [tokens[0].text]
    for before, token in pairwise(tokens):
        parts.append("\n" if "\n" in text[before.end : token.start] else " ")
        parts.append(token.text)
    return "".join(parts)
