"""Two worlds compared, by a walk that shares nothing with emulator.explore.engine.snapshot.

Reachable objects are found by the garbage collector's means, attributes by copyreg's, and everything is
described by its type, its content, and the order in which the walk comes to it.
"""

from __future__ import annotations

import copyreg
import gc
import re
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, GeneratorType, ModuleType
from typing import Any

from emulator.explore.machine.control import Control
from emulator.litmus.model import Section
from emulator.litmus.ops import Op
from native import ffi

_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")
# The same in every world, or the search's own.
_OUTSIDE = (type, ModuleType, CodeType, Section, Op, Control)


def describe(*roots: object) -> list[str]:
    """A line for each object, equal for worlds that are alike."""
    return [f"{number}: {text}" for number, text in enumerate(_Walk(roots).lines())]


class _Walk:
    def __init__(self, roots: tuple[object, ...]) -> None:
        self.numbers: dict[int, int] = {}
        self.found: list[object] = []
        for root in roots:
            self.name(root)

    def lines(self) -> Iterator[str]:
        for obj in self.found:  # which grows
            yield f"{type(obj).__name__} {self.inside(obj)}"

    def name(self, obj: Any) -> str:
        """How others call it: by value if it has one, else by its number."""
        if obj is None or isinstance(obj, bool | int | float | str | bytes):
            return repr(obj)
        if isinstance(obj, _OUTSIDE) or (
            callable(obj) and isinstance(obj, FunctionType) and not obj.__closure__
        ):
            return f"<{type(obj).__name__} {getattr(obj, '__qualname__', '')}>"
        number = self.numbers.get(id(obj))
        if number is None:
            number = self.numbers[id(obj)] = len(self.found)
            self.found.append(obj)
        return f"#{number}"

    def inside(self, obj: Any) -> str:
        kind = type(obj)
        if isinstance(obj, GeneratorType):
            return obj.__name__  # its position follows from the task's messages
        if isinstance(obj, ffi.CData):
            return self.memory(obj)
        if isinstance(obj, dict):
            return ", ".join(f"{self.name(k)}={self.name(v)}" for k, v in obj.items())
        if isinstance(obj, set | frozenset):
            return ", ".join(sorted(self.name(element) for element in obj))
        if isinstance(obj, bytearray):
            return obj.hex()
        if kind.__flags__ & 1 << 9 and not isinstance(obj, tuple):
            names = sorted({*copyreg._slotnames(kind), *getattr(obj, "__dict__", ())})  # type: ignore[attr-defined]
            missing: Callable[[str], str] = lambda name: "-"  # noqa: E731
            return ", ".join(
                f"{name}={self.name(getattr(obj, name)) if hasattr(obj, name) else missing(name)}"
                for name in names
                if name != "__weakref__"
            )
        return ", ".join(self.name(other) for other in gc.get_referents(obj))

    @staticmethod
    def memory(obj: Any) -> str:
        text = _ADDRESS.sub("", repr(obj))
        return f"{text} {bytes(ffi.buffer(obj)).hex()}" if " owning " in text else text
