"""The schema of litmus tests: one TOML file each.

    doc = "One paragraph: what could go wrong, and why it does or does not."
    source = "The thread (subject, date) or the commit that it is from."

    [machine]                     # all optional
    pcpus = 2                     # physical CPUs; TLBs never evict
    root_frames = 4               # frames for EPT roots: few, to be used again
    ept = true                    # false: KVM shadows the guests' page tables
    vpid = true                   # false: VM entry and VM exit flush
    hyperv = false                # true: on Hyper-V, which flushes KVM's EPTs
    vpids = 65535                 # VPIDs of the host; a nested vCPU takes two

    [[vm]]                        # one VM with one vCPU if not given
    vcpus = 2
    pages = 2048                  # guest-physical memory; memslot 0 covers it
    smm_slots = false             # true: SMM has this memory, too
    smram = 0x600                 # pages from here on belong to SMM alone
    device = 0                    # pages of memslot 2, behind memslot 0
    ept_ad = true                 # false: aging takes SPTEs' permissions
    tdp_levels = [4, 5]           # of each vCPU's EPT; all 4 if not given
    paging = false                # false: CR0.PG = 0, linear is guest-physical
    pcid = false                  # CR4.PCIDE
    apic = false                  # true: an xAPIC at the page behind memslot 0
    chunk = 32                    # SPTEs that a zap handles in one step
    prefetch = false              # true: faults without EPT map neighbours, too
    fault_around = 0              # pages that a fault maps at once; 0: one
    resched_chunks = 0            # steps until a zap yields; 0: contended only
    mmu_pages = 65536             # shadow pages at most (KVM_SET_NR_MMU_PAGES)
    invalidations = 0             # where mmu_invalidate_seq begins
    dirty_log = "protect"         # or "manual", or "initially-set"

    init = ["v0: write 0x10"]     # one after the other, before the threads
    final = ["v0: read 0x10"]     # one after the other, after the threads

    [threads.v0]                  # a vCPU's thread
    vcpu = 0                      # its number in the VM (vm = 0 if not given)
    pcpu = 0                      # the pCPU that it starts on (0 if not given)
    ops = ["read 0x10", "migrate 1"]

    [threads.mm]                  # an ioctl caller, or the host's mm
    vm = 0
    ops = ["wait v0 1", "host-unmap 0x10"]

    [stress]                      # only for runs on real threads
    # THREAD POINT [read|write] [MICROSECONDS]: it lingers there now and then
    delays = ["v0 mode write", "mm mmu_lock 400"]
    chaos = 0                     # one in so many points of the core delays

    [expect]
    needs = "averted"             # without this danger, nothing is proved
    default = "safe"
    "mutant:remote-flush-current-only" = ["use-after-free"]

Pages are numbers of 4 KiB pages, decimal or 0x hexadecimal.  `flushlab list
litmus --ops` explains the operations.  A thread's name is made of letters,
digits and "_".  `wait THREAD N` waits until THREAD has completed its first N
operations (those of `ops`); a vCPU waits in guest mode.  `block THREAD N` waits
outside of guest mode.

The verdict of a policy is
    safe           no violation, and the danger occurred (`needs`)
    violations     an access used a translation or a right that KVM had promised
                   to be gone; threads wait for ever ("deadlock"); or, at the
                   end, KVM keeps what nothing will free ("leak"): a root, a
                   table, a reference, a VPID; or its MMU's structures disagree
                   with each other, or with the host's or the guest's tables
                   ("inconsistent")
    inconclusive   no violation, but no danger that could have led to one
                   either; with `explore`, in none of the interleavings
`expect` names the policies with another verdict than safe: a list of violation
kinds means that at least one execution violates, and that every violation is of
one of these kinds.  "inconclusive" is for a policy under which the danger
cannot arise.  Where only "deadlock" is expected, `flushlab litmus` leaves the
policy to `flushlab explore`, because real threads only pause.  Keys are
presets, mutants, or "point=alternative" (several joined by ","), which is the
default policy with these points changed.  Verdicts that only `flushlab explore`
can show, with more choices of its scheduler, stand in sections of their own,
with keys and values of this form; all other verdicts are expected not to change
with these choices:

    [expect.evict]                # --adversary evict
    [expect.speculate]            # --adversary speculate
    [expect.store-buffers]        # --store-buffers

`needs`, any of:
    averted        a flush removed an entry, and an access followed that would
                   have violated by using it
    legal-stale    an entry was used between a zap and its completed flush,
                   which is allowed and must stay so
    stale-walk     a walk went on from a cached pointer to a table that no entry
                   led to any more, which is allowed until the flush and must
                   stay so
    dead-root      a root page became a root again while old entries of it were
                   cached
    kicks          another CPU's call interrupted a guest
    crossed-calls  two pCPUs called each other at a time: each had to run the
                   other's call while it waited
    retries        a fault met an mmu_notifier's invalidation, and was retried
    slot-retries   a fault met a memslot that was being deleted, and was retried
    slot-waits     an update of the memslots waited until an mmu_notifier's
                   invalidation had ended
    frozen         a fault met an SPTE that another CPU had frozen, and was
                   retried
    yields         a zap or another walk over SPTEs dropped mmu_lock before its
                   end
    pending-flush  a walk of the TDP MMU dropped mmu_lock with zapped SPTEs that
                   were not flushed yet
    root-gone      a walk of the TDP MMU dropped mmu_lock, and its root was
                   invalidated before it went on
    tables-freed   KVM freed a table
    elided         KVM elided a flush
    guest-invalidations    a guest invalidated TLB entries
    overlaps       an invalidation began while another one of its pages was in
                   progress
    dirty-compared a page was written while it was logged, and compared with its
                   copy at the end
    unsync         a guest's page table became writable and out of date, without
                   EPT
    syncs          KVM compared a shadow page with the guest's table, without
                   EPT
    prefetched     a fault mapped a neighbour of its page as well, without EPT
    readers        a kick met a vCPU that read SPTEs without mmu_lock, without
                   EPT
    table-stores   KVM emulated a guest's store to its page table, without EPT
    mmio-sptes     KVM noted in an SPTE that a gfn is in no memslot, without EPT
    apic-aliases   a guest accessed its APIC while its pCPU had cached the
                   APIC-access page as memory, too
    apic-withheld  a nested guest accessed the page of L1's APIC, and got no
                   mapping of it
    nothing        no danger: a run without violations proves the test's claim
                   by itself
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from emulator.litmus.kvm_ops import SLOT, SMM_SLOT
from emulator.litmus.leftovers import INCONSISTENT, LEAK
from emulator.litmus.ops import Op
from emulator.machine.runtime import FAULT_AROUND_MAX
from emulator.policy import canonical
from emulator.validation import Unit
from native import VIOLATION_KINDS

SAFE = "safe"
INCONCLUSIVE = "inconclusive"
# Kinds of violations: those that the core reports, and what is left over at the end.
KINDS = (*VIOLATION_KINDS, LEAK, INCONSISTENT)

Need = Literal[
    "averted",
    "legal-stale",
    "stale-walk",
    "dead-root",
    "kicks",
    "crossed-calls",
    "retries",
    "slot-retries",
    "slot-waits",
    "frozen",
    "yields",
    "pending-flush",
    "root-gone",
    "tables-freed",
    "elided",
    "guest-invalidations",
    "overlaps",
    "dirty-compared",
    "unsync",
    "syncs",
    "prefetched",
    "readers",
    "table-stores",
    "mmio-sptes",
    "apic-aliases",
    "apic-withheld",
    "nothing",
]
# Each is an OS thread, and the check that all waits can end takes time that grows with their square.
MAX_THREADS = 64
Kind = Literal["vcpu", "kvm"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class MachineSection(Section):
    pcpus: Annotated[int, Unit("pCPUs")] = Field(default=2, ge=1, le=8, strict=True)
    root_frames: Annotated[int, Unit("frames")] = Field(default=8, ge=2, le=64, strict=True)
    table_frames: Annotated[int, Unit("frames")] = Field(default=256, ge=16, le=4096, strict=True)
    guest_blocks: Annotated[int, Unit("blocks of 2 MiB")] = Field(default=4, ge=0, le=16, strict=True)
    ept: bool = True
    vpid: bool = True
    hyperv: bool = False
    vpids: Annotated[int, Unit("VPIDs")] = Field(default=65535, ge=1, le=65535, strict=True)

    @model_validator(mode="after")
    def _hyperv_with_ept(self) -> Self:
        if self.hyperv and not self.ept:
            raise ValueError("ept = true where hyperv = true: Hyper-V flushes EPTs")
        return self


class VmSection(Section):
    vcpus: Annotated[int, Unit("vCPUs")] = Field(default=1, ge=1, le=4, strict=True)
    pages: Annotated[int, Unit("pages of 4 KiB")] = Field(default=2048, ge=512, le=1 << 19, strict=True)
    smm_slots: bool = False
    smram: Annotated[int | None, Unit("pages of 4 KiB")] = Field(default=None, ge=1, strict=True)
    device: Annotated[int, Unit("pages of 4 KiB")] = Field(default=0, ge=0, le=512, strict=True)
    ept_ad: bool = True
    tdp_levels: tuple[Literal[4, 5], ...] = ()
    paging: bool = False
    pcid: bool = False
    apic: bool = False
    chunk: Annotated[int, Unit("SPTEs")] = Field(default=32, ge=1, le=512, strict=True)
    resched_chunks: Annotated[int, Unit("steps")] = Field(default=0, ge=0, le=1024, strict=True)
    fault_around: Annotated[int, Unit("pages")] = Field(default=0, ge=0, le=FAULT_AROUND_MAX, strict=True)
    prefetch: bool = False
    eager_page_split: bool = True
    mmu_pages: Annotated[int, Unit("shadow pages")] = Field(default=1 << 16, ge=16, le=1 << 16, strict=True)
    invalidations: Annotated[int, Unit("invalidations")] = Field(default=0, ge=0, lt=1 << 63, strict=True)
    dirty_log: Literal["protect", "manual", "initially-set"] = "protect"

    @property
    def gfns(self) -> int:
        """Return the pages of guest-physical address space, those of the APIC and the device included."""
        return self.device_gfn + self.device

    @property
    def device_gfn(self) -> int:
        """Return the first page of the device."""
        return self.pages + self.apic

    @property
    def slots(self) -> tuple[tuple[int, int, int], ...]:
        """Return address space, number and pages of each memslot; guest page 0 is page 0 of user memory."""
        slot = (0, SLOT, self.pages if self.smram is None else self.smram)
        return (slot, (1, SMM_SLOT, self.pages)) if self.smm_slots or self.smram is not None else (slot,)

    @model_validator(mode="after")
    def _a_level_for_each(self) -> Self:
        if self.tdp_levels and len(self.tdp_levels) != self.vcpus:
            raise ValueError(f"tdp_levels to have {self.vcpus} entries, one for each vCPU")
        if self.smram is not None and self.smram > self.pages:
            raise ValueError(f"smram of at most {self.pages:#x}, the pages of this VM")
        if self.fault_around & (self.fault_around - 1):
            raise ValueError("fault_around to be a power of 2")
        if self.pcid and not self.paging:
            raise ValueError("paging = true where pcid = true")
        return self


class ThreadSection(Section):
    vcpu: Annotated[int | None, Unit(names="a vCPU of the VM")] = Field(default=None, ge=0, strict=True)
    vm: Annotated[int, Unit(names="a VM")] = Field(default=0, ge=0, strict=True)
    pcpu: Annotated[int, Unit(names="a pCPU")] = Field(default=0, ge=0, strict=True)
    ops: tuple[str, ...] = ()

    _parsed: tuple[Op, ...] = PrivateAttr(default=())

    @property
    def is_vcpu(self) -> bool:
        return self.vcpu is not None

    @property
    def parsed(self) -> tuple[Op, ...]:
        """Return the parsed operations (emulator.litmus.ops)."""
        return self._parsed


class StressSection(Section):
    delays: tuple[str, ...] = ()
    chaos: Annotated[int, Unit("points, of which one is delayed")] = Field(
        default=0, ge=0, le=1 << 16, strict=True
    )


class Delay(Section):
    """A delay at a point of KVM's code: thread, kind of object, access ("" for any), the most microseconds
    (0: the usual length)."""

    thread: str
    point: str
    mode: str = ""
    microseconds: Annotated[int, Unit("microseconds")] = 0


Expected = str | tuple[str, ...]


def _verdict(value: object) -> Expected:
    if value in (SAFE, INCONCLUSIVE):
        return str(value)
    if isinstance(value, list | tuple) and value and all(kind in KINDS for kind in value):
        return tuple(value)
    kinds = ", ".join(KINDS)
    raise ValueError(f'"safe", "inconclusive", or a list of violations ({kinds})')


ByPolicy = dict[str, Annotated[Expected, BeforeValidator(_verdict)]]


class ExpectSection(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    needs: Annotated[tuple[Need, ...], BeforeValidator(_one_or_many)] = ("averted",)
    default: Literal["safe", "inconclusive"] = "safe"
    evict: ByPolicy = Field(default={})
    speculate: ByPolicy = Field(default={})
    store_buffers: ByPolicy = Field(default={}, alias="store-buffers")
    __pydantic_extra__: dict[str, Annotated[Expected, BeforeValidator(_verdict)]] = Field(init=False)

    @property
    def policies(self) -> dict[str, Expected]:
        """Return the verdicts other than `default`, by preset, mutant, or "point=alternative[,...]"."""
        return _by_name(self.__pydantic_extra__ or {})

    def named(self) -> dict[str, list[str]]:
        """Return the policies as the file spells them, by choice; "" is for none."""
        return {
            "": list(self.__pydantic_extra__ or {}),
            "evict": list(self.evict),
            "speculate": list(self.speculate),
            "store-buffers": list(self.store_buffers),
        }

    def apart(self) -> dict[str, dict[str, Expected]]:
        """Return the verdicts with more choices of explore's scheduler, by choice and policy."""
        return {
            "evict": _by_name(self.evict),
            "speculate": _by_name(self.speculate),
            "store-buffers": _by_name(self.store_buffers),
        }


