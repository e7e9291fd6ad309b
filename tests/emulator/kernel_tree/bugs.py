"""One-line bugs for a copy of a tree: the function, a short pattern in it, and its replacement.

They hold for 6.12 and for 7.3; the patterns have no more of the kernel's text than names a place in it.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

MMU = "arch/x86/kvm/mmu"
KVM_MAIN = "virt/kvm/kvm_main.c"
# The parts of a tree that are read (emulator/kernel_tree/headers.py).
PARTS = ("Makefile", "arch/x86/kvm", "arch/x86/include", "include", "virt/kvm")


@dataclass(frozen=True, slots=True)
class Bug:
    name: str
    function: str
    pattern: str
    replacement: str
    file: str = "tdp_mmu.c"

    @property
    def path(self) -> str:
        return self.file if "/" in self.file else f"{MMU}/{self.file}"


_RCU = r"call_rcu\(([^,]*), (\w+)\)"
_CMPXCHG = r"!try_cmpxchg64\(([^,]*), &iter->old_spte, new_spte\)"
BUGS = (
    Bug("a yield does not flush", "tdp_mmu_iter_cond_resched", r"if \(flush\)", "if (0)"),
    Bug("a yield keeps the old iterator", "tdp_mmu_iter_cond_resched", r"iter->yielded = true", ""),
    Bug("a zap owes no flush", "tdp_mmu_zap_leafs", r"flush = true", "flush = false"),
    Bug("a flush is made twice", "tdp_mmu_zap_leafs", r"flush = false", ""),
    Bug("an earlier root's flush is lost", "kvm_tdp_mmu_zap_leafs", r"true, flush\)", "true, false)"),
    Bug("a table is freed without RCU", "handle_removed_pt", _RCU, r"\2(\1)"),
    Bug("a root is freed without RCU", "kvm_tdp_mmu_put_root", _RCU, r"\2(\1)"),
    Bug("a plain store in a shared walk", "__tdp_mmu_set_spte_atomic", _CMPXCHG, r"(*(\1) = new_spte, 0)"),
    Bug("a leaf over a table is not flushed", "tdp_mmu_map_handle_target_level", r"kvm_flush_\w+\(.*\)", "0"),
    Bug("invalid roots are skipped", "kvm_tdp_mmu_unmap_gfn_range", r"\| KVM_INVALID_ROOTS", ""),
    Bug("MMU-writable is left", "write_protect_gfn", r"\| shadow_mmu_writable_mask", ""),
    Bug("no write-protection after a race", "wrprot_gfn_range", r"goto retry", "continue"),
    Bug("the last SPTE is left", "tdp_mmu_zap_leafs", r"min\(end,", "min(end - 1,"),
)


_REQUEST = r"__kvm_make_request\(req, vcpu\);"
_OUTSIDE = "kvm_vcpu_exiting_guest_mode(vcpu) != OUTSIDE_GUEST_MODE"
# In the requests to all vCPUs, each with a litmus test that refutes it.
KICKS = (
    (Bug("kicks are not awaited", "kvm_kick_many_cpus", r"NULL, wait\)", "NULL, false)", KVM_MAIN),
     "remote-two-vcpus"),
    (Bug("a vCPU outside gets no request", "kvm_make_vcpu_request", _REQUEST,
         f"if ({_OUTSIDE}) __kvm_make_request(req, vcpu);", KVM_MAIN), "fault-races-unmap"),
)  # fmt: skip

# Misdeeds, each in a function that every walk over tables calls.
_WALK = r"trace_kvm_mmu_prepare_zap_page\(sp\);"
_FREE = r"kmem_cache_free\((.*), sp\);"
MISDEEDS = (
    Bug("does not compile", "handle_removed_pt", _WALK, "frobnicate_all(sp);"),
    Bug(
        "crashes",
        "handle_removed_pt",
        _WALK,
        "*(volatile int *)((long)sp->nx_huge_page_disallowed + 16) = 1;",
    ),
    Bug("never ends", "handle_removed_pt", _WALK, "while (!sp->nx_huge_page_disallowed) barrier();"),
    Bug("frees twice", "tdp_mmu_free_sp", _FREE, r"kmem_cache_free(\1, sp); kmem_cache_free(\1, sp);"),
    Bug("uses what it has freed", "tdp_mmu_free_sp", _FREE, r"kmem_cache_free(\1, sp); sp->gfn++;"),
    Bug("warns", "handle_removed_pt", _WALK, "WARN_ON_ONCE(level < 3);"),
)

# An access that no step of explored code covers: vCPUs that fault at once count in one variable.
PLAIN = Bug(
    "counts faults without an atomic", "kvm_tdp_mmu_map",
    r"int ret = RET_PF_RETRY;", "int ret = RET_PF_RETRY; static unsigned long faults; faults++;",
)  # fmt: skip


def copied(top: Path, to: Path) -> Path:
    """Copy the parts of a tree that are read; links stand for directories that nothing changes."""
    for part in PARTS:
        (to / part).parent.mkdir(parents=True, exist_ok=True)
        if part in ("arch/x86/kvm", "virt/kvm"):
            shutil.copytree(top / part, to / part)
        else:
            (to / part).symlink_to((top / part).resolve())
    return to


def apply(bug: Bug, original: Path, tree: Path) -> bool:
    """Write the file with the bug into the copy, of which all else is as in the original; return False if the
    function has no such place."""
    for path in (*(f"{MMU}/{name}" for name in ("tdp_mmu.c", "tdp_iter.c", "tdp_iter.h")), KVM_MAIN):
        shutil.copyfile(original / path, tree / path)
    text = changed(bug, (original / bug.path).read_text())
    if text is not None:
        (tree / bug.path).write_text(text)
    return text is not None


def changed(bug: Bug, text: str) -> str | None:
    """Return the file's text with the bug; None if the function has no such place."""
    start = re.search(rf"^[a-z][^;{{}}()]*\b{bug.function}\([^;{{}}]*\)\n{{", text, re.MULTILINE)
    if start is None:
        return None
    end = text.index("\n}", start.end())
    body, n = re.subn(bug.pattern, bug.replacement, text[start.end() : end], count=1)
    return text[: start.end()] + body + text[end:] if n else None
