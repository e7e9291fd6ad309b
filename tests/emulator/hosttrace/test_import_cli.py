"""`flushlab import` from the command line."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.hosttrace.cost_recipe import FUNCTIONS
from emulator.hosttrace.workload_file import read_workload
from emulator.scenario.costs import load_costs
from tests.emulator.hosttrace.made_up import Line, entry, kick, leave, probe, unmap


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    lines = [entry(7, 1, 0), unmap(900, 0, 10, 0x1000, 0x4000), probe(900, 0, 11, "kvm_flush_remote_tlbs")]
    lines += [kick(900, 0, 12, "2"), leave(7, 1, 13, "EXTERNAL_INTERRUPT", 0x800000FC)]
    lines += [Line("numad", 900, 0, 14, "brand_new_event", "x=1")]
    path = tmp_path / "kvm.trace"
    path.write_text("# tracer: nop\n" + "".join(line.ftrace() for line in lines))
    return path


def test_the_report_fits_and_says_what_is_missing(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(trace)]) == 0
    text = capsys.readouterr().out
    assert "brand_new_event 1" in text
    assert "notifier: unmap" in text
    assert "root loads" in text
    assert "remote flushes:" not in text
    assert max(len(line) for line in text.splitlines() if str(trace) not in line) <= 80


def test_the_document_has_the_sums(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = trace.with_suffix(".gz")
    packed.write_bytes(gzip.compress(trace.read_bytes()))
    assert main(["import", str(packed), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["causes"]["notifier: unmap"]["flushes"] == 1
    assert document["causes"]["notifier: unmap"]["in_guest"] == 1
    assert document["vcpus"][0]["vectors"] == {"0xfc": 1}
    assert document["unread"] == {"brand_new_event": 1}


@pytest.mark.parametrize(("from_file", "vms"), [(True, [1]), (False, [0])])
def test_a_file_is_read_twice_if_it_shows_several_vms(
    from_file: bool, vms: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [entry(7, 1, 0), entry(8, 2, 1)]
    lines += [Line("qemu", 900, 0, 2, "kvm_mmu_zap_all_fast", "kvm-mmu-valid-gen 0")]
    lines += [probe(900, 0, 3, "kvm_make_all_cpus_request", " kvm=0xb req=0x327")]
    lines += [probe(task, 1, 4, "kvm_mmu_free_roots", f" kvm=0x{kvm}") for task, kvm in ((7, "a"), (8, "b"))]
    trace, workload = tmp_path / "kvm.trace", tmp_path / "kvm.workload"
    trace.write_text("".join(line.ftrace() for line in lines))
    with trace.open() as text:
        monkeypatch.setattr("sys.stdin", text)
        assert main(["import", str(trace) if from_file else "-", "--workload", str(workload)]) == 0
    found = read_workload(workload)
    assert [step.vm for step in found.steps if step.verb == "zap-all"] == vms
    assert any("read once" in reason for reason in found.left_out) is not from_file


def test_lost_events_and_strange_lines_are_told(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace.write_text("cpus=2\nCPU:1 [LOST 9 EVENTS]\n" + trace.read_text())
    assert main(["import", str(trace)]) == 0
    text = capsys.readouterr().out
    assert "lost 9 events" in text
    assert "'cpus=2'" in text


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"hello\nworld\n", "no event in 2 lines, the first: hello"),
        (b"\x17\x08\x44tracing0", "a recording of trace-cmd, which is not installed here"),
        (b"PERFILE2....", "a recording of perf, which is not installed here"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    found: str,
) -> None:
    monkeypatch.setenv("PATH", "")
    path = tmp_path / "trace"
    path.write_bytes(content)
    assert main(["import", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert found in line


@pytest.mark.parametrize(
    "arguments",
    [["import"], ["import", "/no/such"], ["import", "--recipe", "--json"], ["import", "--recipe", "x"]],
)
def test_bad_arguments_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("tool", ["trace-cmd", "perf"])
def test_a_recording_is_printed_by_its_tool(
    tmp_path: Path,
    trace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tool: str,
) -> None:
    fake = tmp_path / tool
    fake.write_text(f"#!/bin/sh\ncat {trace}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    recording = tmp_path / "recording"
    recording.write_bytes(b"\x17\x08\x44tracing0" if tool == "trace-cmd" else b"PERFILE2....")
    assert main(["import", str(recording)]) == 0
    assert "notifier: unmap" in capsys.readouterr().out
    fake.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    assert main(["import", str(recording)]) == 2
    assert f"{tool} failed: broken" in capsys.readouterr().err


@pytest.mark.slow
def test_the_recipe_of_costs_is_a_script_that_prints_a_table_of_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["import", "--recipe", "costs"]) == 0
    script = tmp_path / "costs.sh"
    script.write_text(capsys.readouterr().out)
    # As bpftrace and x86/vmexit print them.
    times = {
        "probes": 110,
        "invept_global": 310,
        "invept_single": 290,
        "invvpid_single": 100,
        "ipi_send": 210,
    }
    text = "Attaching 12 probes...\n\n" + "".join(f"@{key}: {value}\n" for key, value in times.items())
    (tmp_path / "x86").mkdir()
    for name, output in (("bpftrace", text), ("x86/run", "enabling apic\ncpuid 1234\n")):
        fake = tmp_path / name
        fake.write_text(f"#!/bin/sh\nprintf '%s' '{output}'\n")
        fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("KVM_UNIT_TESTS", str(tmp_path))
    printed = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=True).stdout
    table = tmp_path / "my-host.toml"
    table.write_text(printed)
    costs, own = load_costs(table, load_costs()), load_costs()
    assert costs.vm_exit_entry.cycles == 1234
    assert costs.invvpid_single.cycles == 1  # shorter than the probes
    # 200, 180 and 100 ns at the host's frequency.
    assert costs.invept_global.cycles == pytest.approx(2 * costs.ipi_send.cycles, abs=2)
    assert costs.invept_single.cycles == pytest.approx(0.9 * costs.invept_global.cycles, abs=2)
    assert costs.ipi_send.cycles > 10
    assert costs.ipi_receive == own.ipi_receive
    assert all(function in script.read_text() for function in FUNCTIONS.values())
