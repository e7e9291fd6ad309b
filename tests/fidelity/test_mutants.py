"""The lines notice policies that decide otherwise than Linux does, and calls that are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import pytest

from emulator.kvm import regs
from emulator.kvm.mmu import mmu, paging, shadow, shadow_map, track_write
from emulator.kvm.virt import mmu_notifier
from emulator.kvm.vmx import vmx

from .compare import problems
from .emulated import EmulatorDriver
from .lines import load

LINES = {line.id: line for line in load()}
CAPABILITIES = EmulatorDriver.capabilities


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "alternative", "line_id"),
    [
        ("migration", "none", "migrate-running"),
        ("migration", "active-roots", "migrate-running"),
        ("notifier_flush", "none", "unmap-populated-idle"),
        ("write_protect", "none", "dirty_log_enable"),
        ("write_protect", "none", "get_dirty_log-8-pages-written"),
        ("write_protect", "none", "manual-clear-all"),
        ("root_load", "none", "memslot_delete-active"),
        ("map_replace", "none", "collapse-two-2m"),
        ("zap_yield", "no-flush", "unmap-64-pages-one-yield"),
        ("remote_flush", "current-context", "unmap-one-page-while-written"),
        ("slot_delete", "zap-slot-leafs", "memslot_delete-populated"),
        ("age_flush", "none", "age-for-reclaim"),
        ("fault_split", "split", "thp-dirty_log_enable-lazy-zap"),
        ("fault_split", "zap", "thp-dirty_log_enable-lazy"),
        ("huge_recovery", "in-place", "thp-dirty_log_disable"),
        ("role_change", "keep-roots", "smi-rsm"),
        ("role_change", "no-guest-flush", "smi-rsm"),
        ("role_change", "unload-all", "cr0-wp"),
        ("role_change", "keep-roots", "cr4-pse"),
        ("root_load", "root-tlb-gen", "smi-rsm"),
        ("root_load", "none", "shadow-memslot_delete-active"),
        ("root_load", "none", "shadow-cr0-wp-first-of-two"),
        ("root_load", "none", "shadow-smi-rsm-first-of-two"),
    ],
)
def test_other_decisions_do_not_reproduce_the_recording(point: str, alternative: str, line_id: str) -> None:
    assert differs(line_id, {point: alternative})


def differs(line_id: str, settings: Mapping[str, str], without: Sequence[tuple[object, str]] = ()) -> bool:
    """Return whether the line's counts differ from the recorded ones, where the operation took effect.

    without: module and name of functions that these modules do not call during the operation.
    """
    line = LINES[line_id]
    vcpus = line.vcpus[-1]
    with (
        EmulatorDriver().boot(line.machine, vcpus, line.presets[-1], settings) as bench,
        pytest.MonkeyPatch.context() as patch,
    ):
        for step in line.setup:
            bench.step(step)
            bench.settle()
        for module, call in without:
            patch.setattr(module, call, lambda *args, **kwargs: None)
        before = bench.counts(line.vm)
        result = bench.step(line.do)
        bench.settle()
        counts = bench.counts(line.vm).since(before)
    found = problems(line, vcpus, result, [counts])
    return any(not problem.startswith("precondition") for problem in found)


# Calls that a module of KVM's code makes, and lines that miss their effect.
CALLS: list[tuple[ModuleType, str, list[str]]] = [
    # kvm_mmu_commit_zap_page()
    (
        shadow,
        "kvm_flush_remote_tlbs",
        [
            "shadow-memslot_delete-populated",
            "shadow-memslot_delete-never-touched",
            "shadow-memslot_delete-active",
            "shadow-memslot_delete-stopped",
            "shadow-memslot_delete-previous-roots",
            "shadow-memslot_move",
            "shadow-vm_destroy",
            "shadow-vm_destroy-other-vm-unaffected",
        ],
    ),
    # kvm_mmu_zap_all_fast()
    (mmu, "kvm_make_all_cpus_request", ["shadow-memslot_delete-stopped"]),
    # __kvm_mmu_prepare_zap_page(), of a root in use
    (
        shadow,
        "kvm_make_all_cpus_request",
        ["shadow-vm_destroy", "shadow-vm_destroy-other-vm-unaffected"],
    ),
    (
        mmu_notifier,
        "kvm_flush_remote_tlbs",
        [
            "shadow-unmap-all-while-written",
            "shadow-unmap-one-page-while-written",
            "shadow-unmap-populated-idle",
            "shadow-unmap-64-pages-while-written",
            "shadow-mprotect-rw-to-r",
            "shadow-mprotect-rw-to-none",
            "shadow-mprotect-one-page",
            "shadow-thp-unmap-one-page",
            "shadow-thp-mprotect-one-page",
            "shadow-thp-unmap-all",
            "shadow-collapse-two-2m",
        ],
    ),
    # mmu_set_spte()
    (shadow_map, "kvm_flush_remote_tlbs_range", ["shadow-collapse-two-2m"]),
    # validate_direct_spte()
    (
        paging,
        "kvm_flush_remote_tlbs_range",
        ["shadow-vm_create", "shadow-mov-cr3-new", "shadow-mov-cr3-third"],
    ),
    # kvm_mmu_track_write()
    (track_write, "kvm_mmu_remote_flush_or_zap", ["shadow-pt-store-upper"]),
    (
        mmu,
        "kvm_flush_remote_tlbs_memslot",
        [
            "shadow-dirty_log_enable",
            "shadow-get_dirty_log-all-written",
            "shadow-get_dirty_log-8-pages-written",
            "shadow-get_dirty_log-idle-8-left",
        ],
    ),
    (
        regs,
        "kvm_mmu_reset_context",
        [
            "shadow-cr0-wp",
            "shadow-cr0-wp-20",
            "shadow-cr0-wp-first-of-two",
            "shadow-32-bit-cr0-wp",
            "shadow-cr4-pse",
            "shadow-cr4-pse-20",
            "shadow-cr4-pse-first-of-two",
            "shadow-cr0-pg",
            "shadow-cr4-smep",
            "ept-cr0-pg",
            "ept-cr4-smep",
        ],
    ),
    (
        regs,
        "request_guest_flush",
        [
            "shadow-cr4-pge",
            "shadow-cr4-pge-20",
            "shadow-cr4-pge-first-of-two",
            "shadow-32-bit-cr4-pge",
            "shadow-mov-cr3-same",
            "shadow-mov-cr3-same-5",
            "shadow-mov-cr3-same-first-of-two",
            "shadow-mov-cr3-new",
            "shadow-mov-cr3-back",
            "shadow-mov-cr3-again",
            "shadow-mov-cr3-in-turn",
            "shadow-32-bit-mov-cr3-new",
            "shadow-32-bit-mov-cr3-back",
            "shadow-cr0-pg",
            "shadow-cr0-pg-20",
            "shadow-cr4-smep",
            "shadow-cr4-smep-20",
            "ept-cr0-pg",
            "ept-cr0-pg-20",
            "ept-cr4-smep",
            "ept-cr4-smep-20",
            "shadow-smi-rsm-first-of-two",
            "shadow-smi-rsm-second-of-two",
        ],
    ),
    (vmx, "request_tlb_flush", ["shadow-migrate"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "call", "line_id"),
    [
        pytest.param(module, call, line_id, id=f"{module.__name__.rpartition('.')[2]}-{call}-{line_id}")
        for module, call, line_ids in CALLS
        for line_id in line_ids
    ],
)
def test_without_one_call_kvm_does_not_reproduce_the_recording(
    module: ModuleType, call: str, line_id: str
) -> None:
    assert differs(line_id, {}, [(module, call)])


def test_each_count_without_ept_is_one_that_a_missing_call_changes() -> None:
    missed = {line_id for *_, line_ids in CALLS for line_id in line_ids}
    counted = {line.id for line in LINES.values() if not line.machine.ept and line.expect}
    assert {line_id for line_id in counted - missed if LINES[line_id].needs <= CAPABILITIES} == set()
