"""Verdicts on real threads: unsound policies are caught by their tests, sound ones are not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from emulator.cli.main import main
from emulator.errors import BadInput
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import load_test, parse_test, shipped_tests
from emulator.litmus.policies import expected_of, named_policy, policies_for, suits
from emulator.litmus.runner import run_test, running
from emulator.litmus.suite import Task, run_suite, run_task
from emulator.litmus.table import Results, print_results
from emulator.litmus.verdict import Outcome, differs, proven
from emulator.policy import PRESETS, Policy
from tests.emulator.litmus.turns import by_turns

# For the long run of all tests: executions per test and policy.
ITERATIONS = int(os.environ.get("FLUSHLAB_LITMUS_ITERATIONS", "2"))

# Caught every time: the error needs no luck.
CERTAIN = [
    ("away-zap", "migration=none", "use-after-free"),
    ("return-zap", "lkml-2025-cpu-flushed-mask", "use-after-free"),
    ("guest-invlpg-away", "lkml-2025-on-each-cpu", "guest-stale"),
    ("guest-mov-cr3-away", "mutant:generation-without-invvpid", "guest-stale"),
    ("remote-smm-twice", "mutant:remote-flush-current-only", "use-after-free"),
    ("root-recycled", "mutant:root-load-without-flush", "foreign-root"),
    ("root-recycled-other-vm", "root_load=none,migration=none", "cross-vm"),
    ("preempted-after-flush", "migration=none", "use-after-free"),
    ("remote-one-root", "notifier_flush=none", "use-after-free"),
    ("notifier-protect", "notifier_flush=none", "stale-after-revoke"),
    ("zap-leafs-yield", "zap_yield=no-flush", "use-after-free"),
    ("zap-root-order", "mutant:later-root-forgets-flush", "use-after-free"),
    ("log-arm", "write_protect=none", "stale-after-revoke"),
    ("log-arm-aged", "mutant:protect-flush-if-changed", "stale-after-revoke"),
    ("slot-delete-away", "slot_delete=zap-slot-leafs,migration=none", "use-after-free"),
    ("smm-memory", "mutant:smm-keeps-root", "use-after-free"),
    ("guest-paging-off", "mutant:paging-off-without-flush", "guest-stale"),
    ("huge-collapse", "notifier_flush=none", "use-after-free"),
]


@pytest.mark.parametrize(("name", "policy", "kind"), CERTAIN)
def test_the_unsound_is_caught(name: str, policy: str, kind: str) -> None:
    test = load_test(name)
    outcome = run_test(test, named_policy(policy), 5, seed=1)
    assert kind in outcome.kinds
    assert outcome.verdict(test) == "violations"
    assert outcome.violating == outcome.executions == 5
    assert outcome.first == 1
    assert expected_of(test, policy) != ("safe",)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for name, _, _ in CERTAIN}))
def test_the_sound_is_safe(name: str) -> None:
    test = load_test(name)
    with running(test, 1) as runner:
        for policy in ("linux-7.3", "root-tlb-gen"):
            outcome = runner.run(named_policy(policy), 5, 1)
            assert (policy, outcome.verdict(test), outcome.kinds) == (policy, "safe", {})


def test_rcu_is_called_by_its_name() -> None:
    outcome = run_test(load_test("root-recycled"), named_policy("mutant:root-load-without-flush"), 1, seed=1)
    details = outcome.reports[0].details
    freed = [event["cpu"] for event in details["events"] if event["kind"] == "root_free"]
    # The owner of the root takes it off the list.
    assert "rcu" in {details["actors"][str(cpu)] for cpu in freed}


def test_races_are_hit() -> None:
    """Each needs a schedule that comes about now and then; given time, it does."""
    for name, policy in [
        ("entry-races-request", "mutant:requests-before-mode"),
        ("kick-waits", "mutant:kick-without-wait"),
    ]:
        test = load_test(name)
        outcome = run_test(test, named_policy(policy), 400, stop_at=1)
        assert outcome.violating == 1, (name, policy)


def test_nothing_at_stake_is_inconclusive() -> None:
    test = parse_test('doc="d"\nsource="s"\n[threads.v0]\nvcpu=0\nops=["read 1", "read 2"]', "t", None)
    outcome = run_test(test, Policy(), 3)
    assert outcome.verdict(test) == "inconclusive"
    assert differs(outcome, test, ("safe",)) == "inconclusive instead of safe"
    assert not proven(test, {"averted": 0})
    assert proven(test, {"averted": 1})


PREPARED = """
doc = "d"
source = "s"
init = ["v0: read 0x10", "k: zap-all", "v0: read 0x10", "k: rcu"]
[threads.v0]
vcpu = 0
ops = ["read 0x10"]
[threads.k]
ops = [{ops}]
[expect]
needs = "tables-freed"
"""


def test_neither_what_init_does_nor_the_end_of_a_vm_is_a_danger() -> None:
    for ops, verdict in (("", "inconclusive"), ('"zap-all", "rcu"', "safe")):
        test = parse_test(PREPARED.format(ops=ops), "t", None)
        outcome = run_test(test, Policy(), 3)
        assert (outcome.verdict(test), bool(outcome.evidence["tables-freed"])) == (verdict, bool(ops))


@pytest.mark.parametrize("needs", ["averted", "nothing"])
def test_no_execution_is_no_verdict(needs: str) -> None:
    text = f'doc="d"\nsource="s"\n[threads.v0]\nvcpu=0\nops=["read 1"]\n[expect]\nneeds="{needs}"'
    test = parse_test(text, "t", None)
    assert Outcome("t", "linux-7.3").verdict(test) == "inconclusive"


def test_a_delay_to_which_no_thread_comes_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "idle.toml"
    delays = '[stress]\ndelays = ["v0 mode write", "mm guest 5"]\n'
    path.write_text(load_test("remote-one-root").text.replace("[expect]", f"{delays}[expect]"))
    options = ["litmus", str(path), "--policy", "linux-7.3", "--iterations", "2", "--jobs", "1"]
    assert main(options) == 0
    line = "  idle: no execution came to the point of the delay 'mm guest 5'\n"
    assert line in capsys.readouterr().out
    assert main([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["idle_delays"] == [{"test": "idle", "delay": "mm guest 5"}]


def test_executions_do_not_see_each_other() -> None:
    """Entries that an unsound policy leaves in TLBs are gone in the next execution."""
    test = load_test("return-zap")
    with running(test, 0) as runner:
        bad = runner.run(named_policy("migration=none"), 3, 0)
        good = runner.run(Policy(), 20, 0)
    assert bad.violating == 3
    assert good.kinds == {}


@pytest.mark.parametrize(
    ("machine", "ops", "lacks"),
    [
        ("root_frames = 2", ["read 0x10"], "EPT roots (root_frames = 2)"),
        (
            "table_frames = 16",
            [f"read {page:#x}" for page in range(0x10, 1 << 14, 512)],
            "EPT tables (table_frames = 16)",
        ),
    ],
)
def test_frames_that_are_used_up_are_named_with_their_key(machine: str, ops: list[str], lacks: str) -> None:
    text = f"""
        doc = "d"
        source = "s"
        init = ["v0: read 0x10", "v1: read 0x10"]
        [machine]
        {machine}
        [[vm]]
        vcpus = 4
        pages = {1 << 14}
        tdp_levels = [4, 5, 4, 5]
        smm_slots = true
        [threads.v0]
        vcpu = 0
        ops = {json.dumps(["smi", *ops])}
        [threads.v1]
        vcpu = 1
        [expect]
        needs = "nothing"
    """
    test = parse_test(text, "t", None)
    failure = f": no host frame is left for {lacks}"
    outcome = run_test(test, Policy(), 1)
    assert outcome.verdict(test) == "failed"
    assert outcome.failure.endswith(failure)
    explored = explore_verdict(test, Policy(), Plan(minimize=False))
    assert explored.verdict == "failed"
    assert explored.failure.endswith(failure)


@pytest.mark.slow
def test_who_waits_for_ever_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emulator.litmus.runner.STUCK_SECONDS", 1.0)
    text = 'doc="d"\nsource="s"\ninit=["mm: host-protect 0x10"]\n[threads.v0]\nvcpu=0\nops=["write 0x10"]\n'
    test = parse_test(text + "[threads.mm]", "t", None)
    outcome = run_test(test, Policy(), 1)
    assert outcome.verdict(test) == "failed"
    assert "v0 after 0 operations" in outcome.failure


# Never reached, and without it the test would be refused.
ENDED = 'final=["mm: notifier-end 0x10"]'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ('init=["mm: host-protect 0x10", "v0: read 0x10", "v0: write 0x10"]', "v0: 'write 0x10' is refused"),
        (
            f'init=["mm: notifier-start 0x10", "v0: read 0x10"]\n{ENDED}',
            "v0: 'read 0x10' is refused for ever",
        ),
        ('final=["mm: host-protect 0x10", "v0: write 0x10"]', "v0: 'write 0x10' is refused for ever"),
        (f'init=["mm: notifier-start 0x10", "mm: slot-delete"]\n{ENDED}', "mm: 'slot-delete' waits for ever"),
    ],
)
def test_init_and_final_have_an_end(sequence: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slot-delete" in sequence:
        monkeypatch.setattr("emulator.litmus.runner.STUCK_SECONDS", 1.0)
    text = f'doc="d"\nsource="s"\n{sequence}\n[threads.v0]\nvcpu=0\nops=["read 1"]\n[threads.mm]'
    outcome = run_test(parse_test(text, "t", None), Policy(), 1)
    assert outcome.failure.startswith(message)
    assert outcome.failure.endswith("no other thread runs")


def test_a_bug_of_kvm_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next policy gets another machine."""

    def fail(self: object, context: object) -> None:
        raise AssertionError("KVM_BUG_ON")

    test = load_test("away-zap")
    with monkeypatch.context() as patched:
        patched.setattr("emulator.litmus.kvm_ops.HostUnmap.run", fail)
        outcomes = run_task(Task("away-zap", ("linux-7.3", "root-tlb-gen"), 3, 1))
    assert [outcome.failure for outcome in outcomes] == ["mm: AssertionError: KVM_BUG_ON"] * 2
    assert differs(outcomes[0], test, ("safe",)) == "mm: AssertionError: KVM_BUG_ON"


