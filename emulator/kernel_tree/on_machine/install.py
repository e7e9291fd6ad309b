"""Put a tree's TDP MMU in the place of the model's, for the rest of this process's life."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from emulator import audit
from emulator.audit.tdp import TdpAudit
from emulator.explore.results import record
from emulator.job import job
from emulator.kernel_tree.on_machine import tdp_mmu
from emulator.kernel_tree.on_machine.core import Tree
from emulator.kernel_tree.on_machine.story import Storyteller, telling_collector
from emulator.kernel_tree.on_machine.tables import TreeTablesAudit
from emulator.kernel_tree.replace import replace_function
from emulator.kvm.mmu import page_fault, tdp_dirty, tdp_map, tdp_roots
from emulator.kvm.mmu import tdp_mmu as model
from emulator.kvm.structs import Kvm
from emulator.kvm.virt import requests, vm
from emulator.litmus import runner
from emulator.report.violation import ReportCollector

# The functions of the model's TDP MMU that other modules call; tdp_mmu.py has a function of each name.
REPLACED: Final[tuple[Callable[..., Any], ...]] = (
    page_fault.fast_page_fault,
    tdp_map.kvm_tdp_mmu_map,
    tdp_roots.kvm_tdp_mmu_alloc_root,
    tdp_roots.kvm_tdp_mmu_put_root,
    tdp_roots.kvm_tdp_mmu_invalidate_roots,
    model.kvm_tdp_mmu_zap_invalidated_roots,
    model.kvm_tdp_mmu_zap_all,
    model.kvm_mmu_uninit_tdp_mmu,
    model.kvm_tdp_mmu_zap_leafs,
    model.kvm_tdp_mmu_unmap_gfn_range,
    model.kvm_tdp_mmu_age_gfn_range,
    tdp_dirty.kvm_tdp_mmu_wrprot_slot,
    tdp_dirty.kvm_tdp_mmu_write_protect_gfn,
    tdp_dirty.kvm_tdp_mmu_clear_dirty_pt_masked,
    tdp_dirty.kvm_tdp_mmu_try_split_huge_pages,
    tdp_dirty.kvm_tdp_mmu_recover_huge_pages,
    requests.kvm_make_all_cpus_request,
    requests.kvm_flush_remote_tlbs,
)


def install(path: Path, report_fd: int = -1) -> Tree:
    """Load the object at `path`, and make each VM that is created from now on use it."""
    tree = Tree(path, report_fd)
    tdp_mmu.TreeKvm.loaded = tree
    for function in REPLACED:
        replace_function(function, getattr(tdp_mmu, function.__name__))
    setattr(vm, Kvm.__name__, tdp_mmu.TreeKvm)
    setattr(audit, TdpAudit.__name__, TreeTablesAudit)
    return tree


def tell_stories(teller: Storyteller) -> None:
    """Make each report of a violation name the functions of the tree's code that led to it."""
    for module in (job, runner, record):
        setattr(module, ReportCollector.__name__, telling_collector(teller))
