"""Random sequences are the same for a seed, and have all that a comparison needs."""

from __future__ import annotations

from collections import Counter

from emulator.kernel_tree.operations import NPAGES, WATCHED, Operation, random_sequence


def every(seeds: int) -> list[Operation]:
    return [one for seed in range(seeds) for one in random_sequence(seed, 60).operations]


def test_a_seed_is_a_sequence() -> None:
    assert random_sequence(7, 60) == random_sequence(7, 60)
    assert random_sequence(7, 60) != random_sequence(8, 60)


def test_all_operations_occur_with_yields_and_other_cpus_inside() -> None:
    names, inside = Counter[str](), Counter[str]()
    for one in every(40):
        names[one.name] += 1
        if one.point is not None:
            inside["yields" if one.point.yields else "races"] += 1
            inside["others"] += one.point.other is not None
    assert len(names) == 15
    assert min(names.values()) > 5
    assert inside["yields"] > 50
    assert inside["races"] > 10
    assert inside["others"] > 50


def test_points_are_inside_of_their_ranges() -> None:
    for one in every(40):
        if one.point is not None:
            start, end = one.arguments.get("start", 0), one.arguments.get("end", NPAGES)
            assert start < one.point.gfn < end
    assert max(WATCHED) < NPAGES


def test_operations_are_told_in_words() -> None:
    texts = [str(one) for one in every(40) if one.point is not None]
    assert any("it yields at gfn 0x" in text and "meanwhile" in text for text in texts)
    assert any("before the change, touch" in text for text in texts)
