"""Read the descriptions of the calls, of which each stands beside the prototype of its function.

A description is the comment right above a prototype, after the prose if there is any:

    /* call: step mode; reads mode(vcpu); writes mode(vcpu) if result == IN_GUEST_MODE; keeps-gil */

Prototypes without a comment between them share it.  `/* calls: ... */` right behind `/* api */` describes
each call of that part that has no description of its own.  An unknown word or name is an error of the build.

The first clause classifies the call for a controlled scheduler:

    step KIND       The call is a step; its label is KIND, the kind of the point that announces it.
    part            It belongs to the step that is under way.
    modelled        The scheduler has a function of its own in its place, with the call's steps.
    local           It uses only its arguments, or memory that the point right before it names.
    aside           It uses state on which no later step depends: statistics, reports, what is set up before.
    anything        It may touch everything: it is for code that no such scheduler runs.

Further clauses:

    reads OBJECT, ... [if CONDITION]
    writes OBJECT, ... [if CONDITION]
                    State that threads share.  With a condition, and for what is in a structure or in the
                    result, it is known only after the call.
    at KIND         Points of this kind announce the call, in addition to the step's own.
    fence           A plain store does not stay in the store buffer during the call.
    quiet           It needs no point: it comes right behind a call with one, or is not KVM's.
    keeps-gil       Python keeps the GIL: the call accesses a few words, never waits, and never needs the
                    GIL's owner to make progress.  cffi releases the GIL otherwise, which costs more than
                    such a call: if other threads wait, each release wakes one of them in vain, and the
                    caller may lose the GIL for a switch interval.  A VM exit makes some twenty such calls.

    OBJECT          a word, for some of them with operands: ept, mode(vcpu), table(removal->page)
    CONDITION       TEST and TEST ..., TEST being OPERAND, not OPERAND or OPERAND RELATION VALUE, with one of
                    == != < <= > >= and a number or a member of an enum
    OPERAND         an argument's name, a field of a structure (chunk->changed), or `result`

KINDs and OBJECTs are words here and no more: the core knows no scheduler.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from native.headers import HERE, api_parts, declarations, public_headers, statements

RESULT: Final = -1
ROLES: Final = ("step", "part", "modelled", "local", "aside", "anything")
FLAGS: Final = ("fence", "quiet", "keeps-gil")
_OWN: Final = re.compile(r"/\* call: (.*?) \*/", re.DOTALL)
_DEFAULT: Final = re.compile(r"\s*/\* calls: (.*?) \*/", re.DOTALL)
_TEST: Final = re.compile(
    r"(?P<no>not )?(?P<operand>[\w>-]+?)(?: (?P<relation>[=!<>]=|[<>]) (?P<value>-?\w+))?"
)
_POINTER: Final = re.compile(r"\bstruct (\w+) \*(\w+)")
_OBJECT: Final = re.compile(r"(?P<word>\w+)(?:\((?P<operands>[^()]*)\))?")


class Operand(NamedTuple):
    """An argument by its number, or RESULT; `field` of the structure that it points to."""

    argument: int
    field: str = ""


class Object(NamedTuple):
    word: str
    operands: tuple[Operand, ...] = ()


class Comparison(NamedTuple):
    """`relation`: `bool` and `not` take no value."""

    operand: Operand
    relation: str = "bool"
    value: int | str = 0


class Access(NamedTuple):
    objects: tuple[Object, ...]
    condition: tuple[Comparison, ...] = ()


class Call(NamedTuple):
    role: str
    kind: str = ""
    reads: tuple[Access, ...] = ()
    writes: tuple[Access, ...] = ()
    points: tuple[str, ...] = ()
    fence: bool = False
    quiet: bool = False
    keeps_gil: bool = False


class Malformed(Exception):
    """A description that cannot be read; the message says where."""


class Described(NamedTuple):
    """The arguments of a call, separated by blanks, and the text of its description."""

    arguments: str
    text: str


class _Names(NamedTuple):
    """Names that descriptions may refer to: the members of enums, and the fields of structures."""

    members: frozenset[str]
    fields: Mapping[str, frozenset[str]]


def _names(text: str) -> _Names:
    code = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    enums = re.findall(r"\benum\s+\w*\s*\{(.*?)\}", code, re.DOTALL)
    structures = re.findall(r"^struct (\w+) \{(.*?)^\}", code, re.DOTALL | re.MULTILINE)
    return _Names(
        frozenset(name for body in enums for name in re.findall(r"\b[A-Z]\w+", body)),
        {name: frozenset(re.findall(r"(\w+)(?:\[\w+\])?\s*[;,]", body)) for name, body in structures},
    )


class _Reader:
    """Reads the description of one call.  With names, it checks each name that is not an argument's."""

    def __init__(
        self,
        arguments: tuple[str, ...],
        names: _Names | None = None,
        structures: Mapping[str, str] | None = None,
    ) -> None:
        self._arguments = arguments
        self._names = names
        self._structures = structures or {}

    def call(self, text: str) -> Call:
        first, *rest = (clause.strip() for clause in text.split(";"))
        role, _, kind = first.partition(" ")
        if role not in ROLES or bool(kind) != (role == "step") or not re.fullmatch(r"[\w>-]*", kind):
            raise Malformed(f"found {first!r}, expected step KIND or one of {', '.join(ROLES[1:])}")
        call = Call(role, kind)
        for clause in rest:
            call = self._with(call, clause)
        if (call.reads or call.writes) and role not in ("step", "part"):
            raise Malformed(f"{role!r} with reads or writes; expected step or part")
        return call

    def _with(self, call: Call, clause: str) -> Call:
        word, _, tail = clause.partition(" ")
        if clause == "fence":
            return call._replace(fence=True)
        if clause == "quiet":
            return call._replace(quiet=True)
        if clause == "keeps-gil":
            return call._replace(keeps_gil=True)
        if word == "reads":
            return call._replace(reads=(*call.reads, self._access(tail)))
        if word == "writes":
            return call._replace(writes=(*call.writes, self._access(tail)))
        if word == "at" and re.fullmatch(r"[\w>-]+", tail):
            return call._replace(points=(*call.points, tail))
        raise Malformed(f"found {clause!r}, expected reads, writes, at KIND, or one of {', '.join(FLAGS)}")

    def _access(self, text: str) -> Access:
        objects, condition, tests = text.partition(" if ")
        words = re.split(r",\s*(?![^()]*\))", objects)
        return Access(
            tuple(self._object(word) for word in words),
            tuple(self._test(test) for test in tests.split(" and ")) if condition else (),
        )

    def _object(self, text: str) -> Object:
        match = _OBJECT.fullmatch(text.strip())
        if match is None:
            raise Malformed(f"found {text!r}, expected an object: ept, mode(vcpu)")
        operands = match["operands"]
        listed = [] if operands is None else operands.split(",")
        return Object(match["word"], tuple(self._operand(operand.strip()) for operand in listed))

    def _test(self, text: str) -> Comparison:
        match = _TEST.fullmatch(text.strip())
        if match is None or (match["no"] and match["relation"]):
            raise Malformed(f"found {text!r}, expected a test: OPERAND, not OPERAND, OPERAND == VALUE")
        operand = self._operand(match["operand"])
        if not match["relation"]:
            return Comparison(operand, "not" if match["no"] else "bool")
        value = match["value"]
        if re.fullmatch(r"-?\d+", value):
            return Comparison(operand, match["relation"], int(value))
        if self._names is not None and value not in self._names.members:
            raise Malformed(f"{value} is no member of an enum that Python sees")
        return Comparison(operand, match["relation"], value)

    def _operand(self, text: str) -> Operand:
        name, arrow, field = text.partition("->")
        if name == "result" and not arrow:
            return Operand(RESULT)
        if name not in self._arguments:
            raise Malformed(f"found {name!r}, expected an argument: {', '.join(self._arguments)}")
        if arrow and self._names is not None:
            structure = self._structures.get(name, "")
            if field not in self._names.fields.get(structure, frozenset()):
                raise Malformed(f"{text}: {name} points to no structure with such a field that Python sees")
        return Operand(self._arguments.index(name), field)


