"""A tree's compiled TDP MMU, driven through the shim."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from cffi import FFI

from emulator.kernel_tree.build import shim_text
from emulator.kernel_tree.operations import HUGE_RANGES, MOST_ROOTS, NPAGES, WATCHED, Operation, host_writable
from emulator.kernel_tree.sides import Event, Kind, Outcome, State

_KINDS: Final = {
    "EVENT_FLUSH": Kind.FLUSH,
    "EVENT_FLUSH_RANGE": Kind.FLUSH_RANGE,
    "EVENT_FLUSH_SLOT": Kind.FLUSH_SLOT,
    "EVENT_YIELD": Kind.YIELD,
    "EVENT_LOCK": Kind.LOCK,
    "EVENT_UNLOCK": Kind.UNLOCK,
    "EVENT_CALL_RCU": Kind.CALL_RCU,
    "EVENT_DIRTY": Kind.DIRTY,
}


class TreeSide:
    """`pfns`: the host's frame of each gfn.  `age_locked`: aging holds mmu_lock for write, as the tree's
    callers do."""

    def __init__(self, path: Path, pfns: list[int], *, age_locked: bool) -> None:
        self.ffi = FFI()
        self.ffi.cdef(shim_text("api.h"))
        self.lib: Any = self.ffi.dlopen(str(path))
        self.kinds = {getattr(self.lib, name): kind for name, kind in _KINDS.items()}
        self.pfns = pfns
        self.age_locked = age_locked
        self._other = self.ffi.callback("void(void)", self._run_other)
        self._pending: Operation | None = None
        self._watched = self.ffi.new("unsigned long long[]", WATCHED)
        self._events = self.ffi.new("const struct shim_event **")
        self._words = self.ffi.new("unsigned int *")
        self.roots: list[tuple[int, int]] = []
        self.logging = [False, False]

    def start(self, *, ad_bits: bool) -> None:
        self.ad_bits = ad_bits
        self.roots = []
        self.logging = [False, False]
        self.lib.tree_start(NPAGES, ad_bits, self._watched, len(WATCHED), self._other)
        for space in (0, 1):
            self._set_levels(space)

    def run(self, operation: Operation) -> Outcome:
        self.lib.tree_clear()
        point = operation.point
        self._pending = point.other if point else None
        what = 0 if point is None else (1 if point.yields else 0) | (2 if point.other else 0)
        points = self.ffi.new("struct shim_point[1]", [(point.gfn if point else 0, what)])
        self.lib.tree_set_points(points, point is not None)
        returned = self._call(operation)
        self.lib.tree_set_points(points, 0)
        return self._outcome(returned)

    def _run_other(self) -> None:
        other, self._pending = self._pending, None
        if other is not None:
            self._call(other)

    def _call(self, operation: Operation) -> int:
        return int(getattr(self, f"_{operation.name}")(operation) or 0)

    def _set_levels(self, space: int) -> None:
        huge = 1 if self.logging[space] else 2
        self.lib.tree_set_levels(space, bytes([huge] * HUGE_RANGES + [1] * (64 - HUGE_RANGES)), 64)

    def _outcome(self, returned: int) -> Outcome:
        number = self.lib.tree_events(self._events)
        events, complaints = [], []
        for at in range(number):
            one = self._events[0][at]
            kind = self.kinds.get(one.kind)
            if kind is None:
                complaints.append(self._complaint(one))
            else:
                state = self._state(one.state) if one.state >= 0 else None
                events.append(Event(kind, one.rcu > 0, one.lock, one.a, one.b, state))
        if held := self.lib.tree_locks():
            complaints.append(f"the operation ends with locks held ({held:#x})")
        state = self._state(self.lib.tree_record())
        return Outcome(
            returned, tuple(events), state, self.lib.tree_pages(), tuple(dict.fromkeys(complaints))
        )

    def _complaint(self, event: Any) -> str:
        name = self.ffi.string(event.text) if event.text else b""
        text = name.decode() if isinstance(name, bytes) else name
        if event.kind == self.lib.EVENT_WARN:
            return f"WARN at line {event.a}: {text}"
        if event.kind == self.lib.EVENT_MISSING:
            return f"it calls {text}(), which the shim does not have"
        if event.kind == self.lib.EVENT_FREED_USE and event.a:
            return f"an SPTE is {text}"
        return f"{text} of an SPTE in a table that was freed"

    def _state(self, place: int) -> tuple[int, ...]:
        words = self.lib.tree_state(place, self._words)
        state = [int(word) for word in self.ffi.unpack(words, self._words[0])]
        if self.ad_bits:
            return tuple(state)
        # Without A/D bits in EPT they mean nothing.
        return tuple(_without_ad(word) for word in state)

    # --- the operations -------------------------------------------------------------------------------------

    def root(self, number: int) -> tuple[int, int] | None:
        return self.roots[number] if number < len(self.roots) else None

    def _alloc_root(self, one: Operation) -> None:
        if len(self.roots) < MOST_ROOTS:
            self.roots.append((self.lib.tree_alloc_root(one["space"]), one["space"]))

    def _put_root(self, one: Operation) -> None:
        if self.root(one["root"]) is not None:
            self.lib.tree_put_root(self.roots.pop(one["root"])[0])

    def _map(self, one: Operation) -> int:
        found = self.root(one["root"])
        if found is None or self.lib.tree_root_invalid(found[0]):
            return -1
        root, space = found
        gfn = one["gfn"]
        writable = host_writable(gfn)
        level = one["level"] if gfn < HUGE_RANGES * 512 and not self.logging[space] else 1
        write = one["write"] and writable
        return int(self.lib.tree_map(root, gfn, self.pfns[gfn], write, 0, level, writable))

    def _touch(self, one: Operation) -> int:
        found = self.root(one["root"])
        return -1 if found is None else int(self.lib.tree_touch(found[0], one["gfn"], one["write"]))

    def _zap_leafs(self, one: Operation) -> int:
        return int(self.lib.tree_zap_leafs(one["start"], one["end"], one["flush"]))

    def _unmap(self, one: Operation) -> int:
        return int(
            self.lib.tree_unmap(one["space"], one["start"], one["end"], one["may_block"], one["flush"])
        )

    def _age(self, one: Operation) -> int:
        return int(self.lib.tree_age(one["space"], one["start"], one["end"], self.age_locked))

    def _wrprot_slot(self, one: Operation) -> int:
        return int(self.lib.tree_wrprot_slot(one["space"], one["level"]))

    def _write_protect_gfn(self, one: Operation) -> int:
        return int(self.lib.tree_write_protect_gfn(one["space"], one["gfn"], one["level"]))

    def _clear_dirty(self, one: Operation) -> None:
        self.lib.tree_clear_dirty(one["space"], one["gfn"], one["mask"])

    def _split(self, one: Operation) -> None:
        self.lib.tree_split(one["space"], one["start"], one["end"], 1, one["shared"])

    def _recover(self, one: Operation) -> None:
        if not self.logging[one["space"]]:
            self.lib.tree_recover(one["space"])

    def _logging(self, one: Operation) -> None:
        self.logging[one["space"]] = bool(one["on"])
        self.lib.tree_set_logging(one["space"], one["on"])
        self._set_levels(one["space"])

    def _invalidate_roots(self, one: Operation) -> None:
        self.lib.tree_invalidate_roots()

    def _zap_invalidated_roots(self, one: Operation) -> None:
        self.lib.tree_zap_invalidated_roots(1)


_AD: Final = int(State.A | State.D)


def _without_ad(word: int) -> int:
    return word & ~_AD if word & State.LEAF else word
