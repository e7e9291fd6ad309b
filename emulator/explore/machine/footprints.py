"""The footprint of each native call: the shared objects that it reads and writes.

The descriptions in the core's headers name objects by words (native/description.py); here is the object of
each word.  The EPT, the custody of the guests' pages and the frames of a kind are one object each.  That is
coarse, so steps that commute are sometimes tried in both orders.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from emulator.explore.engine.scheduler import Label
from emulator.explore.machine.described import CALLS
from emulator.kvm.mmu.spte import is_last_spte, is_shadow_present_pte, spte_to_child_pt
from native import lib
from native.description import RESULT, Access, Call, Comparison, Object, Operand
from native.types import Gfn, InvalidateSeq, Level, VmId

if TYPE_CHECKING:
    from emulator.explore.machine.control import Control

Args = tuple[Any, ...]
Template = tuple[Hashable, ...]  # an object's name, with the numbers of the arguments that select it
Masks = tuple[int, int]  # objects read and written
NOTHING: Final[Masks] = (0, 0)
Announced = tuple[Label, int, int]  # a call's label, and its certain reads and writes
# Of the arguments and the result: the further accesses.
After = Callable[[Args, Any], Masks]

# Words that name an object, alone or with the objects that their operands select.
#
# `custody` is the custody of the guests' pages, by which TLB entries are judged.  The custody of a table
# tells whether the table is free.  Each table has an object of its own, and `tables` stands for all of them:
# a walk from a cached table pointer reads it.  Averted violations are counted without an object, because no
# later step depends on the count.  The begin of an invalidation writes mmu_invalidate_in_progress and its
# range, but not mmu_invalidate_seq, so it does not conflict with a fault that only samples the latter.  The
# end writes both, but counts as a write of mmu_invalidate_seq alone.  So all calls that depend on the number
# in progress read mmu_invalidate_seq, too, except a check that no end can change (_invalidate_end()).
OBJECTS: Final[Mapping[str, tuple[str, ...]]] = {
    "block_frames": ("frames", "block"),
    "callbacks": ("callbacks",),
    "contents": ("contents",),
    "custody": ("custody",),
    "ept": ("ept",),
    "guest_frames": ("frames", "guest"),
    "memory": ("memory",),
    "mm": ("mm",),
    "mmu_invalidate_in_progress": ("mmu_invalidate_in_progress",),
    "mmu_invalidate_seq": ("mmu_invalidate_seq",),
    "mode": ("mode",),
    "progress": ("progress",),  # of litmus tests' threads
    "request": ("request",),
    "requests": ("requests",),
    "root_frames": ("frames", "root"),
    "table": ("custody of table",),
    "table_frames": ("frames", "table"),
    "tables": ("custody of tables",),
    "tlb": ("tlb",),  # of the pCPU that the thread is on; INVEPT by IPI is the interrupt's step
    "vcpu_cpu": ("vcpu->cpu",),
}


# --- words for objects that are computed after the call -----------------------------------------------------


def _invalidate_end(control: Control, vm: VmId, seq: InvalidateSeq, gfn: Gfn) -> int:
    """Return the object of an invalidation's end, as read by a check that makes a fault retry.

    The check does not read it if the merged range reaches over the gfn, because neither the last end nor the
    next one changes the result.  Before the last end, the invalidation was in progress with this range, which
    an end does not change.  After the next end, the sequence has moved past the fault's sample.
    """
    stays = lib.mmu_invalidate_retry_stays(control.machine.m, vm, seq, gfn)
    return 0 if stays else control.bit("mmu_invalidate_seq", vm)


def _freed(control: Control, table: int) -> int:
    """Note that an RCU callback will free the table."""
    control.freed.append(table)
    return 0


def _root_loaded(control: Control, vmcs: int, root: int) -> int:
    """Note the root in the EPT_POINTER of a VMCS; return its custody."""
    control.root_of[vmcs] = root
    return control.custody_of_tables((root,))


def rights(control: Control, spte: int, level: Level) -> int:
    """Return custody, as read by a leaf SPTE: it grants its rights only if custody still holds."""
    return control.bit("custody") if is_shadow_present_pte(spte) and is_last_spte(spte, level) else 0


def _table_below(control: Control, spte: int) -> int:
    return control.custody_of_tables((spte_to_child_pt(spte),))


def _tables_on_path(control: Control, removal: Any) -> int:
    """Return the custody of the tables on the path to the current entry, and of the table just completed.

    Deeper slots are stale.
    """
    way = [removal.table[level] for level in range(removal.level or removal.top, removal.top + 1)]
    return control.custody_of_tables(table for table in (*way, removal.page) if table)


COMPUTED: Final[Mapping[str, Callable[..., int]]] = {
    "freed": _freed,
    "invalidate_end": _invalidate_end,
    "rights": rights,
    "root_loaded": _root_loaded,
    "table_below": _table_below,
    "tables_on_path": _tables_on_path,
}
_RELATIONS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "not": lambda value, _: not value,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


# --- footprints ---------------------------------------------------------------------------------------------


class Late(NamedTuple):
    """Accesses that are known after the call only."""

    writes: bool
    access: Access


@dataclass(frozen=True, slots=True)
class Footprint:
    """The accesses of one call.  `step`: it begins a step; otherwise it belongs to the current one."""

    reads: tuple[Template, ...] = ()
    writes: tuple[Template, ...] = ()
    late: tuple[Late, ...] = ()
    step: bool = True
    kind: str = ""

    @property
    def writer(self) -> bool:
        return bool(self.writes) or any(late.writes for late in self.late)

    def key(self) -> Callable[[Args], Hashable]:
        """Return a function that finds, in the arguments, all that `before` depends on."""
        used = _numbers(self.reads + self.writes)
        return itemgetter(*used) if used else len

    def before(self, name: str, control: Control, args: Args) -> Announced:
        """Return the label of the call with these arguments, and its certain reads and writes."""
        mode: Literal["read", "write"] = "write" if self.writer else "read"
        obj = tuple(args[number] for number in _numbers((self.writes or self.reads)[:1]))
        label = (self.kind or name, obj if len(obj) > 1 else obj[0] if obj else None, mode)
        return label, _mask(self.reads, args, control), _mask(self.writes, args, control)

    def after(self, control: Control) -> After | None:
        """Return a function of the arguments and the result: the further accesses.  None: there are none."""
        if not self.late:
            return None
        accesses = [_access(one, control) for one in self.late]
        if len(accesses) == 1:
            return accesses[0]

        def access(args: Args, result: Any) -> Masks:
            reads = writes = 0
            for one in accesses:
                more, written = one(args, result)
                reads |= more
                writes |= written
            return reads, writes

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


def _value(operand: Operand) -> Callable[[Args, Any], Any]:
    number, field = operand
    if number == RESULT:
        return lambda args, result: result
    if field:
        return lambda args, result: getattr(args[number], field)
    return lambda args, result: args[number]


def _tested(test: Comparison) -> Callable[[Args, Any], object]:
    value = _value(test.operand)
    if test.relation == "bool":
        return value
    relation = _RELATIONS[test.relation]
    expected = getattr(lib, test.value) if isinstance(test.value, str) else test.value
    return lambda args, result: relation(value(args, result), expected)


def _selected(one: Object, control: Control) -> Callable[[Args, Any], int]:
    """Return a function of the arguments and the result: the objects that these select."""
    compute = COMPUTED.get(one.word)
    find = partial(control.bit, *OBJECTS[one.word]) if compute is None else partial(compute, control)
    if len(one.operands) == 1:
        number, field = one.operands[0]
        if number == RESULT:
            return lambda args, result: find(result)
        if not field:
            return lambda args, result: find(args[number])
        return lambda args, result: find(getattr(args[number], field))
    values = [_value(operand) for operand in one.operands]
    return lambda args, result: find(*[value(args, result) for value in values])


def _access(late: Late, control: Control) -> After:
    """Return a function of the arguments and the result: this access, if its condition is met."""
    tests = [_tested(test) for test in late.access.condition]
    certain = control.objects.mask(OBJECTS[one.word] for one in late.access.objects if not one.operands)
    selected = [_selected(one, control) for one in late.access.objects if one.operands]
    writes = late.writes

    def access(args: Args, result: Any) -> Masks:
        for test in tests:
            if not test(args, result):
                return NOTHING
        mask = certain
        for objects in selected:
            mask |= objects(args, result)
        return (0, mask) if writes else (mask, 0)

    return access


def _is_late(one: Object, access: Access) -> bool:
    return (
        bool(access.condition)
        or one.word in COMPUTED
        or any(operand.field or operand.argument == RESULT for operand in one.operands)
    )


def footprint(call: Call) -> Footprint:
    """Return the footprint of a call that a description makes a step, or a part of one."""
    certain: tuple[list[Template], list[Template]] = ([], [])
    late: list[Late] = []
    for writes, accesses in ((False, call.reads), (True, call.writes)):
        for access in accesses:
            after = tuple(one for one in access.objects if _is_late(one, access))
            if after:
                late.append(Late(writes, access._replace(objects=after)))
            certain[writes].extend(
                (*OBJECTS[one.word], *(operand.argument for operand in one.operands))
                for one in access.objects
                if one not in after
            )
    return Footprint(tuple(certain[0]), tuple(certain[1]), tuple(late), call.role == "step", call.kind)


FOOTPRINTS: dict[str, Footprint] = {
    name: footprint(call) for name, call in CALLS.items() if call.role in ("step", "part")
}
