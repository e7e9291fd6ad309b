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
    assert main(["compare", str(path), *both, "--speed", "1000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speed"] == 1000
    assert main(["compare", "main", "--speed", "2"]) == 2
    assert capsys.readouterr().err.startswith("flushlab: --speed: found without a workload")
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


@pytest.mark.slow
def test_rsm_flushes_the_current_context_if_cr4_pge_is_clear() -> None:
    steps = [Step(i, verb, 0, 0, 0) for i, verb in enumerate(("enter", "smi", "rsm", "enter"))]
    found = []
    for clear in ([], [(0, 0)]):
        loaded = spelled_policy("linux-6.12")
        workload = Workload("smm", 1, [1], [BLOCK], [[]], steps, without_pge=clear)
        with loaded.confined(), Replay(workload, loaded) as replay:
            assert replay.run() is not None
        found.append(replay.flush_current_calls)
    assert found == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("shown", [True, False])
def test_an_assumption_about_rsm_is_told(
    shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "smm.workload"
    steps = [Step(i, verb, 0, 0, 0) for i, verb in enumerate(("enter", "smi", "rsm", "enter"))]
    workload = Workload("smm", 1, [1], [BLOCK], [[]], steps, recorded={"flush_current": 2} if shown else {})
    path.write_text(text_of(workload))
    assert main(["replay", str(path)]) == 0
    assert ("CR4.PGE is taken to be set" in capsys.readouterr().out) is not shown


@pytest.mark.slow
def test_vmrun_and_its_exit_flush_and_a_nested_guest_has_a_root_of_its_own() -> None:
    verbs = ("enter", *("vmrun", "vmexit") * 3)
    steps = [Step(i, verb, 0, 0, 0) for i, verb in enumerate(verbs)]
    loaded = spelled_policy("linux-6.12")
    with loaded.confined(), Replay(Workload("svm", 1, [1], [BLOCK], [[]], steps), loaded) as replay:
        snapshot = replay.run()
    assert snapshot is not None
    # Three entries, three exits, and the load of the nested guest's root, which is cached from then on.
    assert (snapshot.kvm("mmu_load"), replay.flush_current_calls) == (1, 7)


@pytest.mark.slow
def test_huge_pages_flush_where_a_table_is_replaced_or_zapped() -> None:
    def requests(*events: tuple[str, int], huge: bool = False) -> int:
        steps = [Step(0, "enter", 0, 0, 0)]
        for verb, page in events:
            vcpu = 0 if verb == "write" else -1
            end = page + BLOCK if verb in ("unmap", "recover") else -1
            steps.append(Step(0, verb, 0, vcpu, page, end))
        before = [(0, 0)] if huge else []
        workload = Workload("huge", 1, [1], [2 * BLOCK], [[]], steps, huge=before)
        return replayed(workload).kvm("remote_tlb_flush_requests")

    assert requests(("huge", 0), ("write", 5)) == 0
    # The collapse zaps a 4K page; with the page gone before, the table that is left is replaced.
    assert requests(("write", 5), ("huge", 0)) == 1
    assert requests(("write", 5), ("unmap", 0), ("huge", 0), ("write", 5)) == 2
    assert requests(("write", 5), ("huge", 0), ("write", 5), huge=True) == 0
    # Recovery makes one flush for all blocks, and none for blocks that are not mapped.
    assert requests(("write", 5), ("recover", 0)) == 1
    assert requests(("write", 5), ("recover", BLOCK)) == 0


@pytest.mark.slow
def test_a_zap_of_a_whole_block_does_not_yield() -> None:
    mapped = [list(range(2 * BLOCK))]
    steps = [Step(0, "enter", 0, 0, 0), Step(1, "unmap", 0, -1, 0, 2 * BLOCK)]
    snapshot = replayed(Workload("zap", 1, [1], [2 * BLOCK], mapped, steps))
    assert snapshot.kvm("remote_tlb_flush_requests") == 1


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
