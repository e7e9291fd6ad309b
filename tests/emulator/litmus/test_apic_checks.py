"""Accesses to an APIC that a litmus test cannot mean are refused."""

from __future__ import annotations

import pytest

from emulator.errors import BadInput
from emulator.litmus.loader import parse_test

TEST = """
doc = "d"
source = "s"
[[vm]]
paging = true
apic = {apic}
[threads.v0]
vcpu = 0
ops = [{ops}]
[threads.mm]
ops = [{host}]
[expect]
"""
ENTER = '"vmxon", "vmptrld 1", "vmwrite-apic 0x30", "l2-enter"'


def parse(ops: str, host: str = '"host-migrate 0x800"', apic: str = "true") -> None:
    parse_test(TEST.format(ops=ops, host=host, apic=apic), "t.toml", None)


def test_good_ones() -> None:
    parse('"map 0x10 0x800", "apic-read 0x10", "apic-mode x2apic", "apic-mode xapic", "apic-write 0x10"')
    parse(f'{ENTER}, "l2-apic 0x10", "l2-enter", "l2-exit", "apic-read 0x10"', '"zap 0x10"', "true")
    parse(f'{ENTER}, "l2-apic 0x10"', '"zap 0x10"', "false")


@pytest.mark.parametrize(
    ("ops", "host", "apic", "problem"),
    [
        ('"apic-read 1"', '"zap 1"', "false", "threads.v0.ops[0]: found 'apic-read 1'; expected apic = true"),
        ('"apic-mode xapic"', '"zap 1"', "false", "expected apic = true in its VM"),
        ('"apic-mode off"', '"zap 1"', "true", "expected apic-mode disabled|xapic|x2apic"),
        ('"apic-mode x2apic", "apic-read 1"', '"zap 1"', "true", "expected an apic-mode xapic before it"),
        (f'{ENTER}, "apic-write 1"', '"zap 1"', "true", "expected l2-apic in this nested guest"),
        ('"vmxon", "vmptrld 1", "l2-enter", "l2-apic 1"', '"zap 1"', "true", "expected a vmwrite-apic PAGE"),
        (f'{ENTER}, "l2-apic 1", "l2-apic 1"', '"zap 1"', "true", "expected an l2-enter before it"),
        ('"vmxon", "vmwrite-apic 1"', '"zap 1"', "true", "expected a vmptrld before it"),
        ('"vmxon", "vmptrld 1", "vmwrite-apic 0x800"', '"zap 1"', "true", "expected a page of memslot 0"),
        (ENTER, '"host-unmap 0x30"', "true", "expected no host-unmap in a VM with vmwrite-apic"),
        (ENTER, '"slot-delete"', "true", "expected no slot-delete in a VM with vmwrite-apic"),
        ('"read 1"', '"host-migrate 0x801"', "true", "expected pages of VM 0, which has 0x801"),
    ],
)
def test_what_it_cannot_mean(ops: str, host: str, apic: str, problem: str) -> None:
    with pytest.raises(BadInput) as error:
        parse(ops, host, apic)
    assert problem in str(error.value)
