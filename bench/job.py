"""kvm_flush_remote_tlbs as it occurs in the main job, beside the machine's real IPI.

The job is `flushlab run` as users type it, in a process of its own.  Its histograms have a bucket per power
of two, so a percentile is a bound, at most twice the true value.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from bench import programs
from bench.benchmark import Context
from bench.errors import BenchFailed
from bench.figures import Figure

# Seconds that the job may take beyond its duration: starting, stopping, and a busy machine.
_SPARE_SECONDS = 120


def job(context: Context) -> Iterator[Figure]:
    # Both cores are busy during the job, so measure the IPI's price before and after it.
    before = list(programs.ipi(context))
    context.say(f"flushlab run for {context.sizes.job_seconds} s")
    run = run_job(context.sizes.job_seconds)
    after = list(programs.ipi(context))
    flushes = run["histograms"]["remote_flush"]
    if not flushes["count"]:
        raise BenchFailed("flushlab run: no kvm_flush_remote_tlbs")
    for percentile, earlier, later in zip(("p50", "p99"), before, after, strict=True):
        value = flushes[percentile] * 1e9
        yield Figure(
            name=f"kvm_flush_remote_tlbs, {percentile}",
            what=f"as it occurs in the main job, {flushes['count']} times; upper bound of the bucket",
            unit="ns",
            values=(value, value),
            reference_name=f"{earlier.reference_name}, {percentile}",
            references=(earlier.reference, later.reference),
            ratio_of="value/reference",
        )


def run_job(seconds: int) -> Mapping[str, Any]:
    """Run the job and return its JSON document; raise BenchFailed if it fails or its counters are wrong."""
    command = [sys.executable, "-m", "emulator", "run", "--duration", f"{seconds}s", "--seed", "1", "--json"]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds + _SPARE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise BenchFailed(f"flushlab run: not done {_SPARE_SECONDS} s after its end") from None
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [""])[-1]
        raise BenchFailed(f"flushlab run: exit status {run.returncode}: {last}")
    document: dict[str, Any] = json.loads(run.stdout)
    check_counters(document["counters"])
    return document


def check_counters(counters: Mapping[str, int]) -> None:
    """Raise BenchFailed unless each access took one poll, one look-up and one check.

    More are allowed only for accesses that were not completed: a poll that finds something ends guest mode
    before the look-up; a #PF or an EPT violation comes after look-up and check, and the access is tried
    again.
    """
    interrupted = counters["polls"] - counters["lookups"]
    retried = counters["lookups"] - counters["accesses"]
    faults = counters["exit_ept_violation"] + counters["guest_faults"]
    if counters["lookups"] != counters["checks"]:
        raise BenchFailed(f"{counters['lookups']} look-ups, {counters['checks']} checks")
    if not 0 <= interrupted <= counters["vm_entries"]:
        raise BenchFailed(f"{interrupted} polls without a look-up in {counters['vm_entries']} VM entries")
    if not 0 <= retried <= faults:
        raise BenchFailed(f"{retried} look-ups without an access, {faults} faults")
