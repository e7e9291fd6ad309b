"""The account at the end of an execution: references and pages that nothing will ever free.

All threads have ended, no walk is under way, and every RCU callback has run.  A root then has one reference
for each place in which a vCPU holds it, and one of the TDP MMU's own until the root is invalidated and
zapped.  A root of the shadow MMU has one for each vCPU that holds it, and each of its pages is in use, or an
invalid root that a vCPU still holds.  A vCPU may hold an obsolete root only while its request to free
obsolete roots is pending.  Each table page in use is linked below a root of the TDP MMU, or is the shadow
MMU's.  Each VPID is free or a vCPU's.

A leak harms no guest at once; it is the violation `leak`, after all others.  Structures that disagree
(emulator.audit) are the violation `inconsistent`: no guest may have been harmed yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from emulator.audit import audited
from emulator.explain.facts import INCONSISTENT, LEAK
from emulator.kvm.kvm_host import KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, KVM_REQUEST_MASK
from emulator.kvm.mmu.spte import is_obsolete_sp
from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.structs import Kvm, Vcpu
from emulator.machine.runtime import Machine
from native import lib

__all__ = ["INCONSISTENT", "LEAK", "at_the_end", "left_over"]


def at_the_end(machine: Machine, kvms: Sequence[Kvm]) -> str:
    """Return the violation of an execution that shows no other: a leak, or structures that disagree; "" for
    none."""
    left = left_over(machine, kvms)
    if left:
        return f"{LEAK}: {left}"
    found = audited(machine, kvms)
    return found and f"{INCONSISTENT}: {found}"


def left_over(machine: Machine, kvms: Iterable[Kvm]) -> str:
    """Return a sentence about each leak; "" if there is none."""
    return "; ".join([text for kvm in kvms for text in _of_vm(kvm)] or _of_machine(machine, list(kvms)))


def _of_vm(kvm: Kvm) -> Iterator[str]:
    held = dict.fromkeys(kvm.tdp_mmu_roots, 0)
    for vcpu in kvm.vcpus:
        for root, place in _roots(vcpu):
            held[root] = held.get(root, 0) + 1
            if is_obsolete_sp(kvm, root) and not _frees_roots(vcpu):
                where = f"previous root {place - 1}" if place else "current root"
                yield (
                    f"vCPU {vcpu.id} of VM {kvm.id} keeps root {root.hfn:#x} as its {where}: the root is "
                    "obsolete, and no request to free it is pending"
                )
    yield from _of_shadow_mmu(kvm, held)
    for root, holders in held.items():
        if not root.tdp_mmu_page:
            continue
        expected = holders + _own_references(kvm, root)
        if root.tdp_mmu_root_count.value != expected:
            yield (
                f"root {root.hfn:#x} of VM {kvm.id} has {root.tdp_mmu_root_count.value} references, "
                f"{expected} of them accounted for"
            )
        if root.role.invalid and root.tdp_mmu_scheduled_root_to_zap:
            yield f"root {root.hfn:#x} of VM {kvm.id} was invalidated and never zapped"


def _of_shadow_mmu(kvm: Kvm, held: dict[KvmMmuPage, int]) -> Iterator[str]:
    for vcpu in kvm.vcpus:
        for root in filter(None, vcpu.root_mmu.pae_root):
            held[root] = held.get(root, 0) + 1
    for sp in kvm.shadow.page_of.values():
        holders = held.get(sp, 0)
        if sp.root_count != holders:
            yield (
                f"root {sp.hfn:#x} of VM {kvm.id} has {sp.root_count} references, "
                f"{holders} of them accounted for"
            )
        waits = sp in kvm.shadow.active_mmu_pages or sp in kvm.shadow.zapped_pages
        if not waits and not holders:
            yield f"shadow page {sp.hfn:#x} of VM {kvm.id} was zapped and not freed"


def _shadow_tables(kvm: Kvm) -> int:
    """Return the table pages of the shadow MMU: shadow pages, those above PAE roots, and the dummy root."""
    special = sum(2 for vcpu in kvm.vcpus if vcpu.root_mmu.pml4_root is not None)
    return len(kvm.shadow.page_of) + special + (kvm.shadow.dummy_root is not None)


def _roots(vcpu: Vcpu) -> Iterator[tuple[KvmMmuPage, int]]:
    """Yield the shadow pages of the roots that a vCPU holds, and where: 0 is the current root, then come the
    previous ones.  A root without a shadow page is not counted."""
    for mmu in (vcpu.root_mmu, vcpu.guest_mmu):
        for place, root in enumerate((mmu.root, *mmu.prev_roots)):
            if root is not None and root.sp is not None:
                yield root.sp, place


def _frees_roots(vcpu: Vcpu) -> bool:
    request = KVM_REQ_MMU_FREE_OBSOLETE_ROOTS & KVM_REQUEST_MASK
    return bool(lib.kvm_test_request(vcpu.kvm.machine.m, vcpu.id, request))


def _own_references(kvm: Kvm, root: KvmMmuPage) -> int:
    """Return the references that the TDP MMU holds: its own, one for a zap that is due, and the worker's."""
    own = root.has_tdp_ref and not root.role.invalid
    return int(own or root.tdp_mmu_scheduled_root_to_zap) + kvm.tdp_mmu_zap_works.count(root)


def _of_machine(machine: Machine, kvms: list[Kvm]) -> list[str]:
    found = []
    roots = [root for kvm in kvms for root in kvm.tdp_mmu_roots]
    linked = sum(lib.ept_tables_below(machine.m, root.hfn, root.role.level) for root in roots)
    linked += sum(map(_shadow_tables, kvms))
    tables = lib.frames_in_use(machine.m, lib.FRAME_TABLE)
    if tables != linked:
        found.append(f"{tables} table pages are in use, {linked} of them accounted for")
    pages = lib.frames_in_use(machine.m, lib.FRAME_ROOT)
    if pages != len(roots):
        found.append(f"{pages} root pages are in use, and the VMs have {len(roots)} roots")
    taken = [vpid for kvm in kvms for vcpu in kvm.vcpus for vpid in (vcpu.vpid, vcpu.nested.vpid02)]
    vpids = len(machine.vmx_vpids) + sum(vpid != 0 for vpid in taken)
    if vpids != machine.vpids:
        found.append(f"of {machine.vpids} VPIDs {vpids} are free or a vCPU's")
    return found
