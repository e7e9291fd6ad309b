"""The footprint of each native call: the shared objects that it reads and writes.

A template names an object by its kind and by the numbers of the arguments that select it: ("mode", 1) is the
mode of the vCPU in argument 1.  The EPT, the custody of the guests' pages and the frames of a kind are one
object each.  That is coarse, so steps that commute are sometimes tried in both orders.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from emulator.explore.engine.scheduler import Label
from emulator.kvm.mmu.spte import is_last_spte, is_shadow_present_pte, spte_to_child_pt
from native import lib

if TYPE_CHECKING:
    from emulator.explore.machine.control import Control

Args = tuple[Any, ...]
Template = tuple[Hashable, ...]  # a name and numbers of arguments, or a name alone
Access = Callable[[Args], tuple[Label, int, int]]
# (control, arguments, result) -> further objects that the call has written
Outcome = Callable[["Control", Args, Any], int]
# (control, arguments), after the call -> further objects that it has read
Seen = Callable[["Control", Args], int]


@dataclass(frozen=True, slots=True)
class Footprint:
    """The accesses of one call.  `step`: it begins a step; otherwise it belongs to the current one."""

    reads: tuple[Template, ...] = ()
    writes: tuple[Template, ...] = ()
    outcome: Outcome | None = None
    seen: Seen | None = None
    step: bool = True
    kind: str = ""

    def bind(self, name: str, control: Control) -> Access:
        """Return a function of the arguments: the label of the call, and its certain reads and writes."""
        mode: Literal["read", "write"] = "write" if self.writes or self.outcome is not None else "read"
        which = _numbers((self.writes or self.reads)[:1])
        used = _numbers(self.reads + self.writes)
        key: Callable[[Args], Hashable] = itemgetter(*used) if used else len
        known: dict[Hashable, tuple[Label, int, int]] = {}

        def access(args: Args) -> tuple[Label, int, int]:
            found = known.get(key(args))
            if found is None:
                obj = tuple(args[number] for number in which)
                label = (self.kind or name, obj if len(obj) > 1 else obj[0] if obj else None, mode)
                found = label, _mask(self.reads, args, control), _mask(self.writes, args, control)
                known[key(args)] = found
            return found

        return access


def _numbers(templates: tuple[Template, ...]) -> tuple[int, ...]:
    """Return the numbers of the arguments that the templates mention."""
    return tuple(dict.fromkeys(part for _, *parts in templates for part in parts if isinstance(part, int)))


def _mask(templates: tuple[Template, ...], args: Args, control: Control) -> int:
    """Return the objects that the templates name for these arguments."""
    return control.objects.mask(
        (name, *(args[part] if isinstance(part, int) else part for part in parts))
        for name, *parts in templates
    )


# --- accesses that are known after the call only ------------------------------------------------------------


def _request_cleared(control: Control, args: Args, result: Any) -> int:
    if not result:
        return 0
    return control.bit("request", args[1], args[2]) | control.bit("requests", args[1])


def _mode_changed(control: Control, args: Args, result: Any) -> int:
    return control.bit("mode", args[1]) if result == lib.IN_GUEST_MODE else 0


def _spte_changed(control: Control, args: Args, result: Any) -> int:
    return control.bit("ept") if result == 0 else 0


def _sptes_changed(control: Control, args: Args, result: Any) -> int:
    chunk = args[3]
    return control.bit("ept") if chunk.changed and chunk.walk != lib.TDP_COUNT else 0


def _allocated(control: Control, args: Args, result: Any) -> int:
    """Return the objects that an allocation writes: the frames of its kind, and the new page."""
    kind = control.bit("frames", "root" if args[2] == lib.FRAME_ROOT else "table")
    return kind | _new_page(control, args, result)


def _new_page(control: Control, args: Args, result: Any) -> int:
    return control.custody_of_tables((result,)) if result >= 0 else 0


def _queued(control: Control, args: Args, result: Any) -> int:
    control.freed.append(args[2])
    return 0


def _root_loaded(control: Control, args: Args) -> int:
    control.root_of[args[1]] = args[2]
    return control.custody_of_tables((args[2],))


def granted(control: Control, args: Args) -> int:
    """Return custody, as read by a leaf SPTE: it grants its rights only if custody still holds."""
    spte, level = args[-1], args[5]
    return control.bit("custody") if is_shadow_present_pte(spte) and is_last_spte(spte, level) else 0


def _root_walked(control: Control, args: Args) -> int:
    """Return the custody that a walk from the root reads: the root's, because all tables below it are linked,
    and the pages' if it marks them as it zaps, because a page that it marks must not be free."""
    chunk = args[3]
    frames = control.bit("custody") if chunk.set_pfn and chunk.changed else 0
    return control.custody_of_tables((chunk.root,)) | frames


def _link_followed(control: Control, args: Args) -> int:
    return control.custody_of_tables((spte_to_child_pt(args[3]),))


