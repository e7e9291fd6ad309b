"""The MMU's structures: struct kvm_mmu, kvm_mmu_page, and the roots that vCPUs hold.

SPTEs live in the native core, in the frames that shadow pages name; the fields here are read and written
under the lock that the kernel has for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from emulator.kvm.kvm_host import KVM_MMU_NUM_PREV_ROOTS, PG_LEVEL_512G
from emulator.machine.locks import Refcount
from emulator.machine.runtime import Cpu
from native import lib
from native.types import Hfn, Level, SpteIndex

if TYPE_CHECKING:
    from emulator.kvm.mmu.fault import KvmPageFault
    from emulator.kvm.mmu.guest_walk import KvmPagewalk
    from emulator.kvm.mmu.shadow_structs import ShadowPage
    from emulator.kvm.structs import Vcpu


# ACC_ bits of a role and of a guest's walk (mmu.h).
ACC_READ_MASK: Final[int] = lib.SPTE_READABLE
ACC_WRITE_MASK: Final[int] = lib.SPTE_WRITABLE
ACC_EXEC_MASK: Final[int] = lib.SPTE_EXECUTABLE
ACC_USER_MASK: Final[int] = lib.SPTE_USER
ACC_ALL: Final = ACC_READ_MASK | ACC_WRITE_MASK | ACC_EXEC_MASK | ACC_USER_MASK


@dataclass(frozen=True, slots=True)
class KvmMmuPageRole:
    """union kvm_mmu_page_role.

    `level`: 1 for a table of 4K entries, 4 or 5 for a root.  guest_mode: the page is a nested guest's.
    cr0_wp, cr4_smep, smap_andnot_wp: the guest's bits of these names, for shadow pages.

    `smm` is the address space.  `direct`: the page maps gfns by their number, and shadows no table of the
    guest.  `invalid` takes part in comparisons, so an invalid root matches no vCPU's role.  `access` and the
    bits below it are the same for all pages of the TDP MMU.  has_4_byte_gpte: a table of such entries has
    twice as many as a shadow page, so that several pages shadow it; quadrant: the part that this one stands
    for.  ad_disabled: the CPU sets no accessed and dirty flags, because L1's EPTP does not enable them.
    """

    level: Level = PG_LEVEL_512G
    smm: int = 0
    guest_mode: bool = False
    direct: bool = True
    invalid: bool = False
    access: int = field(default=ACC_ALL, repr=False)
    cr0_wp: bool = field(default=True, repr=False)
    cr4_smep: bool = field(default=False, repr=False)
    smap_andnot_wp: bool = field(default=False, repr=False)
    has_4_byte_gpte: bool = field(default=False, repr=False)
    quadrant: int = field(default=0, repr=False)
    ad_disabled: bool = field(default=False, repr=False)


class KvmMmuPage:
    """struct kvm_mmu_page: a shadow page.  The TDP MMU's tables below its roots are plain frame numbers.

    `hfn`: the number of the page's host frame.
    `tdp_mmu_page`: it belongs to the TDP MMU, which has roots only; the others are ShadowPages.
    `mmu_valid_gen`: the VM's generation when the ShadowPage was made.  `parent_spte`: the SPTE that would
    point to the page, with its custody.  role.invalid is set under mmu_lock held for write.

    Fields of roots: `tdp_mmu_root_count` counts the references.  `policy_data`: the policy's state of the
    root, which ends with the root.

    Fields of TDP roots: `tdp_mmu_root_count` starts at 2, for the vCPU's reference and the TDP MMU's own; or
    at 1 if the TDP MMU keeps none (`has_tdp_ref`, decision root_put).  `tdp_mmu_scheduled_root_to_zap` is set
    under mmu_lock held for write, and cleared under slots_lock.
    """

    __slots__ = (
        "has_tdp_ref",
        "hfn",
        "mmu_valid_gen",
        "parent_spte",
        "policy_data",
        "role",
        "tdp_mmu_page",
        "tdp_mmu_root_count",
        "tdp_mmu_scheduled_root_to_zap",
    )

    def __init__(
        self,
        hfn: Hfn,
        role: KvmMmuPageRole,
        *,
        tdp_mmu_page: bool,
        parent_spte: int = 0,
        policy_data: object = None,
        has_tdp_ref: bool = True,
    ) -> None:
        self.hfn = hfn
        self.role = role
        self.tdp_mmu_page = tdp_mmu_page
        self.mmu_valid_gen = 0
        self.parent_spte = parent_spte
        self.policy_data = policy_data
        self.has_tdp_ref = has_tdp_ref
        self.tdp_mmu_root_count = Refcount(2 if has_tdp_ref else 1)
        self.tdp_mmu_scheduled_root_to_zap = False

    def __repr__(self) -> str:
        return f"<root {self.hfn:#x} {self.role} refs {self.tdp_mmu_root_count.value}>"

    def invalidate(self) -> None:
        self.role = replace(self.role, invalid=True)


@dataclass(frozen=True, slots=True)
class KvmMmuRootInfo:
    """struct kvm_mmu_root_info: a root that a vCPU holds.

    pgd: the guest's page table that the root stands for, by its guest-physical address; 0 for direct roots,
    which stand for none.  hfn: the root's page, the kernel's `hpa`.  sp: its shadow page; a dummy root has
    none.
    """

    pgd: int
    hfn: Hfn
    sp: KvmMmuPage | None


class KvmMmu:
    """struct kvm_mmu: the current root and up to three previous ones (None: INVALID_PAGE).

    `root` is the current one, prev_roots has the others.  root_role: the role of the roots that it loads.
    page_fault: the handler of guests' faults, or None until kvm_init_mmu() chooses it.  sync_spte: compares
    an SPTE of an unsync page with the guest's entry; None for direct MMUs.  w: how the guest's tables are
    walked; None for direct MMUs.  inject_page_fault: hands L1 an access that its EPT forbids to a nested
    guest; None: the guest itself gets a page fault.

    pae_root: without EPT, and where the guest has no table of that level, the four pages that map one GiB
    each.  They are the current root, below the pages of pml4_root, which are made when first needed.
    """

    __slots__ = (
        "inject_page_fault",
        "pae_root",
        "page_fault",
        "pml4_root",
        "prev_roots",
        "root",
        "root_role",
        "sync_spte",
        "w",
    )

    def __init__(self, root_role: KvmMmuPageRole) -> None:
        self.root_role = root_role
        self.page_fault: Callable[[Cpu, Vcpu, KvmPageFault], int] | None = None
        self.sync_spte: Callable[[Cpu, Vcpu, ShadowPage, SpteIndex], int] | None = None
        self.w: KvmPagewalk | None = None
        self.inject_page_fault: Callable[[Cpu, Vcpu, KvmPageFault, int], None] | None = None
        self.root: KvmMmuRootInfo | None = None
        self.pae_root: list[ShadowPage | None] = [None] * 4
        self.pml4_root: tuple[Hfn, Hfn] | None = None
        self.prev_roots: list[KvmMmuRootInfo | None] = [None] * KVM_MMU_NUM_PREV_ROOTS
