"""Policies that act, explored: their state is KVM's own to the search, and orders are honoured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from emulator.explore.machine.options import ExploreOptions
from emulator.explore.results.verdict import Plan, Verdict, explore_verdict
from emulator.litmus.loader import load_test, load_tests
from emulator.litmus.model import SAFE
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import VIOLATIONS

GENERATIONS = """
from emulator.policy import Policy
from emulator.policy.instructions import (
    REASON_MIGRATION, active_roots, flush_elided, invept_single, linked_roots
)
from emulator.policy.state import Generation, PerCpu, per_root

class Mine(Policy):
    tlb_gen = per_root(Generation, 1)
    cpu_tlb_gen = per_root(PerCpu)

    def remote_flush_due(self, cpu, kvm, reason):
        for root in linked_roots(cpu, kvm):
            self.tlb_gen(root).inc_return(cpu)

    def pcpu_flushes(self, cpu, kvm, flush):
        for root in flush.roots:
            self.cpu_tlb_gen(root).set(cpu, cpu.id, self.tlb_gen(root).read(cpu))

    def migration(self, cpu, vcpu):
        for root in active_roots(vcpu):
            if self.tlb_gen(root.sp).read(cpu) != self.cpu_tlb_gen(root.sp).read(cpu, cpu.id):
                invept_single(cpu, vcpu.kvm, root, REASON_MIGRATION)
            else:
                flush_elided(cpu, vcpu.kvm, REASON_MIGRATION, root.hfn)
        return "done"

    def migration_vpid(self, cpu, vcpu):
        return "invvpid"
"""
LATE = GENERATIONS.replace("remote_flush_due(self, cpu, kvm, reason)", "kick_wait(self, cpu, kvm)").replace(
    "inc_return(cpu)\n", 'inc_return(cpu)\n        return "wait"\n', 1
)


def written(directory: Path, text: str, name: str = "mine.py") -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


def explored(policy: str, test: str, executions: int = 500, *, buffers: bool = False) -> Verdict:
    options = ExploreOptions(store_buffers=buffers)
    return explore_verdict(
        load_test(test), named_policy(policy), Plan(executions=executions, minimize=False, options=options)
    )


@pytest.mark.slow
def test_a_class_with_state_is_proved(tmp_path: Path) -> None:
    policy = written(tmp_path, GENERATIONS)
    verdict = explored(policy, "return-zap-other-vcpu")
    assert (verdict.verdict, verdict.complete, verdict.unwatched) == (SAFE, True, ())
    assert verdict.met
    assert verdict.executions > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "test", "kind"),
    [
        ("self.tlb_gen(root).inc_return(cpu)", "pass", "return-zap", "use-after-free"),
        ('return "invvpid"', 'return "with-ept"', "guest-invlpg-away", "guest-stale"),
    ],
)
def test_a_class_with_a_hole_is_refuted(tmp_path: Path, old: str, new: str, test: str, kind: str) -> None:
    text = GENERATIONS.replace(old, new)
    assert text != GENERATIONS
    verdict = explored(written(tmp_path, text), test)
    assert verdict.verdict == VIOLATIONS
    assert verdict.kinds[0] == kind


@pytest.mark.slow
def test_state_is_an_object_of_the_order(tmp_path: Path) -> None:
    """The generation moves on when a request may be visible already: one order of the steps is wrong."""
    verdict = explored(written(tmp_path, LATE, "late.py"), "mask-cleared-late", 2000)
    assert verdict.verdict == VIOLATIONS
    steps = verdict.counterexample
    assert steps is not None
    texts = [step["text"] for step in steps.document()["steps"]]
    assert any("policy_state tlb_gen root 0x1" in text for text in texts)


# A flusher that finds no vCPU on its way into the guest does not wait.  A vCPU stores the flag, then checks
# for requests; the flusher makes a request, then loads the flag.  One of them must see the other's store.
ENTERING = """
from emulator.policy import Policy
from emulator.policy.state import Flag, Generation, PerCpu, per_vm

class Mine(Policy):
    entering = per_vm(Flag)

    def vcpu_loading(self, cpu, vcpu):
        self.entering(vcpu.kvm).clear(cpu)

    def before_entry(self, cpu, vcpu):
        self.entering(vcpu.kvm).set(cpu)

    def kick_wait(self, cpu, kvm):
        return "wait" if self.entering(kvm).test(cpu) else "no-wait"
"""
ENTRY = """
doc = "A request is made while the vCPU is on its way into the guest."
source = "this test"
init = ["v0: read 0x10", "v0: exit"]

