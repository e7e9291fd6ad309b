"""KVM states its decision points; the registry describes each of their answers, and mypy knows them all."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from mypy import api

from emulator.kvm.decisions import Decisions
from emulator.policy import POINTS, Policy
from emulator.policy.point import answers_of
from emulator.policy.point import point as describe

ROOT = Path(__file__).resolve().parents[3]

# Lines that end in "# error" are errors of types, and no others are.
ANSWERS = """
from emulator.kvm import decisions
from emulator.kvm.decisions import Decisions
from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.structs import Kvm, Vcpu
from emulator.machine.runtime import Cpu
from emulator.policy import Policy

def asks(cpu: Cpu, kvm: Kvm, vcpu: Vcpu, root: KvmMmuPage) -> None:
    if kvm.policy.migration(cpu, vcpu) == "done":
        pass
    if kvm.policy.migration(cpu, vcpu) == "root-tlb-gen":  # error
        pass
    if kvm.policy.remote_kick(cpu, kvm) == "all-contexts":  # error
        pass
    kvm.policy.migration(cpu, kvm)  # error
    kvm.policy.may_answer("root_put", "async")
    kvm.policy.may_answer("root_put", "none")  # error
    kvm.policy.may_answer("iroot_put", "async")  # error

class Answers(Policy):
    def migration(self, cpu: Cpu, vcpu: Vcpu) -> decisions.Migration:
        return "done"
    def migration_vpid(self, cpu: Cpu, vcpu: Vcpu) -> decisions.MigrationVpid:
        return "active-roots"  # error
    def root_put(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> decisions.Zap:  # error
        return "rcu-proxy"

class Silent:
    name = "silent"

policy: Decisions = Policy()
silent: Decisions = Silent()  # error
"""


def test_the_registry_has_the_points_and_the_answers_that_kvm_knows() -> None:
    methods = [name for name in vars(Decisions) if name in {point.name for point in POINTS}]
    others = {"heard", "may_answer", "new_data"}
    asked = {name for name, value in vars(Decisions).items() if inspect.isfunction(value) and name[0] != "_"}
    assert set(methods) == asked - others
    assert [point.name for point in POINTS] == methods
    for point in POINTS:
        method = getattr(Decisions, point.name)
        own = [one.name for one in point.alternatives if not one.proposed]
        assert (*own, *["done"] * point.acts) == answers_of(method)
        assert set(own).isdisjoint(point.proposals())
        assert inspect.getdoc(method)
        assert inspect.signature(method).parameters.keys() == (
            inspect.signature(getattr(Policy, point.name)).parameters.keys()
        )


@pytest.mark.parametrize("described", [{"wait": "yes"}, {"wait": "yes", "no-wait": "no", "maybe": "both"}])
def test_an_answer_without_a_description_is_found_and_so_is_the_opposite(described: dict[str, str]) -> None:
    with pytest.raises(AssertionError, match="kick_wait has answers"):
        describe(Decisions.kick_wait, "does the flusher wait", described)


def test_kvm_imports_no_policy_not_even_for_annotations() -> None:
    imported = [
        (path.name, node.module)
        for path in (ROOT / "emulator/kvm").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom)
    ]
    assert len(imported) > 100
    assert not [one for one in imported if str(one[1]).startswith("emulator.policy")]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mypy_knows_every_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    source = tmp_path / "answers.py"
    source.write_text(ANSWERS)
    out, err, _ = api.run(["--strict", "--no-error-summary", "--hide-error-context", str(source)])
    assert not err
    errors = {int(line.split(":")[1]) for line in out.splitlines() if ": error:" in line}
    wanted = {n for n, line in enumerate(ANSWERS.splitlines(), 1) if line.endswith("# error")}
    assert errors == wanted, out