def _tables_removed(control: Control, args: Args) -> int:
    """Return the custody of the tables on the path to the current entry, and of the table just completed.

    Deeper slots are stale.
    """
    removal = args[3]
    way = [removal.table[level] for level in range(removal.level or removal.top, removal.top + 1)]
    frames = control.bit("custody") if removal.set_pfn and removal.leafs else 0
    return control.custody_of_tables(table for table in (*way, removal.page) if table) | frames


EPT: Template = ("ept",)
# CUSTODY is that of the guests' pages, which TLB entries are judged by.  The custody of a table is whether it
# is free: there is an object for each table, and CUSTODY_OF_TABLES for all together, which a walk from a
# cached table pointer reads.  Violations that flushes avert are counted, but no later step depends on that.
CUSTODY: Template = ("custody",)
CUSTODY_OF_TABLES: Template = ("custody of tables",)


def _table(number: int) -> Template:
    """Return the template for the table that this argument is the number of."""
    return "custody of table", number


# kvm->mmu_invalidate_seq; mmu_invalidate_in_progress with its range.  A fault first samples seq alone, so the
# begin of an invalidation does not conflict with that.
SEQ: Template = ("mmu_invalidate_seq", 1)
IN_PROGRESS: Template = ("mmu_invalidate_in_progress", 1)
_MM: tuple[Template, ...] = (("mm", 2), ("frames", "guest"), CUSTODY, ("memory", 2))
_ANY_TABLE: tuple[Template, ...] = (("frames", "root"), ("frames", "table"))

FOOTPRINTS: dict[str, Footprint] = {
    # vcpu->mode, vcpu->requests, vcpu->cpu
    "vcpu_mode": Footprint(reads=(("mode", 1),), kind="mode"),
    "vcpu_set_mode": Footprint(writes=(("mode", 1),), kind="mode"),
    "vcpu_exiting_guest_mode": Footprint(reads=(("mode", 1),), outcome=_mode_changed, kind="mode"),
    "kvm_make_request": Footprint(writes=(("request", 1, 2), ("requests", 1)), kind="requests"),
    "kvm_check_request": Footprint(reads=(("request", 1, 2),), outcome=_request_cleared, kind="requests"),
    "kvm_test_request": Footprint(reads=(("request", 1, 2),), kind="requests"),
    "kvm_requests": Footprint(reads=(("requests", 1),), kind="requests"),
    "vcpu_cpu": Footprint(reads=(("vcpu->cpu", 1),), kind="vcpu->cpu"),
    "vcpu_set_cpu": Footprint(writes=(("vcpu->cpu", 1),), kind="vcpu->cpu"),
    # EPT
    "vmcs_write_eptp": Footprint(seen=_root_loaded, step=False),
    "tdp_mmu_get_walk": Footprint(reads=(EPT, _table(1)), kind="sptes"),
    "spte_read": Footprint(reads=(EPT, _table(1)), step=False),
    "tdp_mmu_set_spte_atomic": Footprint(
        reads=(EPT, _table(3)), outcome=_spte_changed, seen=granted, kind="spte"
    ),
    "tdp_mmu_set_spte": Footprint(reads=(_table(3),), writes=(EPT,), seen=granted, kind="spte"),
    "tdp_walk_chunk": Footprint(reads=(EPT,), outcome=_sptes_changed, seen=_root_walked, kind="sptes"),
    "tdp_removal_begin": Footprint(reads=(EPT,), seen=_tables_removed, step=False),
    "tdp_removal_step": Footprint(writes=(EPT,), seen=_tables_removed, kind="sptes"),
    "tdp_table_holds": Footprint(reads=(EPT,), seen=_link_followed, kind="sptes"),
    "tdp_mmu_map_around": Footprint(reads=(_table(3), CUSTODY), writes=(EPT,), kind="sptes"),
    "ept_table_alloc": Footprint(outcome=_allocated, kind="table"),
    "ept_table_free": Footprint(writes=(*_ANY_TABLE, CUSTODY_OF_TABLES, _table(2)), kind="table"),
    "ept_table_free_rcu": Footprint(writes=(("callbacks",),), outcome=_queued, kind="call_rcu"),
    "tdp_mmu_make_split_table": Footprint(
        reads=(CUSTODY,), writes=(("frames", "table"),), outcome=_new_page, kind="table"
    ),
    # mmu_invalidate_seq
    "mmu_invalidate_begin": Footprint(writes=(IN_PROGRESS,), kind="mmu_invalidate_seq"),
    "mmu_invalidate_range_add": Footprint(writes=(IN_PROGRESS,), step=False),
    "mmu_invalidate_overlaps": Footprint(reads=(IN_PROGRESS,), step=False),
    "mmu_invalidate_end": Footprint(writes=(SEQ, IN_PROGRESS), kind="mmu_invalidate_seq"),
    "mmu_invalidate_seq": Footprint(reads=(SEQ,), kind="mmu_invalidate_seq"),
    "mmu_invalidate_retry_gfn": Footprint(reads=(SEQ, IN_PROGRESS), kind="mmu_invalidate_seq"),
    "mmu_invalidate_retry_range": Footprint(reads=(SEQ, IN_PROGRESS), kind="mmu_invalidate_seq"),
    # the host's memory
    "mm_fault_range": Footprint(reads=(CUSTODY,), writes=(("mm", 2), ("frames", "guest")), kind="mm"),
    "mm_unmap": Footprint(writes=_MM, kind="mm"),
    "mm_protect": Footprint(writes=_MM, kind="mm"),
    "mm_migrate": Footprint(writes=_MM, kind="mm"),
    "mm_collapse": Footprint(writes=(*_MM, ("frames", "block")), kind="mm"),
    "mm_split": Footprint(writes=(*_MM, ("frames", "block")), kind="mm"),
    "mm_huge": Footprint(reads=(("mm", 1),), step=False),
    "mm_present": Footprint(reads=(("mm", 1),), step=False),
    "mm_image_differs": Footprint(reads=(("contents", 1),), kind="compare"),
    "mm_image_lost": Footprint(reads=(("contents", 1),), step=False),
    # Belongs to the step in which the fault tests whether to retry: mmu_lock is held for read, and no step
    # that another task can take meanwhile changes the results of both calls.
    "mm_huge_custody": Footprint(reads=(("mm", 1), CUSTODY), step=False),
    # progress of litmus tests' threads
    "signal_add": Footprint(writes=(("progress", 1),), step=False),
    "signal_get": Footprint(reads=(("progress", 1),), step=False),
    # promises
    "oracle_ticket": Footprint(reads=(EPT,), step=False),
    "oracle_revoke": Footprint(reads=(EPT,), writes=(CUSTODY,), kind="promise"),
    "oracle_revoke_mask": Footprint(reads=(EPT,), writes=(CUSTODY,), kind="promise"),
    # A TLB belongs to the pCPU that the thread is on; INVEPT by IPI is the interrupt's step.
    "flush_invept_global": Footprint(writes=(("tlb", 1),), step=False),
    "flush_invept_single": Footprint(writes=(("tlb", 1),), step=False),
    "flush_invvpid_single": Footprint(writes=(("tlb", 1),), step=False),
    "flush_invvpid_all": Footprint(writes=(("tlb", 1),), step=False),
    "flush_invvpid_address": Footprint(writes=(("tlb", 1),), step=False),
}

