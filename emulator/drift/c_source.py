"""Finds the functions and function-like macros of C source that has not been preprocessed.

Tokens are C's, so comments and white space do not count.  Both branches of an #ifdef are read: at an #else
the nesting of braces and parentheses is again that of the #if, because each branch continues from there.
Directives inside of a function are part of it.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

# In C a line that ends with a backslash continues on the next one, even inside of a token.
_SPLICE: Final = re.compile(r"\\\r?\n")
_TOKEN: Final = re.compile(
    r"""
    (?P<blank> [^\S\n]+ | //[^\n]* | /\*[\s\S]*?(?:\*/|\Z) )
  | (?P<newline> \n )
  | (?P<literal> (?:u8|[uUL])? (?: "(?:[^"\\\n]|\\.)*"? | '(?:[^'\\\n]|\\.)*'? ) )
  | (?P<word> [^\W\d][\w$]* )
  | (?P<number> \.?\d (?: [eEpP][+-] | [\w.] )* )
  | (?P<punctuator>
      <<= | >>= | \.\.\. | -> | \+\+ | -- | << | >> | [-+*/%&|^<>=!]= | && | \|\| | \#\# | [\s\S] )
    """,
    re.VERBOSE,
)
# The end of a directive, as a token.  No token of C is empty.
END: Final = ""
_ATTRIBUTES: Final = re.compile(
    r"__attribute__|__(?:aligned|alloc_size|printf|scanf|section|no_sanitize)"
    r"|__(?:acquires|releases|must_hold|cond_acquires)(?:_shared)?"
)
_AFTER_PARAMETERS: Final = re.compile(r"__\w+|noinline\w*|notrace")
_STATEMENTS: Final = frozenset({"if", "for", "while", "switch", "return", "sizeof"})


@dataclass(frozen=True, slots=True)
class Definition:
    """A function or a function-like macro, from line `first` to line `last` of its file."""

    name: str
    first: int
    last: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    start: int
    end: int
    # Not part of a preprocessor directive.
    code: bool


def fingerprint(tokens: list[Token]) -> str:
    """Return 64 bits of a hash of the tokens' texts, as hexadecimal digits."""
    data = "\n".join([token.text for token in tokens]).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def definitions(source: str) -> Iterator[Definition]:
    """Yield the definitions of a file.

    A fingerprint covers the parameters and all that follows, up to the closing brace or to the end of the
    macro.  The name and the return type are left out, so that a renamed function can be recognized.
    """
    text, lines = joined(source)
    for name, begin, tokens in _Finder().run(text):
        first = bisect_left(lines, begin + 1) + 1
        last = bisect_left(lines, tokens[-1].start + 1) + 1
        yield Definition(name, first, last, fingerprint(tokens))


def joined(source: str) -> tuple[str, list[int]]:
    """Return the text with continued lines joined, and the offsets in it at which a new line began."""
    parts: list[str] = []
    starts: list[int] = []
    last = length = 0
    for splice in _SPLICE.finditer(source):
        parts.append(source[last : splice.start()])
        length += len(parts[-1])
        starts.append(length)
        last = splice.end()
    text = "".join([*parts, source[last:]])
    starts += [match.end() for match in re.finditer("\n", text)]
    return text, sorted(starts)


@dataclass(slots=True)
class _Finder:
    """The state of a pass over a file: nesting at the current token, and the constructs
    that are open there."""

    tokens: list[Token] = field(default_factory=list)
    braces: int = 0
    parentheses: int = 0
    # (braces, parentheses) at each #if that is open.
    conditionals: list[tuple[int, int]] = field(default_factory=list)
    # Tokens since the last complete declaration at file level, without directives.
    header: list[int] = field(default_factory=list)
    # The open function: its name, where its header begins, and its first parameter's parenthesis.
    function: tuple[str, int, int] | None = None

    def run(self, text: str) -> Iterator[tuple[str, int, list[Token]]]:
        """Yield each definition: name, offset at which it begins, tokens from the parameters on."""
        for line in token_lines(text):
            if line[0].code:
                for token in line:
                    yield from self._code(token)
            else:
                self.tokens += line
                self._directive(line)
                if line[1].text == "define" and line[2].text.endswith("("):
                    yield line[2].text[:-1], line[0].start, line[3:]

    def _directive(self, line: list[Token]) -> None:
        word = line[1].text
        if word in ("if", "ifdef", "ifndef"):
            self.conditionals.append((self.braces, self.parentheses))
        elif self.conditionals and word in ("else", "elif", "elifdef", "elifndef"):
            self.braces, self.parentheses = self.conditionals[-1]
        elif self.conditionals and word == "endif":
            self.conditionals.pop()

    def _code(self, token: Token) -> Iterator[tuple[str, int, list[Token]]]:
        self.tokens.append(token)
        text = token.text
        if text == "{":
            if self.braces == 0:
                self.function = self._opened()
            self.braces += 1
        elif text == "}":
            self.braces = max(0, self.braces - 1)
            if self.braces == 0 and self.parentheses == 0:
                if self.function is not None:
                    name, begin, first = self.function
                    yield name, begin, self.tokens[first:]
                self._declared()
        elif self.braces == 0:
            self._at_file_level(text)

    def _at_file_level(self, text: str) -> None:
        self.header.append(len(self.tokens) - 1)
        if text == "(":
            self.parentheses += 1
        elif text == ")":
            self.parentheses = max(0, self.parentheses - 1)
        elif text == ";" and self.parentheses == 0:
            self._declared()

    def _declared(self) -> None:
        self.function = None
        self.header.clear()

    def _opened(self) -> tuple[str, int, int] | None:
        """Return the function that a brace after this header opens; None if it opens something else."""
        words = [self.tokens[index].text for index in self.header]
        name = function_name(words)
        if name is None:
            return None
        # Under #ifdef there may be several headers before the body.
        word = name.partition("(")[0]
        first = next(at for at in range(len(words)) if words[at : at + 2] == [word, "("])
        return name, self.tokens[self.header[0]].start, self.header[first + 1]


def function_name(words: list[str]) -> str | None:
    """Return the name of the function that begins with these tokens: the word before the last parentheses,
    attributes aside.  FNAME(page_fault) is a name, too."""
    at = len(words) - 1
    while at > 0:
        if words[at] == ")":
            at = _matching(words, at) - 1
            word = words[at] if at >= 0 else ""
            if word == ")":
                inner = _matching(words, at)
                return "".join(words[inner - 1 : at + 1]) if inner > 0 else None
            if word.isidentifier() and not _ATTRIBUTES.fullmatch(word):
                return None if word in _STATEMENTS else word
        elif not _AFTER_PARAMETERS.fullmatch(words[at]):
            return None
        at -= 1
    return None


def _matching(words: list[str], at: int) -> int:
    """Return the index of the parenthesis that the one at `at` closes, or -1."""
    depth = 0
    while at >= 0:
        depth += (words[at] == ")") - (words[at] == "(")
        if depth == 0:
            break
        at -= 1
    return at


def token_lines(text: str) -> Iterator[list[Token]]:
    """Yield the tokens, in one list a line.  A directive is a list that begins with "#"."""
    line: list[Token] = []
    code = True
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup
        if kind == "blank":
            continue
        if kind == "newline":
            if line:
                yield line if code else _directive(line, match.start())
                line, code = [], True
            continue
        if not line:
            code = match.group() != "#"
        line.append(Token(match.group(), match.start(), match.end(), code))
    if line:
        yield line if code else _directive(line, len(text))


def _directive(line: list[Token], end: int) -> list[Token]:
    """Return the tokens of a directive, and one for its end.

    In a #define white space before a parenthesis matters, so a name and the parenthesis that follows it at
    once become one token.
    """
    if len(line) > 3 and line[1].text == "define" and line[3].text == "(" and line[2].end == line[3].start:
        line[2:4] = [Token(line[2].text + "(", line[2].start, line[3].end, False)]
    return [*line, Token(END, end, end, False)]
