"""Former names of modules are known while a policy's file is executed, and gone whatever the file does."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from types import ModuleType

import pytest

import emulator.kvm as kvm
from emulator.policy import UserPolicyError, load_user_policy
from emulator.policy.former import FormerNames

EVERY = sorted(name for name in vars(builtins) if not name.startswith("_"))
FILE = """
import builtins, sys
import emulator.kvm.mmu as mmu, emulator.kvm.dirty_log
from emulator.policy import Policy
{what}
class Mine(Policy):
    def zap(self, cpu, kvm): return "rcu-proxy"
"""


def modules() -> dict[str, type]:
    """Return the class of each module of KVM, by name."""
    found = {name: type(module) for name, module in sys.modules.items() if name.startswith("emulator.kvm")}
    return {**found, **{f"kvm.{name}": type(value) for name, value in vars(kvm).items()}}


def test_names_are_gone_although_the_file_breaks_each_builtin() -> None:
    before, names = modules(), vars(builtins)
    kept = dict(names)
    for broken in EVERY:
        try:
            with FormerNames():
                known = modules() != before
                names[broken] = None
        finally:
            names.update(kept)
        assert known
        assert modules() == before, broken


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        "builtins.len = builtins.issubclass = builtins.sorted = None",
        "builtins.vars = builtins.next = None",
        "raise KeyboardInterrupt",
        "class Odd(type(sys)):\n    __class__ = property(lambda self: 1 / 0)\nmmu.__class__ = Odd",
        "mmu.__getattr__ = None\ndel sys.modules['emulator.kvm.dirty_log']\nraise ValueError",
    ],
)
def test_names_are_gone_after_a_file_that_misbehaves(what: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE.replace("{what}", what.replace("\\\n", "\n")))
    load_user_policy_or_error(path)
    before = modules()
    load_user_policy_or_error(path)
    assert modules() == before
    assert all(one is ModuleType for name, one in before.items() if name.startswith("emulator."))


def load_user_policy_or_error(path: Path) -> None:
    try:
        load_user_policy(path)
    except UserPolicyError:
        return


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("import emulator.report.result as r\nr.__class__ = type('Odd', (type(r),), {})", "result.__class__"),
        ("import emulator.kvm.x86 as x\nx.__class__ = type('Odd', (type(x),), {})", "x86.__class__"),
        ("sys.__class__ = type('Odd', (type(sys),), {})", "sys.__class__"),
        (
            "from emulator.policy import PolicyError as E\nE.__bases__ = (type('Odd', E.__bases__, {}),)",
            "PolicyError.__bases__",
        ),
    ],
)
def test_classes_of_modules_and_bases_of_classes_are_no_policys_to_change(
    what: str, name: str, tmp_path: Path
) -> None:
    """They are not among the names of a module, and change what its names mean."""
    path = tmp_path / "mine.py"
    path.write_text(FILE.replace("{what}", what))
    before = modules()
    with pytest.raises(UserPolicyError, match=rf"mine\.py:\d+: changes [\w.]*{name}; expected"):
        load_user_policy(path)
    assert modules() == before
    path.write_text(FILE.replace("{what}", ""))
    load_user_policy(path)
