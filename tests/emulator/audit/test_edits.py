"""The audit at the end of an execution: bugs that only it finds, explored and on real threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from emulator.litmus.runner import run_test
from emulator.litmus.verdict import VIOLATIONS
from tests.emulator.policy.patch.edits import edited, written

pytestmark = pytest.mark.slow

SYNCED = """    if sp.get_access(index) == access:
        return 0
    sp.shadowed_access[index] = access
"""
DROPPED = """    if w.prefetch_invalid_gpte(gpte):
        drop_spte(cpu, kvm, sptep)
        return 1
"""
TRACKED = "slot.arch.gfn_write_track.get(sp.gfn, 0) + 1\n"
TAKEN = "taken = PT_WRITABLE_MASK | (SHADOW_MMU_WRITABLE_MASK if pt_protect else 0)\n"
MARKED = """    if spte & PT_WRITABLE_MASK and slot.dirty_track_enabled():
        mark_page_dirty_in_slot(cpu, slot, gfn)
"""
# The edit of KVM's code, the operations, and a part of the report.
EDITS = {
    "a page is counted twice": (
        ("    shadow.n_mmu_pages += 1\n", "    shadow.n_mmu_pages += 2\n"),
        [],
        "n_mmu_pages is ",
    ),
    "a page is in the hash twice": (
        (
            "shadow.mmu_page_hash.setdefault(gfn, []).insert(0, sp)\n",
            "shadow.mmu_page_hash[gfn] = [sp, sp]\n",
        ),
        [],
        "are in the hash, or elsewhere in it",
    ),
    "a table is counted twice": (
        ("    kvm.shadow.indirect_shadow_pages += 1\n", "    kvm.shadow.indirect_shadow_pages += 2\n"),
        [],
        "indirect_shadow_pages is ",
    ),
    "a link is noted twice": (
        ("    sp.parent_ptes.append(sptep)\n", "    sp.parent_ptes += [sptep, sptep]\n"),
        [],
        "which is not its child",
    ),
    "a link is noted that does not exist": (
        ("    sp.parent_ptes.append(sptep)\n", "    sp.parent_ptes += [sptep, Sptep(sptep.sp, 511)]\n"),
        [],
        "has a parent that does not link it",
    ),
    "a leaf is in the rmap twice": (
        ("    rmap_head.append(sptep)\n", "    rmap_head += [sptep, sptep]\n"),
        [],
        "1 times too often or too seldom",
    ),
    "an unsync table is not marked above": (
        ("    sp.unsync = True\n    kvm_mmu_mark_parents_unsync(sp)\n", "    sp.unsync = True\n"),
        ["map 0x102 0x12"],
        "is unsync, and entry 0 is not marked",
    ),
    "a gfn is write-tracked twice": (
        (TRACKED, TRACKED.replace("1", "2")),
        [],
        "is write-tracked 1 times too often or too seldom",
    ),
    "huge pages are disallowed twice": (
        (
            "    _update_gfn_disallow_lpage_count(slot, gfn, 1)\n",
            "    _update_gfn_disallow_lpage_count(slot, gfn, 2)\n",
        ),
        [],
        "disallows pages of level 2",
    ),
    "a table stays MMU-writable": (
        (TAKEN, "taken = PT_WRITABLE_MASK\n"),
        [],
        "lets the guest write to its table",
    ),
    "an SPTE outlives the guest's entry": (
        (DROPPED, DROPPED.replace("drop_spte(cpu, kvm, sptep)\n        return 1", "return 0")),
        ["unmap 0x100", "mov-cr3 0"],
        "maps gfn 0x10, and the guest's entry is not present",
    ),
    "an SPTE keeps rights": (
        (SYNCED, SYNCED.replace("if sp.get_access(index) == access:\n        ", "if access:\n        ")),
        ["write 0x100", "protect 0x100", "mov-cr3 0"],
        "that the guest's entry does not give",
    ),
    "an SPTE has more rights than the walk": (
        ("        sp.shadowed_access[sptep.idx] = access\n", "        sp.shadowed_access[sptep.idx] = 0\n"),
        [],
        "that its walk of the guest's tables had not",
    ),
    "a page is writable and not in the log": (
        (MARKED, ""),
        ["k: log-arm", "read 0x101"],
        "which is not marked in the dirty log",
    ),
}
TEXT = """
doc = "A guest changes its tables."
source = "here"
init = ["v0: map 0x100 0x10", "v0: map 0x101 0x11 dirty", "v0: read 0x100"]
[machine]
ept = false
[[vm]]
paging = true
[threads.v0]
vcpu = 0
ops = [{vcpu}]
[threads.k]
ops = [{vmm}]
[expect]
needs = "nothing"
"""


def written_test(path: Path, ops: list[str]) -> str:
    vmm = [op.removeprefix("k: ") for op in ops if op.startswith("k: ")]
    vcpu = [op for op in ops if not op.startswith("k: ")] or ["read 0x100"]
    if vmm:
        vcpu.insert(0, f"block k {len(vmm)}")
    quoted = {"vcpu": ", ".join(f'"{op}"' for op in vcpu), "vmm": ", ".join(f'"{op}"' for op in vmm)}
    file = path / "audited.toml"
    file.write_text(TEXT.format(**quoted))
    return str(file)


@pytest.mark.parametrize("name", EDITS)
def test_each_disagreement_is_found(name: str, tmp_path: Path) -> None:
    edit, ops, text = EDITS[name]
    test = load_test(written_test(tmp_path, ops))
    assert not explore_verdict(test, named_policy("linux-7.3"), Plan(executions=5)).kinds
    policy = named_policy(written(tmp_path, edited(edit)))
    found = explore_verdict(test, policy, Plan(executions=5, minimize=False))
    assert (found.verdict, found.kinds) == (VIOLATIONS, ("inconsistent",))
    assert found.counterexample is not None
    assert found.counterexample.violation is not None
    assert text in found.counterexample.violation["text"]


def test_a_disagreement_is_found_on_real_threads(tmp_path: Path) -> None:
    edit, ops, text = EDITS["a page is counted twice"]
    test = load_test(written_test(tmp_path, ops))
    assert not run_test(test, named_policy("linux-7.3"), 2).kinds
    outcome = run_test(test, named_policy(written(tmp_path, edited(edit))), 1)
    assert outcome.kinds == {"inconsistent": 1}
    assert text in outcome.reports[0].text


PROTECTED = "protected |= kvm_mmu_slot_gfn_write_protect(cpu, kvm, slot, sp.gfn, PG_LEVEL_4K)\n"
NESTED = """
doc = "L1 changes its EPT."
source = "here"
init = [
    "v0: vmxon", "v0: vmptrld 1", "v0: ept12-map 1 0x20 0x30", "v0: vmwrite-eptp 1", "v0: l2-enter",
    "v0: map 0x10 0x20", "v0: read 0x10", "v0: l2-exit",
]
[[vm]]
paging = true
[threads.v0]
vcpu = 0
ops = ["ept12-unmap 1 0x20", "invept 2", "l2-enter", "OP"]
[expect]
needs = "nothing"
"""


@pytest.mark.parametrize(
    ("edit", "op", "text"),
    [
        ((PROTECTED, "protected |= False\n"), "read 0x10", "lets the guest write to its table"),
        (
            EDITS["an SPTE outlives the guest's entry"][0],
            "read 0x11",
            "maps gfn 0x30, and the guest's entry is not present",
        ),
    ],
)
def test_disagreements_with_an_ept_of_l1s(edit: tuple[str, str], op: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "nested.toml"
    file.write_text(NESTED.replace("OP", op))
    test = load_test(str(file))
    assert not explore_verdict(test, named_policy("linux-7.3"), Plan(executions=5)).kinds
    found = explore_verdict(
        test, named_policy(written(tmp_path, edited(edit))), Plan(executions=5, minimize=False)
    )
    assert (found.verdict, found.kinds) == (VIOLATIONS, ("inconsistent",))
    assert found.counterexample is not None
    assert found.counterexample.violation is not None
    assert text in found.counterexample.violation["text"]


UNMAP = "kvm_tdp_mmu_unmap_gfn_range(cpu, kvm, slot, start, end, flush, reason)\n"
MADE = """    if writable and slot.dirty_track_enabled():
        mark_page_dirty_in_slot(cpu, slot, gfn)
