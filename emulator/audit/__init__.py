"""An audit of the MMU's structures at a quiet moment: do they agree with each other and with other tables?

A fault, a zap or a sync that leaves them in disagreement harms no guest at once: a leaf that is in no rmap is
used wrongly only after the host has taken its page and the guest has come back.  The audit finds the
disagreement itself.  arch/x86/kvm/mmu/mmu_audit.c did this for the shadow MMU before 5.18, and
check_spte_writable_invariants() does part of this for every SPTE.

shadow.py has the shadow MMU's invariants, tdp.py those of the TDP MMU, and leaf.py those of each leaf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from emulator.audit.shadow import ShadowAudit
from emulator.audit.tdp import TdpAudit
from emulator.kvm.structs import Kvm, kvm_memslots_have_rmaps, tdp_mmu_enabled
from emulator.machine.runtime import Machine

# The most findings of one audit that a report has.
_MOST = 3


def audited(machine: Machine, kvms: Iterable[Kvm], *, live: bool = False) -> str:
    """Return a sentence about each of the first disagreements; "" if there is none.

    All threads have ended, and no emulated store is under way.  `live`: they have been stopped wherever they
    were, but none of them within mmu_lock.  Then only those invariants are audited that hold whenever
    mmu_lock is free.
    """
    found: list[str] = []
    for kvm in kvms:
        for text in _findings(machine, kvm, live):
            found.append(f"VM {kvm.id}: {text}")
            if len(found) == _MOST:
                return "; ".join(found)
    return "; ".join(found)


def _findings(machine: Machine, kvm: Kvm, live: bool) -> Iterator[str]:
    if kvm_memslots_have_rmaps(kvm):
        yield from ShadowAudit(machine, kvm, live=live).findings()
    if tdp_mmu_enabled(kvm):
        yield from TdpAudit(machine, kvm, live=live).findings()
