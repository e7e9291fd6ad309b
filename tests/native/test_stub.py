"""The typed stub agrees with the headers and the library, and mypy finds swapped numbers by it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from mypy import api

from native import ffi, lib
from native.kinds import ARGUMENTS, ENUMS, EXCEPTIONS, FIELDS, NULLABLE, RESULTS, TLB_ARGUMENTS
from native.stub import STUB, text

ROOT = Path(__file__).resolve().parents[2]

# Lines that end in "# error" are errors of types, and no others are.
SWAPPED = """
from native import ffi, lib
from native._native import MachinePtr
from native.types import (
    CpuId, Custody, Gfn, Gva, Hfn, Hva, ReportNumber, SpteIndex, VcpuId, VmcsId, VmId, Vpid, span
)

def calls(m: MachinePtr, cpu: CpuId, vm: VmId, vcpu: VcpuId) -> None:
    lib.mmu_write_lock(m, cpu, vm)
    lib.mmu_write_lock(m, vm, cpu)  # error
    lib.vcpu_create(m, vm)
    lib.vcpu_create(m, vcpu)  # error
    lib.guest_speculate(m, cpu, Gva(0))
    lib.guest_speculate(m, vcpu, Gva(0))  # error
    lib.guest_clock(m, vcpu)
    lib.guest_clock(m, vm)  # error
    lib.smp_call_function_single(m, cpu, cpu, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT)
    lib.smp_call_function_single(m, cpu, vcpu, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT)  # error
    lib.flush_invept_global(m, cpu, vm, lib.REASON_OTHER)
    lib.flush_invept_global(m, cpu, vm, lib.STAT_EXITS)  # error
    lib.vm_stat_add(m, vm, lib.STAT_EXITS, 1)
    lib.vm_stat_add(m, vm, lib.COUNT_CHECKS, 1)  # error
    lib.cpu_wake(m, 3)  # error
    lib.cpu_wake(cpu, m)  # error
    lib.no_such_function(m)  # error

def frames(m: MachinePtr, cpu: CpuId, vm: VmId, vcpu: VcpuId, vmcs: VmcsId, root: Hfn, vpid: Vpid) -> None:
    lib.flush_invept_single(m, cpu, vm, 0x101E, lib.REASON_GUEST)
    lib.flush_invept_single(m, cpu, vm, "root", lib.REASON_GUEST)  # error
    lib.flush_invvpid_single(m, cpu, vm, vpid, lib.REASON_GUEST)
    lib.flush_invvpid_single(m, cpu, vm, root, lib.REASON_GUEST)  # error
    lib.vmcs_write_eptp(m, vmcs, root, lib.PG_LEVEL_512G)
    lib.vmcs_write_eptp(m, vmcs, lib.PG_LEVEL_512G, root)  # error
    lib.vmptrld(m, cpu, vmcs)
    lib.vmptrld(m, vmcs, cpu)  # error
    lib.vmcs_create(m, vcpu, vpid)
    lib.vmcs_create(m, vmcs, vpid)  # error
    lib.spte_read(m, root, SpteIndex(7))
    lib.spte_read(m, root, 7)  # error
    lib.spte_read(m, 7, root)  # error
    lib.ept_table_free(m, cpu, root)
    lib.ept_table_free(m, root, cpu)  # error

def pages(m: MachinePtr, cpu: CpuId, vm: VmId, gfn: Gfn, hva: Hva) -> None:
    lib.oracle_track_writes(m, cpu, vm, gfn + 1, True)
    lib.oracle_track_writes(m, cpu, vm, 1 + (gfn & -512), True)
    lib.oracle_track_writes(m, cpu, vm, gfn - gfn, True)  # error
    lib.oracle_track_writes(m, cpu, vm, gfn >> 9, True)  # error
    lib.oracle_track_writes(m, cpu, vm, hva + gfn, True)  # error
    lib.mm_present(m, vm, hva, hva + 3)
    lib.mm_present(m, vm, hva, gfn)  # error
    for page in span(hva, hva + 3, 2):
        lib.mm_huge(m, vm, page)
    for number in range(hva, hva + 3):
        lib.mm_huge(m, vm, number)  # error

