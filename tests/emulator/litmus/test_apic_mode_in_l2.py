"""A hole of Linux 7.3: L1's APIC is enabled while L2 is active, and the flush is one of L2's root.

vmx_set_virtual_apic_mode() flushes the current root of root_mmu at once, instead of at the VM exit.  Without
EPT in the VMCS12 that root is L2's.  L1's is a previous one, to which the VM exit returns without a flush.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.explore.results.verdict import explore_verdict
from emulator.litmus.loader import parse_test
from emulator.litmus.model import SAFE
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import VIOLATIONS
from emulator.policy import Policy

TEST = """
doc = "L1 has cached the page of its APIC as memory, and L2 enables the APIC."
source = "vmx_set_virtual_apic_mode(), Linux 7.3"
init = [
    "v0: apic-mode disabled", "v0: vmxon", "v0: vmptrld 1", "v0: vmwrite-vpid 1", "v0: l2-enter",
    "v0: map 0x11 0x30", "v0: read 0x11", "v0: l2-exit", "v0: map 0x10 0x800",
]

[machine]
ept = {ept}

[[vm]]
paging = true
apic = true

[threads.v0]
vcpu = 0
ops = ["read 0x10", "l2-enter", "apic-mode xapic", "read 0x11", "l2-exit", "apic-read 0x10"]

[expect]
"""

# The repair: flush each root of the other role.
L1_ROOTS = """
--- a/emulator/kvm/vmx/apic.py
+++ b/emulator/kvm/vmx/apic.py
@@ -14,2 +14,3 @@
 )
+from emulator.kvm.mmu.roots import mmu_roots
 from emulator.kvm.structs import Kvm, KvmMemorySlot, Vcpu
@@ -54,2 +55,6 @@
         kvm_make_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_CURRENT)
+    elif vcpu.kvm.params.ept:
+        for root in mmu_roots(vcpu.root_mmu):
+            if root.sp is not None and not root.sp.role.guest_mode:
+                vmx_flush_tlb_ept_root(cpu, vcpu.kvm, root, lib.REASON_OTHER)
     elif not vcpu.kvm.params.ept:
"""


@pytest.mark.slow
def test_l1_may_use_its_apic_as_memory_in_linux(tmp_path: Path) -> None:
    test = parse_test(TEST.format(ept="true"), "apic-mode-in-l2.toml", None)
    found = explore_verdict(test, Policy())
    assert (found.verdict, found.kinds) == (VIOLATIONS, ("apic-stale",))
    patch = tmp_path / "l1-roots.patch"
    patch.write_text(L1_ROOTS)
    found = explore_verdict(test, named_policy(str(patch)))
    assert (found.verdict, found.complete) == (SAFE, True)


def test_without_ept_the_flush_names_the_vpid_of_l1() -> None:
    found = explore_verdict(parse_test(TEST.format(ept="false"), "apic-mode-in-l2.toml", None), Policy())
    assert (found.verdict, found.complete) == (SAFE, True)
