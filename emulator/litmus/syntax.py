"""The syntax of litmus tests' operations: `VERB ARGUMENT ... [WORD ...]`, and errors in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from emulator.errors import closest, shown
from emulator.machine.runtime import HPAGE_PMD_NR

if TYPE_CHECKING:
    from emulator.host.memory import UserMemory
    from emulator.kvm.structs import Kvm, Vcpu
    from emulator.litmus.migration import Migration
    from emulator.litmus.model import LitmusTest, VmSection
    from emulator.machine.runtime import Cpu

Who = Literal["vcpu", "kvm"]
ArgumentKind = Literal["page", "count", "number", "pcpu", "thread", "name"]

_EXPECTED: dict[str, str] = {
    "page": "a page number such as 0x10",
    "count": "a number, at least 1",
    "number": "a whole number",
    "pcpu": "the number of a pCPU",
    "thread": "a thread's name",
    "name": "a name",
}
_MAX_PAGE = (1 << 36) - 1


class OpError(ValueError):
    """An error in an operation: the text found, and the text expected."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"found {found}; expected {expected}")
        self.found, self.expected = found, expected


@dataclass(frozen=True, slots=True)
class Arg:
    """One argument; without a default it must be given."""

    name: str
    kind: ArgumentKind
    default: int | None = None
    most: int = _MAX_PAGE

    def parse(self, text: str) -> int | str:
        if self.kind in ("thread", "name"):
            return text
        try:
            value = int(text, 0)
        except ValueError:
            raise OpError(shown(text), self._expected()) from None
        low = 1 if self.kind == "count" else 0
        if not low <= value <= self.most:
            raise OpError(shown(text), self._expected())
        return value

    def _expected(self) -> str:
        most = f", at most {self.most}," if self.most != _MAX_PAGE else ""
        return f"{_EXPECTED[self.kind]}{most} for {self.name.upper()}"


class Op:
    """One operation of a thread.  Subclasses define its syntax and the threads that may execute it."""

    verb: ClassVar[str]
    doc: ClassVar[str]
    args: ClassVar[tuple[Arg, ...]] = ()
    words: ClassVar[tuple[str, ...]] = ()
    who: ClassVar[tuple[Who, ...]] = ("kvm",)

    __slots__ = ("flags", "text", "values")

    def __init__(self, text: str, values: dict[str, int | str], flags: frozenset[str]) -> None:
        self.text = text
        self.values = values
        self.flags = flags

    def __repr__(self) -> str:
        return f"<{self.text}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Op):
            return NotImplemented
        return (type(self), self.values, self.flags) == (type(other), other.values, other.flags)

    def __hash__(self) -> int:
        return hash((type(self), self.text))

    @classmethod
    def usage(cls) -> str:
        args = [arg.name.upper() if arg.default is None else f"[{arg.name.upper()}]" for arg in cls.args]
        return " ".join([cls.verb, *args, *(f"[{word}]" for word in cls.words)])

    def number(self, name: str) -> int:
        value = self.values[name]
        assert isinstance(value, int)
        return value

    def name(self, name: str) -> str:
        value = self.values[name]
        assert isinstance(value, str)
        return value

    def run(self, context: Context) -> None:
        """Execute the operation, outside of the guest."""
        raise NotImplementedError

    def waits_for(self) -> tuple[str, int] | None:
        """Return (thread, operations that it must have completed), if this operation waits for a thread."""
        return None

    def check(self, test: LitmusTest, thread: str) -> None:
        """Check the operation within its test.  Raises OpError."""
        section = test.threads[thread]
        pages = test.vm[section.vm].gfns
        for arg in self.args:
            if arg.kind == "pcpu" and self.number(arg.name) >= test.machine.pcpus:
                expected = f"a pCPU below machine.pcpus, {test.machine.pcpus}"
                raise OpError(shown(self.number(arg.name)), expected)
        if self._physical(test, thread) and self.number("page") + self.span() > pages:
            raise OpError(shown(self.text), f"pages of VM {section.vm}, which has {pages:#x}")

    def span(self) -> int:
        """Return the number of pages, from PAGE on, that the operation concerns."""
        return self.number("count") if "count" in self.values else 1

    def _physical(self, test: LitmusTest, thread: str) -> bool:
        """Return whether PAGE is guest-physical."""
        paging = test.vm[test.threads[thread].vm].paging
        return "page" in self.values and not (paging and "vcpu" in self.who)


def check_huge(op: Op, *names: str) -> None:
    """Check that each of these pages begins 2 MiB.  Raises OpError."""
    for name in names:
        if op.number(name) % HPAGE_PMD_NR:
            raise OpError(shown(op.text), f"a multiple of {HPAGE_PMD_NR:#x} for {name.upper()}")


class Context(Protocol):
    """The thread of the test that executes an operation, on a real thread or as a task."""

    @property
    def cpu(self) -> Cpu:
        """Return the CPU that the thread is on now."""

    @property
    def kvm(self) -> Kvm: ...

    @property
    def vm(self) -> VmSection: ...

    @property
    def memory(self) -> UserMemory:
        """Return the VMM's address space behind the VM."""

    @property
    def migration(self) -> Migration:
        """Return the VMM's side of the VM's dirty log."""

    @property
    def vcpu(self) -> Vcpu:
        """Return the thread's vCPU: loaded on `cpu`, between two KVM_RUN or in one that holds no lock."""

    def migrate(self, pcpu: int) -> None:
        """Move the thread to another pCPU now."""

    def preempt(self, pcpu: int, nth: int) -> None:
        """Move the thread to another pCPU the nth time from now that KVM is preemptible before VM entry."""

    def wait_for(self, thread: str, n: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a guest program: a kind of GUEST_OP_*, a linear address, another operand."""

    kind: str
    linear: int = 0
    value: int = 0
    flags: frozenset[str] = frozenset()


class GuestOp(Op):
    """An operation that the guest executes.  `exits`: always to KVM, which goes on behind it."""

    who: ClassVar[tuple[Who, ...]] = ("vcpu",)
    exits: ClassVar[bool] = False

    def instructions(self) -> list[Instruction]:
        raise NotImplementedError


class KvmOp(Op):
    """An operation of an ioctl caller or of the host's memory management."""


class VcpuOp(Op):
    """An event of a vCPU outside of its guest, on the thread that runs it."""

    who: ClassVar[tuple[Who, ...]] = ("vcpu",)


def parse(text: str, who: Who, verbs: dict[str, type[Op]]) -> Op:
    """Return the operation in `text`."""
    words = text.split()
    if not words:
        raise OpError("an empty text", "an operation")
    kind = verbs.get(words[0])
    if kind is None:
        close = closest(words[0], verbs)
        guess = "one of those that `flushlab list litmus --ops` prints" if close is None else repr(close)
        raise OpError(f"unknown operation {shown(words[0])}", guess)
    if who not in kind.who:
        needed = "a thread with a vcpu" if who == "kvm" else "a thread without a vcpu"
        raise OpError(shown(text), f"{words[0]} in {needed}")
    rest = words[1:]
    flags = frozenset(word for word in rest if word in kind.words)
    given = [word for word in rest if word not in kind.words]
    required = sum(arg.default is None for arg in kind.args)
    if not required <= len(given) <= len(kind.args):
        raise OpError(shown(text), f"{kind.usage()!r}")
    values: dict[str, int | str] = {arg.name: arg.default for arg in kind.args if arg.default is not None}
    for arg, word in zip(kind.args, given, strict=False):
        values[arg.name] = arg.parse(word)
    return kind(text, values, flags)