def _by_name(policies: ByPolicy) -> ByPolicy:
    return {canonical(name): expected for name, expected in policies.items()}


class LitmusTest(Section):
    doc: str = Field(min_length=1)
    source: str = Field(min_length=1)
    machine: MachineSection = MachineSection()
    vm: tuple[VmSection, ...] = Field(default=(VmSection(),), min_length=1, max_length=4)
    init: tuple[str, ...] = ()
    final: tuple[str, ...] = ()
    threads: dict[str, ThreadSection] = Field(min_length=1, max_length=MAX_THREADS)
    stress: StressSection = StressSection()
    expect: ExpectSection = ExpectSection()

    _name: str = PrivateAttr(default="litmus")
    _path: Path | None = PrivateAttr(default=None)
    _text: str = PrivateAttr(default="")
    _init: tuple[tuple[str, Op], ...] = PrivateAttr(default=())
    _final: tuple[tuple[str, Op], ...] = PrivateAttr(default=())
    _delays: tuple[Delay, ...] = PrivateAttr(default=())

    @property
    def name(self) -> str:
        """Return the file's name, without directory and suffix."""
        return self._name

    @property
    def path(self) -> Path | None:
        """Return the file that it was read from; None: it ships with the package."""
        return self._path

    @property
    def text(self) -> str:
        """Return the text of its file, which a counterexample holds, so that it needs no other file."""
        return self._text

    @property
    def parsed_init(self) -> tuple[tuple[str, Op], ...]:
        """Return pairs of thread and operation, in order."""
        return self._init

    @property
    def parsed_final(self) -> tuple[tuple[str, Op], ...]:
        return self._final

    @property
    def delays(self) -> tuple[Delay, ...]:
        return self._delays

    @property
    def operations(self) -> int:
        """Return the number of operations of all threads, without init and final."""
        return sum(len(thread.ops) for thread in self.threads.values())
