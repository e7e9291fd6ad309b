"""The lines notice policies that decide otherwise than Linux does."""

from __future__ import annotations

import pytest

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
    ],
)
def test_other_decisions_do_not_reproduce_the_recording(point: str, alternative: str, line_id: str) -> None:
    from .emulated import EmulatorDriver

    line = LINES[line_id]
    vcpus = line.vcpus[-1]
    with EmulatorDriver().boot(line.machine, vcpus, line.presets[-1], {point: alternative}) as bench:
        for step in line.setup:
            bench.step(step)
            bench.settle()
        before = bench.counts(line.vm)
        result = bench.step(line.do)
        bench.settle()
        counts = bench.counts(line.vm).since(before)
    found = problems(line, vcpus, result, [counts])
    assert any(not problem.startswith("precondition") for problem in found)
