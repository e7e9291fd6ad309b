"""A scenario made of a trace has its vCPUs and rates, and can be run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.cli.main import main
from emulator.errors import BadInput
from emulator.hosttrace.observed import Observed
from emulator.hosttrace.shape import scenario
from emulator.scenario.config import Scenario, parse_scenario
from tests.emulator.hosttrace.made_up import Line, entry, leave, observe, unmap


def _scenario(observed: Observed) -> Scenario:
    return parse_scenario(scenario("kvm.trace", observed), "kvm.trace", Path())


def _host(seconds: int = 2) -> list[str]:
    lines = [entry(7, 1, 0), leave(7, 1, 10), entry(7, 2, 20), entry(8, 3, 30, vcpu=1)]
    lines += [unmap(900, 0, 40 + i, 0x1000, 0x1000 * (2 + i)) for i in range(4)]
    lines += [Line("qemu", 6, 0, 50, "kvm_mmu_zap_all_fast", "kvm-mmu-valid-gen 0 used_pages 0")] * 6
    lines += [
        Line("CPU", 7, 2, 51, "kvm_smm_transition", f"vcpu 0: {way} SMM") for way in ("entering", "leaving")
    ]
    lines += [entry(7, 2, seconds * 1_000_000)]
    return [line.ftrace() for line in lines]


def test_rates_and_sizes_are_those_of_the_trace() -> None:
    found = _scenario(observe(_host()))
    assert [(vm.count, vm.vcpus) for vm in found.vm] == [(1, 2)]
    assert found.machine.pcpus == 3
    assert (found.host.unmap, found.host.pages) == (2.0, 2)
    assert (found.kvm.memslot_cycles, found.kvm.smis) == (3.0, 0.5)
    assert (found.scheduler.mode, found.scheduler.migrations) == ("storm", 0.5)


def test_vms_are_told_by_process_or_guessed() -> None:
    lines = [entry(10 + tid, tid, tid, vcpu=tid % 2) for tid in range(4)]
    guessed = _scenario(observe(line.ftrace() for line in lines))
    assert [(vm.count, vm.vcpus) for vm in guessed.vm] == [(2, 2)]
    assert guessed.scheduler.mode == "pin"
    known = observe(line.ftrace(tgid="1" if line.tid < 13 else "2") for line in lines)
    assert [(vm.count, vm.vcpus) for vm in _scenario(known).vm] == [(1, 3), (1, 1)]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 3)), min_size=2, max_size=20))
def test_any_trace_with_a_vcpu_makes_a_valid_scenario(entries: list[tuple[int, int, int]]) -> None:
    observed = observe(
        entry(100 + tid, cpu, micros, vcpu).ftrace() for micros, (tid, cpu, vcpu) in enumerate(entries)
    )
    found = _scenario(observed)
    assert found.vcpus == len(observed.vcpus)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "no times"),
        ([unmap(1, 0, 0, 0x1000, 0x2000), unmap(1, 0, 9, 0x1000, 0x2000)], "no vCPU"),
        ([entry(7, 1, 5_000_000), entry(7, 1, 0)], "several recordings"),
    ],
)
def test_a_trace_without_vcpus_or_times_makes_none(lines: list[Line], complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        scenario("kvm.trace", observe(line.ftrace() for line in lines))


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, written = tmp_path / "kvm.trace", tmp_path / "host.toml"
    trace.write_text("".join(_host()))
    assert main(["import", str(trace), "--scenario", str(written)]) == 0
    assert parse_scenario(written.read_text(), "host", tmp_path).vcpus == 2
    trace.write_text(unmap(1, 0, 0, 0x1000, 0x2000).ftrace())
    written.unlink()
    assert main(["import", str(trace), "--scenario", str(written)]) == 2
    assert not written.exists()
    assert len(capsys.readouterr().err.splitlines()) == 1