@pytest.mark.parametrize(
    ("ops", "failure"),
    [
        ('"write 0x100"', ""),
        ('"write 0x100 fault"', "v0: shutdown at"),
        ('"store 0x7c4 0x100 0x12005", "write 0x100 fault"', ""),
        ('"efer lme 0 gp"', ""),
        ('"efer nx 0 gp"', "v0: MachineError: 'efer nx 0 gp' is no general-protection fault"),
        ('"efer lme 0"', "v0: MachineError: 'efer lme 0' is a general-protection fault"),
    ],
)
def test_an_expected_fault_has_to_come(ops: str, failure: str) -> None:
    text = (
        f'doc="d"\nsource="s"\ninit=["v0: map 0x100 0x12"]\nmachine.ept=false\n[[vm]]\npaging=true\n'
        f"[threads.v0]\nvcpu=0\nops=[{ops}]\n"
    )
    found = run_test(parse_test(text, "t", None), Policy(), 1).failure
    assert found.startswith(failure)
    assert bool(found) == bool(failure)


def test_what_kvm_refuses_is_bad_input() -> None:
    """Whether another thread arms the log in time shows only when the threads run, or `init` does."""
    arms = '[threads.l]\nops=["wait k 1", "log-arm"]\n'
    text = f'doc="d"\nsource="s"\ninit=["k: log-get"]\n[threads.k]\nops=["log-get"]\n{arms}'
    for part in (text, text.replace('["k: log-get"]', "[]")):
        with pytest.raises(BadInput, match=r"litmus test t: thread k: 'log-get' is refused: .*no dirty log"):
            run_test(parse_test(part, "t", None), Policy(), 1)