def described(part: str, first_line: int, place: str, names: _Names) -> Iterator[tuple[str, Described]]:
    """Yield the calls of an api part of a header.  Raises Malformed, also where a description is missing."""
    default = _DEFAULT.match(part)
    last = ""
    for statement in statements(part):
        # Without a comment, a prototype right below another one shares its description.
        function = statement.function()
        if function is None or "/*" in statement.before or "\n\n" in statement.before:
            last = default[1] if default else ""
        if function is None:
            continue
        name, arguments = function
        own = _OWN.findall(statement.before)
        where = f"{place}:{first_line + statement.line - 1}: {name}()"
        if len(own) > 1:
            raise Malformed(f"{where}: {len(own)} descriptions, expected one")
        last = own[0] if own else last
        if not last:
            raise Malformed(f"{where}: no description, expected /* call: ... */ (native/description.py)")
        line = re.sub(r"\s*\n\s*\*\s*", " ", last)
        structures = {argument: kind for kind, argument in _POINTER.findall(statement.text)}
        try:
            _Reader(arguments, names, structures).call(line)
        except Malformed as error:
            raise Malformed(f"{where}: {error}") from None
        yield name, Described(" ".join(arguments), line)


def described_calls(headers: Iterable[Path] | None = None) -> dict[str, Described]:
    """Return the description of each call that Python sees, header by header.  Raises Malformed."""
    names = _names(declarations())
    found: dict[str, Described] = {}
    for header in public_headers() if headers is None else headers:
        place = str(header.relative_to(HERE.parent) if header.is_relative_to(HERE) else header.name)
        for part, line in api_parts(header):
            found.update(described(part, line, place, names))
    return found


def read(one: Described) -> Call:
    """Return the description of a call, after its header has been checked."""
    return _Reader(tuple(one.arguments.split())).call(one.text)


# --- the table for Python -----------------------------------------------------------------------------------

TABLE: Final = HERE / "_calls.py"

_HEAD: Final = '''\
"""The descriptions of all calls, as the headers have them (native/description.py)."""

# Generated by native/description.py: run 'python -m native.build' after changing a header.
from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from native.description import Described

CALLS: Final[Mapping[str, Described]] = {
'''


def text() -> str:
    """Return the table of the headers as they are."""
    calls = described_calls().items()
    lines = (f'    "{name}": Described("{one.arguments}", "{one.text}"),\n' for name, one in calls)
    return f"{_HEAD}{''.join(lines)}}}\n"


def update(path: Path = TABLE) -> bool:
    """Write the table unless it is current; return whether it was written."""
    table = text()
    if path.exists() and path.read_text() == table:
        return False
    path.write_text(table)
    return True
