"""Objects and values that explore can watch while a policy reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Final

from emulator.explore.machine.handed import CONTAINERS
from emulator.kvm import structs
from emulator.kvm.mmu import shadow_structs
from emulator.kvm.mmu import structs as mmu_structs
from emulator.kvm.notifications import Heard
from emulator.kvm.vmx.vmcs import LoadedVmcs
from emulator.machine.locks import MmuLock, Mutex, Refcount, SpinLock
from emulator.machine.runtime import Cpu, Machine
from emulator.policy import Policy
from emulator.policy.state import Data, State
from native import ffi

# Classes, with the slot that distinguishes their objects, equally in every execution; "": there is none.
WATCHED: Final[Mapping[type, str]] = {
    structs.Kvm: "id",
    structs.Vcpu: "id",
    structs.VcpuArch: "",
    mmu_structs.KvmMmu: "",
    mmu_structs.KvmMmuPage: "hfn",
    shadow_structs.ShadowPage: "hfn",
    shadow_structs.KvmShadowArch: "",
    shadow_structs.SlotArch: "",
    LoadedVmcs: "",
    structs.KvmMemslots: "",
    structs.KvmMemorySlot: "id",
    Cpu: "id",
    Machine: "",
    Refcount: "",
    MmuLock: "vm",
    SpinLock: "",
    Mutex: "",
}
# Immutable values.
_ATOMS: Final = (
    type(None), bool, int, float, complex, str, bytes, range, Enum, Policy,
    # Each operation on a policy's state is an ordering point; KVM's functions for moments never change.
    Data, State, Heard,
)  # fmt: skip
# The handle of the machine: only native calls can read through it.
_HANDLE: Final = "m"


def is_mutable(value: object) -> bool:
    """Return whether it has contents that change in place: a container, or memory of the core's."""
    return type(value) in CONTAINERS or (isinstance(value, ffi.CData) and " owning " in repr(value))


def copied(container: Any) -> object:
    """Return a copy of its contents, for a comparison with later ones."""
    if isinstance(container, ffi.CData):
        return bytes(ffi.buffer(container))
    if isinstance(container, dict):
        return tuple(container.items())
    return type(container)(container) if isinstance(container, bytearray | set) else tuple(container)


def is_watchable(value: object, attr: str = "") -> bool:
    """Return whether all state that can be read through it is watched, too, or never changes."""
    kind = type(value)
    if isinstance(value, _ATOMS) or kind in WATCHED:
        return True
    if isinstance(value, tuple | frozenset):
        return all(map(is_watchable, value))
    if isinstance(value, ffi.CData):
        return attr == _HANDLE
    frozen = bool(getattr(getattr(kind, "__dataclass_params__", None), "frozen", False))
    return (
        is_dataclass(kind) and frozen and all(is_watchable(getattr(value, one.name)) for one in fields(kind))
    )