def memory(m: MachinePtr, cpu: CpuId) -> None:
    words, halves = ffi.new("uint64_t[]", 8), ffi.new("uint32_t[]", 8)
    lib.counters_sum(m, words)
    lib.counters_sum(m, halves)  # error
    lib.oracle_reports(m, ReportNumber(0), ffi.new("struct violation_report[]", 4), 4)
    lib.oracle_reports(m, ReportNumber(0), ffi.new("struct event[]", 4), 4)  # error
    lib.tlb_dump(lib.cpu_tlb(m, cpu), ffi.NULL, 0)
    lib.counters_sum(m, ffi.NULL)  # error
    page = ffi.new("struct mm_page *")
    page.tag = Custody(words[0])
    page.tag = words[0]  # error
    page.no_such_field = 0  # error
"""


def stub_of(name: str) -> ast.ClassDef:
    classes = (node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef))
    (found,) = (node for node in classes if node.name == name)
    return found


def test_is_what_the_headers_say() -> None:
    assert STUB.read_text() == text(), "run 'python -m native.build'"


def test_has_every_name_of_the_library_with_as_many_arguments() -> None:
    stub: dict[str, int | None] = {}
    for node in stub_of("Lib").body:
        if isinstance(node, ast.FunctionDef):
            stub[node.name] = len(node.args.posonlyargs) - 1
        else:
            assert isinstance(node, ast.AnnAssign)
            stub[ast.unparse(node.target)] = None
    symbols = {name: getattr(lib, name) for name in dir(lib)}
    library = {
        name: len(ffi.typeof(symbol).args) if callable(symbol) else None for name, symbol in symbols.items()
    }
    assert stub == library
    assert sum(n is not None for n in library.values()) > 150


@pytest.mark.slow
def test_has_every_field_of_every_structure() -> None:
    _, structs, unions = ffi.list_types()
    assert not unions
    seen = 0
    for struct in structs:
        try:
            ffi.sizeof(f"struct {struct}")
        except ffi.error:
            continue  # opaque; asking for its fields would end the process
        fields = ffi.typeof(f"struct {struct}").fields
        body = stub_of("".join(word.capitalize() for word in struct.split("_"))).body
        names = [ast.unparse(node.target) for node in body if isinstance(node, ast.AnnAssign)]
        assert names == [name for name, _ in fields if name != "global"], struct
        seen += 1
    assert seen > 8


def test_names_nothing_that_the_headers_lack() -> None:
    arguments = {
        (node.name, argument.arg.removesuffix("_"))
        for node in stub_of("Lib").body
        if isinstance(node, ast.FunctionDef)
        for argument in node.args.posonlyargs
    }
    assert EXCEPTIONS.keys() | NULLABLE <= arguments
    assert ARGUMENTS.keys() | TLB_ARGUMENTS.keys() <= {argument for _, argument in arguments}
    assert RESULTS.keys() <= {function for function, _ in arguments}
    for enum in ENUMS:
        assert ffi.typeof(f"enum {enum}").relements
    for struct, field in FIELDS:
        assert field in dict(ffi.typeof(f"struct {struct}").fields)


def test_lets_nothing_be_of_any_type() -> None:
    assert not re.search(r"\bAny\b", STUB.read_text())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_numbers_in_the_wrong_order_are_errors_of_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snippet = tmp_path / "swapped.py"
    snippet.write_text(SWAPPED)
    monkeypatch.chdir(ROOT)
    out, err, _ = api.run(["--config-file=", "--strict", f"--cache-dir={tmp_path / 'cache'}", str(snippet)])
    assert not err
    found = {int(line) for line in re.findall(r"swapped\.py:(\d+): error:", out)}
    expected = {n for n, line in enumerate(SWAPPED.splitlines(), 1) if line.endswith("# error")}
    assert found == expected, out
