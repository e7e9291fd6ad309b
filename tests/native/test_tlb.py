"""The TLB against the SDM's rules (tlb_model.py), on programs that hypothesis and random seeds write.

Unbounded it must hold exactly the rules' entries: an entry too few is an over-flush, which would hide
the misses that other code is here to show.  With a real geometry it must hold nothing else.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.native.tlb_model import Kind
from tests.native.tlb_pair import (
    EP4TAS,
    INVALIDATIONS,
    PAGES,
    PCIDS,
    SERVER,
    TINY,
    UNBOUNDED,
    VPIDS,
    Geometry,
    Pair,
)
from tests.native.tlb_pair import random_program as run_random_program

# Random programs for each geometry.
PROGRAMS = int(os.environ.get("FLUSHLAB_PROGRAMS", "1000"))

page = st.sampled_from(PAGES) | st.integers(0, 1100)
size = st.sampled_from((0, 0, 0, 1, 2))


@st.composite
def invalidation(draw: st.DrawFn) -> tuple[str, tuple[int, ...]]:
    name, arguments = draw(st.sampled_from(INVALIDATIONS))
    return name, tuple(draw(st.sampled_from(values)) for values in arguments)


class TlbMachine(RuleBasedStateMachine):
    geometry = UNBOUNDED

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(self.geometry)

    def teardown(self) -> None:
        self.pair.close()

    @rule(
        kind=st.sampled_from(Kind),
        vpid=st.sampled_from(VPIDS),
        pcid=st.sampled_from(PCIDS),
        ep4ta=st.sampled_from(EP4TAS),
    )
    def switch(self, kind: Kind, vpid: int, pcid: int, ep4ta: int) -> None:
        self.pair.switch(kind, vpid, pcid, ep4ta)

    @rule(page=page, size=size, guest=st.integers(0, 2), is_global=st.booleans(), physical=st.booleans())
    def insert(self, page: int, size: int, guest: int, is_global: bool, physical: bool) -> None:
        self.pair.insert(page, size, guest, is_global, physical)

    @rule(page=page, level=st.integers(1, 4), physical=st.booleans())
    def insert_psc(self, page: int, level: int, physical: bool) -> None:
        self.pair.insert_psc(page, level, physical)

    @rule(page=page, physical=st.booleans(), refill=st.booleans())
    def lookup(self, page: int, physical: bool, refill: bool) -> None:
        self.pair.lookup(page, physical, refill)

    @rule(page=page, physical=st.booleans())
    def psc_lookup(self, page: int, physical: bool) -> None:
        self.pair.psc_lookup(page, physical)

    @rule(operation=invalidation())
    def invalidate(self, operation: tuple[str, tuple[int, ...]]) -> None:
        name, arguments = operation
        self.pair.invalidate(name, *arguments)

    @precondition(lambda self: self.pair.model.kind != Kind.LINEAR)
    @rule(gpa_page=page, linear_page=st.none() | page)
    def ept_violation(self, gpa_page: int, linear_page: int | None) -> None:
        self.pair.ept_violation(gpa_page, linear_page)

    @rule(page=page)
    def drop(self, page: int) -> None:
        self.pair.drop(page)

    @invariant()
    def contents(self) -> None:
        self.pair.check()


class TinyTlbMachine(TlbMachine):
    geometry = TINY


_SETTINGS = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)

TlbMachine.TestCase.settings = _SETTINGS
TinyTlbMachine.TestCase.settings = _SETTINGS
TestUnbounded = pytest.mark.slow(TlbMachine.TestCase)
TestTiny = pytest.mark.slow(TinyTlbMachine.TestCase)


@pytest.mark.slow
@pytest.mark.parametrize("geometry", [UNBOUNDED, SERVER, TINY], ids=["unbounded", "server", "tiny"])
def test_random_programs(geometry: Geometry) -> None:
    for seed in range(150):
        run_random_program(geometry, seed, steps=60)


@pytest.mark.stress
@pytest.mark.parametrize("geometry", [UNBOUNDED, SERVER, TINY], ids=["unbounded", "server", "tiny"])
@pytest.mark.parametrize("first", range(1000, 1000 + PROGRAMS, 500))
def test_many_random_programs(geometry: Geometry, first: int) -> None:
    for seed in range(first, first + 500):
        run_random_program(geometry, seed, steps=80)
