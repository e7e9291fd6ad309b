"""Scripts that record a trace: ftrace, trace-cmd, perf, bpftrace."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.hosttrace.bpftrace_recipe import EVENTS, FUNCTIONS, bpftrace_recipe
from emulator.hosttrace.fields import cpus_of, exit_of, range_of, spte_of, vcpu_of
from emulator.hosttrace.lines import Dialect, Event
from emulator.hosttrace.missing import QUESTIONS
from emulator.hosttrace.recipe import PROBES, TRACEPOINTS, perf_recipe, trace_cmd_recipe, trace_recipe
from tests.emulator.hosttrace.made_up import observe, read

_SHELL = {"trace": trace_recipe, "trace-cmd": trace_cmd_recipe, "perf": perf_recipe}
_RECORDED = {name.partition(":")[2] for name in TRACEPOINTS} | {function for function, _ in PROBES}

# As bpftrace 0.17 printed it on Linux 6.18.
_SAMPLE = """\
Attaching 18 probes...
bpftrace-17133 (17133) [1] 1003.067629737: csd_queue_cpu: cpu=0 callsite=on_each_cpu func=do_sync_core
bpftrace-17133 (17133) [1] 1003.067629900: ipi_send_cpu: cpu=0 callsite=on_each_cpu_cond_mask
cc1-16910 (16910) [1] 1003.340070888: sched_migrate_task: pid=12623 orig_cpu=0 dest_cpu=1
kworker/0:2-4506 (4506) [0] 1003.421162517: ipi_send_cpu: cpu=1 callsite=wakeup_preempt
"""


@pytest.mark.parametrize("name", _SHELL)
def test_a_recipe_is_a_script_that_answers_each_question(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", "--recipe", name]) == 0
    script = capsys.readouterr().out
    assert script == _SHELL[name]()
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    assert all(_RECORDED.intersection(question.events) for question in QUESTIONS)
    assert all(word in script or word.replace(":", "/") in script for word in TRACEPOINTS)
    assert script.count("/kprobe_events") == 2 * len(PROBES)


def _lines() -> list[str]:
    """Return a line for each printf of the script, with values in place of its arguments."""
    values = {"s": "name", "d": "5", "u": "5", "ld": "5", "x": "2f", "lx": "2f000", "llx": "2f"}
    texts = re.findall(r'printf\("(.+?)\\n",', bpftrace_recipe())
    assert len(texts) == len(EVENTS) + len(FUNCTIONS) + 3

    def value(found: re.Match[str]) -> str:
        return values[found[2]].rjust(int(found[1] or 0), "0")

    return [re.sub(r"%(\d+)?(l*[sdux])", value, text) + "\n" for text in texts]


def test_the_importer_reads_each_line_that_the_script_can_print() -> None:
    reading, events = read(_lines())
    assert reading.other == 0
    assert set(reading.dialects) == {Dialect.DASHED}
    found: dict[str, Event] = {event.name: event for event in events}
    assert set(found) == {
        *(name.partition(":")[2] for name in EVENTS),
        *FUNCTIONS,
        "kvm_exit",
        "ipi_send_cpumask",
    }
    assert all((event.comm, event.tid, event.tgid, event.cpu) == ("name", 5, 5, 5) for event in events)
    # nsecs / 1000000000, and the rest with nine digits.
    assert all(event.time == 5_000_000_005 for event in events)
    observed = observe(_lines())
    assert not observed.unread
    assert observed.functions.keys() == {(function, function) for function in FUNCTIONS}
    assert vcpu_of(found["kvm_entry"].fields) == 5
    assert exit_of(found["kvm_exit"].fields).vcpu == 5
    assert range_of(found["kvm_unmap_hva_range"].fields) == (0x2F000, 0x2F000)
    change = spte_of(found["kvm_tdp_mmu_spte_changed"].fields)
    assert change is not None
    assert (change.gfn, change.level, change.old) == (0x2F, 5, 0x2F)
    assert cpus_of(found["ipi_send_cpumask"].fields) == [0, 1, 2, 3, 5]
    assert cpus_of(found["csd_queue_cpu"].fields) == [5]


def test_the_script_prints_all_that_the_other_recipes_record() -> None:
    script = bpftrace_recipe()
    # sched_switch adds to no sum and is by far the most frequent.
    assert all(f"tracepoint:{name}\n" in script for name in TRACEPOINTS if name != "sched:sched_switch")
    assert all(f"kprobe:{function}\n" in script for function, _ in PROBES)
    assert script.count("{") == script.count("}")


def test_a_recorded_sample() -> None:
    reading, events = read(_SAMPLE.splitlines())
    assert (reading.events, reading.other) == (4, 1)
    assert events[0].time == 1003_067_629_737
    assert (events[3].comm, events[3].tgid) == ("kworker/0:2", 4506)
    senders = observe(_SAMPLE.splitlines()).senders
    assert {name: sender.calls for name, sender in senders.items()} == {
        "on_each_cpu_cond_mask": 1,
        "wakeup_preempt": 1,
    }


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
def test_perf_prints_a_recording_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = tmp_path / "perf.data"
    made = subprocess.run(
        ["perf", "record", "-a", "-e", "cpu-clock", "-o", str(recording), "--", "ls", "/"],
        capture_output=True,
        check=False,
    )
    if made.returncode or not recording.exists():
        pytest.skip("perf may not record here")
    assert main(["import", str(recording)]) == 0
    assert "(perf script)" in capsys.readouterr().out
