"""A policy decides nothing that the tree's code decides, and no test that needs another MMU runs on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.errors import BadInput
from emulator.kernel_tree.on_machine.points import OWN_POINTS, check_policy_for_tree
from emulator.kernel_tree.on_machine.suite import fitting_tests
from emulator.litmus.loader import load_test, shipped_tests
from emulator.litmus.policies import named_policy
from emulator.policy import PRESETS


@pytest.mark.parametrize(
    "policy",
    ["linux-7.3", "linux-6.12", "linux-5.14", "lkml-2025-active-roots", "linux-6.12+migration=none"],
)
def test_a_policy_about_the_rest(policy: str) -> None:
    check_policy_for_tree(named_policy(policy))


@pytest.mark.parametrize(
    ("policy", "found"),
    [
        ("linux-6.12+zap_yield=no-flush", "zap_yield=no-flush"),
        ("linux-6.12+kick_wait=no-wait", "kick_wait=no-wait"),
        ("map_replace=none", "map_replace=none"),
        ("lkml-2025-on-each-cpu", "root_alloc=on-each-cpu"),
        ("lkml-2021-batch-list", "zap=disconnected-list"),
        ("mutant:iterator-skips-spte", "patches the model's code"),
    ],
)
def test_a_policy_about_what_the_tree_decides(policy: str, found: str) -> None:
    with pytest.raises(BadInput, match=found):
        check_policy_for_tree(named_policy(policy))


def test_a_class_that_decides_for_the_tree(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from emulator.policy import Policy\n\n\nclass Mine(Policy):\n"
        "    def map_replace(self, cpu, kvm, gfn):\n        return 'flush'\n"
    )
    with pytest.raises(BadInput, match="decides map_replace"):
        check_policy_for_tree(named_policy(str(file)))


def test_each_point_of_the_tree_is_one() -> None:
    assert set(OWN_POINTS) < PRESETS["linux-7.3"].answers().keys()


def test_tests_without_ept_are_refused_by_name() -> None:
    every = shipped_tests()
    chosen = fitting_tests(every, named=False)
    assert 0 < len(chosen) < len(every)
    assert all(test.machine.ept for test in chosen)
    with pytest.raises(BadInput, match="shadow-wp: it needs the shadow MMU"):
        fitting_tests([load_test("return-zap"), load_test("shadow-wp")], named=True)


@pytest.mark.parametrize("option", ["--explore", "--mutants"])
def test_options_that_do_not_go_together(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["litmus", "return-zap", "--kernel", "no-such-tree", option]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"flushlab: {option}: found with --kernel")


def test_a_tree_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["litmus", "return-zap", "--kernel", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(tmp_path) in line


@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_scenario_without_ept_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--kernel", "no-such-tree", "--no-ept", "--policy", "linux-6.12"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "it needs the shadow MMU" in line


@pytest.mark.parametrize("command", ["run", "compare", "litmus"])
def test_a_policy_of_the_tree_s_points_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    policy = "linux-6.12+zap_yield=no-flush"
    assert main([command, "--kernel", "no-such-tree", "--policy", policy]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "zap_yield=no-flush, which the tree's own code decides" in line


def test_a_sweep_has_no_tree(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--policy", "linux-6.12", "--vary", "pcpus=2,4", "--kernel", "no-such-tree"]
    assert main(["compare", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("flushlab: --kernel: found with a sweep")
