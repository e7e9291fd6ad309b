"""Users' classes that act: as the shipped proposals do, on top of them, and apart from each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import emulator.policy.proposals
from emulator.cli.main import main
from emulator.kvm.structs import Kvm
from emulator.policy import UserPolicyError, load_user_policy, preset
from native import lib
from tests.emulator.kvm.rig import Guest, Rig, scopes

DIRECTORY = Path(next(iter(emulator.policy.proposals.__path__)))
# The presets that are proposals' classes alone, and the files.
FILES = {
    "lkml-2025-on-each-cpu": "lkml_2025_on_each_cpu.py",
    "lkml-2025-vm-pcpu-mask": "lkml_2025_vm_pcpu_mask.py",
    "lkml-2025-cpu-flushed-mask": "lkml_2025_cpu_flushed_mask.py",
    "cpu-flushed-mask-cleared": "cpu_flushed_mask_cleared.py",
    "root-tlb-gen": "root_tlb_gen.py",
}


def written(directory: Path, text: str, name: str = "mine.py") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def guest_of(rig: Rig, path: Path) -> tuple[Kvm, Guest]:
    kvm = rig.vm(load_user_policy(path))
    return kvm, rig.guest(kvm)


# --- answers of proposals -----------------------------------------------------------------------------------

ANSWERS = """
from emulator.policy import Policy

class Mine(Policy):
    def migration(self, cpu, vcpu):
        return "{answer}"
"""


def test_a_class_may_answer_with_a_proposal_that_keeps_nothing(rig: Rig, tmp_path: Path) -> None:
    policy = load_user_policy(written(tmp_path, ANSWERS.format(answer="active-roots")))
    guest = rig.guest(rig.vm(policy))
    guest.read(0, 5)
    before = scopes(rig)
    guest.read(1, 5)
    after = scopes(rig)
    assert after["invept_single"] - before["invept_single"] == 1
    assert after["invept_global"] == before["invept_global"]
    assert policy.given() == {"migration": {"active-roots": 2}}


@pytest.mark.parametrize("answer", ["root-tlb-gen", "cpu-flushed-mask"])
def test_one_with_state_needs_it_for_a_base(rig: Rig, tmp_path: Path, answer: str) -> None:
    _, guest = guest_of(rig, written(tmp_path, ANSWERS.format(answer=answer)))
    with pytest.raises(UserPolicyError, match=rf"mine\.py:5: Mine\.migration: returned '{answer}'.*a base"):
        guest.read(0, 5)


BASED = """
from emulator.policy import Policy
from emulator.policy.instructions import linked_roots

class Mine(Policy):
    base = "root-tlb-gen"

    def __init__(self):
        super().__init__()
        self.heard = []

    def migration(self, cpu, vcpu):
        return super().migration(cpu, vcpu)

    def remote_flush_due(self, cpu, kvm, reason):
        self.heard.append(len(linked_roots(cpu, kvm)))
"""


def test_the_base_hears_its_moments_too(rig: Rig, tmp_path: Path) -> None:
    """Without the base's, no generation would move on, and the second move would not flush."""
    policy = load_user_policy(written(tmp_path, BASED))
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    for pcpu in (0, 1):
        guest.read(pcpu, 5)
    before = scopes(rig)["invept_single"]
    guest.read(0, 5)
    assert scopes(rig)["invept_single"] == before
    rig.unmap(kvm, 0, 64)
    guest.read(0, 70)
    guest.read(1, 70)
    assert scopes(rig)["invept_single"] - before == 2
    assert rig.violations() == {}
    assert policy._mine.heard  # type: ignore[attr-defined]


# --- errors -------------------------------------------------------------------------------------------------

HEARS = """
from emulator.policy import Policy
from emulator.policy.state import Bitmap, per_root

class Mine(Policy):
    mask = per_root(Bitmap)

    def {definition}
        {body}
"""


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("before_entry(self, cpu):", r"Mine\.before_entry: before_entry\(self, cpu\).*vcpu\)"),
        ("before_entri(self, cpu, vcpu):", "no such decision point or moment; expected before_entry"),
    ],
)
def test_a_moment_with_another_signature_is_refused(tmp_path: Path, definition: str, message: str) -> None:
    with pytest.raises(UserPolicyError, match=message):
        load_user_policy(written(tmp_path, HEARS.format(definition=definition, body="pass")))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("self.mask(kvm)", r"mine\.py:9: Mine\.remote_flush_due: TypeError: mask is state of a root"),
        ("self.mask(kvm.tdp_mmu_roots[0]).set_bit(cpu, 99)", "IndexError: <mask of root 0x1> has no pCPU 99"),
        ("raise SystemExit", r"Mine\.remote_flush_due: SystemExit"),
    ],
)
def test_an_error_in_a_moment_is_one_line(rig: Rig, tmp_path: Path, body: str, message: str) -> None:
    text = HEARS.format(definition="remote_flush_due(self, cpu, kvm, reason):", body=body)
    kvm, guest = guest_of(rig, written(tmp_path, text))
    guest.read(0, 5)
    with pytest.raises(UserPolicyError, match=message):
        rig.unmap(kvm, 0, 64)


def test_a_class_that_only_listens_is_a_policy(rig: Rig, tmp_path: Path) -> None:
    text = HEARS.format(definition="vcpu_loading(self, cpu, vcpu):", body="self.last = vcpu.id")
    policy = load_user_policy(written(tmp_path, text))
    assert policy.overrides() == {"vcpu_loading": "mine.py:8"}
    rig.guest(rig.vm(policy)).read(0, 5)
    assert lib.machine_stopping(rig.machine.m) == 0


# --- the shipped files as a user's --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_copy_of_a_proposal_has_its_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = written(tmp_path, (DIRECTORY / FILES[name]).read_text(), "copy.py")
    assert load_user_policy(path).answers()["migration_vpid"] == preset(name).answers()["migration_vpid"]
    tests = ["return-zap", "guest-invlpg-away", "root-recycled"]
    main(["explore", *tests, "--policy", name, "--policy", str(path), "--executions", "150", "--json"])
    found: dict[str, dict[str, list[str]]] = {name: {}, str(path): {}}
    for one in json.loads(capsys.readouterr().out)["explored"]:
        found[one["policy"]][one["test"]] = one["violations"]
        assert "unwatched" not in one
        assert one["failure"] is None
    assert found[name] == found[str(path)]


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_two_classes_of_one_name_do_not_meet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], order: tuple[int, int], jobs: str
) -> None:
    good = (DIRECTORY / "root_tlb_gen.py").read_text()
    bad = good.replace("self.tlb_gen(root).inc_return(cpu)", "pass")
    assert bad != good
    paths = [str(written(tmp_path, good, "good.py")), str(written(tmp_path, bad, "bad.py"))]
    policies = [word for i in order for word in ("--policy", paths[i])]
    assert main(["explore", "return-zap", *policies, "--jobs", jobs, "--json"]) == 1
    explored = json.loads(capsys.readouterr().out)["explored"]
    assert {one["policy"]: one["verdict"] for one in explored} == {paths[0]: "safe", paths[1]: "violations"}