"""
MISSED = (UNMAP, UNMAP.replace("start, end", "start + 1, end"))
# With EPT: the edit, the operations one after the other, and a part of the report.
TDP_EDITS = {
    "a zap misses the first page": (
        MISSED, ("v0: read 0x10", "k: host-unmap 0x10"), "and the host has no page there",
    ),
    "a zap misses a page that moves": (
        MISSED, ("v0: read 0x10", "k: host-migrate 0x10"), "and the host has frame ",
    ),
    "a zap misses a page that is protected": (
        MISSED, ("v0: write 0x10", "k: host-protect 0x10"), "which the host has read-only",
    ),
    "a page is writable and not in the log": (
        (MADE, ""), ("k: log-arm", "v0: read 0x11"), "which is not marked in the dirty log",
    ),
}  # fmt: skip
TDP_TEXT = """
doc = "The host changes a page that the guest does not use any more."
source = "here"
init = [{init}]
[[vm]]
fault_around = {around}
[threads.v0]
vcpu = 0
ops = [{vcpu}]
[threads.k]
ops = [{host}]
[expect]
needs = "nothing"
"""


@pytest.mark.parametrize("name", TDP_EDITS)
def test_disagreements_of_the_tdp_mmu(name: str, tmp_path: Path) -> None:
    edit, init, text = TDP_EDITS[name]
    file = tmp_path / "tdp.toml"
    quoted = ", ".join(f'"{op}"' for op in init)
    file.write_text(TDP_TEXT.format(init=quoted, around=0, vcpu='"read 0x20"', host=""))
    test = load_test(str(file))
    assert not explore_verdict(test, named_policy("linux-7.3")).kinds
    found = explore_verdict(test, named_policy(written(tmp_path, edited(edit))), Plan(minimize=False))
    assert (found.verdict, found.kinds) == (VIOLATIONS, ("inconsistent",))
    assert found.counterexample is not None
    assert found.counterexample.violation is not None
    assert text in found.counterexample.violation["text"]


def test_a_lookup_that_is_overtaken(tmp_path: Path) -> None:
    """mprotect() changes no frame, and overtakes a fault that maps the page beside its own in vain."""
    file = tmp_path / "tdp.toml"
    file.write_text(TDP_TEXT.format(init="", around=2, vcpu='"read 0x10"', host='"host-unprotect 0x11"'))
    test = load_test(str(file))
    assert not explore_verdict(test, named_policy("linux-7.3"), Plan(executions=50)).kinds
    found = explore_verdict(test, named_policy("fault_retry=none"), Plan(minimize=False))
    assert found.kinds == ("inconsistent",)
    assert found.counterexample is not None
    assert found.counterexample.violation is not None
    assert "by a lookup that an invalidation has overtaken" in found.counterexample.violation["text"]


SMM_FIRST = """
doc = "SMM has mapped a page before the guest makes a table of it: KVM protects no leaf of SMM's."
source = "here"
init = ["v1: smi", "v1: write 0x7c4", "v1: rsm"]
[machine]
ept = false
[[vm]]
vcpus = 2
paging = true
smm_slots = true
[threads.v0]
vcpu = 0
ops = ["map 0x100 0x10", "read 0x100"]
[threads.v1]
vcpu = 1
pcpu = 1
ops = []
[expect]
needs = "nothing"
"""


def test_linux_leaves_smms_leafs_of_a_table_writable(tmp_path: Path) -> None:
    """account_shadowed() protects the leafs of its own address space, in which alone the audit looks."""
    file = tmp_path / "smm.toml"
    file.write_text(SMM_FIRST)
    found = explore_verdict(load_test(str(file)), named_policy("linux-7.3"), Plan(executions=5))
    assert not found.kinds
    assert found.executions
