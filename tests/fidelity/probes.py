"""kprobes for the emulated KVM: counts calls of its functions by name, without help of its own counters.

The recordings were made the same way. A probe replaces every reference to a function in the modules of
the emulator and is taken out again at the end.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from types import FunctionType, TracebackType
from typing import Any

# A probe's handler gets the call's arguments and result, and returns counter, vCPU or VM, and amount.
Handler = Callable[[tuple[Any, ...], Any], tuple[str, int, int] | None]
PACKAGE = "emulator."


class Probes:
    """Counters by (what, of whom). Each is a sum over CPUs, as each CPU is one thread and adds to its own."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, str, int]] = Counter()
        self._undo: list[tuple[Any, str, Any]] = []

    def count(self, what: str, whom: int) -> int:
        """Return how often `what` happened to vCPU or VM number `whom`."""
        return sum(n for (_, name, number), n in list(self._counts.items()) if (name, number) == (what, whom))

    def names(self, prefix: str, whom: int) -> set[str]:
        """Return the counts under this prefix."""
        return {name for _, name, number in list(self._counts) if number == whom and name.startswith(prefix)}

    def probe(
        self, function: str, handler: Handler, before: Callable[[tuple[Any, ...]], object] | None = None
    ) -> None:
        """Call `handler` after each call of KVM's function of this name; its first argument is the Cpu.

        before: called with the arguments before the call.
        """
        targets = {
            id(value): value
            for module in self._modules()
            if isinstance(value := getattr(module, function, None), FunctionType)
            # Another test of this process may have loaded what hands calls to a tree's code.
            and value.__module__.startswith("emulator.kvm.")
        }
        if len(targets) != 1:
            raise LookupError(f"{PACKAGE} has {len(targets)} functions {function}, expected 1")
        (original,) = targets.values()

        probed = self._probed(original, handler, 0, before)
        for module in self._modules():
            if getattr(module, function, None) is original:
                self._replace(module, function, probed)

    def probe_method(self, cls: type, method: str, handler: Handler, cpu: int = 0) -> None:
        """Probe a method; argument number `cpu` is the Cpu."""
        self._replace(cls, method, self._probed(getattr(cls, method), handler, cpu))

    def _probed(
        self,
        original: Callable[..., Any],
        handler: Handler,
        cpu: int,
        before: Callable[[tuple[Any, ...]], object] | None = None,
    ) -> Callable[..., Any]:
        @wraps(original)
        def probed(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(args)
            result = original(*args, **kwargs)
            counted = handler((*args, *kwargs.values()), result)
            if counted is not None and counted[2]:
                self._counts[args[cpu].id, counted[0], counted[1]] += counted[2]
            return result

        return probed

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    @staticmethod
    def _modules() -> list[Any]:
        return [module for name, module in list(sys.modules.items()) if name.startswith(PACKAGE)]

    def __enter__(self) -> Probes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)
        self._undo.clear()
