"""A hole of Linux 7.3: SMM keeps a writable SPTE of a page that becomes a table outside of SMM.

account_shadowed() write-protects the page by the rmap of the memslot of the table's own address space.  Since
7.2 faults ask both address spaces (0f38453cdb2e, 2e8a2c1b0306), but an SPTE that is writable already does not
fault.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import load_test
from emulator.litmus.model import INCONCLUSIVE, SAFE
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import VIOLATIONS
from emulator.policy import Policy

TEST = """
doc = "SMM stores to a page before the guest outside of SMM makes it a table, and again after that."
source = "account_shadowed(), Linux 7.3"
init = ["v1: smi", "v1: write {page}", "v0: map 0x300 0x10", "v0: read 0x300"]

[machine]
ept = false

[[vm]]
vcpus = 2
paging = true
smm_slots = true

[threads.v0]
vcpu = 0
ops = ["read 0x300"]

[threads.v1]
vcpu = 1
pcpu = 1
ops = ["write {page}", "rsm"]

[expect]
needs = ["table-stores"]
"""

# The repair: protect the page by the rmaps of both address spaces.
BOTH_SPACES = """
--- a/emulator/kvm/mmu/page_track.py
+++ b/emulator/kvm/mmu/page_track.py
@@ -91,4 +91,5 @@
     kvm_mmu_gfn_disallow_lpage(slot, sp.gfn)
-    if kvm_mmu_slot_gfn_write_protect(cpu, kvm, slot, sp.gfn, PG_LEVEL_4K):
+    both = slots_of_gfn(cpu, kvm, slot, sp.gfn)
+    if any([kvm_mmu_slot_gfn_write_protect(cpu, kvm, one, sp.gfn, PG_LEVEL_4K) for one in both]):
         kvm_flush_remote_tlbs(cpu, kvm, lib.REASON_REMOTE_PROTECT)
     stores_exit(cpu, kvm, sp.gfn)
"""

# The gfns that the guest's OS takes for the tables of page 0x300, of level 2 and 1.  A table of level 1
# becomes unsync with the repair, so that no store exits, which is the test's precondition.
TABLES = [("0x7c3", SAFE), ("0x7c4", INCONCLUSIVE)]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "repaired"), TABLES)
def test_a_store_of_smm_goes_unseen_in_linux(tmp_path: Path, page: str, repaired: str) -> None:
    file, patch = tmp_path / "smm-writable.toml", tmp_path / "both-spaces.patch"
    patch.write_text(BOTH_SPACES)
    file.write_text(TEST.format(page=page))
    found = explore_verdict(load_test(str(file)), Policy(), Plan(executions=100))
    assert (found.verdict, found.kinds) == (VIOLATIONS, ("missed-guest-write",))
    found = explore_verdict(load_test(str(file)), named_policy(str(patch)), Plan(executions=100))
    assert (found.verdict, found.kinds) == (repaired, ())