def test_the_last_pages_of_a_log_may_be_fewer_than_64() -> None:
    text = (
        'doc="d"\nsource="s"\n[[vm]]\npages=520\n[threads.v0]\nvcpu=0\nops=["write 519"]\n'
        '[threads.k]\nops=["log-arm", "wait v0 1", "log-get", "log-clear 519"]\n'
    )
    assert run_test(parse_test(text, "t", None), Policy(), 1).failure == ""


def test_the_same_machine_for_all_policies_of_a_task() -> None:
    outcomes = run_task(Task("away-zap", ("linux-7.3", "migration=none"), 3, 1))
    assert [(outcome.policy, bool(outcome.kinds)) for outcome in outcomes] == [
        ("linux-7.3", False),
        ("migration=none", True),
    ]


def test_many_executions_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emulator.litmus.suite.PIECE", 3)
    test = load_test("away-zap")
    results, progress = Results([test], 5), list[int]()
    for outcome in run_suite([(test, ("linux-7.3", "migration=none"))], 7, 5, 1, progress.append):
        results.add(outcome)
    assert sum(progress) == results.executions == 14
    assert results.outcomes["away-zap", "migration=none"].violating == 7
    assert results.outcomes["away-zap", "migration=none"].first == 5
    assert results.differing() == []


