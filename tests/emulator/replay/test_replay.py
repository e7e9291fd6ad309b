"""Replays: the counts of a recording come out again under its kernel's preset."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.hosttrace.workload import BLOCK, Step, Workload
from emulator.hosttrace.workload_file import text_of
from emulator.policy import spelled_policy
from emulator.replay.machine import Replay
from emulator.report.result import Snapshot
from tests.emulator.replay.recording import whole, workload_of


def counts(policy: str) -> Snapshot:
    return replayed(workload_of(whole()), policy)


def replayed(workload: Workload, policy: str = "linux-6.12") -> Snapshot:
    loaded = spelled_policy(policy)
    with loaded.confined(), Replay(workload, loaded) as replay:
        snapshot = replay.run()
    assert snapshot is not None
    return snapshot


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["linux-6.12", "linux-7.3"])
def test_the_counts_of_the_recording_come_out_again(policy: str) -> None:
    recorded = workload_of(whole()).recorded
    snapshot = counts(policy)
    assert len(recorded) == 5
    assert {name: snapshot.kvm(name) for name in recorded} == recorded
    assert not snapshot.violated


@pytest.mark.slow
def test_a_replay_has_one_course_and_another_policy_another() -> None:
    first, second = counts("linux-6.12"), counts("linux-6.12")
    assert (first.vms, first.flushes) == (second.vms, second.flushes)
    # Some callbacks share a grace period or not, as RCU's thread comes to them.
    differing = {name for name, n in first.counters.items() if n != second.counters[name]}
    assert differing <= {"grace_periods", "wait_nanoseconds"}
    other = counts("linux-6.12+migration=none")
    assert other.kvm("flush_all") == first.kvm("flush_all") - 3
    assert other.kvm("remote_tlb_flush_requests") == first.kvm("remote_tlb_flush_requests")


@pytest.mark.slow
def test_compare_takes_a_workload_as_a_scenario(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kvm.workload"
    path.write_text(text_of(workload_of(whole())))
    both = ["--policy", "linux-7.3", "--policy", "linux-7.3+migration=none"]
    assert main(["replay", str(path), *both]) == 0
    replayed = capsys.readouterr().out
    assert main(["compare", str(path), *both[2:]]) == 0
    assert capsys.readouterr().out == replayed
    # The cost by cause, and the savings of the other policy.
    (total,) = (line for line in replayed.splitlines() if line.startswith("cycles of flushing"))
    assert re.search(r" -\d+%$", total.rstrip())
    assert main(["compare", str(path), *both, "--json"]) == 0
    for policy in json.loads(capsys.readouterr().out)["policies"]:
        assert sum(policy["flush_cycles_by_item"].values()) == pytest.approx(policy["flush_cycles"])
        assert len(policy["flush_cycles_by_item"]) > 1
    assert main(["compare", str(path), *both, "--repeat", "2"]) == 2
    assert "--repeat" in capsys.readouterr().err


@pytest.mark.slow
def test_import_and_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, workload = tmp_path / "kvm.trace", tmp_path / "kvm.workload"
    trace.write_text("".join(whole().text()))
    assert main(["import", str(trace), "--workload", str(workload)]) == 0
    capsys.readouterr()
    line = ["replay", str(workload), "--policy", "linux-6.12", "--policy", "linux-6.12+migration=none"]
    assert main([*line, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["flushlab_replay"] == 1
    kernel, other = document["policies"]
    assert {name: kernel["counts"][name] for name in document["recorded"]} == document["recorded"]
    assert other["flushes_elided"] == 3
    assert other["flush_cycles"] < kernel["flush_cycles"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert all(len(row) <= 100 for row in out.splitlines())
    assert "Not replayed: 8 zapped SPTEs outside of a notifier's range." in out
    row = next(row.split() for row in out.splitlines() if row.startswith("flush_all"))
    assert row == ["flush_all", "11", "11", "8"]


@pytest.mark.slow
def test_what_a_new_vcpu_flushes_is_counted_and_what_an_old_one_did_is_not() -> None:
    found = []
    for new in ([], [(0, 1)]):
        workload = Workload("two", 2, [2], [BLOCK], [[]], [Step(0, "enter", 0, i, i) for i in (0, 1)], new)
        snapshot = replayed(workload)
        found.append([snapshot.kvm(name) for name in ("flush_all", "flush_guest", "mmu_load")])
    # A vCPU's first entry flushes everything once, as real KVM's does (vmx_vcpu_load_vmcs, kvm_vcpu_reset).
    assert found == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.slow
def test_smis_load_roots_and_a_recording_may_begin_in_smm() -> None:
    found = []
    for verbs in (("enter", "rsm", "enter"), ("enter", "smi", "rsm", "enter", "smi", "rsm", "enter")):
        steps = [Step(i, verb, 0, 0, 0) for i, verb in enumerate(verbs)]
        snapshot = replayed(Workload("smm", 1, [1], [BLOCK], [[]], steps))
        found.append((snapshot.kvm("smis"), snapshot.kvm("mmu_load")))
    assert found == [(0, 0), (2, 4)]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kvm.workload"
    assert main(["replay", str(path)]) == 2
    path.write_text("flushlab-workload 1\npcpus 1\nvm 0 vcpus 1 pages 512\n")
    assert main(["replay", str(path), "--policy", "linux-7.3", "--policy", "linux-7.3"]) == 2
    assert main(["replay", str(path), "--policy", "commit_zap=no-flush"]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 3


@pytest.mark.slow
def test_a_workload_without_events_has_counts_of_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kvm.workload"
    path.write_text("flushlab-workload 1\npcpus 1\nvm 0 vcpus 1 pages 512\n")
    assert main(["replay", str(path), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["policies"][0]["counts"].values()) == {0}
