"""The cause that a diagram and a report name is the nature of the mutant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emulator.explain.document import Case, load_cases
from emulator.explain.explanation import explain
from emulator.explain.meanings import (
    EARLY,
    ELIDED,
    FORBIDDEN,
    LATE,
    MARKED_EARLY,
    MISSED,
    NARROW,
    OUTDATED,
    REFUSED,
    REOPENED,
    SKIPPED,
    UNNOTIFIED,
    UNPROTECTED,
)
from emulator.explore.machine.options import ExploreOptions
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import load_test, parse_test
from emulator.litmus.policies import named_policy
from emulator.litmus.runner import run_test
from emulator.policy import MUTANTS

# The report names a missing action if no event stands for its absence.
FLUSH = "the remote flush before the promise"
UNLINKED = "the flush between unlinking the table and freeing it"
REFERENCE = "a reference on the root, rcu_read_lock() or READING_SHADOW_PAGE_TABLES, or a new start"
STILL_MAPPED = "the zap of this SPTE before the host freed the page"
WRITE_PROTECTED = "the flush after write-protecting"
TABLE_PROTECTED = "the write-protection of the table in each SPTE that maps it, and the flush after that"
SYNCED = "the synchronization of KVM's table, or the INVVPID, for the guest's invalidation"

# The test that shows it; the wrong or missing action; the event that carries the explanation.
EPT12 = "the sync of KVM's tables with the EPT that L1 changed, or the flush for L1's invalidation"
EMULATED = "the flush of the guest's VPID for its invalidation, which KVM emulates"
TAGS = "tags that tell L1 and L2 apart"
APIC = "the reload of the APIC-access page (KVM_REQ_APIC_PAGE_RELOAD), or the flush after it"
CAUSES: dict[str, tuple[str, str, str]] = {
    "yield-forgets-flush": ("zap-root-yield", FLUSH, ""),
    "later-root-forgets-flush": ("zap-root-order", FLUSH, ""),
    "recovery-forgets-flush": ("huge-replaces-table", ELIDED, "elided"),
    "recovery-uses-old-iterator": ("recover-yields", REFERENCE, ""),
    "zap-flushes-accessed-only": ("aged-unmap", FLUSH, ""),
    "shadow-zap-flushes-accessed-only": ("shadow-aged-unmap", FLUSH, ""),
    "zap-flushes-writable-only": ("protected-unmap", FLUSH, ""),
    "shadow-zap-flushes-writable-only": ("shadow-protected-unmap", FLUSH, ""),
    "zap-misses-first": ("zap-range-first", SKIPPED, "promise"),
    "shadow-zap-misses-first": ("shadow-zap-range-first", SKIPPED, "promise"),
    "iterator-skips-spte": ("zap-yield-restart", SKIPPED, "promise"),
    "protect-flush-if-changed": ("log-arm-aged", ELIDED, "elided"),
    "zap-leaves-flush-to-next": ("zap-range-ioctl", ELIDED, "elided"),
    "remote-flush-current-only": ("remote-smm-twice", NARROW, "flush"),
    "notifier-without-reference": ("notifier-root-freed", REFERENCE, ""),
    "mmio-over-live-spte": ("slot-delete-mmio", FLUSH, ""),
    "init-without-flush": ("guest-init", ELIDED, "elided"),
    "log-without-protect": ("log-get", UNPROTECTED, "log_get"),
    "log-protects-before-marks": ("log-order", REOPENED, "protect"),
    "mark-before-writable": ("log-races-write", MARKED_EARLY, "exit"),
    "requests-before-mode": ("entry-races-request", MISSED, "entry"),
    "interrupts-before-entry": ("entry-races-request", MISSED, "entry"),
    "mode-before-request": ("entry-races-request", MISSED, "request"),
    "exiting-not-waited": ("kick-exiting", MISSED, "request"),
    "kick-without-wait": ("kick-waits", LATE, "ipi"),
    "flush-all-by-invvpid": ("flush-all-scope", NARROW, "flush"),
    "root-put-before-zap": ("zap-put-root", REFERENCE, ""),
    "notifier-flush-unlocked": ("notifier-second-zap", FLUSH, ""),
    "request-after-invalidation": ("zap-all-notifier", FLUSH, ""),
    "invept-of-root-address": ("root-recycled", REFUSED, "vmfail"),
    "root-load-without-flush": ("root-recycled", ELIDED, "elided"),
    "unlock-before-flush": ("zap-table-walk", UNLINKED, ""),
    "flush-before-zap": ("kick-waits", EARLY, "request"),
    "map-over-frozen": ("recover-frozen", EARLY, "request"),
    "fault-assumes-writable": ("fault-protected", FORBIDDEN, "map"),
    "fault-without-retry": ("fault-races-unmap", OUTDATED, "map"),
    "sequence-at-start": ("fault-mid-invalidation", OUTDATED, "map"),
    "sequence-after-lookup": ("fault-late-sequence", OUTDATED, "map"),
    "retry-ignores-range": ("fault-races-unmap", OUTDATED, "map"),
    "flush-at-range-end": ("notifier-range-end", LATE, "request"),
    "mask-never-cleared": ("bounce-zap", ELIDED, "elided"),
    "mask-cleared-after-kick": ("mask-cleared-late", ELIDED, "elided"),
    "mask-without-invvpid": ("guest-invlpg-away", ELIDED, "elided"),
    "migration-current-only": ("remote-smm-moved", NARROW, "flush"),
    "paging-off-without-flush": ("guest-paging-off", ELIDED, "elided"),
    "smm-keeps-root": ("smm-memory", SKIPPED, "promise"),
    "log-flush-before-protect": ("log-clear-manual", WRITE_PROTECTED, ""),
    "generation-not-checked": ("remote-smm-moved", NARROW, "flush"),
    "generation-without-invvpid": ("guest-invlpg-away", ELIDED, "elided"),
    "generation-after-kick": ("mask-cleared-late", ELIDED, "elided"),
    "generation-outlives-root": ("root-recycled-elsewhere", ELIDED, "elided"),
    "list-flush-after-rcu": ("zap-table-walk", UNLINKED, ""),
    "notifier-skips-invalid-roots": ("zap-invalid-root", STILL_MAPPED, ""),
    "zap-range-not-counted": ("zap-range-fault", OUTDATED, "map"),
    "entry-without-barrier": ("entry-races-request", MISSED, "entry"),
    "request-without-barrier": ("entry-races-request", MISSED, "entry"),
    "generation-without-barrier": ("entry-races-request", FLUSH, ""),
    "generation-entry-without-barrier": ("entry-races-request", MISSED, "entry"),
    "reader-not-awaited": ("shadow-fast-fault", REFERENCE, ""),
    "reader-without-mode": ("shadow-fast-fault", REFERENCE, ""),
    "nested-flush-before-switch": ("nested-vpid-changes", TAGS, ""),
    "nested-flush-of-wrong-vpid": ("nested-two-guests", TAGS, ""),
    "nested-flush-of-source-root": ("nested-ept-no-vpid", NARROW, "flush"),
    "nested-guest-request-left": ("nested-entry-fails", TAGS, ""),
    "nested-last-vpid-outlives-vmxoff": ("nested-vpid02-reused", ELIDED, "elided"),
    "nested-address-under-wrong-vpid": ("nested-invvpid", NARROW, "flush"),
    "nested-move-judged-by-vcpu": ("nested-l1-away", ELIDED, "elided"),
    "nested-ignores-new-vpid": ("nested-two-guests", ELIDED, "elided"),
    "nested-eptp-switch-keeps-root": ("nested-ept-switch", EPT12, ""),
    "nested-failed-entry-keeps-request": ("nested-entry-fails", TAGS, ""),
    "nested-failed-entry-without-flush": ("nested-entry-fails-no-vpid", EMULATED, ""),
    "nested-invept-compares-flags": ("nested-ept-flags", EPT12, ""),
    "nested-invept-current-only": ("nested-ept-switch", EPT12, ""),
    "nested-invept-ignored": ("nested-ept-unmap", ELIDED, "elided"),
    "nested-invvpid-by-invept": ("nested-ept-invvpid", NARROW, "flush"),
    "nested-move-flushes-one-mmu": ("nested-ept-away", NARROW, "flush"),
    "nested-sync-ignores-accessed": ("nested-ept-dirty", EPT12, ""),
    "nested-sync-ignores-dirty": ("nested-ept-dirty", EPT12, ""),
    "nested-store-not-tracked": ("nested-ept-table", EPT12, ""),
    "nested-table-left-writable": ("nested-ept-unsync", TABLE_PROTECTED, ""),
    "nested-unmap-forgets-flush": ("nested-ept-host-unmap", FLUSH, ""),
    "nested-vmfunc-keeps-root": ("nested-vmfunc", EPT12, ""),
    "nested-violation-current-only": ("nested-ept-violation", EPT12, ""),
    "nested-violation-without-sync": ("nested-ept-violation", EPT12, ""),
    "nested-without-rmaps": ("nested-ept-host-unmap", SKIPPED, "promise"),
    "nested-zap-forgets-flush": ("nested-ept-zap-range", FLUSH, ""),
    "nested-invvpid-ignored": ("nested-invvpid", ELIDED, "elided"),
    "nested-invvpid-on-wrong-pcpu": ("nested-invvpid-elsewhere", ELIDED, "elided"),
    "nested-transition-without-flush": ("nested-no-vpid", ELIDED, "elided"),
    "nested-transition-syncs-one-root": ("nested-ept0-pcid", SYNCED, ""),
    "nested-run-with-wrong-vpid": ("nested-invvpid", NARROW, "flush"),
    "guest-flush-by-invept": ("nested-ept0-no-vpid", TAGS, ""),
    "nested-invvpid-keeps-roots": ("nested-ept0-invvpid", SYNCED, ""),
    "nested-apic-page-mapped": ("nested-apic-l1-page", APIC, ""),
    "nested-apic-reload-wrong-vmcs": ("nested-apic-migrate", APIC, ""),
    "nested-role-without-guest-mode": ("nested-apic-page", APIC, ""),
    "apic-mode-without-flush": ("apic-mode", APIC, ""),
    "apic-page-not-reloaded": ("apic-migrate", APIC, ""),
    "apic-reload-without-retry": ("apic-reload-races", APIC, ""),
    "hyperv-common-root-stays": ("hyperv-two-roots", NARROW, "flush"),
    "hyperv-first-root-only": ("hyperv-two-roots", NARROW, "flush"),
    "hyperv-load-flushes-by-tag": ("hyperv-root-recycled", NARROW, "flush"),
    "hyperv-range-behind-table": ("hyperv-table-walk", NARROW, "flush"),
    "hyperv-range-of-wrong-level": ("hyperv-huge-replaces-table", NARROW, "flush"),
    "hyperv-root-not-tracked": ("hyperv-unmap", FLUSH, ""),
    "hyperv-slot-range-short": ("hyperv-log-edges", NARROW, "flush"),
    "shadow-account-without-flush": ("shadow-new-table", TABLE_PROTECTED, ""),
    "shadow-free-without-flush": ("shadow-flooded", ELIDED, "elided"),
    "shadow-guest-flush-without-sync": ("shadow-invpcid-all", SYNCED, ""),
    "shadow-guest-flush-keeps-previous": ("shadow-pge", SYNCED, ""),
    "shadow-pcide-keeps-roots": ("shadow-pcide", SYNCED, ""),
    "shadow-direct-page-stays": ("shadow-huge-aliases", SYNCED, ""),
    "shadow-direct-shares-rights": ("shadow-huge-aliases", SYNCED, ""),
    "shadow-tracked-becomes-writable": ("shadow-tracked-table", TABLE_PROTECTED, ""),
    "shadow-invlpg-current-only": ("shadow-invlpg-global", SYNCED, ""),
    "shadow-invpcid-current-only": ("shadow-invpcid-address", SYNCED, ""),
    "shadow-invpcid-retains-roots": ("shadow-invpcid-retain", SYNCED, ""),
    "shadow-load-without-sync": ("shadow-evicted-root", SYNCED, ""),
    "shadow-log-get-without-rmaps": ("shadow-log-get", UNPROTECTED, "log_get"),
    "shadow-log-skips-huge": ("shadow-log-huge", UNPROTECTED, "log_arm"),
    "shadow-recover-without-flush": ("shadow-recover", FLUSH, ""),
    "shadow-recycle-without-flush": ("shadow-oldest", UNLINKED, ""),
    "shadow-store-without-flush": ("shadow-store-drops", FLUSH, ""),
    "shadow-invlpg-without-flush": ("shadow-invlpg-drops", FLUSH, ""),
    "shadow-sync-without-flush": ("shadow-sync-drops", FLUSH, ""),
    "shadow-sync-keeps-rights": ("shadow-protect", SYNCED, ""),
    "shadow-sync-makes-writable": ("shadow-sync-two-tables", TABLE_PROTECTED, ""),
    "shadow-yield-without-flush": ("shadow-unmap-yields", FLUSH, ""),
    "shadow-wp-user-writes": ("shadow-wp-user", SYNCED, ""),
    "shadow-zap-forgets-space": ("shadow-zap-two-spaces", FLUSH, ""),
    "shadow-invlpg-without-sync": ("shadow-invlpg", SYNCED, ""),
    "shadow-link-before-sync": ("shadow-shared-tables", SYNCED, ""),
    "shadow-mmio-over-present": ("shadow-mmio-over-present", REFERENCE, ""),
    "shadow-pae-root-without-flush": ("shadow-smm", SYNCED, ""),
    "shadow-pcid-keeps-previous-roots": ("shadow-invpcid-previous", SYNCED, ""),
    "shadow-pge-flushes-current": ("shadow-pge", SYNCED, ""),
    "shadow-protect-forgets-mmu-writable": ("shadow-log-races-table", TABLE_PROTECTED, ""),
    "shadow-smm-keeps-paging": ("shadow-smm", SYNCED, ""),
    "shadow-switch-without-sync": ("shadow-mov-cr3", SYNCED, ""),
    "shadow-prefetch-assumes-writable": ("shadow-prefetch-protected", FORBIDDEN, "map"),
    "shadow-prefetch-while-invalidating": ("shadow-prefetch", OUTDATED, "map"),
    "shadow-sync-without-protect-flush": ("shadow-resync", TABLE_PROTECTED, ""),
    "shadow-track-own-space": ("shadow-smm-table", TABLE_PROTECTED, ""),
    "shadow-unmap-without-flush": ("shadow-unmap", FLUSH, ""),
    "shadow-unsync-after-spte": ("shadow-invlpg", SYNCED, ""),
}
# Found by real threads sooner than by search.
ON_THREADS = ("recovery-uses-old-iterator", "notifier-without-reference", "mmio-over-live-spte")
SAID = {
    EARLY: "too early",
    ELIDED: "elided",
    LATE: "too late",
    MARKED_EARLY: "marked before the SPTE was writable",
    MISSED: "request not seen",
    NARROW: "too narrow",
    OUTDATED: "looked up before the promise",
    FORBIDDEN: "permitted, though the host does not",
    REFUSED: "refused by the processor",
    REOPENED: "write-protected before its mark was taken",
    SKIPPED: "missing: the zap before",
    UNPROTECTED: "not write-protected again",
}


def written(path: Path, document: dict[str, Any]) -> Case:
    path.write_text(json.dumps(document))
    return load_cases(path)[0]


def explored(test: str, policy: str, path: Path, *, late_stores: bool = False) -> Case:
    plan = Plan(executions=4000, options=ExploreOptions(store_buffers=late_stores))
    found = explore_verdict(load_test(test), named_policy(policy), plan)
    assert found.counterexample is not None
    return written(path, found.counterexample.document())


def caught(test: str, policy: str, path: Path) -> Case:
    loaded = load_test(test)
    outcome = run_test(loaded, named_policy(policy), 2000, stop_at=1)
    return written(path, {"results": [outcome.document(loaded, ())]})


def test_every_mutant_that_is_caught_is_in_the_table() -> None:
    """Except those after which no access goes wrong: a thread waits for ever, a page is never freed, or KVM's
    structures disagree."""
    without_use = {"deadlock", "leak", "inconsistent"}
    assert set(CAUSES) == {name for name, mutant in MUTANTS.items() if set(mutant.expected) - without_use}


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_the_mutants(name: str, tmp_path: Path) -> None:
    test, cause, kind = CAUSES[name]
    policy, path = f"mutant:{name}", tmp_path / "case.json"
    if name in ON_THREADS:
        case = caught(test, policy, path)
    else:
        case = explored(test, policy, path, late_stores=MUTANTS[name].store_buffers)
    culprit, text = case.analysis.culprit, case.report["text"]
    if not kind:
        assert culprit is None
        assert f"\n  missing: {cause}" in text
        return
    assert culprit is not None
    assert (culprit.meaning, culprit.event.kind) == (cause, kind)
    assert f"\n  {SAID[cause]}: " in text
    others = [said for part, said in SAID.items() if part != cause]
    assert not [said for said in others if f"\n  {said}: " in text]
    assert not [missing for missing in (FLUSH, UNLINKED, REFERENCE) if missing in text]
    assert any(note.meaning == cause for note in explain(case).notes)


NO_NOTIFIER = """
doc = "khugepaged retracts the page table of a shmem mapping without a call of the mmu_notifiers."
source = "f268f6cf875f (6.1, CVE-2022-48991)"
init = ["v0: write 0x10"]
[threads.v0]
vcpu = 0
ops = ["read 0x10", "wait mm 3", "read 0x10"]
[threads.mm]
ops = ["wait v0 1", "notifier-free 0x10", "host-touch 0x11"]
"""


def test_a_free_without_a_notifier_has_its_column(tmp_path: Path) -> None:
    test = parse_test(NO_NOTIFIER, "t", None)
    found = explore_verdict(test, named_policy("linux-7.3"))
    assert found.counterexample is not None
    case = written(tmp_path / "case.json", found.counterexample.document())
    culprit = case.analysis.culprit
    assert culprit is not None
    assert (culprit.meaning, culprit.event.kind, case.label(culprit.cpu)) == (UNNOTIFIED, "free", "mm")
    assert [case.label(cpu) for cpu in case.columns] == ["CPU0", "mm"]
    notes = [note.text for note in explain(case).notes if note.meaning == UNNOTIFIED]
    assert notes == ["missing: an mmu_notifier; KVM is not told, and keeps its SPTE"]
    assert "\n  missing: an mmu_notifier before: frame 0x" in case.report["text"]


@pytest.mark.parametrize(
    ("test", "answer"),
    [
        ("shadow-flooded", "commit_zap=none"),
        ("shadow-replaced", "spte_replace=none"),
        ("shadow-log-races-table", "table_protect=none"),
        ("shadow-unmap", "notifier_flush=none"),
    ],
)
def test_without_ept_the_decision_is_the_shadow_mmus(test: str, answer: str, tmp_path: Path) -> None:
    case = explored(test, answer, tmp_path / "case.json", late_stores=False)
    assert f"(decision {answer.partition('=')[0]})" in case.report["text"]
    assert any(f"({answer})" in note.text for note in explain(case).notes)
