"""Checks of a litmus test's VMX instructions: none fails, and none stands beside an unmodelled operation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from emulator.errors import shown
from emulator.litmus.checks import SchemaError, sequence
from emulator.litmus.nested_ops import EPT12_OPS, NESTED_OPS, Ept12Clean

if TYPE_CHECKING:
    from emulator.litmus.model import LitmusTest
    from emulator.litmus.syntax import Op

_VERBS: Final = frozenset(op.verb for op in NESTED_OPS)
# Where KVM would have to leave L2, or has registers of L1 and of L2 to tell apart.
_NOT_MODELLED: Final = frozenset(
    {"send-smi", "init", "send-init", "cr0", "cr4", "efer", "set-sregs", "join"}
)
_NEEDS_CURRENT: Final = frozenset(
    {"vmwrite-vpid", "vmwrite-apic", "vmwrite-eptp", "l2-enter", "l2-enter-fails", "l2-enter-halted"}
)
_LEAVES_L2: Final = frozenset({"l2-exit", "l2-apic"})
_OF_L2: Final = _LEAVES_L2 | {"l2-eptp"}
# L1 needs no VMX operation to write to its memory.
_STORES: Final = frozenset(op.verb for op in EPT12_OPS)
# The oracle looks at flags in the frames where they were cleared.
_TAKES_PAGES: Final = ("host-", "notifier-")
_EPT12_VERBS: Final = _STORES | {"vmwrite-eptp", "l2-eptp", "invept"}
# Page tables of four vCPUs with three nested guests each.
_LEAST_PAGES: Final = 0x800


def check_nested(test: LitmusTest) -> None:
    """Raise SchemaError for the first VMX instruction that would fail, or that is not modelled."""
    nested, cleaned = set(), set()
    for name, thread in test.threads.items():
        placed = list(sequence(test, name))
        if any(op.verb == Ept12Clean.verb for _, op in placed):
            cleaned.add(thread.vm)
        uses = [(key, op) for key, op in placed if op.verb in _VERBS]
        if not uses:
            continue
        nested.add(thread.vm)
        _check_machine(test, thread.vm, *uses[0])
        _check_vpids(test, uses)
        _check_ept12(test, thread.vm, uses)
        follow = _L1()
        for key, op in placed:
            follow.step(key, op)
    for name, thread in test.threads.items():
        for key, op in sequence(test, name):
            if thread.vm in nested and op.verb in _NOT_MODELLED:
                raise SchemaError(key, shown(op.text), f"no {op.verb} in a VM with nested guests")
            if thread.vm in cleaned and op.verb.startswith(_TAKES_PAGES):
                raise SchemaError(key, shown(op.text), f"no {op.verb} in a VM with ept12-clean")


def _check_machine(test: LitmusTest, vm: int, key: str, op: Op) -> None:
    if test.vm[vm].pages < _LEAST_PAGES:
        raise SchemaError(key, shown(op.text), f"pages = {_LEAST_PAGES:#x} or more in its VM")


def _check_vpids(test: LitmusTest, uses: list[tuple[str, Op]]) -> None:
    """Refuse a VPID of L1's in a host without VPIDs, which offers none to L1 and no INVVPID."""
    for key, op in uses:
        if not test.machine.vpid and (
            op.verb == "invvpid" or (op.verb == "vmwrite-vpid" and op.number("vpid"))
        ):
            raise SchemaError(key, shown(op.text), "machine.vpid = true: without, L1 has no VPIDs")


def _check_ept12(test: LitmusTest, vm: int, uses: list[tuple[str, Op]]) -> None:
    """Refuse an EPT of L1's where the host offers none, or where it meets an operation that is not modelled.

    Without paging L2 has no tables of its own, and the operations would name no page of it.
    """
    used = [(key, op) for key, op in uses if op.verb in _EPT12_VERBS]
    if not used:
        return
    key, op = used[0]
    if not test.machine.ept:
        raise SchemaError(key, shown(op.text), "machine.ept = true: without, L1 is offered no EPT")
    if not test.vm[vm].paging:
        raise SchemaError(key, shown(op.text), "paging = true in its VM: without, an EPT is not modelled")


@dataclass(slots=True)
class _L1:
    """L1's VMX state, as a thread's operations change it.

    made: L1's EPTs that have a root.  has_ept: VMCS12s with "enable EPT".
    """

    vmxon: bool = False
    current: int = 0
    inside: bool = False
    smm: bool = False
    made: set[int] = field(default_factory=set)
    has_ept: set[int] = field(default_factory=set)

    def step(self, key: str, op: Op) -> None:
        if op.verb in ("smi", "rsm"):
            self.smm = op.verb == "smi"
        if op.verb not in _VERBS:
            return
        self._refuse(key, op)
        if op.verb in ("vmxon", "vmxoff"):
            self.vmxon, self.current = op.verb == "vmxon", 0
        elif op.verb == "vmptrld":
            self.current = op.number("vmcs12")
        elif op.verb == "vmclear" and self.current == op.number("vmcs12"):
            self.current = 0
        elif op.verb == "l2-enter" or op.verb in _LEAVES_L2:
            self.inside = op.verb == "l2-enter"
        if op.verb in _EPT12_VERBS:
            self.made.add(op.number("ept12"))
        if op.verb == "vmwrite-eptp":
            (self.has_ept.add if op.number("ept12") else self.has_ept.discard)(self.current)

    def _refuse(self, key: str, op: Op) -> None:
        """Refuse an instruction that raises #UD, fails, or exits to L1 for another reason than VMCALL."""
        if self.smm:
            raise SchemaError(key, shown(op.text), "an rsm before it, by the same thread: SMM has no VMX")
        if self.inside != (op.verb in _OF_L2):
            expected = "an l2-exit before it" if self.inside else "an l2-enter before it"
            raise SchemaError(key, shown(op.text), f"{expected}, by the same thread")
        if op.verb in _STORES:
            return
        if self.vmxon == (op.verb == "vmxon"):
            expected = "a vmxoff before it" if self.vmxon else "a vmxon before it"
            raise SchemaError(key, shown(op.text), f"{expected}, by the same thread")
        if op.verb in _NEEDS_CURRENT and not self.current:
            raise SchemaError(key, shown(op.text), "a vmptrld before it, by the same thread")
        if op.verb == "l2-eptp":
            self._refuse_switch(key, op)
        if op.verb == "invept" and (op.number("type") == 1) != bool(op.number("ept12")):
            expected = "the number of an EPT for type 1" if op.number("type") == 1 else "no EPT for type 2"
            raise SchemaError(key, shown(op.text), expected)
        if op.verb == "invvpid" and op.number("type") != 2 and not op.number("vpid"):
            raise SchemaError(key, shown(op.text), "a VPID of at least 1 for this TYPE")

    def _refuse_switch(self, key: str, op: Op) -> None:
        """Refuse an EPTP switch that would exit to L1: EPT is off, or the list has no such EPTP."""
        if self.current not in self.has_ept:
            raise SchemaError(key, shown(op.text), "a vmwrite-eptp EPT12 before its l2-enter")
        if op.number("ept12") not in self.made:
            expected = f"an ept12-map {op.number('ept12')} PAGE GFN before it, by the same thread"
            raise SchemaError(key, shown(op.text), expected)
