"""Litmus tests under the controlled scheduler: verdicts, counterexamples, and the same thing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.explore.engine.scheduler import Divergence
from emulator.explore.results.minimize import size
from emulator.explore.results.replay import load, replay
from emulator.explore.results.verdict import Plan, Verdict, explore_verdict
from emulator.litmus.loader import load_test
from emulator.litmus.model import SAFE
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import BOUNDED, SEARCHED, VIOLATIONS

TEXT = """
doc = "A kick that does not come, and a thread that waits for one that waits for it."
source = "here"
[threads.v0]
vcpu = 0
ops = ["read 0x10", "read 0x11"]
[threads.mm]
ops = ["host-unmap 0x10"]
"""


def verdict_of(test: str, policy: str, plan: Plan | None = None) -> Verdict:
    return explore_verdict(load_test(test), named_policy(policy), plan)


@pytest.mark.parametrize("policy", ["linux-7.3", "root-tlb-gen", "cpu-flushed-mask-cleared"])
def test_what_is_sound_is_proved(policy: str) -> None:
    found = verdict_of("return-zap", policy)
    assert (found.verdict, found.complete, found.counterexample) == (SAFE, True, None)
    assert "in the only interleaving" in found.summary()


def test_a_race_is_explored_to_the_end() -> None:
    found = verdict_of("entry-races-request", "linux-7.3")
    assert (found.verdict, found.complete) == (SAFE, True)
    assert found.rounds[-1]["preemption_bound"] is None
    assert found.executions > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("test", "policy", "kind"),
    [
        ("return-zap", "lkml-2025-cpu-flushed-mask", "use-after-free"),
        ("guest-invlpg-away", "lkml-2025-cpu-flushed-mask", "guest-stale"),
        ("entry-races-request", "mutant:requests-before-mode", "use-after-free"),
        ("entry-races-request", "mutant:interrupts-before-entry", "use-after-free"),
        ("entry-races-request", "mutant:mode-before-request", "use-after-free"),
        ("fault-races-unmap", "mutant:fault-without-retry", "use-after-free"),
        ("kick-waits", "mutant:kick-without-wait", "use-after-free"),
        ("root-recycled", "mutant:root-load-without-flush", "foreign-root"),
        ("log-get", "write_protect=none", "stale-after-revoke"),
        ("notifier-range-end", "mutant:flush-at-range-end", "use-after-free"),
        ("huge-neighbour-fault", "notifier_flush=none", "stale-after-revoke"),
        ("zap-range-fault", "mutant:zap-range-not-counted", "stale-after-revoke"),
        ("zap-invalid-root", "mutant:notifier-skips-invalid-roots", "use-after-free"),
    ],
)
def test_what_is_unsound_is_refuted(test: str, policy: str, kind: str) -> None:
    found = verdict_of(test, policy)
    assert found.verdict == VIOLATIONS
    assert found.kinds[0] == kind
    assert found.counterexample is not None
    assert found.counterexample.violation is not None
    assert found.counterexample.violation["kind"] == kind


def test_a_bound_or_a_budget_is_admitted() -> None:
    found = verdict_of("fault-races-unmap", "linux-7.3", Plan(bound=1))
    assert (found.verdict, found.complete, found.bound) == (BOUNDED, False, 1)
    assert "up to 1 preemption;" in found.summary()
    found = verdict_of("fault-races-unmap", "linux-7.3", Plan(executions=3, bound=9))
    assert (found.complete, found.executions <= 3) == (False, True)
    found = verdict_of("fault-races-unmap", "linux-7.3", Plan("random", executions=3))
    assert (found.verdict, found.complete, found.executions) == (SEARCHED, False, 3)


@pytest.mark.parametrize("strategy", ["pct", "pos", "surw", "random"])
def test_sampling_finds_what_is_easy_to_find(strategy: str) -> None:
    plan = Plan(strategy, executions=300, seed=1)
    found = verdict_of("entry-races-request", "mutant:requests-before-mode", plan)
    assert found.verdict == VIOLATIONS
    assert (found.guarantee is not None) == (strategy == "pct")
    again = verdict_of("entry-races-request", "mutant:requests-before-mode", plan)
    assert again.document() == found.document()


def test_minimizing_makes_it_shorter() -> None:
    plan = Plan("random", executions=300, seed=3, minimize=False)
    long = verdict_of("entry-races-request", "mutant:requests-before-mode", plan).counterexample
    short = verdict_of(
        "entry-races-request", "mutant:requests-before-mode", Plan("random", executions=300, seed=3)
    ).counterexample
    assert long is not None
    assert short is not None
    assert size(tuple(map(hash, short.schedule))) < size(tuple(map(hash, long.schedule)))


def test_a_counterexample_replays_and_says_when_it_does_not(tmp_path: Path) -> None:
    found = verdict_of("entry-races-request", "mutant:requests-before-mode").counterexample
    assert found is not None
    path = tmp_path / "hole.json"
    found.write(path)
    assert replay(path).document() == found.document()

    document = load(path)
    document["policy"] = "linux-7.3"
    path.write_text(json.dumps(document))
    with pytest.raises(Divergence, match=r"step|schedule"):
        replay(path)


@pytest.mark.slow
def test_the_same_document_byte_for_byte(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        status = main(
            [
                "explore",
                "entry-races-request",
                "return-zap",
                "--policy",
                "mutant:mode-before-request",
                "--json",
            ]
        )
        assert status == 1
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert [item["verdict"] for item in json.loads(texts[0])["explored"]] == [VIOLATIONS, SAFE]


def test_the_command_line_writes_and_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explore", "return-zap", "--policy", "lkml-2025-cpu-flushed-mask", "--output", str(tmp_path)]
    assert main(arguments) == 1
    (path,) = tmp_path.iterdir()
    capsys.readouterr()
    assert main(["explore", "--replay", str(path)]) == 1
    assert "the same as recorded" in capsys.readouterr().out
    assert main(["explain", str(path)]) == 0
    assert "CPU0" in capsys.readouterr().out
    path.write_text("{}")
    assert main(["explore", "--replay", str(path)]) == 2
    assert main(["explore", "return-zap", "--strategy", "guess"]) == 2


@pytest.mark.parametrize("where", ["init", "final"])
def test_init_and_final_are_given_up(where: str, tmp_path: Path) -> None:
    path = tmp_path / "refused.toml"
    sequence = f'{where} = ["mm: host-protect 1", "v0: write 1"]'
    path.write_text(TEXT.replace("[threads.v0]", f"{sequence}\n[threads.v0]"))
    found = explore_verdict(load_test(str(path)), named_policy("linux-7.3"))
    assert (found.verdict, found.counterexample) == ("failed", None)
    assert found.failure == "v0: 'write 1' is refused for ever: no other thread runs"


@pytest.mark.slow
def test_a_failure_is_a_verdict_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: object, context: object) -> None:
        raise AssertionError("KVM_BUG_ON")

    monkeypatch.setattr("emulator.litmus.kvm_ops.HostUnmap.run", fail)
    arguments = ["entry-races-request", "guest-invlpg-away", "--policy", "linux-7.3", "--jobs", "1"]
    assert main(["explore", *arguments]) == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.split(maxsplit=2)[2] == "failed: mm: AssertionError: KVM_BUG_ON"
    assert "no violation in the only interleaving" in second

    assert main(["explore", *arguments, "--json"]) == 1
    explored = json.loads(capsys.readouterr().out)["explored"]
    assert [(one["verdict"], one["failure"]) for one in explored] == [
        ("failed", "mm: AssertionError: KVM_BUG_ON"),
        (SAFE, None),
    ]

    assert main(["litmus", "--explore", *arguments]) == 1
    text = capsys.readouterr().out
    assert "1 verdicts are not as expected" in text
    assert "entry-races-request under linux-7.3: mm: AssertionError: KVM_BUG_ON" in text

    # A setting is no preset: those have a table of their own.
    arguments[3] = "migration=active-roots"
    assert main(["litmus", "--explore", *arguments]) == 1
    assert "entry-races-request (failed)" in capsys.readouterr().out

    assert main(["explore", "--audit", *arguments[:1], "--executions", "1"]) == 1
    assert "1x mm: AssertionError: KVM_BUG_ON  [entry-races-request]" in capsys.readouterr().out


def test_an_error_of_ours_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: object, context: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("emulator.litmus.kvm_ops.HostUnmap.run", fail)
    assert main(["explore", "entry-races-request", "--jobs", "1"]) == 3
    assert "IndexError" in capsys.readouterr().err


# Its memory is out of reach.
UNSTEADY = """
import string
from itertools import count
from emulator.policy import Policy

