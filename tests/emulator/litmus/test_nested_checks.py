"""VMX instructions of a litmus test that would fail are refused, and operations not modelled beside them."""

from __future__ import annotations

import pytest

from emulator.errors import BadInput
from emulator.litmus.loader import parse_test

GOOD = '"vmxon", "vmptrld 1", "vmwrite-vpid 1", "l2-enter", "read 0x10", "l2-exit", "invvpid 1 1"'
TEST = """
doc = "d"
source = "s"
init = []
[machine]
[[vm]]
vcpus = 2
[threads.v0]
vcpu = 0
ops = [{ops}]
[threads.v1]
vcpu = 1
pcpu = 1
ops = ["read 0x10"]
[threads.mm]
ops = ["host-unmap 0x10"]
[expect]
"""


def parse(ops: str, old: str = "", new: str = "") -> None:
    parse_test(TEST.format(ops=ops).replace(old, new) if old else TEST.format(ops=ops), "t.toml", None)


def test_a_good_one() -> None:
    parse(GOOD)
    parse('"vmxon", "vmptrld 1", "vmwrite-vpid 0", "l2-enter"', "[machine]", "[machine]\nvpid = false")
    parse('"vmxon", "vmptrld 1", "l2-enter", "smi", "read 1", "rsm", "read 1", "smi", "rsm", "l2-exit"')
    parse('"vmxon", "vmptrld 1", "l2-enter-fails controls", "l2-enter-halted", "l2-enter"')
    parse(f'{GOOD}, {GOOD.replace("vmxon", "vmclear 1")}, "vmxoff", {GOOD}')


@pytest.mark.parametrize(
    ("ops", "problem"),
    [
        (
            '"vmptrld 1"',
            "threads.v0.ops[0]: found 'vmptrld 1'; expected a vmxon before it, by the same thread",
        ),
        ('"vmxon", "vmxon"', "threads.v0.ops[1]: found 'vmxon'; expected a vmxoff before it"),
        ('"vmxon", "vmxoff", "vmxoff"', "expected a vmxon before it"),
        ('"vmxon", "l2-enter"', "found 'l2-enter'; expected a vmptrld before it"),
        ('"vmxon", "vmptrld 1", "vmclear 1", "l2-enter"', "expected a vmptrld before it"),
        ('"vmxon", "vmptrld 1", "vmxoff", "vmxon", "vmwrite-vpid 1"', "expected a vmptrld before it"),
        ('"vmxon", "l2-exit"', "expected an l2-enter before it"),
        ('"vmxon", "vmptrld 1", "l2-enter", "invvpid 2"', "expected an l2-exit before it"),
        ('"vmxon", "invvpid 1"', "found 'invvpid 1'; expected a VPID of at least 1 for this TYPE"),
        ('"vmxon", "invvpid 4"', "expected a whole number, at most 3, for TYPE"),
        ('"vmxon", "vmptrld 4"', "expected a number, at least 1, at most 3, for VMCS12"),
        ('"vmxon", "vmptrld 1", "vmwrite-vpid 64"', "at most 63, for VPID"),
        ('"vmxon", "smi", "vmptrld 1"', "found 'vmptrld 1'; expected an rsm before it, by the same thread"),
        ('"vmxon", "vmptrld 1", "l2-enter", "smi", "l2-exit"', "expected an rsm before it"),
        ('"vmxon", "smi", "vmxon"', "expected an rsm before it"),
        ('"vmxon", "l2-enter-fails controls"', "expected a vmptrld before it"),
        ('"vmxon", "l2-enter-halted"', "expected a vmptrld before it"),
        ('"vmxon", "vmptrld 1", "l2-enter-fails"', "expected one of controls, guest-state, msr-load"),
        (
            '"vmxon", "vmptrld 1", "l2-enter", "l2-enter-fails controls"',
            "expected an l2-exit before it",
        ),
        ('"vmxon", "cr4 pge 0"', "expected no cr4 in a VM with nested guests"),
    ],
)
def test_an_instruction_that_would_fail_is_refused(ops: str, problem: str) -> None:
    with pytest.raises(BadInput) as error:
        parse(ops)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "[machine]",
            "[machine]\nvpid = false",
            "threads.v0.ops[2]: found 'vmwrite-vpid 1'; expected machine.vpid",
        ),
        ("vcpus = 2", "vcpus = 2\npages = 0x400", "expected pages = 0x800 or more in its VM"),
        (
            '"read 0x10"]',
            '"init"]',
            "threads.v1.ops[0]: found 'init'; expected no init in a VM with nested guests",
        ),
        (
            '"host-unmap 0x10"',
            '"send-smi 0"',
            "threads.mm.ops[0]: found 'send-smi 0'; expected no send-smi in a VM with",
        ),
        (
            '"host-unmap 0x10"',
            '"send-init 0"',
            "threads.mm.ops[0]: found 'send-init 0'; expected no send-init in a VM with",
        ),
    ],
)
def test_what_is_not_modelled_beside_it_is_refused(old: str, new: str, problem: str) -> None:
    with pytest.raises(BadInput) as error:
        parse(GOOD, old, new)
    assert problem in str(error.value)