# Local calls that read no shared state, or only memory that is an argument.
UNSHARED = frozenset(
    {
        "atomic64_inc_return",
        "atomic64_read",
        "atomic64_set",
        "bitmap_clear",
        "event_record",
        "histogram_record",
        "irqs_disabled",
        "make_nonleaf_spte",
        "make_spte",
        "test_and_set_bit",
        "test_bit",
        "vcpu_add_flush_reason",
        "vm_stat_add",
    }
)

# Calls that touch no shared state, or statistics only, or state that the point right before them names.
LOCAL = frozenset(
    {
        "atomic64_inc_return",
        "atomic64_read",
        "atomic64_set",
        "bitmap_clear",
        "counters_read",
        "counters_sum",
        "cpu_attention",
        "cpu_event",
        "cpu_power",
        "event_record",
        "flush_reset",
        "frame_tag_of",
        "guest_boot",
        "guest_add_process",
        "guest_clock",
        "guest_configure",
        "guest_invalidates_all",
        "guest_program_position",
        "guest_skip",
        "histogram_record",
        "ipi_pending",
        "irqs_disabled",
        "machine_create",
        "machine_destroy",
        "machine_error_text",
        "machine_stop",
        "machine_stopping",
        "make_nonleaf_spte",
        "make_spte",
        # Images change under user space's lock; the steps that copy pages name their contents (GuestMode).
        "mm_image_changed",
        "mm_image_create",
        "mm_image_destroy",
        "oracle_counts",
        "oracle_reports",
        "rcu_pending",
        "test_and_set_bit",
        "test_bit",
        "vcpu_add_flush_reason",
        "vcpu_create",
        "vcpu_destroy",
        "vcpu_set_paging",
        "vcpu_set_smm",
        "vcpu_take_flush_reasons",
        # A VMCS is used by its vCPU's thread alone, which waits for VMCLEAR on the pCPU that it leaves.
        # VMCLEAR of one VMCS and VMPTRLD of another on the same pCPU commute.
        "vmclear",
        "vmcs_create",
        "vmcs_destroy",
        "vmptrld",
        "vmptrst",
        "vm_create",
        "vm_destroy",
        "vm_stat",
        "vm_stats_read",
        "vm_stat_add",
    }
)
