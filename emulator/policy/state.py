"""State of a policy that acts: words that all CPUs share, of a root, a vCPU or a VM.

    class Mine(Policy):
        flushed = per_root(Bitmap)          # a bit for each pCPU

        def migration(self, cpu, vcpu):
            ...self.flushed(root).test_and_set_bit(cpu, cpu.id)...

A declaration is called with its object.  KVM keeps the state with the object (`policy_data`): a root's state
is made with the root and ends with it.  Every operation takes the acting CPU first, is one step of the native
core and an ordering point (`policy_state`), so that `litmus` lingers there and `explore` knows its object.

Memory ordering is the kernel's, by operation or by `order`:

    relaxed     READ_ONCE(), WRITE_ONCE(): a store may become visible after later loads of its CPU
    acquire     smp_load_acquire(): no later access comes before the load
    release     smp_store_release(): the store comes after all earlier accesses of its CPU
    full        smp_store_mb(), or a locked instruction: nothing passes it

With `explore --store-buffers` (x86-TSO) relaxed and release stores wait in their CPU's store buffer, as such
stores of the kernel do; locked instructions and `full` wait for it.  Real threads run with stronger order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from emulator.machine.runtime import Cpu, Mode, smp_mb
from native import ffi, lib

Scope = Literal["vm", "vcpu", "root"]
LoadOrder = Literal["relaxed", "acquire"]
StoreOrder = Literal["relaxed", "release", "full"]

_LOADS: Final = ("relaxed", "acquire")
_STORES: Final = ("relaxed", "release", "full")


class State:
    """One piece of state.  name: as declared; owner: the object that it belongs to, for ordering points."""

    __slots__ = ("name", "owner", "pcpus", "words")

    def __init__(self, name: str, owner: str, pcpus: int, length: int) -> None:
        self.name, self.owner, self.pcpus = name, owner, pcpus
        self.words = ffi.new("uint64_t[]", length)

    def __repr__(self) -> str:
        return f"<{self.name} of {self.owner}>"

    def _point(self, cpu: Cpu, mode: Mode, index: int | None = None) -> None:
        cpu.point("policy_state", (self.name, self.owner, index), mode)

    def _pcpu(self, pcpu: int) -> int:
        if not 0 <= pcpu < self.pcpus:
            raise IndexError(f"{self!r} has no pCPU {pcpu}: the host has pCPUs 0 to {self.pcpus - 1}")
        return pcpu

    def _word(self, index: int) -> Any:
        words: Any = self.words
        return words + index

    def _load(self, cpu: Cpu, index: int, order: str, name: int | None = None) -> int:
        if order not in _LOADS:
            raise ValueError(f"a load has no order {order!r}: {' or '.join(_LOADS)}")
        self._point(cpu, "read", name)
        return int(lib.atomic64_read(self._word(index)))

    def _store(self, cpu: Cpu, index: int, value: int, order: str, name: int | None = None) -> None:
        if order not in _STORES:
            raise ValueError(f"a store has no order {order!r}: {', '.join(_STORES)}")
        self._point(cpu, "write", name)
        lib.atomic64_set(self._word(index), value)
        if order == "full":
            smp_mb(cpu)


class Bitmap(State):
    """A mask with a bit for each pCPU, as the kernel's cpumask."""

    __slots__ = ("length",)

    def __init__(self, name: str, owner: str, pcpus: int) -> None:
        self.length = (pcpus + 63) // 64
        super().__init__(name, owner, pcpus, self.length)

    def test_bit(self, cpu: Cpu, pcpu: int) -> bool:
        """Load the bit: relaxed."""
        self._point(cpu, "read")
        return bool(lib.test_bit(self.words, self._pcpu(pcpu)))

    def set_bit(self, cpu: Cpu, pcpu: int) -> None:
        """Set the bit by a locked instruction."""
        self._point(cpu, "write")
        lib.set_bit(self.words, self._pcpu(pcpu))

    def clear_bit(self, cpu: Cpu, pcpu: int) -> None:
        """Clear the bit by a locked instruction."""
        self._point(cpu, "write")
        lib.clear_bit(self.words, self._pcpu(pcpu))

    def test_and_set_bit(self, cpu: Cpu, pcpu: int) -> bool:
        """Set the bit and return its old value: full."""
        self._point(cpu, "write")
        return bool(lib.test_and_set_bit(self.words, self._pcpu(pcpu)))

    def test_and_clear_bit(self, cpu: Cpu, pcpu: int) -> bool:
        """Clear the bit and return its old value: full."""
        self._point(cpu, "write")
        return bool(lib.test_and_clear_bit(self.words, self._pcpu(pcpu)))

    def clear(self, cpu: Cpu) -> None:
        """Clear all bits by plain stores: relaxed, as cpumask_clear()."""
        self._point(cpu, "write")
        lib.bitmap_clear(self.words, self.length)

    def pcpus_set(self, cpu: Cpu) -> list[int]:
        """Load the whole mask; return the pCPUs with a bit that is set: relaxed."""
        self._point(cpu, "read")
        return [pcpu for pcpu in range(self.pcpus) if lib.test_bit(self.words, pcpu)]