EPT = '"ept12-map 1 0x20 0x30", "vmxon", "vmptrld 1", "vmwrite-eptp 1 ad", "invept 1 1", "invept 2"'


def test_an_ept_of_l1s() -> None:
    """L1 needs no VMX operation for stores to its memory."""
    parse(f"{EPT}, {GOOD[9:]}", "[[vm]]", "[[vm]]\npaging = true")
    switch = '"ept12-map 2 1 1", "l2-enter", "l2-eptp 2 ad", "l2-eptp 1", "l2-exit"'
    parse(f"{EPT}, {switch}", "[[vm]]", "[[vm]]\npaging = true")


def test_flags_that_the_oracle_looks_at_stay_where_they_are() -> None:
    with pytest.raises(BadInput, match="found 'host-unmap 0x10'; expected no host-unmap in a VM with ept12"):
        parse(f'{EPT}, "ept12-clean 1 0x20", {GOOD[9:]}', "[[vm]]", "[[vm]]\npaging = true")


@pytest.mark.parametrize(
    ("ops", "vm", "problem"),
    [
        (EPT, "", "found 'ept12-map 1 0x20 0x30'; expected paging = true in its VM"),
        ('"ept12-map 5 0x20 0x30"', "paging = true", "at most 4, for EPT12"),
        ('"ept12-map 1 0x20 0x1000"', "paging = true", "expected pages of its VM, which has 0x800"),
        ('"ept12-unmap 1 0x1000"', "paging = true", "expected pages of its VM, which has 0x800"),
        ('"vmxon", "vmwrite-eptp 1"', "paging = true", "expected a vmptrld before it"),
        ('"invept 2"', "paging = true", "expected a vmxon before it"),
        ('"vmxon", "invept 1"', "paging = true", "expected the number of an EPT for type 1"),
        ('"vmxon", "invept 2 1"', "paging = true", "expected no EPT for type 2"),
        ('"vmxon", "vmptrld 1", "l2-enter", "ept12-unmap 1 0x20"', "paging = true", "an l2-exit before it"),
        ('"vmxon", "vmptrld 1", "l2-eptp 1"', "paging = true", "expected an l2-enter before it"),
        (f'{EPT}, "vmwrite-eptp 0", "l2-enter", "l2-eptp 1"', "paging = true", "a vmwrite-eptp EPT12 before"),
        (f'{EPT}, "l2-enter", "l2-eptp 2"', "paging = true", "expected an ept12-map 2 PAGE GFN before it"),
    ],
)
def test_an_ept_that_l1_cannot_have_is_refused(ops: str, vm: str, problem: str) -> None:
    with pytest.raises(BadInput) as error:
        parse(ops, "[[vm]]", f"[[vm]]\n{vm}")
    assert problem in str(error.value)


def test_without_ept_in_the_host_l1_is_offered_none() -> None:
    with pytest.raises(BadInput) as error:
        parse(EPT, "[machine]\n[[vm]]", "[machine]\nept = false\n[[vm]]\npaging = true")
    assert "expected machine.ept = true: without, L1 is offered no EPT" in str(error.value)
