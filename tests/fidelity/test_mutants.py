"""The lines notice policies that decide otherwise than Linux does, and calls that are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from emulator.kvm import regs
from emulator.kvm.mmu import mmu, paging, shadow, shadow_map
from emulator.kvm.virt import mmu_notifier

from .compare import problems
from .lines import load

LINES = {line.id: line for line in load()}


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
    from .emulated import EmulatorDriver

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "call", "line_id"),
    [
        # kvm_mmu_commit_zap_page()
        (shadow, "kvm_flush_remote_tlbs", "shadow-memslot_delete-populated"),
        (shadow, "kvm_flush_remote_tlbs", "shadow-memslot_delete-never-touched"),
        (shadow, "kvm_flush_remote_tlbs", "shadow-memslot_delete-active"),
        (shadow, "kvm_flush_remote_tlbs", "shadow-memslot_delete-stopped"),
        (shadow, "kvm_flush_remote_tlbs", "shadow-memslot_move"),
        # kvm_mmu_zap_all_fast()
        (mmu, "kvm_make_all_cpus_request", "shadow-memslot_delete-stopped"),
        (mmu_notifier, "kvm_flush_remote_tlbs", "shadow-unmap-all-while-written"),
        (mmu_notifier, "kvm_flush_remote_tlbs", "shadow-unmap-one-page-while-written"),
        (mmu_notifier, "kvm_flush_remote_tlbs", "shadow-unmap-populated-idle"),
        (mmu_notifier, "kvm_flush_remote_tlbs", "shadow-unmap-64-pages-while-written"),
        (mmu_notifier, "kvm_flush_remote_tlbs", "shadow-mprotect-rw-to-r"),
        (mmu_notifier, "kvm_flush_remote_tlbs", "shadow-mprotect-rw-to-none"),
        (mmu_notifier, "kvm_flush_remote_tlbs", "shadow-mprotect-one-page"),
        (mmu_notifier, "kvm_flush_remote_tlbs", "shadow-thp-unmap-one-page"),
        (mmu_notifier, "kvm_flush_remote_tlbs", "shadow-thp-mprotect-one-page"),
        (mmu_notifier, "kvm_flush_remote_tlbs", "shadow-thp-unmap-all"),
        (mmu_notifier, "kvm_flush_remote_tlbs", "shadow-collapse-two-2m"),
        # mmu_set_spte()
        (shadow_map, "kvm_flush_remote_tlbs_range", "shadow-collapse-two-2m"),
        (mmu, "kvm_flush_remote_tlbs_memslot", "shadow-dirty_log_enable"),
        (mmu, "kvm_flush_remote_tlbs_memslot", "shadow-get_dirty_log-all-written"),
        (mmu, "kvm_flush_remote_tlbs_memslot", "shadow-get_dirty_log-8-pages-written"),
        (mmu, "kvm_flush_remote_tlbs_memslot", "shadow-get_dirty_log-idle-8-left"),
        # validate_direct_spte()
        (paging, "kvm_flush_remote_tlbs_range", "shadow-vm_create"),
        (shadow, "kvm_flush_remote_tlbs", "shadow-vm_destroy"),
        (shadow, "kvm_make_all_cpus_request", "shadow-vm_destroy"),
        (shadow, "kvm_flush_remote_tlbs", "shadow-vm_destroy-other-vm-unaffected"),
        (shadow, "kvm_make_all_cpus_request", "shadow-vm_destroy-other-vm-unaffected"),
        (regs, "kvm_mmu_reset_context", "shadow-cr0-wp-first-of-two"),
        (regs, "kvm_mmu_reset_context", "shadow-cr4-pse-first-of-two"),
        (regs, "request_guest_flush", "shadow-cr4-pge-first-of-two"),
        (regs, "request_guest_flush", "shadow-mov-cr3-same-first-of-two"),
        (regs, "request_guest_flush", "shadow-smi-rsm-first-of-two"),
        (regs, "request_guest_flush", "shadow-smi-rsm-second-of-two"),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if hasattr(value, "__name__") else value,
)
def test_without_one_call_kvm_does_not_reproduce_the_recording(
    module: object, call: str, line_id: str
) -> None:
    assert differs(line_id, {}, [(module, call)])