[threads]
v0 = { vcpu = 0, ops = ["read 0x10"] }
mm.ops = ["host-unmap 0x10"]
"""
BY_GENERATION = (
    ENTERING.replace("per_vm(Flag)", "per_vm(Generation)")
    .replace(".clear(cpu)", ".set(cpu, 0)")
    .replace(".set(cpu)", ".set(cpu, 1)")
    .replace(".test(cpu)", ".read(cpu)")
)
BY_ARRAY = (
    ENTERING.replace("per_vm(Flag)", "per_vm(PerCpu)")
    .replace(".clear(cpu)", ".set(cpu, 0, 0)")
    .replace(".set(cpu)", ".set(cpu, 0, 1)")
    .replace(".test(cpu)", ".read(cpu, 0)")
)


WITH_OTHERS = (
    ENTERING.replace(
        "    def kick_wait",
        "        self.gen(vcpu.kvm).read(cpu)\n"
        "        self.other(vcpu.kvm).test_bit(cpu, 0)\n"
        "        self.gen(vcpu.kvm).set(cpu, 1)\n\n    def kick_wait",
    )
    .replace(
        "    entering = per_vm(Flag)\n",
        "    entering = per_vm(Flag)\n    gen = per_vm(Generation)\n    other = per_vm(Bitmap)\n",
    )
    .replace("import Flag,", "import Bitmap, Flag,")
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (ENTERING, ".set(cpu)", '.set(cpu, "full")'),
        (BY_GENERATION, ".set(cpu, 1)", ".inc_return(cpu)"),
        (BY_ARRAY, ".set(cpu, 0, 1)", '.set(cpu, 0, 1, "full")'),
        # Neither a load of another word nor a store to it waits for the store.
        (WITH_OTHERS, ".set(cpu)", '.set(cpu, "full")'),
    ],
)
def test_orders_are_honoured_by_store_buffers(tmp_path: Path, text: str, old: str, new: str) -> None:
    """A relaxed or a release store may become visible behind the check for requests; a full one may not."""
    test = written(tmp_path, ENTRY, "test.toml")
    relaxed, full = written(tmp_path, text), written(tmp_path, text.replace(old, new), "full.py")
    release = written(tmp_path, text.replace(old, f'{old[:-1]}, "release")'), "release.py")
    if text is ENTERING:
        assert kinds(test, relaxed, buffers=False, executions=150) == ()
    assert kinds(test, full, buffers=True, executions=150) == ()
    for late in (relaxed, release):
        assert "use-after-free" in kinds(test, late, buffers=True)


def kinds(test: str, policy: str, *, buffers: bool, executions: int = 600) -> tuple[str, ...]:
    (found,) = load_tests([test])
    plan = Plan(executions=executions, minimize=False, options=ExploreOptions(store_buffers=buffers))
    verdict = explore_verdict(found, named_policy(policy), plan)
    assert verdict.met
    assert not verdict.failure
    return verdict.kinds


@pytest.mark.slow
def test_what_policies_call_is_instrumented_from_the_start() -> None:
    """A module that is imported later calls the core itself: a wait in it would never end."""
    found = "{module.__name__ for module in instrumented_modules()}"
    wanted = "{'emulator.policy.instructions', 'emulator.policy.state'}"
    text = f"from emulator.explore.machine.lib import instrumented_modules\nassert {wanted} <= {found}"
    subprocess.run([sys.executable, "-c", text], check=True, timeout=60)


FORWARDED = """
from emulator.policy import Policy
from emulator.policy.state import Bitmap, Flag, Generation, PerCpu, per_vm

class Mine(Policy):
    flag = per_vm(Flag)
    gen = per_vm(Generation)
    array = per_vm(PerCpu)
    mask = per_vm(Bitmap)

    def before_entry(self, cpu, vcpu):
        kvm = vcpu.kvm
        self.flag(kvm).set(cpu)
        assert self.flag(kvm).test(cpu)
        self.flag(kvm).clear(cpu)
        assert not self.flag(kvm).test(cpu)
        before = self.gen(kvm).inc_return(cpu)
        self.gen(kvm).set(cpu, before + 7)
        assert self.gen(kvm).read(cpu) == before + 7
        self.array(kvm).set(cpu, 1, before)
        assert self.array(kvm).read(cpu, 1) == before
        assert self.array(kvm).read(cpu, 0) == 0
        self.mask(kvm).set_bit(cpu, 1)
        self.mask(kvm).clear(cpu)
        assert not self.mask(kvm).test_bit(cpu, 1)
        assert self.mask(kvm).pcpus_set(cpu) == []
"""


@pytest.mark.slow
def test_a_cpu_loads_its_own_waiting_stores(tmp_path: Path) -> None:
    (found,) = load_tests([written(tmp_path, ENTRY, "test.toml")])
    plan = Plan(executions=60, minimize=False, options=ExploreOptions(store_buffers=True))
    verdict = explore_verdict(found, named_policy(written(tmp_path, FORWARDED)), plan)
    assert (verdict.failure, verdict.kinds) == ("", ())
    assert verdict.met
