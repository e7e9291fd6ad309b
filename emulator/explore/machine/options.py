"""Options for further choices of the scheduler, apart from the order of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emulator.errors import BadInput

SEQUENTIALLY_CONSISTENT = "sequentially consistent"
TSO = "x86-TSO"
EVICT = "evict"
SPECULATE = "speculate"
ADVERSARY = (EVICT, SPECULATE)


@dataclass(frozen=True, slots=True)
class ExploreOptions:
    """The budgets of one execution, and its memory model.

    evict: how often a pCPU may lose a cached mapping; speculate: how often a pCPU may fetch a translation
    that no access needs.  0: not at all.
    """

    evict: int = 0
    speculate: int = 0
    store_buffers: bool = False

    @property
    def memory(self) -> str:
        """Return the memory model of KVM's own accesses."""
        return TSO if self.store_buffers else SEQUENTIALLY_CONSISTENT

    @property
    def adversary(self) -> bool:
        return bool(self.evict or self.speculate)

    def describe(self) -> str:
        """Describe, for a verdict, the choices besides interleavings, and the memory model."""
        said = []
        if self.evict:
            said.append(_times(self.evict, "eviction"))
        if self.speculate:
            said.append(_times(self.speculate, "speculative fill"))
        turns = [f"with up to {' and '.join(said)}"] if said else []
        return ", ".join([*turns, self.memory])

    def document(self) -> dict[str, Any]:
        return {"adversary": {EVICT: self.evict, SPECULATE: self.speculate} if self.adversary else None}

    @classmethod
    def given(cls, adversary: Sequence[str], budget: int, store_buffers: bool) -> ExploreOptions:
        """Return the choices of a command line; raises BadInput."""
        for name in adversary:
            if name not in ADVERSARY:
                raise BadInput("--adversary", repr(name), " or ".join(ADVERSARY))
        return cls(**dict.fromkeys(adversary, budget), store_buffers=store_buffers)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> ExploreOptions:
        """Return the choices of a document that `document` has written; raises ValueError."""
        memory = document.get("memory", SEQUENTIALLY_CONSISTENT)
        if memory not in (SEQUENTIALLY_CONSISTENT, TSO):
            raise ValueError(f"memory {memory!r}")
        adversary = document.get("adversary") or {}
        if not isinstance(adversary, dict):
            raise ValueError(f"adversary {adversary!r}")
        budgets = {name: adversary.get(name, 0) for name in ADVERSARY}
        if not all(type(n) is int and n >= 0 for n in budgets.values()):
            raise ValueError(f"adversary {adversary!r}")
        return cls(**budgets, store_buffers=memory == TSO)


NONE = ExploreOptions()


def _times(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
