"""Checks of a litmus test's accesses to APICs: each must exit to the hypervisor that the test means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emulator.errors import shown
from emulator.litmus.apic_ops import APIC_OPS
from emulator.litmus.checks import SchemaError, sequence

if TYPE_CHECKING:
    from emulator.litmus.checks import Placed
    from emulator.litmus.model import LitmusTest

_VERBS: Final = frozenset(op.verb for op in APIC_OPS)
_ACCESSES: Final = frozenset({"apic-read", "apic-write"})
_LEAVES: Final = frozenset({"l2-exit", "l2-apic"})
# KVM pins the APIC-access page of a VMCS12, and the model has no pins.
_TAKES_PAGES: Final = ("host-", "notifier-", "slot-")


def check_apic(test: LitmusTest) -> None:
    """Raise SchemaError for the first operation on an APIC that is not modelled or reaches another APIC."""
    pinned = set()
    for name, thread in test.threads.items():
        placed = list(sequence(test, name))
        for key, op in placed:
            if op.verb in _VERBS and not test.vm[thread.vm].apic:
                raise SchemaError(key, shown(op.text), "apic = true in its VM")
        _follow(placed)
        pinned |= {thread.vm for _, op in placed if op.verb == "vmwrite-apic" and op.number("page")}
    for name, thread in test.threads.items():
        for key, op in sequence(test, name):
            if thread.vm in pinned and op.verb.startswith(_TAKES_PAGES):
                raise SchemaError(key, shown(op.text), f"no {op.verb} in a VM with vmwrite-apic")


def _follow(placed: list[Placed]) -> None:
    """Check a thread's accesses.  Those of L2 go to the APIC-access page of its VMCS12, or to L1's APIC if
    the VMCS12 has none.  Those of L1 go to its own APIC, in xAPIC mode."""
    current, inside, mode = 0, False, "xapic"
    pages: dict[int, int] = {}
    for key, op in placed:
        virtualized = inside and pages.get(current, 0) != 0
        if op.verb == "l2-apic" and not virtualized:
            raise SchemaError(key, shown(op.text), "a vmwrite-apic PAGE before its l2-enter")
        if op.verb in _ACCESSES and (virtualized or mode != "xapic"):
            expected = "l2-apic in this nested guest" if virtualized else "an apic-mode xapic before it"
            raise SchemaError(key, shown(op.text), expected)
        if op.verb == "vmptrld":
            current = op.number("vmcs12")
        elif op.verb == "vmwrite-apic":
            pages[current] = op.number("page")
        elif op.verb == "apic-mode":
            mode = op.name("mode")
        elif op.verb == "l2-enter" or op.verb in _LEAVES:
            inside = op.verb == "l2-enter"
