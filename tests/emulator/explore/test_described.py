"""The words of the core's descriptions have objects here, and conditions are evaluated as they read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from emulator.explore.machine.control import Control
from emulator.explore.machine.described import CALLS, calls_of
from emulator.explore.machine.footprints import COMPUTED, FOOTPRINTS, OBJECTS
from emulator.explore.machine.lib import ControlledLib
from emulator.explore.machine.program import LitmusProgram
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from emulator.points import POINTS
from native import ffi, lib
from native.description import Object
from native.types import Custody, Hfn, HostWritable, Level

LEAF, TABLE = (
    lib.make_spte(Hfn(9), Custody(0), Level(1), True, HostWritable(True)),
    7 | 5 << lib.SPTE_HFN_SHIFT,
)


def objects() -> Iterator[Object]:
    for call in CALLS.values():
        for access in (*call.reads, *call.writes):
            yield from access.objects


def test_each_word_has_an_object_and_each_object_a_word() -> None:
    assert {one.word for one in objects()} == OBJECTS.keys() | COMPUTED.keys()
    assert not OBJECTS.keys() & COMPUTED.keys()


def test_a_word_has_as_many_operands_everywhere() -> None:
    assert len({(one.word, len(one.operands)) for one in objects()}) == len({one.word for one in objects()})


def test_points_that_announce_calls_are_points() -> None:
    assert {point for call in CALLS.values() for point in call.points} <= POINTS.keys()


def test_a_modelled_call_has_a_function_in_its_place_and_no_other_has() -> None:
    own = {name for name in dir(ControlledLib) if not name.startswith("_") and name != "control"}
    assert own == calls_of("modelled")


@pytest.fixture(scope="module")
def control() -> Iterator[Control]:
    program = LitmusProgram(load_test("return-zap"), named_policy("linux-7.3"))
    yield program.control
    program.close()


def chunk(**fields: int) -> Any:
    return ffi.new("struct tdp_chunk *", {"root": 3, "walk": lib.TDP_ZAP_LEAFS, **fields})


@pytest.mark.parametrize(
    ("call", "args", "result", "reads", "writes"),
    [
        ("kvm_check_request", (None, 1, 2), 0, [], []),
        ("kvm_check_request", (None, 1, 2), 1, [], [("request", 1, 2), ("requests", 1)]),
        ("vcpu_exiting_guest_mode", (None, 1), lib.IN_GUEST_MODE, [], [("mode", 1)]),
        ("vcpu_exiting_guest_mode", (None, 1), lib.EXITING_GUEST_MODE, [], []),
        ("tdp_mmu_set_spte_atomic", (None, 0, 0, 5, 0, 1, 0, 0, LEAF), 0, [("custody",)], [("ept",)]),
        ("tdp_mmu_set_spte_atomic", (None, 0, 0, 5, 0, 1, 0, LEAF, 0), lib.MACHINE_AGAIN, [], []),
        ("tdp_mmu_set_spte_atomic", (None, 0, 0, 5, 0, 2, 0, 0, TABLE), 0, [], [("ept",)]),
        ("tdp_walk_chunk", (None, 0, 0, chunk(), 1), 0, [("custody of table", 3)], []),
        ("tdp_walk_chunk", (None, 0, 0, chunk(changed=1), 1), 0, [("custody of table", 3)], [("ept",)]),
        (
            "tdp_walk_chunk",
            (None, 0, 0, chunk(changed=1, set_pfn=1, walk=lib.TDP_COUNT), 1),
            0,
            [("custody of table", 3), ("custody",)],
            [],
        ),
        (
            "ept_table_alloc",
            (None, 0, lib.FRAME_ROOT),
            4,
            [],
            [("frames", "root"), ("custody of table", 4)],
        ),
        ("ept_table_alloc", (None, 0, lib.FRAME_TABLE), lib.MACHINE_NOMEM, [], [("frames", "table")]),
        ("tdp_table_holds", (None, 0, 0, TABLE, 2, 0), 1, [("custody of table", 5)], []),
    ],
)
def test_accesses_that_depend_on_the_call(
    control: Control, call: str, args: Any, result: int, reads: list[object], writes: list[object]
) -> None:
    after = FOOTPRINTS[call].after(control)
    assert after is not None
    found = after(args, result)
    assert [set(control.objects.of(mask)) for mask in found] == [set(reads), set(writes)]


@pytest.mark.parametrize(
    ("call", "writes"),
    [("kvm_test_request", False), ("kvm_check_request", True), ("tdp_walk_chunk", True), ("mm_unmap", True)],
)
def test_a_call_that_writes_under_a_condition_is_a_writer(call: str, writes: bool) -> None:
    assert FOOTPRINTS[call].writer == writes


def test_a_freed_table_and_a_loaded_root_are_noted(control: Control) -> None:
    freed = FOOTPRINTS["ept_table_free_rcu"].after(control)
    loaded = FOOTPRINTS["vmcs_write_eptp"].after(control)
    assert freed is not None
    assert loaded is not None
    assert freed((None, 0, 6), 0) == (0, 0)
    assert loaded((None, 2, 3, 4), None) == (control.bit("custody of table", 3), 0)
    assert control.freed[-1] == 6
    assert control.root_of[2] == 3
