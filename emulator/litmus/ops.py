"""The operations of litmus tests, by name, and their parser.

A *guest* operation becomes instructions of the vCPU's guest program; consecutive ones run in one stretch of
guest mode.  Any other operation has one implementation, `run(context)`, on KVM's public functions.
"""

from __future__ import annotations

from emulator.litmus.apic_ops import APIC_OPS
from emulator.litmus.guest_ops import GUEST_OPS, VCPU_OPS
from emulator.litmus.kvm_ops import KVM_OPS
from emulator.litmus.nested_ops import NESTED_OPS
from emulator.litmus.syntax import Context, GuestOp, Instruction, KvmOp, Op, OpError, VcpuOp, Who, parse
from emulator.litmus.waits import Block, Wait

__all__ = [
    "VERBS",
    "Block",
    "Context",
    "GuestOp",
    "Instruction",
    "KvmOp",
    "Op",
    "OpError",
    "VcpuOp",
    "Wait",
    "parse_op",
]

_KINDS: tuple[type[Op], ...] = (*GUEST_OPS, *APIC_OPS, *NESTED_OPS, Wait, Block, *VCPU_OPS, *KVM_OPS)

VERBS: dict[str, type[Op]] = {kind.verb: kind for kind in _KINDS}


def parse_op(text: str, who: Who) -> Op:
    """Return the operation in `text`, for a thread with a vCPU ("vcpu") or without one ("kvm")."""
    return parse(text, who, VERBS)
