"""A real kernel's TDP MMU in every interleaving: verdicts as the preset's, footprints that hold, and bugs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from emulator.cli.main import main
from emulator.explore.audit.independence import IndependenceCheck
from emulator.explore.audit.residue import ResidueProgram
from emulator.explore.machine.lib import instrument
from emulator.kernel_tree.build import Use, build
from emulator.kernel_tree.execute import policy_for
from emulator.kernel_tree.on_machine.child import in_child
from emulator.kernel_tree.on_machine.core import Tree
from emulator.kernel_tree.on_machine.explored_program import TreeProgram
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import VIOLATIONS
from tests.emulator.kernel_tree.bugs import BUGS, KICKS, MISDEEDS, Bug, apply

# Tests of which the search ends, for the model and for the tree.
ENDING = (
    "aged-exec", "aged-read", "apic-migrate", "away-zap", "host-split-away", "huge-collapse",
    "join-after-zap", "log-clear-manual", "log-get-away", "nested-ept-unmap", "remote-exec",
    "remote-levels", "remote-smm", "return-page-migration", "return-zap", "root-recycled-elsewhere",
    "stale-dead-root", "zap-leafs-yield", "zap-root-order", "zap-yield-restart",
)  # fmt: skip


def story(verdict: dict[str, Any]) -> list[str]:
    """Return the lines that name the tree's functions."""
    return verdict["counterexample"]["violation"].get("tree", [])  # type: ignore[no-any-return]


def explored(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = main(["explore", *arguments, "--jobs", "1", "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("--stateful", "the tree's memory is no part of a state"),
        ("--store-buffers", "no store of the tree's code is held back"),
    ],
)
def test_options_without_a_tree_s_part_are_refused(
    option: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explore", "return-zap", "--kernel", str(tmp_path), option]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"flushlab: {option}: found with --kernel; expected ")
    assert line.endswith(why)


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_verdicts_are_those_of_the_preset(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = explored(*ENDING, "--kernel", str(tree), "--executions", "20000", capsys=capsys)
    assert status == 0
    (policy,) = {one["policy"] for one in found["explored"]}
    _, model = explored(*ENDING, "--policy", policy, "--executions", "20000", capsys=capsys)
    verdicts = [(one["test"], one["verdict"], one["complete"]) for one in found["explored"]]
    assert verdicts == [(one["test"], one["verdict"], one["complete"]) for one in model["explored"]]
    assert all(complete for _, _, complete in verdicts)
    assert found["kernel"]["tree"] == str(tree)
    assert len(found["kernel"]["sources"]) == 16


class _Residue(TreeProgram, ResidueProgram):
    """A test on a tree, with the final state in its outcome."""


def swapped(tests: Sequence[str], policy: str) -> tuple[int, dict[str, int]]:
    """Swap steps that the footprints call independent; return the number of swaps, and what they changed."""
    swaps, findings = 0, dict[str, int]()
    for name in tests:
        program = _Residue(load_test(name), named_policy(policy))
        check = IndependenceCheck(program, program.objects, 1)
        with instrument(program.control):
            check.run(12, 20)
        program.close()
        swaps += check.swaps
        findings |= check.findings
    return swaps, findings


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_steps_with_disjoint_footprints_commute(tree: Path) -> None:
    built = build(tree, Use.MACHINE)
    policy = policy_for(built.version)

    def check(loaded: Tree) -> tuple[int, dict[str, int]]:
        return swapped(("fault-races-unmap", "remote-two-vcpus", "huge-split"), policy)

    swaps, findings = in_child(built, check)
    assert findings == {}
    assert swaps > 300


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_a_bug_is_found(tree: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bug = next(bug for bug in BUGS if bug.name == "a zap owes no flush")
    assert apply(bug, tree, copy)
    arguments = ["remote-two-vcpus", "--kernel", str(copy), "--output", str(tmp_path)]
    status, found = explored(*arguments, capsys=capsys)
    (one,) = found["explored"]
    assert status == 1
    assert one["verdict"] == VIOLATIONS
    # The report names the functions of the tree's code that took the right away.
    violation = one["counterexample"]["violation"]
    assert violation["tree"][0].startswith("zaps the SPTE of gfn 0x")
    assert any("tdp_mmu_zap_leafs() arch/x86/kvm/mmu/tdp_mmu.c:" in line for line in violation["tree"])
    (written,) = tmp_path.iterdir()
    assert main(["explain", str(written)]) == 0
    assert main(["explore", "--replay", str(written)]) == 2
    assert "it was recorded with the code of Linux 6." in capsys.readouterr().err
    # With the tree it runs again, and ends with the same violation; a changed tree diverges, and is named.
    again = ["explore", "--replay", str(written), "--kernel"]
    assert main([*again, str(copy), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["violation"]["kind"] == violation["kind"]
    assert document["sources"] == found["kernel"]["sources"]
    assert document["schedule"] == json.loads(written.read_text())["schedule"]
    assert main([*again, str(tree)]) == 3
    assert f"(recorded with sources {document['sources']}, the tree has " in capsys.readouterr().err


@pytest.mark.stress
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("bug", "test"), KICKS, ids=lambda one: getattr(one, "name", one))
def test_a_bug_of_the_requests_is_found(
    bug: Bug, test: str, tree: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(bug, tree, copy)
    status, found = explored(test, "--kernel", str(copy), "--executions", "300", capsys=capsys)
    (one,) = found["explored"]
    assert status == 1
    assert {"use-after-free", "stale-after-revoke"} & set(one["violations"])
    # The flush that came too late or to too few is told with its place.
    assert any("kvm_flush_remote_tlbs() virt/kvm/kvm_main.c:" in line for line in story(one))


@pytest.mark.stress
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("_soon_endless")
@pytest.mark.parametrize("name", ["crashes", "uses what it has freed", "frees twice", "never ends", "warns"])
def test_a_misdeed_is_a_failure(
    name: str, tree: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bug = next(bug for bug in MISDEEDS if bug.name == name)
    assert apply(bug, tree, copy)
    arguments = ["recover-yields", "--kernel", str(copy), "--executions", "20"]
    status, found = explored(*arguments, capsys=capsys)
    (one,) = found["explored"]
    assert status == 1
    assert one["verdict"] == "failed"
    assert "arch/x86/kvm/mmu/tdp_mmu.c:" in one["failure"]


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_a_trace_draws_an_execution_of_the_tree(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["explore", "zap-yield-restart", "--kernel", str(tree), "--trace", "--reach", "yields"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["execution"] == 1
    assert found["kernel"]
    assert {"spte", "mmu_lock"} <= {step["kind"] for step in found["steps"]}
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert "yields mmu_lock" in capsys.readouterr().out
    (written,) = tmp_path.iterdir()
    again = ["explore", "--replay", str(written), "--kernel", str(tree)]
    assert main(again) == 0
    assert f"{len(found['steps'])} steps, the same as recorded" in capsys.readouterr().out
    assert main([*again, "--stop-at", "30", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["next"] == found["steps"][30]["text"]


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_a_trace_of_a_crash_is_its_stack(tree: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bug = next(bug for bug in MISDEEDS if bug.name == "crashes")
    assert apply(bug, tree, copy)
    assert main(["explore", "recover-yields", "--kernel", str(copy), "--trace"]) == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "the tree's code crashes: SIGSEGV at address 0x10"
    assert second.startswith("  handle_removed_pt() arch/x86/kvm/mmu/tdp_mmu.c:")