def test_what_differs() -> None:
    test = load_test("away-zap")
    outcome = Outcome("away-zap", "p", executions=1, violating=1, kinds={"cross-vm": 1})
    assert differs(outcome, test, (("cross-vm",),)) is None
    assert differs(outcome, test, (("use-after-free",),)) == "also cross-vm"
    assert differs(outcome, test, ("safe",)) == "violations instead of safe"
    assert differs(outcome, test, ()) is None
    assert expected_of(test, "linux-7.3") == ("safe",)
    assert expected_of(test, "mutant:flush-repeated-after-yield") == ("safe", "inconclusive")
    assert expected_of(test, "mutant:protect-flush-if-changed") == ()
    named = policies_for(test, [], all_mutants=False)
    suitable = [name for name in PRESETS if suits(test, name)]
    assert named[: len(suitable)] == suitable
    assert suits(load_test("hyperv-away"), "lkml-2025-hyperv-flush")
    assert "lkml-2025-hyperv-flush" not in suitable
    assert "migration=none" in named
    assert policies_for(test, ["root-tlb-gen"], all_mutants=True) == ["root-tlb-gen"]
    # A deadlock is explored: on threads it takes the time limit, and looks like a pause.
    stuck, test = "mutant:sequence-in-int", load_test("fault-seq-wraps")
    assert expected_of(test, stuck) == (("deadlock",),)
    assert stuck not in policies_for(test, [], all_mutants=False)
    assert policies_for(test, [stuck], all_mutants=False) == [stuck]


def test_names_of_policies() -> None:
    assert named_policy("root-tlb-gen+migration_vpid=none").answers()["migration_vpid"] == "none"
    assert named_policy("migration=none,root_load=none").answers()["root_load"] == "none"
    with pytest.raises(BadInput, match="unknown policy"):
        named_policy("linux-9")
    with pytest.raises(BadInput, match="unknown alternative"):
        named_policy("migration=nope")


