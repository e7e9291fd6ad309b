"""The CPU of each thread."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import ExploreOptions
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.kvm.kvm_host import X86_CR0_PG
from emulator.litmus.loader import load_test, shipped_texts
from emulator.litmus.policies import named_policy


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(shipped_texts()))
def test_each_thread_has_a_cpu_of_its_own_and_so_has_rcu(name: str) -> None:
    program = LitmusProgram(load_test(name), named_policy("linux-7.3"), ExploreOptions(store_buffers=True))
    names = program.names()
    assert sorted(names.values()) == sorted(set(names.values()))
    with instrument(program.control):
        rcu: Any = SimpleNamespace(name="rcu")
        assert names[program.cpu_of(rcu)] == "rcu"
        # Callbacks' stores are in no store buffer.
        assert program.cpu_of(rcu) not in program._buffered()
    program.close()


@pytest.mark.parametrize("name", ["shadow-new-table", "shadow-smm-table", "shadow-resync"])
def test_guests_without_ept_have_booted_before_the_first_step(name: str) -> None:
    """Their boots take hundreds of steps, which would be part of each execution."""
    program = LitmusProgram(load_test(name), named_policy("linux-7.3"))
    with instrument(program.control):
        program._prepare()
    vcpus = [vcpu for kvm in program.harness.kvms for vcpu in kvm.vcpus]
    assert [bool(vcpu.arch.cr0 & X86_CR0_PG) for vcpu in vcpus] == [True] * len(vcpus)
    program.close()


def test_a_callback_frees_on_its_own_cpu() -> None:
    verdict = explore_verdict(
        load_test("root-recycled"), named_policy("mutant:root-load-without-flush"), Plan()
    )
    assert verdict.counterexample is not None
    violation = verdict.counterexample.document()["violation"]
    root = violation["entry"]["ep4ta"]
    freed = [e["cpu"] for e in violation["events"] if e["kind"] == "root_free" and e["a"] == root]
    # kvm_tdp_mmu_put_root() takes it off the list; the page goes when its callback has run.
    assert [violation["actors"][str(cpu)] for cpu in freed] == ["pcpu0", "rcu"]
