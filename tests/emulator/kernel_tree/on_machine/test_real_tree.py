"""A real kernel's TDP MMU on the machine: verdicts as the preset's, bugs caught, and misdeeds reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emulator.cli.main import main
from emulator.kernel_tree.build import MMU
from tests.emulator.kernel_tree.bugs import BUGS, MISDEEDS, Bug, apply

pytestmark = [pytest.mark.stress, pytest.mark.timeout(600)]

# Tests of each kind of operation; FLUSHLAB_TREE_LITMUS=all runs all of them.
TESTS = (
    "return-zap", "huge-split", "huge-replaces-table", "log-get-away", "log-split-yields", "recover-yields",
    "remote-smm", "slot-delete", "zap-table-yield", "nested-ept-unmap",
)  # fmt: skip


def run(top: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = main(["litmus", *arguments, "--kernel", str(top), "--seed", "1", "--jobs", "1", "--json"])
    return status, json.loads(capsys.readouterr().out)


def with_bug(bug: Bug, tree: Path, copy: Path) -> Path:
    if not apply(bug, tree, copy):
        pytest.skip(f"the tree has no place for: {bug.name}")
    return copy


def test_verdicts_are_those_of_the_preset(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tests = () if os.environ.get("FLUSHLAB_TREE_LITMUS") == "all" else TESTS
    status, found = run(tree, *tests, "--iterations", "10", capsys=capsys)
    assert [(one["test"], one["differs"]) for one in found["outcomes"] if one["differs"]] == []
    assert status == 0
    assert found["kernel"]["tree"] == str(tree)
    assert sum(one["evidence"].get("averted", 0) for one in found["outcomes"])


@pytest.mark.parametrize(
    ("name", "test", "kinds"),
    [
        ("a yield does not flush", "zap-leafs-yield", {"use-after-free", "stale-after-revoke"}),
        ("a zap owes no flush", "remote-two-vcpus", {"use-after-free", "stale-after-revoke"}),
    ],
)
def test_a_bug_is_caught(
    name: str, test: str, kinds: set[str], tree: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bug = next(bug for bug in BUGS if bug.name == name)
    status, found = run(with_bug(bug, tree, copy), test, "--iterations", "40", capsys=capsys)
    (outcome,) = found["outcomes"]
    assert kinds & set(outcome["violations"])
    assert status == 1
    # Each report tells the kernel's functions that took the right away.
    for report in outcome["reports"]:
        assert report["tree"][0].startswith("zaps the SPTE of gfn 0x")
        assert any(
            line.startswith("tdp_mmu_zap_leafs() arch/x86/kvm/mmu/tdp_mmu.c:") for line in report["tree"]
        )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "crashes",
            ["crashes: SIGSEGV at address 0x10", "  handle_removed_pt() arch/x86/kvm/mmu/tdp_mmu.c:"],
        ),
        ("never ends", ["did not end in 3 seconds", "  handle_removed_pt() arch/x86/kvm/mmu/tdp_mmu.c:"]),
        ("frees twice", ["freed twice", "  tdp_mmu_free_sp() arch/x86/kvm/mmu/tdp_mmu.c:"]),
        ("uses what it has freed", ["that it has freed", "  tdp_mmu_free_sp() arch/x86/kvm/mmu/tdp_mmu.c:"]),
        ("warns", ["WARN at arch/x86/kvm/mmu/tdp_mmu.c:", "level < 3"]),
    ],
)
@pytest.mark.usefixtures("_soon_endless")
def test_a_misdeed_is_reported(
    name: str, said: list[str], tree: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bug = next(bug for bug in MISDEEDS if bug.name == name)
    status, found = run(with_bug(bug, tree, copy), "recover-yields", "--iterations", "3", capsys=capsys)
    (outcome,) = found["outcomes"]
    assert outcome["verdict"] == "failed"
    for text in said:
        assert text in outcome["failure"]
    if name == "crashes":
        lines = (copy / MMU / "tdp_mmu.c").read_text().splitlines()
        number = next(n for n, line in enumerate(lines, 1) if bug.replacement in line)
        assert f"tdp_mmu.c:{number}\n" in outcome["failure"]
    assert status == 1


def test_a_patch_that_does_not_compile(tree: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = with_bug(MISDEEDS[0], tree, copy)
    assert main(["litmus", "return-zap", "--kernel", str(top)]) == 2
    *details, last = capsys.readouterr().err.strip().splitlines()
    assert any(f"{MMU}/tdp_mmu.c:" in line and "frobnicate_all" in line for line in details)
    assert "it needs frobnicate_all" in last


def test_a_run_is_clean(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--kernel", str(tree), "--duration", "2s", "--seed", "1", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)  # written by the run's own process
    assert found["verdict"] == "clean"
    assert found["kernel"]["tree"] == str(tree)
    assert found["kernel"]["findings"] == {}
    assert "kvm_make_all_cpus_request() in virt/kvm/kvm_main.c" in found["kernel"]["code"]
    assert found["vms"][0]["remote_tlb_flush"]
    assert found["vms"][0]["faults"]
    assert found["vms"][0]["yields"]
    assert found["counters"]["tables_freed"]


def test_a_comparison_runs_on_the_tree(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    policies = ["--policy", "linux-6.12", "--policy", "linux-6.12+migration=active-roots"]
    arguments = ["--kernel", str(tree), *policies, "--duration", "1s", "--seed", "1", "--json"]
    assert main(["compare", *arguments]) == 0
    output = capfd.readouterr()
    found = json.loads(output.out)
    assert len(found["policies"]) == 2
    assert " has the TDP MMU and requests to all vCPUs (" in output.err


def test_a_crash_ends_a_run(tree: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = with_bug(next(bug for bug in MISDEEDS if bug.name == "crashes"), tree, copy)
    assert main(["run", "--kernel", str(top), "--duration", "20s", "--seed", "1"]) == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "the tree's code crashes: SIGSEGV at address 0x10"
    assert second.startswith("  handle_removed_pt() arch/x86/kvm/mmu/tdp_mmu.c:")


def test_a_signal_ends_a_service_and_its_process(tree: Path) -> None:
    command = [sys.executable, "-m", "emulator", "serve", "--metrics", "0", "--kernel", str(tree)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("booted" in line for line in process.stderr)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "clean: no translation was used" in output
    assert not Path(f"/proc/{child}").exists()
