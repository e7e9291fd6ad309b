"""The digest of Python objects: equal for equal states, whichever way has led to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from emulator.explore.engine.digest import Digest
from emulator.explore.engine.snapshot import Snapshot


class Slotted:
    __slots__ = ("also", "big", "name")

    def __init__(self) -> None:
        self.also = 0
        self.big = 1 << 40
        self.name: object = "x"


def digest_after(change: Callable[[Slotted], object]) -> tuple[Any, Any]:
    """Return the digests of an object before a change, and after it."""
    one = Slotted()
    digest = Digest(Snapshot([one]))
    before = digest.now()
    change(one)
    return before, digest.now()


def sets(**values: object) -> Callable[[Slotted], None]:
    def change(one: Slotted) -> None:
        for name, value in values.items():
            setattr(one, name, value)

    return change


@pytest.mark.parametrize("change", [sets(also=1), sets(big=1), sets(name=None), sets(name=0)])
def test_each_attribute_counts(change: Callable[[Slotted], object]) -> None:
    before, after = digest_after(change)
    assert before != after


def test_an_attribute_that_has_gone_counts() -> None:
    before, after = digest_after(lambda one: delattr(one, "also"))
    assert before != after


def test_an_equal_value_is_no_change_whichever_object_it_is() -> None:
    same = int("1" + "0" * 40, 2)
    one = Slotted()
    assert same is not one.big
    before, after = digest_after(sets(big=same))
    assert before == after


def test_an_integer_and_a_boolean_that_are_equal_differ() -> None:
    before, after = digest_after(sets(also=False))
    assert before != after
