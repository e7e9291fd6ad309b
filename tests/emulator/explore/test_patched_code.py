"""The scope of a proof under a patch: shared state that the patch adds has ordering points, or is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from emulator.cli.main import main
from emulator.explore.machine import endless
from tests.emulator.policy.patch.edits import MIGRATION, edited, written

pytestmark = pytest.mark.slow

# A remote flush races an entry, in few interleavings; and with a migration, in many.
TEST = "entry-races-request"
MIGRATES = "return-zap-other-vcpu"
SLOT = ('        "vcpus",\n', '        "vcpus",\n        "mine",\n')
FIELD = (
    "        self.at_host_work: list[CpuId] = []\n",
    "        self.at_host_work: list[CpuId] = []\n        self.mine: Any = {}\n",
)
ANY = ("from bisect import bisect_right\n", "from bisect import bisect_right\nfrom typing import Any\n")
ENTRY = "    budget = vcpu.kvm.params.slice_accesses\n"
REQUESTS = "        cpu.stat(kvm.id, lib.STAT_REMOTE_TLB_FLUSH_REQUESTS)\n"


def explored(
    patch: str, directory: Path, capsys: pytest.CaptureFixture[str], *more: str, test: str = TEST
) -> dict[str, Any]:
    path = written(directory, patch)
    main(["explore", test, "--policy", path, "--json", *more])
    (found,) = json.loads(capsys.readouterr().out)["explored"]
    assert isinstance(found, dict)
    return found


def counting(write: str, read: str, initial: str = "0") -> str:
    """A patch with a new attribute of struct kvm: `write` at each remote flush, `read` at each entry."""
    field = FIELD[0], FIELD[1].replace("{}", initial)
    return edited(ANY, SLOT, field, (REQUESTS, REQUESTS + write), (ENTRY, read + ENTRY))


@pytest.mark.parametrize(
    ("initial", "write", "read", "name"),
    [
        ("0", "        kvm.mine += 1\n", "    vcpu.kvm.mine\n", "Kvm.mine: "),
        ("[0]", "        kvm.mine[0] += 1\n", "    vcpu.kvm.mine[0]\n", "Kvm.mine[]: "),
        ("{}", "        kvm.mine[cpu.id] = 1\n", "    list(vcpu.kvm.mine.values())\n", "Kvm.mine[]: "),
        ("set()", "        kvm.mine |= {1}\n", "    1 in vcpu.kvm.mine\n", "Kvm.mine"),
        ("bytearray(9)", "        kvm.mine[3] = 1\n", "    vcpu.kvm.mine[3]\n", "Kvm.mine[]: "),
    ],
)
def test_shared_state_without_a_point_is_named(
    initial: str, write: str, read: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explored(counting(write, read, initial), tmp_path, capsys)
    assert (found["verdict"], found["complete"]) == ("nothing found", False)
    assert any(one.startswith(name) for one in found["unordered"]), found["unordered"]


def test_the_line_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, counting("        kvm.mine += 1\n", "    vcpu.kvm.mine\n"))
    assert main(["explore", TEST, "--policy", path]) == 0
    out = capsys.readouterr().out
    assert "not all, no ordering point orders Kvm.mine: read in _enter_with_irqs_off, written" in out


@pytest.mark.parametrize(("test", "jobs"), [(TEST, "1"), (MIGRATES, "2")])
def test_shared_state_with_points_is_proved(
    test: str, jobs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = '        cpu.point("mine", kvm.id, "write")\n        kvm.mine += 1\n'
    read = '    cpu.point("mine", vcpu.kvm.id, "read")\n    vcpu.kvm.mine\n'
    found = explored(counting(write, read), tmp_path, capsys, "--jobs", jobs, test=test)
    assert (found["verdict"], found["complete"]) == ("safe", True)
    assert "unordered" not in found


def test_state_of_one_thread_needs_no_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = explored(counting("", "    vcpu.immediate_exit = False\n"), tmp_path, capsys)
    assert (found["verdict"], found["complete"]) == ("safe", True)


def test_an_existing_attribute_that_a_patch_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explored(edited((REQUESTS, REQUESTS + "        kvm.vcpus[0].loaded\n")), tmp_path, capsys)
    assert any(one.startswith("Vcpu.loaded: ") for one in found["unordered"]), found


def test_a_step_that_does_not_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither Ctrl-C nor the scheduler could end it."""
    monkeypatch.setattr(endless, "MOST_SECONDS", 1.0)
    path = written(tmp_path, edited((MIGRATION, "    while cpu.id < 99:\n        pass\n" + MIGRATION)))
    assert main(["explore", MIGRATES, "--policy", path, "--jobs", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(
        r"flushlab: idea\.patch: emulator/kvm/\S+\.py:\d+: migration_ept\(\): "
        r"used 1 s of processor time without a step; expected code that goes on\n",
        err,
    ), err


MEMORY = 'ffi.new("uint64_t *")'


@pytest.mark.parametrize("point", [False, True])
@pytest.mark.parametrize(
    ("write", "read"),
    [
        ("        lib.atomic64_inc_return(kvm.mine)\n", "    lib.atomic64_read(vcpu.kvm.mine)\n"),
        ("        kvm.mine[0] += 1\n", "    vcpu.kvm.mine[0]\n"),
    ],
)
def test_memory_of_the_core_needs_points(
    write: str, read: str, point: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calls that touch it have no footprint of their own."""
    if point:
        write = '        cpu.point("mine", kvm.id, "write")\n' + write
        read = '    cpu.point("mine", vcpu.kvm.id, "write")\n' + read
    found = explored(counting(write, read, MEMORY), tmp_path, capsys)
    assert found["verdict"] == ("safe" if point else "nothing found")
    assert point or any(one.startswith("Kvm.mine[]: ") for one in found["unordered"]), found


def test_a_patch_that_changes_nothing_is_proved_on_each_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Policies that track roots share memory of the core, with points."""
    path = written(tmp_path, edited((MIGRATION, "    kvm = vcpu.kvm\n" + MIGRATION)))
    bases = ["root-tlb-gen", "cpu-flushed-mask-cleared", "linux-5.14"]
    arguments = [f"--policy={base}+{path}" for base in bases]
    assert main(["explore", MIGRATES, TEST, "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)["explored"]
    assert [(one["verdict"], one.get("unordered")) for one in found] == [("safe", None)] * 6


IN_MIGRATION: dict[str, tuple[str, str]] = {
    "global": ("    global _mine\n    _mine = 1\n", "changes the global _mine"),
    "table": ("    _TABLE[1] = 2\n", "uses _TABLE, the state of a module"),
    "class": ("    Mine.mine = 1\n", "changes Mine.mine"),
    "function": ("    migration_ept.mine = 1\n", "changes migration_ept.mine"),
    "time": ("    import time\n    time.time()\n", "imports time"),
    "globals": ("    globals()['x'] = 1\n", "calls globals()"),
    "setattr": ("    setattr(Mine, 'x', 1)\n", "calls setattr()"),
    "identity": ("    id(cpu)\n", "calls id()"),
}


@pytest.mark.parametrize("what", IN_MIGRATION)
def test_state_that_explore_cannot_watch(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, wanted = IN_MIGRATION[what]
    head = "def migration_ept(cpu: Cpu, vcpu: Vcpu) -> None:\n"
    above = "_TABLE = {}\n_mine = 0\n\n\nclass Mine:\n    pass\n\n\n"
    patch = edited((MIGRATION, text + MIGRATION), (head, above + head))
    found = explored(patch, tmp_path, capsys, test="return-zap")
    assert (found["verdict"], found["complete"]) == ("nothing found", False)
    (sentence,) = found["unwatched"]
    assert sentence.startswith("idea.patch: ")
    assert sentence.endswith(f": {wanted}"), sentence


def test_a_function_that_the_patch_leaves_alone_is_not_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its lines have moved."""
    head = "def migration_ept(cpu: Cpu, vcpu: Vcpu) -> None:\n"
    found = explored(edited((head, "# mine\n\n\n" + head)), tmp_path, capsys, test="return-zap")
    assert (found["verdict"], found["complete"]) == ("safe", True)
