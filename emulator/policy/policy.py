"""A policy: an answer to each decision point, at the moment when KVM asks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Final

from emulator.errors import BadInput, one_of, shown
from emulator.policy.points import BY_NAME, POINTS

if TYPE_CHECKING:
    from emulator.kvm.structs import Kvm, KvmMemorySlot, KvmMmuPage, Vcpu
    from emulator.machine.runtime import Cpu


# The command-line option that names a policy.
NAMED_BY: Final = "--policy"


class PolicyError(BadInput):
    """A policy, point or alternative that does not exist, in one line."""


class Policy:
    """KVM's code asks where it decides: `if kvm.policy.root_load(cpu, vcpu, root) == "flush-current"`.

    Each method is a decision point (emulator.policy.points) and returns the name of an alternative; its
    arguments are the objects that the kernel's code has at hand there.  This class answers from a table:
    Linux 7.3's answers, except those given by name.  A subclass may decide case by case.  `bugs`: names of
    historical or injected bugs that KVM's code has under this policy.
    """

    def __init__(self, name: str = "linux-7.3", bugs: Iterable[str] = (), **answers: str) -> None:
        self.name = name
        self.bugs = frozenset(bugs)
        self._answers = {point.name: point.default for point in POINTS}
        for point, alternative in answers.items():
            check_answer(point, alternative)
            self._answers[point] = alternative

    def __repr__(self) -> str:
        return f"<policy {self.name}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Policy):
            return NotImplemented
        return (type(self), self.name, self.bugs, self._answers) == (
            type(other),
            other.name,
            other.bugs,
            other._answers,
        )

    def __hash__(self) -> int:
        return hash((type(self), self.name, self.bugs))

    # --- the decision points ---------------------------------------------------------------------------

    def remote_flush(self, cpu: Cpu, vcpu: Vcpu) -> str:
        """`vcpu` services KVM_REQ_TLB_FLUSH on `cpu`."""
        return self._answers["remote_flush"]

    def remote_kick(self, cpu: Cpu, kvm: Kvm) -> str:
        """A request to all vCPUs of `kvm` is about to interrupt pCPUs."""
        return self._answers["remote_kick"]

    def kick_wait(self, cpu: Cpu, kvm: Kvm) -> str:
        """A flusher has interrupted pCPUs for `kvm`, and may wait until they have left guest mode."""
        return self._answers["kick_wait"]

    def root_load(self, cpu: Cpu, vcpu: Vcpu, root: KvmMmuPage) -> str:
        """`root` became current through kvm_mmu_load."""
        return self._answers["root_load"]

    def cached_root(self, cpu: Cpu, vcpu: Vcpu, root: KvmMmuPage) -> str:
        """`root` became current again without kvm_mmu_load."""
        return self._answers["cached_root"]

    def root_alloc(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> str:
        """`root` has been made, and no vCPU can find it yet."""
        return self._answers["root_alloc"]

    def root_put(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> str:
        """`root` loses its last reference; also when it is made, because the answer decides whether the TDP
        MMU keeps a reference of its own."""
        return self._answers["root_put"]

    def invalid_root_zap(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> str:
        """SPTEs of `root`, which is invalid, were zapped."""
        return self._answers["invalid_root_zap"]

    def migration(self, cpu: Cpu, vcpu: Vcpu) -> str:
        """The VMCS of `vcpu` is loaded on `cpu`, and was loaded on another pCPU before (loaded_vmcs.cpu)."""
        return self._answers["migration"]

    def migration_vpid(self, cpu: Cpu, vcpu: Vcpu) -> str:
        """The VMCS of `vcpu` is loaded on `cpu`, and was loaded on another pCPU before, where the guest may
        have invalidated entries natively."""
        return self._answers["migration_vpid"]

    def slot_delete(self, cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> str:
        """`slot` is being deleted or moved."""
        return self._answers["slot_delete"]

    def zap_scope(self, cpu: Cpu, kvm: Kvm) -> str:
        """A range of gfns is about to be zapped."""
        return self._answers["zap_scope"]

    def zap(self, cpu: Cpu, kvm: Kvm) -> str:
        """A table page has lost its link and all its entries."""
        return self._answers["zap"]

    def zap_root(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> str:
        """`root`, which no vCPU uses any more, is about to be zapped."""
        return self._answers["zap_root"]

    def zap_yield(self, cpu: Cpu, kvm: Kvm) -> str:
        """A walk that may owe a flush drops its locks."""
        return self._answers["zap_yield"]

    def map_replace(self, cpu: Cpu, kvm: Kvm, gfn: int) -> str:
        """A huge leaf replaced the table that mapped `gfn`."""
        return self._answers["map_replace"]

    def eager_split(self, cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> str:
        """Pages of `slot` are about to be write-protected for dirty logging; eager_page_split is on."""
        return self._answers["eager_split"]

    def fault_split(self, cpu: Cpu, kvm: Kvm, gfn: int) -> str:
        """A fault on `gfn` needs a 4K mapping where a huge leaf is."""
        return self._answers["fault_split"]

    def huge_recovery(self, cpu: Cpu, kvm: Kvm) -> str:
        """Dirty logging ended."""
        return self._answers["huge_recovery"]

    def write_protect(self, cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> str:
        """SPTEs of `slot` were write-protected."""
        return self._answers["write_protect"]

    def notifier_flush(self, cpu: Cpu, kvm: Kvm, gfn: int) -> str:
        """An mmu_notifier zapped SPTEs from `gfn` on."""
        return self._answers["notifier_flush"]

    def age_flush(self, cpu: Cpu, kvm: Kvm, gfn: int) -> str:
        """An mmu_notifier took the accessed bit from SPTEs from `gfn` on, for reclaim."""
        return self._answers["age_flush"]

    def zapped_pfn(self, cpu: Cpu, kvm: Kvm) -> str:
        """SPTEs are about to be zapped, by one step of a walk."""
        return self._answers["zapped_pfn"]

    def fault_retry(self, cpu: Cpu, kvm: Kvm, gfn: int) -> str:
        """A fault on `gfn` asks whether it raced an invalidation."""
        return self._answers["fault_retry"]

    def entry_order(self, cpu: Cpu, vcpu: Vcpu) -> str:
        """`vcpu` is about to enter the guest, interrupts off."""
        return self._answers["entry_order"]

    def role_change(self, cpu: Cpu, vcpu: Vcpu) -> str:
        """A register or mode of `vcpu` changed on which the role of its roots may depend."""
        return self._answers["role_change"]

    # --- about the policy ------------------------------------------------------------------------------

    def with_settings(self, settings: Mapping[str, str], name: str | None = None) -> Policy:
        """Return a policy of tables with the points in `settings` answered differently."""
        for point, alternative in settings.items():
            check_answer(point, alternative)
        if name is None:
            changed = [f"{point}={settings[point]}" for point in sorted(settings)]
            name = "+".join([self.name, *changed])
        return Policy(name, self.bugs, **{**self._answers, **settings})

    def answers(self) -> dict[str, str]:
        """Return the table: the alternative by point, in the order of POINTS."""
        return dict(self._answers)

    def may_answer(self, point: str, alternatives: Collection[str]) -> bool:
        """Return whether it can ever answer `point` with one of these; true if a class decides the point."""
        decides = getattr(type(self), point) is not getattr(Policy, point)
        return decides or self._answers[point] in alternatives

    def fresh(self) -> Policy:
        """Return a policy like it without state of earlier runs: itself, unless it is a user's."""
        return self

    def confined(self) -> AbstractContextManager[None]:
        """Return a context for all executions under this policy, which confines changes by a user's file.

        Raises UserPolicyError for changes that cannot be undone.
        """
        return nullcontext()

    def guarded(self) -> AbstractContextManager[None]:
        """Return a context for code that copies or compares a user policy's state, which may run its code."""
        return nullcontext()

    def module(self) -> ModuleType | None:
        """Return the module of a user's file, whose names and classes may hold state, too."""
        return None

    def spelled(self) -> str:
        """Return its spelling on a command line: its name, or the path of a user's file."""
        return self.name

    def overrides(self) -> dict[str, str]:
        """Return the points that a user's class decides case by case, and where in its file."""
        return {}

    def given(self) -> dict[str, dict[str, int]]:
        """Return how often that class has given each alternative, by point."""
        return {}

    def mutants(self) -> tuple[str, ...]:
        """Return its known errors: bugs, and answers that are known to be wrong, as `point=alternative`."""
        wrong = tuple(
            f"{point.name}={self._answers[point.name]}"
            for point in POINTS
            if point.alternative(self._answers[point.name]).mutant
        )
        return (*sorted(self.bugs), *wrong)


def check_answer(point: str, alternative: str, where: str = NAMED_BY) -> None:
    """Raise PolicyError unless `alternative` is one of the point's; `where`: the place that named it."""
    known = BY_NAME.get(point)
    if known is None:
        raise PolicyError(where, f"unknown decision point {shown(point)}", one_of(point, BY_NAME))
    if alternative not in known.names():
        raise PolicyError(
            f"{where}: {point}",
            f"unknown alternative {shown(alternative)}",
            one_of(alternative, known.names()),
        )
