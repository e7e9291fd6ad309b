"""Mutants: bugs that KVM had, and plausible ones, each a policy `mutant:NAME`.

A mutant is a base preset with other answers (`settings`), or with `bugs` that KVM's code has under it
(`"B6" in kvm.policy.bugs`), at the place and in the order in which the kernel had them.  Those that only cost
flushes or memory must not trip the oracle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from emulator.policy.policy import Policy, PolicyError

PREFIX = "mutant:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One of them.

    source: the commit that fixed it, or where the idea comes from.  expected: kinds of violation that it is
    caught by, the most specific of each use; none if it only costs something.
    """

    name: str
    doc: str
    source: str
    expected: tuple[str, ...] = ()
    base: str = "linux-7.3"
    settings: Mapping[str, str] = field(default_factory=dict)
    bugs: tuple[str, ...] = ()

    @property
    def cost_only(self) -> bool:
        return not self.expected

    def policy(self, base: Policy) -> Policy:
        """The policy, on top of the preset that `self.base` names."""
        changed = base.with_settings(self.settings)
        return Policy(PREFIX + self.name, {*base.bugs, *self.bugs}, **changed.answers())


MUTANTS: dict[str, Mutant] = {
    mutant.name: mutant
    for mutant in (
        Mutant(
            name="P1",
            doc="the last look at requests comes before mode = IN_GUEST_MODE: both sides miss each other",
            source="Documentation/virt/kvm/vcpu-requests.rst",
            settings={"entry_order": "requests-then-mode"},
            expected=("use-after-free",),
        ),
        Mutant(
            name="P4",
            doc="whoever flushes does not wait until the interrupted pCPUs have left guest mode",
            source="kvm_request_needs_ipi() without KVM_REQUEST_WAIT",
            settings={"kick_wait": "no-wait"},
            expected=("use-after-free",),
        ),
        Mutant(
            name="P9",
            doc="kvm_mmu_load does not flush: entries of an earlier root on the same page come back",
            source="the comment in kvm_mmu_load()",
            settings={"root_load": "none"},
            expected=("foreign-root",),
        ),
        Mutant(
            name="P10",
            doc="tables go to call_rcu, then rcu_read_unlock, then the flush: a grace period fits in between",
            source="the order that bd29677952fa (5.18) ended, kept with the batching of bb95dfb9e2df",
            settings={"zap_scope": "leafs-and-tables", "zap_yield": "unlock-then-flush"},
            expected=("walk-after-free",),
        ),
        Mutant(
            name="P15",
            doc="a fault does not ask whether it raced an invalidation",
            source="mmu_invalidate_retry_gfn()",
            settings={"fault_retry": "none"},
            expected=("use-after-free",),
        ),
        Mutant(
            name="P16",
            doc="invalidate_range_start returns before the flush, which comes in range_end",
            source="kvm_handle_hva_range()",
            settings={"notifier_flush": "at-range-end"},
            expected=("use-after-free",),
        ),
    )
}


def find_mutant(name: str) -> Mutant:
    """By its name, with or without the prefix."""
    short = name.removeprefix(PREFIX)
    try:
        return MUTANTS[short]
    except KeyError:
        close = get_close_matches(short, MUTANTS, n=1)
        guess = f" (did you mean {PREFIX}{close[0]}?)" if close else ""
        names = ", ".join(PREFIX + known for known in MUTANTS)
        raise PolicyError("policy", f"unknown mutant {name!r}", f"one of {names}{guess}") from None
