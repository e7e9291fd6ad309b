"""Host frames: pools, tags, lives, poison."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from native import lib
from native.types import FrameKind, Hfn, WordIndex
from tests.native.memory_rig import BLOCK, CPU, PRESENT, Rig

KINDS = [lib.FRAME_ROOT, lib.FRAME_TABLE, lib.FRAME_GUEST, lib.FRAME_BLOCK]
POISON = 0x6B6B6B6B6B6B6B68


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as machine:
        yield machine


@pytest.mark.parametrize("kind", [lib.FRAME_ROOT, lib.FRAME_TABLE, lib.FRAME_GUEST])
def test_last_in_first_out(rig: Rig, kind: FrameKind) -> None:
    frames = [rig.frame(kind) for _ in range(3)]
    assert len({0, *frames}) == 4, "frame 0 is nobody's"
    for hfn in (frames[2], frames[0], frames[1]):
        rig.free(hfn)
    assert [rig.frame(kind) for _ in range(3)] == [frames[1], frames[0], frames[2]]


def test_kinds_never_share_a_frame(rig: Rig) -> None:
    for _ in range(2):
        got: dict[FrameKind, list[Hfn]] = {kind: [] for kind in KINDS}
        for kind, frames in got.items():
            while (hfn := rig.frame(kind)) != lib.MACHINE_NOMEM:
                frames += map(Hfn, range(hfn, hfn + (BLOCK if kind == lib.FRAME_BLOCK else 1)))
        every = [hfn for frames in got.values() for hfn in frames]
        assert len(set(every)) == len(every)
        assert all(rig.words(hfn) == {0} for hfn in got[lib.FRAME_ROOT] + got[lib.FRAME_TABLE])
        assert all(rig.words(hfn) == {POISON} for hfn in got[lib.FRAME_GUEST] + got[lib.FRAME_BLOCK][:2])
        for hfn in every:
            lib.frame_write(rig.m, hfn, WordIndex(9), 42)
            rig.free(hfn)


def test_poison_is_no_present_entry() -> None:
    assert not POISON & PRESENT
    assert POISON != lib.FROZEN_SPTE


def test_freeing_changes_both_tags_and_the_life(rig: Rig) -> None:
    for kind in (lib.FRAME_ROOT, lib.FRAME_TABLE, lib.FRAME_GUEST, lib.FRAME_BLOCK):
        hfn = rig.frame(kind)

        def now(hfn: Hfn = hfn) -> tuple[int, int, int]:
            return (
                lib.frame_tag_of(rig.m, hfn),
                lib.frame_host_tag_of(rig.m, hfn),
                lib.frame_life_of(rig.m, hfn),
            )

        before = now()
        rig.free(hfn)
        assert now() == tuple(n + 1 for n in before)
        if kind != lib.FRAME_BLOCK:
            assert rig.frame(kind) == hfn
            assert now() == tuple(n + 1 for n in before), "only freeing changes them"


def test_block_returns_with_its_last_frame(rig: Rig) -> None:
    first = rig.frame(lib.FRAME_BLOCK)
    assert first % BLOCK == 0
    for i in range(1, BLOCK):
        rig.free(Hfn(first + i))
    assert lib.frames_in_use(rig.m, lib.FRAME_BLOCK) == 1
    assert rig.frame(lib.FRAME_BLOCK) != first
    rig.free(first)
    assert rig.frame(lib.FRAME_BLOCK) == first


def test_free_frames_are_counted_and_told(rig: Rig) -> None:
    guest, root = rig.frame(lib.FRAME_GUEST), rig.table(lib.FRAME_ROOT)
    rig.free(guest)
    lib.ept_table_free(rig.m, CPU, root)
    assert rig.count(lib.COUNT_FRAMES_FREED) == rig.count(lib.COUNT_TABLES_FREED) == 1
    assert (lib.EVENT_FREE, guest, 1) in rig.events()
    assert (lib.EVENT_ROOT_FREE, root, 0) in rig.events()


def test_totals(rig: Rig) -> None:
    assert [lib.frames_total(rig.m, kind) for kind in KINDS] == [4, 64, 256, 3]
    assert [lib.frames_in_use(rig.m, kind) for kind in KINDS] == [1, 0, 0, 0]


def test_frame_numbers_end_at_24_bits() -> None:
    with pytest.raises(AssertionError, match=r"\w"):
        Rig(guest_frames=1 << 24)
    with pytest.raises(AssertionError, match=r"\w"):
        Rig(guest_blocks=1 << 15)


def test_freeing_twice_is_loud() -> None:
    """It would hand one frame to two owners; every result after that would be worthless."""
    code = "from tests.native.memory_rig import *; r = Rig(); h = r.frame(2); r.free(h); r.free(h)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGABRT
    assert "BUG: frame" in done.stderr


def test_a_round_of_a_tag_is_counted(rig: Rig) -> None:
    """Each free advances both tags of the frame; the pool hands the same frame out again."""
    values = lib.FRAME_TAG_MASK + 1
    hfn = rig.frame(lib.FRAME_TABLE)
    start = lib.frame_tag_of(rig.m, hfn)
    for _ in range(values - 1 - start):
        rig.free(hfn)
        assert rig.frame(lib.FRAME_TABLE) == hfn
    assert lib.frames_tag_rounds(rig.m) == 0
    rig.free(hfn)
    assert lib.frame_tag_of(rig.m, hfn) == 0
    assert lib.frames_tag_rounds(rig.m) == 2
