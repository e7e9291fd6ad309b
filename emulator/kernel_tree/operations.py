"""Random sequences of operations on a TDP MMU, as data."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Final

# The guest: four ranges of 2M.  The host maps the first two by huge pages; of the last one some pages are
# read-only for the host.
NPAGES: Final = 2048
HUGE_RANGES: Final = 2
# The SPTEs of these gfns are compared: some of each range, with both ends.
WATCHED: Final = tuple(
    base + offset
    for base in range(0, NPAGES, 512)
    for offset in (0, 1, 2, 3, 7, 8, 63, 64, 65, 255, 300, 511)
)
MOST_ROOTS: Final = 5


def host_writable(gfn: int) -> bool:
    """Return whether the host permits writes to the page."""
    return gfn < NPAGES - 512 or gfn % 7 != 3


@dataclass(frozen=True, slots=True)
class Point:
    """A moment inside an operation: when its walk reaches the first SPTE from `gfn` on.

    `yields`: another thread wants mmu_lock or the CPU.  `other`: the operation of another CPU that runs then;
    without a yield it runs between the walk's look at an SPTE and its change.
    """

    gfn: int
    yields: bool
    other: Operation | None = None

    def __str__(self) -> str:
        where = f"at gfn {self.gfn:#x}"
        then = f"{self.other}" if self.other else ""
        if self.yields:
            return f"it yields {where}" + (f", meanwhile {then}" if then else "")
        return f"{where}, before the change, {then}"


@dataclass(frozen=True, slots=True)
class Operation:
    """A call: its name, and its arguments by name."""

    name: str
    arguments: dict[str, int] = field(default_factory=dict)
    point: Point | None = None

    def __getitem__(self, key: str) -> int:
        return self.arguments[key]

    def __str__(self) -> str:
        shown = [
            f"{key} {value:#x}" if key in ("gfn", "start", "end", "mask") else f"{key} {value}"
            for key, value in self.arguments.items()
        ]
        text = " ".join([self.name, *shown])
        return f"{text} ({self.point})" if self.point else text


@dataclass(frozen=True, slots=True)
class Sequence:
    """Operations on an empty VM.  `ad_bits`: EPT has accessed and dirty flags."""

    ad_bits: bool
    operations: tuple[Operation, ...]


# Name and weight of each operation; the functions below make their arguments.
_WEIGHTS: Final = {
    "map": 46,
    "touch": 10,
    "zap_leafs": 5,
    "unmap": 7,
    "wrprot_slot": 4,
    "write_protect_gfn": 4,
    "clear_dirty": 5,
    "age": 6,
    "split": 5,
    "recover": 4,
    "logging": 4,
    "alloc_root": 4,
    "put_root": 2,
    "invalidate_roots": 1,
    "zap_invalidated_roots": 2,
}
# The walks of these operations yield.
_YIELDING: Final = frozenset(
    {"zap_leafs", "unmap", "wrprot_slot", "split", "recover", "zap_invalidated_roots"}
)
# The walks of these operations replace SPTEs that a processor may change meanwhile.
_SHARED: Final = frozenset({"wrprot_slot", "split", "zap_invalidated_roots"})
# Other CPUs' operations while mmu_lock is not held.
_WHILE_UNLOCKED: Final = (
    "map", "map", "touch", "zap_leafs", "unmap", "write_protect_gfn", "invalidate_roots", "clear_dirty",
)  # fmt: skip


def random_sequence(seed: int, length: int) -> Sequence:
    """Return the sequence of this seed."""
    return _Generator(random.Random(seed)).sequence(length)


class _Generator:
    """Make operations that find SPTEs to change: it knows about how many roots there are, and which
    gfns were mapped last."""

    def __init__(self, source: random.Random) -> None:
        self.source = source
        # The address spaces of the roots, by the numbers that operations have for roots.
        self.spaces: list[int] = []
        self.mapped: list[int] = []

    def sequence(self, length: int) -> Sequence:
        source, operations = self.source, [self._operation("alloc_root")]
        names, weights = list(_WEIGHTS), list(_WEIGHTS.values())
        while len(operations) < length:
            operation = self._operation(source.choices(names, weights)[0])
            if operation.point is not None and not operation.point.yields:
                operations += self._before_a_race(operation, operation.point)
            operations.append(operation)
        return Sequence(ad_bits=source.random() < 0.8, operations=tuple(operations))

    def _before_a_race(self, operation: Operation, point: Point) -> list[Operation]:
        """Return operations after which a processor will change the SPTE at which the walk looks: it is
        mapped, and its accessed flag is clear."""
        assert point.other is not None
        root, gfn = point.other["root"], point.gfn
        level = 2 if operation.name == "split" or gfn == 512 else 1
        space = self.spaces[root] if root < len(self.spaces) else 0
        mapped = Operation("map", {"root": root, "gfn": gfn, "write": 1, "level": level})
        aged = Operation("age", {"space": space, "start": 0, "end": NPAGES})
        if operation.name == "zap_invalidated_roots":
            return [mapped, aged, Operation("invalidate_roots")]
        if "space" in operation.arguments:
            operation.arguments["space"] = space
        return [mapped, aged]

    def _operation(self, name: str) -> Operation:
        arguments = self._arguments(name)
        point = None
        if name in _YIELDING and self.source.random() < 0.6:
            point = self._point(name, arguments)
        if name == "alloc_root" and len(self.spaces) < MOST_ROOTS:
            self.spaces.append(arguments["space"])
        elif name == "put_root" and arguments["root"] < len(self.spaces):
            self.spaces.pop(arguments["root"])
        elif name == "map":
            self.mapped = [*self.mapped[-11:], arguments["gfn"]]
        return Operation(name, arguments, point)

    def _point(self, name: str, arguments: dict[str, int]) -> Point | None:
        source = self.source
        start, end = arguments.get("start", 0), arguments.get("end", NPAGES)
        # Where a huge page or a table begins; no other SPTE is reached there.
        candidates: list[int] | range = range(512, HUGE_RANGES * 512, 512)
        if name not in ("recover", "split"):
            candidates = self.mapped if source.random() < 0.7 else list(WATCHED)
        gfns = [gfn for gfn in candidates if start < gfn < end]
        if not gfns:
            return None
        gfn = source.choice(gfns)
        if name in _SHARED and arguments.get("shared", 1) and source.random() < 0.35:
            # A processor that sets A or D in the SPTE at which the walk has just looked makes its cmpxchg
            # fail. A fault there would not do: whether the walk has seen the SPTE before or after is up to
            # chance.
            touch = {"root": self._root(), "gfn": gfn, "write": source.randrange(2)}
            return Point(gfn, yields=False, other=Operation("touch", touch))
        if source.random() < 0.5:
            return Point(gfn, yields=True)
        other = source.choice(_WHILE_UNLOCKED)
        changed = self._arguments(other)
        if "gfn" in changed and source.random() < 0.7:
            changed["gfn"] = gfn
        return Point(gfn, yields=True, other=Operation(other, changed))

    def _arguments(self, name: str) -> dict[str, int]:
        source = self.source
        space = int(source.random() < 0.2)
        if name in ("map", "touch"):
            arguments = {"root": self._root(), "gfn": self._gfn(), "write": int(source.random() < 0.5)}
            if name == "map":
                arguments["level"] = 2 if source.random() < 0.4 else 1
            return arguments
        if name in ("zap_leafs", "unmap", "age", "split"):
            return self._with_range(name, space)
        if name == "write_protect_gfn":
            return {"space": space, "level": 1 + (source.random() < 0.3), "gfn": self._gfn()}
        if name == "wrprot_slot":
            return {"space": space, "level": 1 + (source.random() < 0.3)}
        if name == "clear_dirty":
            return {"space": space, "gfn": self._gfn() & -64, "mask": source.getrandbits(64) | 1}
        if name == "put_root":
            return {"root": self._root()}
        if name == "logging":
            return {"space": space, "on": source.randrange(2)}
        if name in ("alloc_root", "recover"):
            return {"space": space}
        return {}

    def _with_range(self, name: str, space: int) -> dict[str, int]:
        start, end = self._range()
        arguments = {"start": start, "end": end}
        if name in ("zap_leafs", "unmap"):
            arguments["flush"] = int(self.source.random() < 0.2)
        if name == "split":
            arguments["shared"] = int(self.source.random() < 0.6)
        if name != "zap_leafs":
            arguments["space"] = space
        if name == "unmap":
            arguments["may_block"] = int(self.source.random() < 0.8)
        return arguments

    def _root(self) -> int:
        return self.source.randrange(max(1, len(self.spaces)))

    def _gfn(self) -> int:
        if self.mapped and self.source.random() < 0.3:
            return self.source.choice(self.mapped)
        return self.source.choice(WATCHED)

    def _range(self) -> tuple[int, int]:
        source = self.source
        choice = source.random()
        if choice < 0.15:
            return 0, NPAGES
        if choice < 0.45:
            first = source.randrange(NPAGES // 512)
            return first * 512, (first + source.randint(1, NPAGES // 512 - first)) * 512
        a, b = sorted(source.sample(WATCHED, 2))
        return a, b + 1
