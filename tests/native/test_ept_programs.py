"""Random programs of SPTE steps and range walks against a plain dict."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native import lib
from native.types import Custody, Hfn, HostWritable, Level
from tests.native.memory_rig import ACCESSED, PRESENT, WRITABLE, Rig, map_page, pages_of, split_table

GFN = st.one_of(st.integers(0, 20), st.integers(500, 530), st.integers(1015, 1030), st.integers(1530, 1540))
RANGE_WALKS = ["zap", "zap-tables", "protect", "age"]
OPERATION = st.one_of(
    st.tuples(st.just("map"), GFN, st.booleans()),
    st.tuples(st.sampled_from(RANGE_WALKS), GFN, st.sampled_from([1, 2, 30, 512, 700])),
    st.tuples(st.sampled_from(["huge", "split"]), st.sampled_from([0, 512, 1024]), st.just(0)),
    st.tuples(st.just("dirty"), GFN, st.integers(1, 2**64 - 1)),
)


class Model:
    """Leaf SPTEs by first gfn: level, frame, W, A."""

    def __init__(self) -> None:
        self.leafs: dict[int, tuple[int, int, bool, bool]] = {}

    def covering(self, start: int, end: int) -> list[int]:
        return [gfn for gfn, leaf in self.leafs.items() if gfn < end and gfn + pages_of(leaf[0]) > start]

    def rights(self) -> dict[int, tuple[int, int]]:
        return {
            gfn + i: (hfn + i, 3 if writable else 1)
            for gfn, (level, hfn, writable, _) in self.leafs.items()
            for i in range(pages_of(level))
        }

    def walk(self, name: str, start: int, end: int) -> int:
        """Do the work of a range walk; return how many pages it changes."""
        pages = 0
        for gfn in self.covering(start, end):
            level, hfn, writable, accessed = self.leafs[gfn]
            if name in ("zap", "zap-tables"):
                del self.leafs[gfn]
            elif name == "protect" and writable:
                self.leafs[gfn] = (level, hfn, False, accessed)
            elif name == "age" and accessed:
                self.leafs[gfn] = (level, hfn, writable, False)
            else:
                continue
            pages += pages_of(level)
        return pages


WALKS = {
    "zap": lib.TDP_ZAP_LEAFS,
    "zap-tables": lib.TDP_ZAP_RANGE,
    "protect": lib.TDP_WRPROT,
    "age": lib.TDP_AGE,
}


def do_map(rig: Rig, model: Model, gfn: int, writable: bool) -> None:
    if model.covering(gfn, gfn + 1):
        return
    spte = map_page(rig, gfn, writable)
    model.leafs[gfn] = (1, spte >> lib.SPTE_HFN_SHIFT & 0xFFFFFF, writable, True)


def do_huge(rig: Rig, model: Model, gfn: int) -> None:
    table, spte = rig.link(gfn, 2)
    if spte & PRESENT:
        return
    # A block straight from the pool: the contents of user memory do not matter.
    block = rig.frame(lib.FRAME_BLOCK)
    if block < 0:
        return
    new = lib.make_spte(
        block, Custody(lib.frame_block_custody(rig.m, block)), Level(2), True, HostWritable(True)
    )
    assert rig.set_atomic(table, 2, gfn, spte, new) == 0
    model.leafs[gfn] = (2, block, True, True)


def do_split(rig: Rig, model: Model, gfn: int) -> None:
    table, level, spte = rig.walk(gfn)
    if level != 2 or not spte & PRESENT:
        return
    small = split_table(rig, spte, 2)
    if small == lib.MACHINE_NOMEM:
        return
    assert rig.set_atomic(table, 2, gfn, spte, lib.make_nonleaf_spte(rig.m, Hfn(small))) == 0
    _, hfn, writable, accessed = model.leafs.pop(gfn)
    model.leafs |= {gfn + i: (1, hfn + i, writable, accessed) for i in range(512)}


def do_walk(rig: Rig, model: Model, name: str, start: int, end: int, most: int, shared: bool) -> None:
    chunk, pages, calls = rig.chunk(WALKS[name], start, end, shared=shared), 0, 0
    if name == "zap-tables":
        assert rig.zap(chunk, most)[1] == model.walk(name, start, end)
        return
    while not chunk.done:
        pages += rig.step(chunk, most).pages
        calls += 1
        assert calls < 3000
    assert pages == model.walk(name, start, end)


def do_dirty(rig: Rig, model: Model, gfn: int, mask: int) -> None:
    rig.step(rig.chunk(lib.TDP_CLEAR_DIRTY, gfn, gfn + 64, mask=mask))
    for i in range(64):
        if mask >> i & 1 and model.leafs.get(gfn + i, (2,))[0] == 1:
            model.walk("protect", gfn + i, gfn + i + 1)


def compare(rig: Rig, model: Model) -> None:
    rights = model.rights()
    count = rig.step(rig.chunk(lib.TDP_COUNT, 0, 1 << 40))
    assert (count.changed, count.pages) == (len(model.leafs), len(rights))
    for gfn in {*range(0, 2048, 13), *list(rights)[:200]}:
        assert rig.right(gfn) == rights.get(gfn, (0, 0))[1]
        if gfn in rights:
            assert rig.hfn(gfn) == rights[gfn][0]
    for gfn, (level, hfn, writable, accessed) in list(model.leafs.items())[:50]:
        _, found, spte = rig.walk(gfn)
        assert found == level
        assert (spte >> lib.SPTE_HFN_SHIFT & 0xFFFFFF, bool(spte & WRITABLE), bool(spte & ACCESSED)) == (
            hfn,
            writable,
            accessed,
        )


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    operations=st.lists(OPERATION, max_size=25),
    most=st.sampled_from([1, 3, 100, 1 << 20]),
    shared=st.booleans(),
    root_level=st.sampled_from([4, 5]),
)
def test_programs(operations: list[tuple[str, int, int]], most: int, shared: bool, root_level: int) -> None:
    model = Model()
    with Rig(gfns=2048, root_level=root_level, guest_frames=600, table_frames=400, guest_blocks=8) as rig:
        for name, gfn, value in operations:
            if name == "map":
                do_map(rig, model, gfn, bool(value))
            elif name == "huge":
                do_huge(rig, model, gfn)
            elif name == "split":
                do_split(rig, model, gfn)
            elif name == "dirty":
                do_dirty(rig, model, gfn, value)
            else:
                do_walk(rig, model, name, gfn, min(gfn + value, 2048), most, shared)
            compare(rig, model)
        chunk = rig.chunk(lib.TDP_ZAP_LEVEL, 0, 1 << 60, level=root_level, shared=shared)
        assert rig.zap(chunk, most)[1] == len(model.rights())
        model.leafs.clear()
        compare(rig, model)
