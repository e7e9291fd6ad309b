"""Random programs for a ShadowPair: mostly accesses to mapped pages, between changes of all kinds."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

from tests.native.shadow_pair import ANYWHERE, FLAGS, HUGE, MAPPED, PAGES, ROOTS, ShadowPair


class Choice:
    """The operands of a step."""

    def __init__(self, r: random.Random) -> None:
        self.cpu, self.vcpu, self.root = r.randrange(2), r.randrange(2), r.randrange(ROOTS)
        self.page, self.other, self.anywhere = r.choice(PAGES), r.choice(PAGES), r.choice(ANYWHERE)
        self.first = r.choice(tuple(HUGE))
        self.flags = {flag for flag in FLAGS if r.random() < 0.8}
        self.kinds = [r.randrange(3) for _ in PAGES]
        self.kind, self.pcid, self.number = self.kinds[0], r.randrange(3), r.randrange(8)
        self.near, self.beside = r.sample(PAGES[:5], 2)  # in one table
        self.fresh, self.change = r.randrange(3, 4096), r.choice(CHANGES)
        self.often, self.seldom = r.random() < 0.5, r.random() < 0.3


def _walk_unlinked(pair: ShadowPair, c: Choice) -> None:
    """Use a cached pointer to a table that is unlinked."""
    pair.sweep(c.cpu, c.vcpu, c.root, c.pcid, c.kinds)
    pair.unlink(c.root, c.page)
    pair.access(c.cpu, c.vcpu, c.page, c.kind)


def _walk_fresh(pair: ShadowPair, c: Choice) -> None:
    """Walk from a cached table to an SPTE that has just changed, under a PCID that is new to the TLB."""
    pair.load(c.vcpu, c.root, c.fresh)
    for page in (c.beside, c.near):
        pair.set_spte(c.root, page, MAPPED, False)
    pair.access(c.cpu, c.vcpu, c.beside, c.kind)
    c.change(pair, c)
    pair.access(c.cpu, c.vcpu, c.near, c.kinds[1])
    pair.access(c.cpu, c.vcpu, c.near, c.kinds[2])
    pair.access(c.cpu, c.vcpu, c.beside, c.kinds[2])


def _free_unlinked(pair: ShadowPair, c: Choice) -> None:
    pair.unlink(c.root, c.near)
    pair.free_table(-1)


def _reuse_table(pair: ShadowPair, c: Choice) -> None:
    """Free a table; the next one is in the same frame."""
    _free_unlinked(pair, c)
    pair.set_spte(c.root, c.near, MAPPED, False)


def _other_vcpu(pair: ShadowPair, c: Choice) -> None:
    """Let another vCPU have the VPID, and use this one's table caches."""
    other = 1 - c.vcpu
    pair.give_vpid(other, pair.state[c.vcpu].vpid)
    pair.load(other, c.root, c.fresh)
    pair.speculate(c.cpu, other, c.near)
    pair.access(c.cpu, other, c.near, c.kind)


#: What may befall an SPTE, a table or a page.
CHANGES: tuple[Callable[[ShadowPair, Choice], None], ...] = (
    lambda p, c: p.set_spte(c.root, c.near, c.flags, c.seldom),
    lambda p, c: p.set_spte(c.root, c.near, MAPPED - {"user"}, c.seldom),
    lambda p, c: p.set_spte(c.root, c.near, MAPPED, True),
    lambda p, c: p.set_spte(c.root, c.near, MAPPED, False, c.beside),
    lambda p, c: p.track(c.near, True),
    lambda p, c: p.free(c.near),
    lambda p, c: p.unlink(c.root, c.near),
    lambda p, c: p.clean(c.root, c.near),
    _free_unlinked,
    _reuse_table,
    lambda p, c: p.zap(c.root, c.near),
    lambda p, c: p.set_mmio(c.root, c.near),
    lambda p, c: p.access(c.cpu, c.vcpu, c.near, c.kind, supervisor=True),
    lambda p, c: p.speculate(c.cpu, c.vcpu, c.near),
    _other_vcpu,
    lambda p, c: p.give_vpid(c.vcpu, 1 + c.often),
    lambda p, c: p.invvpid_single(c.cpu, c.vcpu),
    lambda p, c: p.invvpid_address(c.cpu, c.vcpu, c.beside),
)

