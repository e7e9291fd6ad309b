"""State of policies: what each operation does, announces and refuses, and how long it lives."""

from __future__ import annotations

from typing import Any

import pytest

from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.structs import Kvm, Vcpu
from emulator.machine.runtime import Cpu, Machine
from emulator.policy import Policy
from emulator.policy.state import (
    Bitmap,
    Flag,
    Generation,
    OwnList,
    PerCpu,
    Private,
    State,
    per_root,
    per_vcpu,
    per_vm,
)
from tests.emulator.kvm.rig import Rig, page_is_a_root_again, running_rig

PCPUS = 70


@pytest.fixture
def cpus() -> Any:
    machine = Machine({"pcpus": 2, "housekeeping": 1, "vms": 1, "vcpus": 1, "root_frames": 2,
                       "table_frames": 4, "guest_frames": 8, "guest_blocks": 0, "l1_ways": 4,
                       "l2_entries": 0, "l2_ways": 12, "psc_entries": 0, "chaos": 0, "seed": 1})  # fmt: skip
    yield machine.cpus
    machine.destroy()


class Points:
    """Records the points of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.found: list[tuple[object, ...]] = []
        machine.install(lambda cpu, kind, obj, mode: self.found.append((cpu.id, kind, obj, mode)))


def test_a_bitmap(cpus: list[Cpu]) -> None:
    mask = Bitmap("mask", "root 0x1", PCPUS)
    cpu = cpus[0]
    assert not mask.test_and_set_bit(cpu, 69)
    assert mask.test_and_set_bit(cpu, 69)
    mask.set_bit(cpu, 3)
    mask.set_bit(cpu, 3)
    assert mask.pcpus_set(cpu) == [3, 69]
    assert mask.test_and_clear_bit(cpu, 3)
    assert not mask.test_and_clear_bit(cpu, 3)
    mask.set_bit(cpu, 4)
    mask.clear_bit(cpu, 69)
    assert mask.pcpus_set(cpu) == [4]
    assert mask.test_bit(cpu, 4)
    mask.clear(cpu)
    assert mask.pcpus_set(cpu) == []


def test_a_generation(cpus: list[Cpu]) -> None:
    gen = Generation("gen", "root 0x1", PCPUS, 1)
    cpu = cpus[0]
    assert gen.read(cpu) == 1
    assert gen.inc_return(cpu) == 2
    gen.set(cpu, (1 << 64) - 1, "release")
    assert gen.read(cpu, "acquire") == (1 << 64) - 1
    assert gen.inc_return(cpu) == 0


def test_an_array_per_pcpu(cpus: list[Cpu]) -> None:
    array = PerCpu("seen", "vm 0", PCPUS)
    cpu = cpus[0]
    array.set(cpu, 69, 7)
    assert [array.read(cpu, pcpu) for pcpu in (0, 68, 69)] == [0, 0, 7]
    assert array.inc_return(cpu, 69) == 8
    assert array.read(cpu, 68) == 0


def test_a_flag(cpus: list[Cpu]) -> None:
    flag = Flag("late", "vcpu 0", PCPUS)
    cpu = cpus[0]
    assert not flag.test(cpu)
    assert not flag.test_and_set(cpu)
    assert flag.test_and_set(cpu)
    assert flag.test_and_clear(cpu)
    assert not flag.test_and_clear(cpu)
    flag.set(cpu, "full")
    assert flag.test(cpu, "acquire")
    flag.clear(cpu, "release")
    assert not flag.test(cpu)


def test_a_list_of_the_acting_cpu(cpus: list[Cpu]) -> None:
    lists = OwnList("tables", "vm 0", PCPUS)
    lists.of(cpus[0]).append(1)
    assert (lists.of(cpus[0]), lists.of(cpus[1])) == ([1], [])


@pytest.mark.parametrize(
    ("operate", "mode", "index"),
    [
        (lambda cpu: Bitmap("s", "vm 0", 2).test_bit(cpu, 1), "read", None),
        (lambda cpu: Bitmap("s", "vm 0", 2).pcpus_set(cpu), "read", None),
        (lambda cpu: Bitmap("s", "vm 0", 2).set_bit(cpu, 1), "write", None),
        (lambda cpu: Bitmap("s", "vm 0", 2).clear_bit(cpu, 1), "write", None),
        (lambda cpu: Bitmap("s", "vm 0", 2).test_and_set_bit(cpu, 1), "write", None),
        (lambda cpu: Bitmap("s", "vm 0", 2).test_and_clear_bit(cpu, 1), "write", None),
        (lambda cpu: Bitmap("s", "vm 0", 2).clear(cpu), "write", None),
        (lambda cpu: Generation("s", "vm 0", 2).read(cpu), "read", None),
        (lambda cpu: Generation("s", "vm 0", 2).set(cpu, 1), "write", None),
        (lambda cpu: Generation("s", "vm 0", 2).inc_return(cpu), "write", None),
        (lambda cpu: PerCpu("s", "vm 0", 2).read(cpu, 1), "read", 1),
        (lambda cpu: PerCpu("s", "vm 0", 2).set(cpu, 1, 1), "write", 1),
        (lambda cpu: PerCpu("s", "vm 0", 2).inc_return(cpu, 1), "write", 1),
        (lambda cpu: Flag("s", "vm 0", 2).test(cpu), "read", None),
        (lambda cpu: Flag("s", "vm 0", 2).set(cpu), "write", None),
        (lambda cpu: Flag("s", "vm 0", 2).clear(cpu), "write", None),
        (lambda cpu: Flag("s", "vm 0", 2).test_and_set(cpu), "write", None),
        (lambda cpu: Flag("s", "vm 0", 2).test_and_clear(cpu), "write", None),
    ],
)
def test_each_operation_is_one_ordering_point(
    cpus: list[Cpu], operate: Any, mode: str, index: int | None
) -> None:
    points = Points(cpus[0].machine)
    operate(cpus[1])
    assert points.found == [(1, "policy_state", ("s", "vm 0", index), mode)]


@pytest.mark.parametrize(
    "operate",
    [
        lambda cpu: Generation("s", "vm 0", 2).set(cpu, 1, "full"),
        lambda cpu: PerCpu("s", "vm 0", 2).set(cpu, 1, 1, "full"),
        lambda cpu: Flag("s", "vm 0", 2).set(cpu, "full"),
        lambda cpu: Flag("s", "vm 0", 2).clear(cpu, "full"),
    ],
)
def test_a_full_store_ends_with_a_barrier(cpus: list[Cpu], operate: Any) -> None:
    points = Points(cpus[0].machine)
    operate(cpus[1])
    assert [kind for _, kind, _, _ in points.found] == ["policy_state", "smp_mb"]


@pytest.mark.parametrize(
    ("operate", "message"),
    [
        (
            lambda cpu: Bitmap("mask", "root 0x1", 2).set_bit(cpu, 2),
            "has no pCPU 2: the host has pCPUs 0 to 1",
        ),
        (lambda cpu: Bitmap("mask", "root 0x1", 2).test_bit(cpu, -1), "<mask of root 0x1> has no pCPU -1"),
        (lambda cpu: PerCpu("seen", "vm 0", 2).read(cpu, 2), "<seen of vm 0> has no pCPU 2"),
        (lambda cpu: PerCpu("seen", "vm 0", 2).set(cpu, 2, 1), "has no pCPU 2"),
        (lambda cpu: PerCpu("seen", "vm 0", 2).inc_return(cpu, 2), "has no pCPU 2"),
        (lambda cpu: Flag("f", "vm 0", 2).test(cpu, "release"), "a load has no order 'release'"),  # type: ignore[arg-type]
        (lambda cpu: Flag("f", "vm 0", 2).set(cpu, "acquire"), "a store has no order 'acquire'"),  # type: ignore[arg-type]
        (lambda cpu: per_root(int), "no type of state"),  # type: ignore[type-var]
        (lambda cpu: per_root(Private), "Private is state of a vCPU"),
    ],
)
def test_wrong_uses_are_refused(cpus: list[Cpu], operate: Any, message: str) -> None:
    with pytest.raises((IndexError, ValueError, TypeError), match=message):
        operate(cpus[0])


# --- whose state it is --------------------------------------------------------------------------------------


class Declares(Policy):
    mask = per_root(Bitmap)
    gen = per_root(Generation, 5)
    late = per_vcpu(Flag)
    seen = per_vm(PerCpu)


def test_each_object_has_state_of_its_own(rig: Rig) -> None:
    policy = Declares()
    one, other = rig.vm(policy), rig.vm(policy)
    guests = rig.guest(one), rig.guest(one), rig.guest(other)
    for guest in guests:
        guest.read(0, 5)
    roots = one.tdp_mmu_roots[0], other.tdp_mmu_roots[0]
    cpu = rig.host
    policy.mask(roots[0]).set_bit(cpu, 0)
    policy.late(guests[0].vcpu).set(cpu)
    policy.seen(one).set(cpu, 2, 9)
    assert [policy.mask(root).pcpus_set(cpu) for root in roots] == [[0], []]
    assert [policy.gen(root).read(cpu) for root in roots] == [5, 5]
    assert [policy.late(guest.vcpu).test(cpu) for guest in guests] == [True, False, False]
    assert [policy.seen(kvm).read(cpu, 2) for kvm in (one, other)] == [9, 0]


def test_two_classes_with_equal_names_do_not_share(rig: Rig) -> None:
    class Also(Policy):
        mask = per_root(Bitmap)

    kvm = rig.vm(Declares())
    rig.guest(kvm).read(0, 5)
    with pytest.raises(TypeError, match="mask is state of a root under this policy"):
        Also.mask(kvm.tdp_mmu_roots[0])


def test_a_subclass_inherits_declarations(rig: Rig) -> None:
    class Derived(Declares):
        pass

    kvm = rig.vm(Derived())
    rig.guest(kvm).read(0, 5)
    assert Derived.gen(kvm.tdp_mmu_roots[0]).read(rig.host) == 5


def test_state_of_a_root_ends_with_the_root() -> None:
    with running_rig(root_frames=2) as rig:
        policy = Declares()
        kvm = rig.vm(policy)
        guest = rig.guest(kvm)
        guest.write(0, 70)
        root = kvm.tdp_mmu_roots[0]
        policy.mask(root).set_bit(rig.host, 1)
        policy.gen(root).inc_return(rig.host)
        page_is_a_root_again(rig, guest, 0)
        again = kvm.tdp_mmu_roots[0]
        assert again.hfn == root.hfn
        assert again is not root
        assert policy.mask(again).pcpus_set(rig.host) == []
        assert policy.gen(again).read(rig.host) == 5


@pytest.mark.parametrize("wrong", ["kvm", "vcpu"])
def test_state_of_another_object_is_refused(rig: Rig, wrong: str) -> None:
    kvm = rig.vm(Declares())
    vcpu = rig.guest(kvm).vcpu
    objects: dict[str, Kvm | Vcpu | KvmMmuPage] = {"kvm": kvm, "vcpu": vcpu}
    with pytest.raises(TypeError, match="gen is state of a root under this policy; found"):
        Declares.gen(objects[wrong])


def test_all_types_are_state() -> None:
    assert {Bitmap, Flag, Generation, OwnList, PerCpu, Private} == set(State.__subclasses__())