class Generation(State):
    """A 64-bit counter, as the kernel's atomic64_t: mm->context.tlb_gen, say."""

    __slots__ = ()

    def __init__(self, name: str, owner: str, pcpus: int, start: int = 0) -> None:
        super().__init__(name, owner, pcpus, 1)
        self.words[0] = start

    def read(self, cpu: Cpu, order: LoadOrder = "relaxed") -> int:
        """Load the counter."""
        return self._load(cpu, 0, order)

    def set(self, cpu: Cpu, value: int, order: StoreOrder = "relaxed") -> None:
        """Store a value."""
        self._store(cpu, 0, value, order)

    def inc_return(self, cpu: Cpu) -> int:
        """Add one and return the new value: full."""
        self._point(cpu, "write")
        return int(lib.atomic64_inc_return(self.words))


class PerCpu(State):
    """A 64-bit word for each pCPU.  Each word is an object of its own."""

    __slots__ = ()

    def __init__(self, name: str, owner: str, pcpus: int) -> None:
        super().__init__(name, owner, pcpus, pcpus)

    def read(self, cpu: Cpu, pcpu: int, order: LoadOrder = "relaxed") -> int:
        """Load the word of that pCPU."""
        return self._load(cpu, self._pcpu(pcpu), order, pcpu)

    def set(self, cpu: Cpu, pcpu: int, value: int, order: StoreOrder = "relaxed") -> None:
        """Store the word of that pCPU."""
        self._store(cpu, self._pcpu(pcpu), value, order, pcpu)

    def inc_return(self, cpu: Cpu, pcpu: int) -> int:
        """Add one and return the new value: full."""
        self._point(cpu, "write", pcpu)
        return int(lib.atomic64_inc_return(self._word(self._pcpu(pcpu))))


class Flag(State):
    """A bit of its own."""

    __slots__ = ()

    def __init__(self, name: str, owner: str, pcpus: int) -> None:
        super().__init__(name, owner, pcpus, 1)

    def test(self, cpu: Cpu, order: LoadOrder = "relaxed") -> bool:
        """Load the flag."""
        return bool(self._load(cpu, 0, order))

    def set(self, cpu: Cpu, order: StoreOrder = "relaxed") -> None:
        """Store 1."""
        self._store(cpu, 0, 1, order)

    def clear(self, cpu: Cpu, order: StoreOrder = "relaxed") -> None:
        """Store 0."""
        self._store(cpu, 0, 0, order)

    def test_and_set(self, cpu: Cpu) -> bool:
        """Set the flag and return its old value: full."""
        self._point(cpu, "write")
        return bool(lib.test_and_set_bit(self.words, 0))

    def test_and_clear(self, cpu: Cpu) -> bool:
        """Clear the flag and return its old value: full."""
        self._point(cpu, "write")
        return bool(lib.test_and_clear_bit(self.words, 0))


