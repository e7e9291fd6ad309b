"""Each policy answer that is known to be wrong is caught on real threads, and not by accident.

A run ends at its first violation.  Every mutant also asserts its precondition: the operation that it breaks
took place.  The right answers, on the same scenarios, are clean, and flushes averted uses.
"""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from emulator.job.job import Job
from emulator.policy import preset
from emulator.report.result import Result
from emulator.scenario.config import load_scenario

SECONDS = 30.0
SEEDS = range(1, 9)
LATE_FLUSH = "zap_yield=unlock-then-flush"
STALE = {"use-after-free", "stale-after-revoke", "cross-vm", "walk-after-free"}


def run(scenario: str, settings: dict[str, str], seconds: float = SECONDS, seed: int = 1) -> Result:
    policy = preset("linux-7.3")
    job = Job(
        load_scenario(scenario),
        policy.with_settings(settings) if settings else policy,
        seed=seed,
        duration=seconds,
        stop_at_violation=True,
    )
    return job.run(lambda snapshot: None, threading.Event())


@pytest.mark.stress
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("scenario", "settings", "kinds", "precondition"),
    [
        ("main", "migration=none", STALE | {"foreign-root", "guest-stale"}, "flushes elided"),
        ("main", "migration=none migration_vpid=none", STALE | {"guest-stale"}, "flushes elided"),
        ("main", "fault_retry=none", STALE, "faults"),
        ("tables", "map_replace=none", {"walk-after-free"}, "flushes elided"),
        ("main", "write_protect=none", {"stale-after-revoke", "lost-dirty"}, "flushes elided"),
        ("main", "root_load=none", {"foreign-root", "walk-after-free"}, "roots loaded"),
        ("main", "notifier_flush=none", STALE, "flushes elided"),
        ("main", "kick_wait=no-wait", STALE, "pages zapped"),
        ("main", "zap_yield=no-flush", STALE, "yields in zaps"),
        (
            "tables",
            "zap_yield=unlock-then-flush zap_scope=leafs-and-tables",
            {"walk-after-free"},
            "tables freed",
        ),
        ("tables", LATE_FLUSH, {"walk-after-free"}, "tables freed"),
        ("reclaim", "zap_yield=no-flush", STALE, "yields in zaps"),
    ],
)
def test_mutant_is_caught(scenario: str, settings: str, kinds: set[str], precondition: str) -> None:
    # Real races on a machine that others may use: one that has slept through a run gets another one.
    for seed in SEEDS:
        result = run(scenario, dict(setting.split("=") for setting in settings.split()), seed=seed)
        if result.verdict == "violations":
            break
    assert result.failure == ""
    assert result.verdict == "violations"
    assert result.preconditions[precondition] > 0
    found = {kind for report in result.reports for kind in report.kinds}
    assert found
    assert found & kinds, found
    assert "  filled by: vCPU" in result.reports[0].text
    assert settings.split()[0] in result.reports[0].text


@pytest.mark.stress
@pytest.mark.parametrize("scenario", ["main", "tables"])
def test_linux_is_clean(scenario: str) -> None:
    result = run(scenario, {}, seconds=8.0)
    assert result.failure == ""
    assert result.verdict == "clean", [report.text for report in result.reports[:2]]
    assert result.preconditions["uses averted"] > 0
    assert result.preconditions["dirty logs compared"] > 0
    counters = result.snapshot.counters
    assert counters["polls"] >= counters["accesses"]
    assert counters["checks"] >= counters["accesses"]


@pytest.mark.stress
@pytest.mark.timeout(300)
def test_in_the_main_job_every_kind_of_flush_averts_uses() -> None:
    """Not in one run alone: ranges are zapped a few times in each."""
    kinds = {
        *("remote_notifier", "remote_protect", "remote_recover", "remote_replace", "remote_zap"),
        *("guest", "migration", "root_load"),
    }
    made, averted = Counter[str](), Counter[str]()
    for seed in range(1, 25):
        result = run("main", {}, seconds=SECONDS / 3, seed=seed)
        assert result.verdict == "clean", [report.text for report in result.reports[:2]]
        for flush in result.snapshot.flushes:
            made[flush.reason] += flush.count
            averted[flush.reason] += flush.necessary
        made.pop("other", None)  # a yield of a split now and then, which need not avert anything
        if all(averted[kind] for kind in kinds):
            break
    assert set(made) == kinds
    assert {kind for kind in kinds if not averted[kind]} == set()


@pytest.mark.stress
def test_late_flush_is_safe_while_only_leafs_are_zapped() -> None:
    """Leafs are not freed by RCU: the order of flush and rcu_read_unlock() matters for tables only.

    The scenario is sharp: without the flush it is caught (above).
    """
    result = run("reclaim", {"zap_yield": "unlock-then-flush", "zap_scope": "leafs"}, seconds=8.0)
    assert result.failure == ""
    assert result.verdict == "clean", [report.text for report in result.reports[:2]]
    assert result.preconditions["yields in zaps"] > 0
    assert result.preconditions["uses averted"] > 0
