"""A policy: an answer to each decision point, at the moment when KVM asks."""

# check_answer() has checked the strings in the table of answers, which mypy sees as Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from emulator.errors import BadInput, one_of, shown
from emulator.policy.points import BY_NAME, POINTS
from emulator.policy.state import Declarations, Scope, declarations, new_data
from native.types import Gfn

if TYPE_CHECKING:
    from emulator.kvm import decisions
    from emulator.kvm.mmu.structs import KvmMmuPage
    from emulator.kvm.notifications import Heard
    from emulator.kvm.structs import Kvm, KvmMemorySlot, Vcpu
    from emulator.machine.runtime import Cpu
    from emulator.policy.patch import KvmPatch


NO_STATE: Final[Declarations] = {"vm": (), "vcpu": (), "root": ()}

# The command-line option that names a policy.
NAMED_BY: Final = "--policy"


class PolicyError(BadInput):
    """A policy, point or alternative that does not exist, in one line."""


class Policy:
    """KVM's code asks where it decides: `if kvm.policy.root_load(cpu, vcpu, root) == "flush-current"`.

    Each method is a decision point: emulator.kvm.decisions tells when KVM asks it, emulator.policy.points
    describes its answers.  This class answers from a table: Linux 7.3's answers, except those given by name.
    A subclass may decide case by case, and act: declare state (emulator.policy.state), define moments
    (emulator.kvm.notifications) and use the machine's instructions (emulator.policy.instructions).  An answer
    may also be a proposal's: its class (emulator.policy.proposals) decides then, as soon as a VM is created
    with the policy.  `patch`: the changes of KVM's code under this policy
    (emulator.policy.patch), if any.
    """

    def __init__(self, name: str = "linux-7.3", **answers: str) -> None:
        self.name = name
        self.patch: KvmPatch | None = None
        self._spelling = ""
        self._answers: dict[str, Any] = {point.name: point.default for point in POINTS}
        # The proposals that the table names, and the methods that decide in place of the table.
        self._parts: dict[str, Policy] = {}
        self._acts: dict[str, Callable[..., Any]] = {}
        self._declared: Declarations = NO_STATE
        for point, alternative in answers.items():
            check_answer(point, alternative)
            self._answers[point] = alternative

    def __repr__(self) -> str:
        return f"<policy {self.name}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Policy):
            return NotImplemented
        return (type(self), self.name, self._answers, self.patch) == (
            type(other),
            other.name,
            other._answers,
            other.patch,
        )

    def __hash__(self) -> int:
        return hash((type(self), self.name))

    # --- the decision points ---------------------------------------------------------------------------

    def remote_flush(self, cpu: Cpu, vcpu: Vcpu) -> decisions.RemoteFlush:
        return self._decide("remote_flush", cpu, vcpu)

    def remote_kick(self, cpu: Cpu, kvm: Kvm) -> decisions.RemoteKick:
        return self._decide("remote_kick", cpu, kvm)

    def kick_wait(self, cpu: Cpu, kvm: Kvm) -> decisions.KickWait:
        return self._answers["kick_wait"]

    def root_load(self, cpu: Cpu, vcpu: Vcpu, root: KvmMmuPage) -> decisions.RootLoad:
        return self._decide("root_load", cpu, vcpu, root)

    def cached_root(self, cpu: Cpu, vcpu: Vcpu, root: KvmMmuPage) -> decisions.CachedRoot:
        return self._answers["cached_root"]

    def root_alloc(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> decisions.RootAlloc:
        return self._decide("root_alloc", cpu, kvm, root)

    def root_lock(self, cpu: Cpu, kvm: Kvm) -> decisions.RootLock:
        return self._answers["root_lock"]

    def root_put(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> decisions.RootPut:
        return self._answers["root_put"]

    def invalid_root_zap(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> decisions.InvalidRootZap:
        return self._answers["invalid_root_zap"]

    def migration(self, cpu: Cpu, vcpu: Vcpu) -> decisions.Migration:
        return self._decide("migration", cpu, vcpu)

    def migration_vpid(self, cpu: Cpu, vcpu: Vcpu) -> decisions.MigrationVpid:
        return self._answers["migration_vpid"]

    def slot_delete(self, cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> decisions.SlotDelete:
        return self._answers["slot_delete"]

    def zap_scope(self, cpu: Cpu, kvm: Kvm) -> decisions.ZapScope:
        return self._answers["zap_scope"]

    def zap(self, cpu: Cpu, kvm: Kvm) -> decisions.Zap:
        return self._decide("zap", cpu, kvm)

    def zap_root(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> decisions.ZapRoot:
        return self._answers["zap_root"]

    def zap_yield(self, cpu: Cpu, kvm: Kvm) -> decisions.ZapYield:
        return self._answers["zap_yield"]

    def map_replace(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> decisions.MapReplace:
        return self._answers["map_replace"]

    def eager_split(self, cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> decisions.EagerSplit:
        return self._answers["eager_split"]

    def split_alloc(self, cpu: Cpu, kvm: Kvm) -> decisions.SplitAlloc:
        return self._answers["split_alloc"]

    def fault_split(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> decisions.FaultSplit:
        return self._answers["fault_split"]

    def invalid_roots(self, cpu: Cpu, kvm: Kvm) -> decisions.InvalidRoots:
        return self._answers["invalid_roots"]

    def frozen_zap(self, cpu: Cpu, kvm: Kvm) -> decisions.FrozenZap:
        return self._answers["frozen_zap"]

    def mapped_fault(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> decisions.MappedFault:
        return self._answers["mapped_fault"]

    def huge_recovery(self, cpu: Cpu, kvm: Kvm) -> decisions.HugeRecovery:
        return self._answers["huge_recovery"]

    def write_protect(self, cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> decisions.WriteProtect:
        return self._answers["write_protect"]

    def notifier_flush(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> decisions.NotifierFlush:
        return self._answers["notifier_flush"]

    def age_lock(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> decisions.AgeLock:
        return self._answers["age_lock"]

    def age_flush(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> decisions.AgeFlush:
        return self._answers["age_flush"]

    def zapped_pfn(self, cpu: Cpu, kvm: Kvm) -> decisions.ZappedPfn:
        return self._answers["zapped_pfn"]

    def fault_retry(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> decisions.FaultRetry:
        return self._answers["fault_retry"]

    def entry_order(self, cpu: Cpu, vcpu: Vcpu) -> decisions.EntryOrder:
        return self._answers["entry_order"]

    def role_change(self, cpu: Cpu, vcpu: Vcpu) -> decisions.RoleChange:
        return self._answers["role_change"]

    def paging_off(self, cpu: Cpu, vcpu: Vcpu) -> decisions.PagingOff:
        return self._answers["paging_off"]

    def smep_on(self, cpu: Cpu, vcpu: Vcpu) -> decisions.SmepOn:
        return self._answers["smep_on"]

    def sregs_flush(self, cpu: Cpu, vcpu: Vcpu) -> decisions.SregsFlush:
        return self._answers["sregs_flush"]

    def pcide_on(self, cpu: Cpu, vcpu: Vcpu) -> decisions.PcideOn:
        return self._answers["pcide_on"]

    def noflush_root(self, cpu: Cpu, vcpu: Vcpu) -> decisions.NoflushRoot:
        return self._answers["noflush_root"]

    def commit_zap(self, cpu: Cpu, kvm: Kvm) -> decisions.CommitZap:
        return self._answers["commit_zap"]

    def spte_replace(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> decisions.SpteReplace:
        return self._answers["spte_replace"]

    def table_protect(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> decisions.TableProtect:
        return self._answers["table_protect"]

    def spte_update(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> decisions.SpteUpdate:
        return self._answers["spte_update"]

    def nested_transition(self, cpu: Cpu, vcpu: Vcpu) -> decisions.NestedTransition:
        return self._answers["nested_transition"]

    def nested_invept(self, cpu: Cpu, vcpu: Vcpu) -> decisions.NestedInvept:
        return self._answers["nested_invept"]

    def nested_invvpid(self, cpu: Cpu, vcpu: Vcpu) -> decisions.NestedInvvpid:
        return self._answers["nested_invvpid"]

    def vpid02_reuse(self, cpu: Cpu, vcpu: Vcpu) -> decisions.Vpid02Reuse:
        return self._answers["vpid02_reuse"]

    def hv_remote_flush(self, cpu: Cpu, kvm: Kvm) -> decisions.HvRemoteFlush:
        return self._answers["hv_remote_flush"]

    def hv_local_flush(self, cpu: Cpu, vcpu: Vcpu) -> decisions.HvLocalFlush:
        return self._answers["hv_local_flush"]

    def _decide(self, point: str, cpu: Cpu, *arguments: object) -> Any:
        """Answer a point that a proposal may decide."""
        act = self._acts.get(point)
        return self._answers[point] if act is None else act(cpu, *arguments)

    # --- moments and state -----------------------------------------------------------------------------

    def heard(self) -> Heard:
        from emulator.policy.acting import heard_by

        self._engage()
        return heard_by([*self._parts.values(), self])

    def new_data(self, scope: Scope, number: int, pcpus: int) -> object:
        name = f"{scope} {number:#x}" if scope == "root" else f"{scope} {number}"
        return new_data(self._declared[scope], name, pcpus)

    def parts(self) -> list[Policy]:
        """Return the proposals that decide in the VMs that were created last."""
        return list(self._parts.values())

    def has_proposals(self) -> bool:
        """Return whether a proposal, which has code and memory of its own, may decide a point."""
        return bool(self._wanted())

    def _engage(self) -> None:
        """Make the proposals that the table names; KVM's code, which they call, may be patched by now."""
        from emulator.policy.proposals import PROPOSALS

        names = self._wanted()
        for name in self._parts.keys() - names:
            del self._parts[name]
        for name in sorted(names):
            if type(self._parts.get(name)) is not PROPOSALS[name]:
                self._parts[name] = PROPOSALS[name]()
        self._acts.clear()
        self._acts.update(
            (point.name, getattr(self._parts[self._answers[point.name]], point.name))
            for point in POINTS
            if self._answers[point.name] in point.proposals()
        )
        self._declared = declarations(type(part) for part in [*self._parts.values(), self._acting()])

    def _wanted(self) -> set[str]:
        """Return the names of the proposals that may decide."""
        return {
            self._answers[point.name] for point in POINTS if self._answers[point.name] in point.proposals()
        }

    def _acting(self) -> Policy:
        """Return the object with the class that declares state and defines moments."""
        return self

    # --- about the policy ------------------------------------------------------------------------------

    def with_settings(self, settings: Mapping[str, str], name: str | None = None) -> Policy:
        """Return a policy of tables with the points in `settings` answered differently."""
        for point, alternative in settings.items():
            check_answer(point, alternative)
        if name is None:
            name = "+".join([self.name, *_settings(settings)])
        changed_policy = Policy(name, **{**self._answers, **settings})
        if self.patch is not None:
            changed_policy.patch = self.patch
            changed_policy._spelling = "+".join([self.spelled(), *_settings(settings)])
        return changed_policy

    def patched(self, patch: KvmPatch, spelling: str, name: str) -> Policy:
        """Return this policy with a patch, on top of its own if it has one.  `spelling`: on command lines."""
        policy = Policy(name, **self._answers)
        policy.patch = patch if self.patch is None else self.patch.together(patch)
        policy._spelling = spelling
        return policy

    def answers(self) -> dict[str, str]:
        """Return the table: the alternative by point, in the order of POINTS."""
        return dict(self._answers)

    def may_answer(self, point: str, *alternatives: str) -> bool:
        """Return whether it can ever answer `point` with one of these; true if a class decides the point."""
        decides = getattr(type(self), point) is not getattr(Policy, point)
        return decides or self._answers[point] in alternatives

    def fresh(self) -> Policy:
        """Return a policy like it without state of earlier runs: itself, unless it is a user's."""
        return self

    def confined(self) -> AbstractContextManager[None]:
        """Return a context for all executions under this policy, in which KVM's code is as the policy's patch
        or a user's file has changed it.

        Raises UserPolicyError for changes that cannot be undone.
        """
        return nullcontext() if self.patch is None else self.patch.live()

    def is_patched_by_user(self) -> bool:
        """Return whether KVM's code under it has changes that are not ours, as a mutant's are."""
        return self.patch is not None and not self.patch.is_shipped

    def blamed(self, error: BaseException) -> PolicyError | None:
        """Return the error in one line if the policy's patch has caused it."""
        return self.patch.blamed(error) if self.patch is not None and self.is_patched_by_user() else None

    def guarded(self) -> AbstractContextManager[None]:
        """Return a context for code that copies or compares a user policy's state, which may run its code."""
        return nullcontext()

    def module(self) -> ModuleType | None:
        """Return the module of a user's file: its names and classes may hold state, too."""
        return None

    def spelled(self) -> str:
        """Return its spelling on a command line: its name, or with the paths of a user's files."""
        return self._spelling or self.name

    def overrides(self) -> dict[str, str]:
        """Return the points that a user's class decides case by case, and where in its file."""
        return {}

    def given(self) -> dict[str, dict[str, int]]:
        """Return how often that class has given each alternative, by point."""
        return {}

    def mutants(self) -> tuple[str, ...]:
        """Return its known errors: mutants, and answers known to be wrong, as `point=alternative`."""
        wrong = tuple(
            f"{point.name}={self._answers[point.name]}"
            for point in POINTS
            if point.alternative(self._answers[point.name]).mutant
        )
        return (*(() if self.patch is None else self.patch.mutants), *wrong)


def parse_setting(text: str, where: str = NAMED_BY) -> tuple[str, str]:
    """Parse `point=alternative`, without checking that the point exists; raises PolicyError."""
    point, _, alternative = (part.strip() for part in text.partition("="))
    if not point or not alternative:
        raise PolicyError(where, f"found {shown(text)}", "point=alternative, as in migration=none")
    return point, alternative


def _settings(settings: Mapping[str, str]) -> list[str]:
    return [f"{point}={settings[point]}" for point in sorted(settings)]


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