class OwnList(State):
    """A list for each CPU that acts, for a walk to collect what it will deal with at its end.

    No CPU can reach another one's list, so an access needs no order.  Use it only where the thread cannot be
    moved to another pCPU: under a lock, in RCU's read section, or with preemption disabled.
    """

    __slots__ = ("lists",)

    def __init__(self, name: str, owner: str, pcpus: int) -> None:
        super().__init__(name, owner, pcpus, 1)
        self.lists: dict[int, list[Any]] = {}

    def of(self, cpu: Cpu) -> list[Any]:
        """Return the acting CPU's list."""
        return self.lists.setdefault(cpu.id, [])


class Private(State):
    """A `value` of a vCPU (per_vcpu) that only the vCPU's thread touches, so an access needs no order."""

    __slots__ = ("value",)

    def __init__(self, name: str, owner: str, pcpus: int) -> None:
        super().__init__(name, owner, pcpus, 1)
        self.value: int = 0


S = TypeVar("S", bound=State)


class HasData(Protocol):
    """A VM, a vCPU or a root."""

    policy_data: object


class Data:
    """The state of one VM, vCPU or root, by declaration."""

    __slots__ = ("states",)

    def __init__(self, states: dict[Declared[Any], State]) -> None:
        self.states = states


class Declared(Generic[S]):
    """A declaration of state, an attribute of a policy's class.  Call it with the object to get the state."""

    scope: Scope

    def __init__(self, kind: type[S], *arguments: int) -> None:
        _check_kind(kind, self.scope)
        self.kind, self.arguments, self.name = kind, arguments, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __call__(self, of: HasData) -> S:
        data = of.policy_data
        found = data.states.get(self) if isinstance(data, Data) else None
        if found is None:
            raise TypeError(f"{self.name} is state of a {self.scope} under this policy; found {of!r}")
        return found  # type: ignore[return-value]


def _check_kind(kind: object, scope: Scope) -> None:
    if not (isinstance(kind, type) and issubclass(kind, State)):
        known = ", ".join(sorted(one.__name__ for one in State.__subclasses__()))
        raise TypeError(f"{kind!r} is no type of state, one of {known}")
    if kind is Private and scope != "vcpu":
        raise TypeError(f"Private is state of a vCPU, for its thread alone, not of a {scope}")


class per_root(Declared[S]):  # noqa: N801 - reads like a declaration
    """State of each root: called with a KvmMmuPage (`root`, or `root.sp` of a KvmMmuRootInfo)."""

    scope = "root"


class per_vcpu(Declared[S]):  # noqa: N801
    """State of each vCPU."""

    scope = "vcpu"


class per_vm(Declared[S]):  # noqa: N801
    """State of each VM."""

    scope = "vm"


Declarations = Mapping[Scope, tuple[Declared[Any], ...]]


def declarations(classes: Iterable[type]) -> Declarations:
    """Return the declarations of these classes and of their bases, by scope."""
    found: dict[str, Declared[Any]] = {}
    for cls in classes:
        for base in reversed(cls.__mro__):
            found.update({f"{cls.__qualname__}.{name}": one for name, one in _declared(base)})
    scopes: tuple[Scope, ...] = ("vm", "vcpu", "root")
    return {scope: tuple(one for one in found.values() if one.scope == scope) for scope in scopes}


def _declared(cls: type) -> Iterator[tuple[str, Declared[Any]]]:
    for name, value in vars(cls).items():
        if isinstance(value, Declared):
            yield name, value


def new_data(declared: tuple[Declared[Any], ...], owner: str, pcpus: int) -> Data | None:
    """Make the state of one object; None if there is none."""
    if not declared:
        return None
    return Data({one: one.kind(one.name, owner, pcpus, *one.arguments) for one in declared})