#: Each with its weight.
STEPS: tuple[tuple[int, Callable[[ShadowPair, Choice], None]], ...] = (
    (1, lambda p, c: p.set_spte(c.root, c.page, c.flags, c.seldom, c.other)),
    (3, lambda p, c: p.set_spte(c.root, c.page, c.flags, c.seldom)),
    (1, lambda p, c: p.map_all(c.root)),
    (1, lambda p, c: p.set_huge(c.root, c.first, c.flags, c.seldom)),
    (1, lambda p, c: p.zap(c.root, c.page)),
    (1, lambda p, c: p.write_protect(c.root, c.page)),
    (1, lambda p, c: p.set_mmio(c.root, c.page)),
    (1, lambda p, c: p.zap_huge(c.root, c.first)),
    (1, lambda p, c: p.promise(c.page, c.often)),
    (1, lambda p, c: p.free(c.page)),
    (1, lambda p, c: p.track(c.page, c.often)),
    (1, _walk_unlinked),
    (8, _walk_fresh),
    (1, lambda p, c: p.free_table(c.number)),
    (1, lambda p, c: p.walk_freed(c.root, c.page, c.cpu, c.vcpu, c.kind)),
    (1, lambda p, c: p.give_vpid(c.vcpu, 1 + c.often)),
    (1, lambda p, c: p.invvpid_single(c.cpu, c.vcpu)),
    (1, lambda p, c: p.invvpid_retain_globals(c.cpu, c.vcpu)),
    (1, lambda p, c: p.invvpid_address(c.cpu, c.vcpu, c.anywhere)),
    (1, lambda p, c: p.invvpid_all(c.cpu)),
    (1, lambda p, c: p.invept_global(c.cpu)),
    (1, lambda p, c: p.skip(c.vcpu)),
    (2, lambda p, c: p.speculate(c.cpu, c.vcpu, c.anywhere)),
    (4, lambda p, c: p.sweep(c.cpu, c.vcpu, c.root, c.pcid, c.kinds)),
    (4, lambda p, c: p.access(c.cpu, c.vcpu, c.anywhere, c.kind, supervisor=True)),
    (5, lambda p, c: p.access(c.cpu, c.vcpu, c.anywhere, c.kind)),
)


def each_change(pair: ShadowPair) -> None:
    """Let everything befall a page whose table is cached, before accesses of each kind."""
    r = random.Random(0)
    for number, (change, first, second) in enumerate(product(CHANGES, range(3), range(3))):
        c = Choice(r)
        c.cpu = c.vcpu = c.root = c.kind = 0
        c.near, c.beside, c.change = 1, 2, change
        c.fresh, c.kinds[1:3] = 3 + number, (first, second)
        for vcpu in range(2):
            pair.give_vpid(vcpu, 1 + vcpu)
        pair.track(c.near, False)
        _walk_fresh(pair, c)
        try:
            pair.compare()
        except AssertionError as error:
            raise AssertionError(f"case {number}: change {number // 9}, kinds {first}, {second}") from error


def random_program(pair: ShadowPair, seed: int, steps: int) -> None:
    """Do random steps, and compare after each."""
    r = random.Random(seed)
    weights = [weight for weight, _ in STEPS]
    for root in range(ROOTS):
        pair.map_all(root)
    for number, (_, step) in enumerate(r.choices(STEPS, weights, k=steps)):
        step(pair, Choice(r))
        try:
            pair.compare()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, step {number}") from error