asked = vars(string).setdefault("unsteady", count())

class Unsteady(Policy):
    def migration(self, cpu, vcpu):
        return "none" if next(asked) % 7 == 6 else super().migration(cpu, vcpu)
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", [["explore"], ["litmus", "--explore"]])
def test_a_policy_that_answers_now_so_now_so(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "unsteady.py"
    path.write_text(UNSTEADY)
    assert main([*command, "bounce-zap", "--policy", str(path), "--jobs", "1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"flushlab: {path}: the same steps went on in another way")
    assert err.endswith("; expected answers that depend only on the events before them\n")


@pytest.mark.slow
def test_not_even_one_interleaving_is_proved_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The search has nothing to repeat here, and would be through before the policy's mind changes."""
    path = tmp_path / "unsteady.py"
    path.write_text(UNSTEADY.replace('"unsteady"', '"one interleaving"'))
    assert main(["explore", "return-zap", "--policy", str(path), "--jobs", "1"]) == 2
    assert "(the first execution came out in another way)" in capsys.readouterr().err


@pytest.mark.slow
def test_bad_input_comes_from_another_process_as_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(UNSTEADY.replace('"none"', '"nothing"').replace("% 7 == 6", ">= 0"))
    arguments = ["return-zap", "away-zap", "--policy", str(path), "--jobs", "2"]
    assert main(["explore", *arguments]) == 2
    # On a busy machine lines of progress come before.
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("explore: ")]
    (line,) = lines
    assert line.startswith(f"flushlab: {path}:9: Unsteady.migration: returned 'nothing'; expected one of ")


def test_a_deadlock_says_who_waits_for_whom(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from emulator.explore.machine import control

    # An interrupt that never arrives.
    def nothing(self: control.Control, execution: object, number: int) -> object:
        return lambda: None

    monkeypatch.setattr(control.Control, "_interrupts", nothing)
    path = tmp_path / "stuck.toml"
    path.write_text(TEXT)
    found = explore_verdict(load_test(str(path)), named_policy("linux-7.3"), Plan(minimize=False))
    assert found.verdict == VIOLATIONS
    assert found.kinds[0].startswith("deadlock")
    assert found.counterexample is not None
    assert found.counterexample.violation is not None
    text = found.counterexample.violation["text"]
    assert "mm in kvm_kick_many_cpus() waits for an acknowledgement by pCPU 0" in text


RETRIES = """
doc = "The invalidation waits for the fault, which is retried until it has ended."
source = "this test"

[threads]
v0 = { vcpu = 0, ops = ["wait mm 1", "read 0x10"] }
mm.ops = ["notifier-start 0x10", "wait v0 2", "notifier-end 0x10"]
"""


def test_a_retry_that_never_ends_says_what_it_looks_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, found = tmp_path / "retries.toml", tmp_path / "found"
    path.write_text(RETRIES)
    assert main(["explore", str(path), "--jobs", "1", "--output", str(found)]) == 1
    waits = "deadlock: v0 in handle_ept_violation() waits for a change of mmu_invalidate_seq 0"
    assert waits in capsys.readouterr().out
    assert main(["explain", str(found / "retries-linux-7.3.json")]) == 0
    drawn = " ".join(capsys.readouterr().out.split())
    assert f"[1] {waits}, mm waits for operation 2 of v0" in drawn
    assert "handle_ept_violation() waits for a change of mmu_invalidate_seq 0" in drawn.partition("[1]")[0]


LOCKED = """
doc = "A slot cannot go while an invalidation is in progress, and the next ioctl waits for slots_lock."
source = "this test"

[threads]
v0 = { vcpu = 0, ops = ["read 0x10"] }
mm.ops = ["notifier-start 0x10", "wait k1 2", "notifier-end 0x10"]
k1.ops = ["wait mm 1", "slot-delete"]
k2.ops = ["wait mm 1", "log-arm"]
"""


def test_a_deadlock_is_drawn_with_functions_and_locks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, found = tmp_path / "locked.toml", tmp_path / "found"
    path.write_text(LOCKED)
    assert main(["explore", str(path), "--jobs", "1", "--output", str(found)]) == 1
    assert main(["explain", str(found / "locked-linux-7.3.json")]) == 0
    drawn = " ".join(capsys.readouterr().out.split())
    one, other = ("k1", "k2") if "slots_lock, held by k1" in drawn else ("k2", "k1")
    assert f"{other} in kvm_set_memory_region() waits for slots_lock, held by {one}" in drawn
    assert f"{one} in kvm_swap_active_memslots() waits for mn_active_invalidate_count" in drawn
    assert "kvm_set_memory_region() waits for slots_lock" in drawn.partition("[1]")[0]
