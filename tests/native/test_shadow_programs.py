"""Guests without EPT against the SDM's rules (shadow_model.py), on random programs and on hypothesis's.

Each access must end as the rules say, with their cached mappings, flags, error codes and violations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.native.shadow_model import EXECUTE, READ, WRITE
from tests.native.shadow_pair import ANYWHERE, FLAGS, HUGE, MAPPED, PAGES, ROOTS, ShadowPair
from tests.native.shadow_steps import each_change, random_program

#: Bounded, so that walks take their fast path, but so large that nothing is evicted.
FAST = (12 * 4096, 12, 4 * 4096)

page = st.sampled_from(PAGES)
anywhere = st.sampled_from(ANYWHERE)
first = st.sampled_from(tuple(HUGE))
root = st.integers(0, ROOTS - 1)
one = st.integers(0, 1)
kind = st.integers(0, 2)
#: Most leafs let user mode in.
flags = st.sets(st.sampled_from((*FLAGS, "user")), max_size=4)


class ShadowMachine(RuleBasedStateMachine):
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.pair = ShadowPair(**self.options)
        self.pair.map_all(0)

    def teardown(self) -> None:
        self.pair.close()

    @rule(root=root, first=first, flags=flags, aged=st.booleans())
    def set_huge(self, root: int, first: int, flags: set[str], aged: bool) -> None:
        self.pair.set_huge(root, first, flags, aged)

    @rule(root=root, first=first)
    def zap_huge(self, root: int, first: int) -> None:
        self.pair.zap_huge(root, first)

    @rule(root=root, page=page, flags=flags, aged=st.booleans(), gfn=st.none() | page)
    def set_spte(self, root: int, page: int, flags: set[str], aged: bool, gfn: int | None) -> None:
        self.pair.set_spte(root, page, flags, aged, gfn)

    @rule(root=root)
    def map_all(self, root: int) -> None:
        self.pair.map_all(root)

    @rule(root=root, page=page)
    def set_mmio(self, root: int, page: int) -> None:
        self.pair.set_mmio(root, page)

    @rule(root=root, page=page)
    def zap(self, root: int, page: int) -> None:
        self.pair.zap(root, page)

    @rule(root=root, page=page)
    def write_protect(self, root: int, page: int) -> None:
        self.pair.write_protect(root, page)

    @rule(gfn=page, freed=st.booleans())
    def promise(self, gfn: int, freed: bool) -> None:
        self.pair.promise(gfn, freed)

    @rule(gfn=page)
    def free(self, gfn: int) -> None:
        self.pair.free(gfn)

    @rule(gfn=page, on=st.booleans())
    def track(self, gfn: int, on: bool) -> None:
        self.pair.track(gfn, on)

    @rule(root=root, page=page)
    def unlink(self, root: int, page: int) -> None:
        self.pair.unlink(root, page)

    @rule(number=st.integers(0, 7))
    def free_table(self, number: int) -> None:
        self.pair.free_table(number)

    @rule(root=root, page=page, cpu=one, vcpu=one, kind=kind)
    def walk_freed(self, root: int, page: int, cpu: int, vcpu: int, kind: int) -> None:
        self.pair.walk_freed(root, page, cpu, vcpu, kind)

    @rule(vcpu=one, vpid=st.integers(1, 2))
    def give_vpid(self, vcpu: int, vpid: int) -> None:
        self.pair.give_vpid(vcpu, vpid)

    @rule(cpu=one, vcpu=one)
    def invvpid_single(self, cpu: int, vcpu: int) -> None:
        self.pair.invvpid_single(cpu, vcpu)

    @rule(cpu=one, vcpu=one)
    def invvpid_retain_globals(self, cpu: int, vcpu: int) -> None:
        self.pair.invvpid_retain_globals(cpu, vcpu)

    @rule(cpu=one, vcpu=one, page=anywhere)
    def invvpid_address(self, cpu: int, vcpu: int, page: int) -> None:
        self.pair.invvpid_address(cpu, vcpu, page)

    @rule(cpu=one)
    def invvpid_all(self, cpu: int) -> None:
        self.pair.invvpid_all(cpu)

    @rule(cpu=one)
    def invept_global(self, cpu: int) -> None:
        self.pair.invept_global(cpu)

    @rule(cpu=one, vcpu=one, root=root, pcid=st.integers(0, 2), kinds=st.lists(kind, min_size=len(PAGES)))
    def sweep(self, cpu: int, vcpu: int, root: int, pcid: int, kinds: list[int]) -> None:
        self.pair.sweep(cpu, vcpu, root, pcid, kinds)

    @rule(cpu=one, vcpu=one, page=anywhere, kind=kind, supervisor=st.booleans())
    def access(self, cpu: int, vcpu: int, page: int, kind: int, supervisor: bool) -> None:
        self.pair.access(cpu, vcpu, page, kind, supervisor)

    @rule(vcpu=one)
    def skip(self, vcpu: int) -> None:
        self.pair.skip(vcpu)

    @rule(cpu=one, vcpu=one, page=anywhere)
    def speculate(self, cpu: int, vcpu: int, page: int) -> None:
        self.pair.speculate(cpu, vcpu, page)

    @invariant()
    def agrees(self) -> None:
        self.pair.compare()


class WithoutVpidMachine(ShadowMachine):
    options: ClassVar = {"vpid": False}


class FastMachine(ShadowMachine):
    options: ClassVar = {"geometry": FAST}


_SETTINGS = settings(
    max_examples=12,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)

ShadowMachine.TestCase.settings = _SETTINGS
WithoutVpidMachine.TestCase.settings = _SETTINGS
FastMachine.TestCase.settings = _SETTINGS
TestWithVpid = pytest.mark.slow(ShadowMachine.TestCase)
TestWithoutVpid = pytest.mark.slow(WithoutVpidMachine.TestCase)
TestFast = pytest.mark.slow(FastMachine.TestCase)


@contextmanager
def pair_of(**options: Any) -> Iterator[ShadowPair]:
    pair = ShadowPair(**options)
    try:
        yield pair
    finally:
        pair.close()


@pytest.mark.parametrize(
    "options", [{}, {"vpid": False}, {"geometry": FAST}], ids=["vpid", "no-vpid", "fast"]
)
def test_random_programs(options: dict[str, Any]) -> None:
    """Run the same programs each time, so long that each kind of event occurs."""
    seen: Counter[str] = Counter()
    for seed in range(4):
        with pair_of(**options) as pair:
            random_program(pair, seed, 150)
            seen += pair.seen
            seen["violations"] += pair.model.violations
            seen["missed stores"] += pair.model.missed_least
            seen["stale walks"] += pair.model.stale_walks
    errors = {int(key.split()[1]) for key in seen if key.startswith("error")}
    # Not present, rights, reserved bits; each for user mode and for the guest's kernel.
    assert errors >= {0, 2, 4, 6, 7, 16, 20, 21, 13}, sorted(errors)
    with_vpid = options.get("vpid", True)
    # Without a VPID no mapping survives a VM exit, so that neither is a table cached nor a mapping stale.
    assert bool(seen["stale walks"]) == with_vpid
    assert seen["violations"] >= (50 if with_vpid else 10)
    assert seen["missed stores"]
    assert seen["done"] >= 200


@pytest.mark.parametrize("geometry", [(0, 0, 0), FAST], ids=["slow", "fast"])
def test_neither_path_of_the_walk_misses_a_change(geometry: tuple[int, int, int]) -> None:
    with pair_of(geometry=geometry) as pair:
        each_change(pair)
        assert pair.model.violations
        assert pair.model.missed_least
        assert pair.model.stale_walks


def test_retaining_globals_drops_all_other_translations() -> None:
    with pair_of() as pair:
        pair.set_spte(0, 3, {"user"}, False)
        pair.set_spte(0, 2, {"user"}, False)
        pair.set_huge(0, 2048, {"user"}, False)
        for page in (3, 2, HUGE[2048][1]):
            pair.access(0, 0, page, READ)
        pair.invvpid_retain_globals(0, 0)
        pair.compare()
        assert {entry.page for entry in pair.model.cpus[0].entries} == {3, 2048}


def test_the_models_rights_are_those_of_user_mode_and_the_kernel() -> None:
    """The kernel uses what it has cached itself; user mode walks, and faults."""
    with pair_of() as pair:
        pair.set_spte(0, 1, MAPPED - {"user"}, False)
        pair.access(0, 0, 1, WRITE, supervisor=True)
        assert pair.seen == {"done": 1}
        pair.access(0, 0, 1, EXECUTE)
        assert pair.seen["error 21"] == 1
        assert not pair.model.cpus[0].entries
        pair.compare()
