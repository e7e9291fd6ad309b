"""The collector: a scrape's content, its cost in series, and that it may meet the machine's end."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import metrics
from metrics import MachineCollector
from metrics.collector import MAX_VMS, _flush_families, _vm_families
from native import COUNTER_NAMES, EXIT_REASONS, HISTOGRAM_NAMES, VIOLATION_KINDS, VM_STAT_NAMES, lib
from native.reader import FlushCell
from native.types import CounterId
from tests.support import CPU0, CPU1, CPU3, VM0, BareMachine


def scrape(collector: MachineCollector) -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


def value(text: str, series: str) -> float:
    match = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    assert match, f"{series} is not among\n{text}"
    return float(match[1])


@pytest.fixture
def collector(bare_machine: BareMachine) -> MachineCollector:
    collector = MachineCollector({"policy": "linux-7.3", "scenario": "test"})
    bare_machine.show_to(collector)
    return collector


def test_no_machine_no_series() -> None:
    assert scrape(MachineCollector()) == ""


def test_counters_are_sums_over_cpus(bare_machine: BareMachine, collector: MachineCollector) -> None:
    bare_machine.count(CPU0, lib.COUNT_IPIS_SENT, 3)
    bare_machine.count(CPU1, lib.COUNT_IPIS_SENT, 4)
    bare_machine.count(CPU3, lib.COUNT_IPIS_SENT, 5)
    assert value(scrape(collector), "flushlab_ipis_sent_total") == 12


def test_every_scrape_reads_anew(bare_machine: BareMachine, collector: MachineCollector) -> None:
    for expected in (1, 2, 3):
        bare_machine.count(CPU0, lib.COUNT_AVERTED, 1)
        assert value(scrape(collector), "flushlab_averted_uses_total") == expected


def test_kvm_statistics_keep_their_names(bare_machine: BareMachine, collector: MachineCollector) -> None:
    lib.vm_stat_add(bare_machine.pointer, VM0, lib.STAT_REMOTE_TLB_FLUSH, 7)
    lib.vm_stat_add(bare_machine.pointer, VM0, lib.STAT_REMOTE_TLB_FLUSH_REQUESTS, 9)
    text = scrape(collector)
    assert value(text, 'flushlab_remote_tlb_flush_total{vm="0"}') == 7
    assert value(text, 'flushlab_remote_tlb_flush_requests_total{vm="0"}') == 9


def test_levels_are_counters_of_their_own(bare_machine: BareMachine, collector: MachineCollector) -> None:
    bare_machine.count(CPU0, lib.COUNT_VM_ENTRIES, 9)
    bare_machine.count(CPU0, lib.COUNT_LEVEL1_ENTRIES, 5)
    bare_machine.count(CPU1, lib.COUNT_LEVEL2_ENTRIES, 4)
    bare_machine.count(CPU0, lib.COUNT_LEVEL1_FLUSHES, 2)
    bare_machine.count(CPU1, lib.COUNT_LEVEL2_FLUSHES, 3)
    lib.vm_stat_add(bare_machine.pointer, VM0, lib.STAT_NESTED_RUN, 8)
    text = scrape(collector)
    assert value(text, "flushlab_vm_entries_total") == 9
    for level, entries, flushes in (("l1", 5, 2), ("l2", 4, 3)):
        assert value(text, f'flushlab_vm_entries_by_level_total{{level="{level}"}}') == entries
        assert value(text, f'flushlab_tlb_flushes_by_level_total{{level="{level}"}}') == flushes
    assert value(text, 'flushlab_nested_run_total{vm="0"}') == 8


def test_histogram_in_seconds(bare_machine: BareMachine, collector: MachineCollector) -> None:
    lib.histogram_record(bare_machine.pointer, CPU0, lib.HISTOGRAM_IPI_WAIT, 1000)
    lib.histogram_record(bare_machine.pointer, CPU1, lib.HISTOGRAM_IPI_WAIT, 3_000_000)
    text = scrape(collector)
    assert value(text, "flushlab_ipi_wait_seconds_count") == 2
    assert value(text, "flushlab_ipi_wait_seconds_sum") == pytest.approx(3.001e-3)
    assert value(text, 'flushlab_ipi_wait_seconds_bucket{le="2.56e-07"}') == 0
    assert value(text, 'flushlab_ipi_wait_seconds_bucket{le="1.024e-06"}') == 1
    assert value(text, 'flushlab_ipi_wait_seconds_bucket{le="+Inf"}') == 2


@pytest.mark.parametrize("nanoseconds", [300, 1500, 18_000, 40_000, 64_000, 2_000_000, 150_000_000])
def test_a_quantile_is_wrong_by_less_than_two(
    nanoseconds: int, bare_machine: BareMachine, collector: MachineCollector
) -> None:
    for _ in range(100):
        lib.histogram_record(bare_machine.pointer, CPU0, lib.HISTOGRAM_VCPU_PAUSE, nanoseconds)
    counts = {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(scrape(collector))
        for sample in family.samples
        if sample.name == "flushlab_vcpu_pause_seconds_bucket"
    }
    above = min(bound for bound, n in counts.items() if n)
    below = max(bound for bound, n in counts.items() if not n)
    # histogram_quantile() interpolates between the bounds.
    assert below <= nanoseconds / 1e9 <= above <= 2 * below


def test_alerts_compare_quantiles_with_bounds_of_buckets() -> None:
    rules = Path(metrics.__file__).with_name("rules").joinpath("flushlab.yml").read_text()
    found = re.findall(r"histogram_quantile\([^\n]*> ([\d.]+)", rules)
    assert found
    # Between two bounds, samples below the threshold could exceed it by interpolation.
    assert {float(text) for text in found} <= {2**exponent / 1e9 for exponent in range(8, 31)}


def test_buckets_never_decrease(bare_machine: BareMachine, collector: MachineCollector) -> None:
    for exponent in range(36):
        lib.histogram_record(bare_machine.pointer, CPU0, lib.HISTOGRAM_VCPU_PAUSE, 1 << exponent)
    counts = [
        sample.value
        for family in text_string_to_metric_families(scrape(collector))
        for sample in family.samples
        if sample.name == "flushlab_vcpu_pause_seconds_bucket"
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 36


def test_modelled_cycles_have_groups_and_never_shrink(bare_machine: BareMachine) -> None:
    given = [("flush", "IPIs sent", 300.0), ("work", "VM exits", 50.0)]
    collector = MachineCollector(cycles=lambda counters: given)
    collector.machine_up(bare_machine.pointer, pcpus=2, vms=1)
    sent = 'flushlab_modelled_cycles_total{group="flush",item="IPIs sent"}'
    assert value(scrape(collector), sent) == 300
    given[0] = ("flush", "IPIs sent", 299.0)
    text = scrape(collector)
    assert value(text, sent) == 300
    assert value(text, 'flushlab_modelled_cycles_total{group="work",item="VM exits"}') == 50
    collector.machine_down()
    collector.machine_up(bare_machine.pointer, pcpus=2, vms=1)
    assert value(scrape(collector), sent) == 299
    collector.machine_down()


def test_each_violation_kind_has_a_series(collector: MachineCollector) -> None:
    text = scrape(collector)
    for kind in VIOLATION_KINDS:
        assert value(text, f'flushlab_violations_total{{kind="{kind}"}}') == 0


def test_exits_have_reasons(bare_machine: BareMachine, collector: MachineCollector) -> None:
    # guest_run adds the reason to the first of these counters: the order must be the same.
    names = [name.removeprefix("exit_") for name in COUNTER_NAMES if name.startswith("exit_")]
    assert tuple(names) == EXIT_REASONS
    bare_machine.count(CPU0, CounterId(lib.COUNT_EXIT_INTERRUPT + lib.EXIT_HLT), 2)
    assert value(scrape(collector), 'flushlab_vm_exits_total{reason="hlt"}') == 2


def test_every_native_histogram_is_exported(collector: MachineCollector) -> None:
    assert scrape(collector).count("# TYPE flushlab_") > len(HISTOGRAM_NAMES)
    assert scrape(collector).count(" histogram\n") == len(HISTOGRAM_NAMES)


def test_promtool_finds_nothing(bare_machine: BareMachine) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    collector = MachineCollector({"policy": "p", "scenario": "s"}, per_cpu=True)
    bare_machine.show_to(collector)
    text = scrape(collector)
    check = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False, timeout=30
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_pcpus_are_labels_only_on_request(bare_machine: BareMachine, collector: MachineCollector) -> None:
    assert "cpu=" not in scrape(collector)
    detailed = MachineCollector(per_cpu=True)
    bare_machine.show_to(detailed)
    bare_machine.count(CPU1, lib.COUNT_IPIS_RECEIVED, 5)
    assert value(scrape(detailed), 'flushlab_pcpu_ipis_received_total{cpu="1"}') == 5


class ManyVms:
    """Stands for the native counters of a host with a hundred VMs."""

    vms = 100
    pcpus = 4

    def flushes(self) -> list[FlushCell]:
        return [FlushCell(vm, "invept_global", "migration", 2, 1) for vm in range(self.vms)]

    def vm_stats(self) -> list[dict[str, int]]:
        return [dict.fromkeys(VM_STAT_NAMES, 1) for _ in range(self.vms)]


def test_vms_beyond_the_first_share_a_series() -> None:
    for families in (_flush_families, _vm_families):
        for family in families(ManyVms()):  # type: ignore[arg-type]
            by_vm = Counter({sample.labels["vm"]: sample.value for sample in family.samples})
            assert len(by_vm) == MAX_VMS + 1
            assert by_vm["other"] == (100 - MAX_VMS) * by_vm["0"]


def test_default_series_stay_below_a_page(collector: MachineCollector) -> None:
    # 23 buckets, +Inf, sum and count for each histogram; six statistics of nested guests and two series
    # by level for each of two counters; the rest are plain series.
    lines = [line for line in scrape(collector).splitlines() if not line.startswith("#")]
    assert len(lines) <= 53 + 10 + len(VIOLATION_KINDS) + 27 * len(HISTOGRAM_NAMES)


@pytest.mark.stress
def test_scrapes_while_machines_come_and_go() -> None:
    """machine_down waits for a scrape in progress, so no scrape reads a freed machine."""
    collector = MachineCollector(per_cpu=True)
    done = threading.Event()
    seen: list[int] = []

    def keep_scraping() -> None:
        while not done.is_set():
            seen.append(len(scrape(collector)))

    threads = [threading.Thread(target=keep_scraping) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            machine = BareMachine()
            collector.machine_up(machine.pointer, pcpus=machine.pcpus, vms=machine.vms)
            before = len(seen)
            while len(seen) < before + 4:
                machine.count(CPU0, lib.COUNT_ACCESSES, 1)
            collector.machine_down()
            machine.close()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert sum(1 for size in seen if size) >= 50
