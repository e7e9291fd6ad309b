"""Violations that a policy's base shows as well say nothing against the policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.kvm import bitops
from emulator.litmus.loader import load_test
from emulator.litmus.model import INCONCLUSIVE, SAFE
from emulator.litmus.policies import violations_of_base
from emulator.litmus.verdict import BOUNDED, SEARCHED, VIOLATIONS, proofs

# Linux itself violates it, in each version.
HOLE = "shadow-mmio-sync"
PATCH = """\
Flushlab-Base: {base}

diff --git a/emulator/kvm/bitops.py b/emulator/kvm/bitops.py
--- a/emulator/kvm/bitops.py
+++ b/emulator/kvm/bitops.py
@@ -1,1 +1,2 @@
{first}
+# Nothing changes.
"""
CLASS = """\
from emulator.policy import Policy


class Mine(Policy):
    base = "linux-6.12"

    def migration(self, cpu, vcpu):
        return super().migration(cpu, vcpu)
"""


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    first = Path(bitops.__file__).read_text().splitlines()[0]
    path = tmp_path / "idea.patch"
    path.write_text(PATCH.format(base="linux-6.12", first=f" {first}"))
    return path


def test_the_base_is_found_for_each_spelling(patch: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(CLASS)
    hole, sound = load_test(HOLE), load_test("aged-unmap")
    for name in (
        "remote_kick=all-pcpus",
        "linux-6.12+remote_kick=all-pcpus",
        str(patch),
        f"linux-7.3+{patch}",
        str(own),
        "mutant:zap-flushes-accessed-only",
    ):
        assert violations_of_base(hole, name) == {"inconsistent"}, name
        assert violations_of_base(sound, name) == frozenset(), name
    broken = load_test("fault-races-unmap")
    assert "use-after-free" in violations_of_base(broken, "mutant:fault-without-retry+remote_kick=all-pcpus")
    assert violations_of_base(hole, "linux-7.3") == frozenset(), "a preset has no base"
    patch.unlink()
    assert violations_of_base(hole, str(patch)) == frozenset(), "its base is no longer known"


def test_a_violation_of_the_base_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--explore", "--policy", "remote_kick=all-pcpus", "--jobs", "1"]
    assert main(["litmus", HOLE, *words]) == 0
    out = capsys.readouterr().out
    assert f"  {HOLE} under remote_kick=all-pcpus: inconsistent, as under its base\n" in out
    assert "nothing" in out


def test_the_searches_are_counted_by_their_ends() -> None:
    said = [(SAFE, "a", "p"), (BOUNDED, "b", "p"), (SEARCHED, "c", "p"), (INCONCLUSIVE, "d", "p")]
    line = "1 proved with their precondition met, 2 not searched to the end, 1 inconclusive"
    assert proofs([*said, (VIOLATIONS, "e", "p")]) == f"{line}: d"
    assert (
        proofs([*said, (INCONCLUSIVE, "d", "q")]) == f"{line.replace('1 inc', '2 inc')}: d under 2 policies"
    )
    assert proofs([*said, (SAFE, "d", "q")]) == f"{line.replace('1 proved', '2 proved')}: d under p"