def test_a_users_policy(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from emulator.policy import Policy\n"
        "class Mine(Policy):\n"
        "    def migration(self, cpu, vcpu):\n"
        "        return 'none'\n"
    )
    assert main(["litmus", "away-zap", "--policy", str(path), "--iterations", "3", "--jobs", "1"]) == 1


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["litmus", "away-zap", "return-zap", "--iterations", "3", "--seed", "7", "--jobs", "1"]
    assert main([*arguments, "--policy", "linux-7.3", "--policy", "lkml-2025-cpu-flushed-mask"]) == 0
    text = capsys.readouterr().out
    assert "all verdicts as expected, 12 executions" in text
    assert "lkml-2025-cpu-flushed-mask: 2 tests" in text
    assert main([*arguments, "--policy", "linux-7.3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["seed"] == 7
    assert [(o["test"], o["verdict"], o["differs"]) for o in document["outcomes"]] == [
        ("away-zap", "safe", None),
        ("return-zap", "safe", None),
    ]


def test_by_proof(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["litmus", "return-zap", "--explore", "--iterations", "150", "--jobs", "1"]
    assert main([*arguments, "--policy", "root-tlb-gen", "--policy", "lkml-2025-cpu-flushed-mask"]) == 0
    text = capsys.readouterr().out
    assert "root-tlb-gen: 1 tests" in text
    assert "1 proved, no violation" in text
    assert "caught by 1: 1 use-after-free" in text


def test_what_was_found_can_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is expected of such a policy, so its violation is told with the command that finds it again."""
    policy = "migration=none,root_load=none"
    arguments = ["litmus", "away-zap", "--policy", policy]
    for options in (
        ["--seed", "7", "--iterations", "20"],
        ["--explore", "--seed", "3", "--iterations", "150", "--seconds", "60"],
    ):
        command = [*arguments, *options]
        assert main([*command, "--jobs", "1"]) == 1
        assert f"    flushlab {' '.join(command)}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_how_far_a_proof_came(capsys: pytest.CaptureFixture[str]) -> None:
    """Too few executions for more than the executions without any preemption."""
    arguments = [
        "litmus",
        "fault-races-two",
        "--explore",
        "--iterations",
        "150",
        "--seconds",
        "0",
        "--jobs",
        "1",
    ]
    assert main([*arguments, "--policy", "root-tlb-gen"]) == 0
    assert "≤0" in capsys.readouterr().out
    assert main([*arguments, "--policy", "root-tlb-gen", "--json"]) == 0
    (outcome,) = json.loads(capsys.readouterr().out)["outcomes"]
    assert (outcome["verdict"], outcome["preemption_bound"]) == ("safe up to a bound", 0)


def test_a_wrong_expectation_is_exit_status_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'doc="d"\nsource="s"\ninit=["v0: read 1"]\n[threads.v0]\nvcpu=0\nops=["wait mm 1", "read 1"]\n'
        '[threads.mm]\nops=["host-unmap 1"]\n[expect]\n"linux-7.3"=["use-after-free"]\n'
    )
    arguments = ["litmus", str(path), "--policy", "linux-7.3", "--iterations", "2", "--jobs", "1"]
    assert main(arguments) == 1
    assert "safe instead of use-after-free" in capsys.readouterr().out


@pytest.mark.slow
def test_bad_input_is_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["litmus", "away-zip"]) == 2
    assert "no such test" in capsys.readouterr().err
    assert main(["litmus", "--policy", "nonsense"]) == 2
    assert "unknown policy" in capsys.readouterr().err


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "litmus"]) == 0
    assert "return-zap" in capsys.readouterr().out
    assert main(["list", "litmus", "--ops"]) == 0
    text = capsys.readouterr().out
    assert "host-unmap PAGE [COUNT]" in text
    assert "mov-cr3 PROCESS [noflush]" in text
    assert "[expect]" in text


@pytest.mark.stress
@pytest.mark.timeout(0 if ITERATIONS > 50 else 300)
def test_all_presets_on_all_tests() -> None:
    """FLUSHLAB_LITMUS_ITERATIONS=1500 FLUSHLAB_PRESETS=all: millions of executions of sound policies."""
    wrong = []
    # Not under the presets with which test_no_vacuous_proofs.py tries the same test.
    for turn, test in enumerate(shipped_tests(), start=1):
        with running(test, 1) as runner:
            for name in by_turns(test, turn):
                outcome = runner.run(named_policy(name), ITERATIONS, 1)
                expected = expected_of(test, name)
                # Few executions: a violation that has not happened yet is no surprise.
                if outcome.failure or (outcome.kinds and differs(outcome, test, expected)):
                    wrong.append((test.name, name, outcome.kinds, outcome.failure))
    assert not wrong


def test_what_an_interrupted_run_has_not_met_is_no_surprise(capsys: pytest.CaptureFixture[str]) -> None:
    (test,) = [load_test("away-zap")]
    results = Results([test], seed=1)
    results.add(Outcome("away-zap", "migration=none", executions=2))
    assert len(results.differing()) == 1, "a violation is expected, and there is none"
    results.interrupted = True
    assert not results.differing()
    assert results.document()["interrupted"] is True
    print_results(results, Console(width=100))
    assert "interrupted; those reached are as expected" in capsys.readouterr().out
    results.add(Outcome("away-zap", "linux-7.3", executions=2, violating=1, kinds={"use-after-free": 1}))
    assert len(results.differing()) == 1, "what it has met is"
