"""Reads of a policy that explore cannot watch are reported, and nothing is proved."""

from __future__ import annotations

import json
from pathlib import Path
from types import MemberDescriptorType

import pytest

from emulator.cli.main import main
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.program import LitmusProgram
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import SEARCHED, VIOLATIONS
from emulator.machine.runtime import Cpu
from emulator.policy import PolicyError
from tests.emulator.explore.returns import LOADED, LOOKS, RETURNS, explored, written

CLOCK = "from time import monotonic"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("condition", "imports", "reason"),
    [
        ("monotonic() < 0", CLOCK, "mine.py:3: imports time"),
        ("open('/dev/null').read()", "", "mine.py:7: calls open()"),
        ("__import__('os').environ.get('NOT_THERE')", "", "mine.py:7: calls __import__()"),
        ("id(vcpu) == 0", "", "mine.py:7: calls id()"),
        ("cpu.hook is None", "", "mine.py:7: reads Cpu.hook"),
        ("lib.rcu_pending(cpu.m) < 0", "from native import lib", "mine.py:7: calls rcu_pending()"),
        ("native.lib.rcu_pending(cpu.m) < 0", "import native", "mine.py: calls the core through native"),
        ("cpu.machine.stopping", "", "mine.py:7: calls machine_stopping()"),
        ("setattr(vcpu.mmu, 'prev_roots', [None] * 3)", "", "mine.py:7: writes KvmMmu.prev_roots"),
        (
            "False",
            "from emulator.kvm.vmx import vmx; vmx.migration_vpid = lambda cpu, vcpu: None",
            "mine.py:3: changes emulator.kvm.vmx.vmx.migration_vpid",
        ),
    ],
    ids=[
        "time",
        "file",
        "environment",
        "address",
        "hook",
        "core",
        "core's module",
        "property",
        "its own list",
        "KVM's code",
    ],
)
def test_unwatched_reads_are_reported(tmp_path: Path, condition: str, imports: str, reason: str) -> None:
    text = LOOKS.format(condition=condition, answer="all-contexts")
    found = explored(tmp_path, text.replace("import Policy\n", f"import Policy\n{imports}\n").lstrip("\n"))
    reason = reason.replace(":3:", ":2:").replace(":7:", ":6:")
    assert found.verdict == SEARCHED
    assert not found.complete
    assert found.bound is None
    assert reason in found.unwatched
    assert f"not all, {found.unwatched[0]}, which explore cannot watch" in found.summary()
    assert found.document()["unwatched"] == list(found.unwatched)


@pytest.mark.slow
def test_violations_are_told_all_the_same(tmp_path: Path) -> None:
    text = LOOKS.format(condition=f"monotonic() and {LOADED}", answer="none")
    found = explored(tmp_path, f"{CLOCK}\n{text}")
    assert found.verdict == VIOLATIONS


def test_no_attribute_is_behind_the_slots(tmp_path: Path) -> None:
    """`vars()` finds nothing that is not watched: KVM's objects have slots only."""
    with pytest.raises(PolicyError, match="TypeError"):
        explored(tmp_path, LOOKS.format(condition="vars(vcpu)", answer="none"))


# --- presets ------------------------------------------------------------------------------------------------


def test_nothing_is_watched_under_a_preset(tmp_path: Path) -> None:
    program = LitmusProgram(load_test("return-zap"), named_policy("linux-7.3"))
    with instrument(program.control):
        assert program.reads is None
        assert isinstance(vars(Cpu)["vcpu"], MemberDescriptorType)
    program.close()
    watched = LitmusProgram(
        load_test("return-zap"),
        named_policy(written(tmp_path, "mine.py", LOOKS.format(condition=0, answer=""))),
    )
    with instrument(watched.control):
        assert not isinstance(vars(Cpu)["vcpu"], MemberDescriptorType)
    watched.close()
    assert isinstance(vars(Cpu)["vcpu"], MemberDescriptorType)


@pytest.mark.slow
def test_tables_say_what_is_not_proved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = written(tmp_path, "returns.toml", RETURNS)
    text = LOOKS.format(condition="monotonic() < 0", answer="all-contexts").lstrip("\n")
    policy = written(tmp_path, "mine.py", f"{CLOCK}\n{text}")
    assert main(["explore", test, "--policy", policy, "--jobs", "1"]) == 0
    assert "not all, mine.py:1: imports time, which explore cannot watch" in capsys.readouterr().out
    arguments = ["litmus", "--explore", test, "--policy", policy, "--jobs", "1"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "nothing is proved: mine.py:1: imports time, which explore cannot watch" in out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcomes"][0]["unwatched"] == ["mine.py:1: imports time"]
