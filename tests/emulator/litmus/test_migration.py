"""A VM that logs ends like a migration: contents are compared, in every mode and however the log ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emulator.explore.results.verdict import explore_verdict
from emulator.kvm.structs import Kvm
from emulator.kvm.virt.dirty_log import kvm_vm_ioctl_get_dirty_log
from emulator.litmus import kvm_ops
from emulator.litmus.loader import load_test, parse_test
from emulator.litmus.model import LitmusTest
from emulator.litmus.policies import named_policy
from emulator.litmus.runner import run_test, running
from emulator.litmus.verdict import VIOLATIONS, Outcome
from emulator.machine.runtime import Cpu
from emulator.policy import Policy
from native import ffi, lib
from native.types import ReportNumber

LOSES = ["log-arm", "log-clear-manual", "log-get-away", "log-get", "log-huge", "log-initially-set"]
LOSES += ["log-races-write", "log-recover", "log-two-steps", "return-dirty-log"]


def forget_to_protect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "emulator.kvm.virt.dirty_log.kvm_arch_mmu_enable_log_dirty_pt_masked", lambda *arguments: 0
    )
    monkeypatch.setattr("emulator.kvm.mmu.mmu.kvm_mmu_slot_remove_write_access", lambda *arguments: False)


def sequential(*ops: str, vm: str = "") -> LitmusTest:
    """Return a test with operations that follow one another."""
    text = f'doc="d"\nsource="s"\ninit={list(ops)!r}\n[[vm]]\nvcpus=2\n{vm}\n[threads.v0]\nvcpu=0\n'
    return parse_test(f"{text}[threads.v1]\nvcpu=1\npcpu=1\n[threads.k]\nops=['linger']", "t", None)


def outcome_of(test: LitmusTest, policy: str = "linux-7.3") -> Outcome:
    return run_test(test, named_policy(policy), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSES)
def test_a_log_that_misses_pages_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a stale translation anywhere: KVM forgets to write-protect."""
    forget_to_protect(monkeypatch)
    test = load_test(name)
    assert "lost-dirty" in run_test(test, Policy(), 60, stop_at=1).kinds
    found = explore_verdict(test, Policy())
    assert (found.verdict, found.kinds) == (VIOLATIONS, ("lost-dirty",))


def test_what_is_logged_all_the_same_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aging has taken the permissions before, and arming flushes: the write faults and is logged.

    The audit at the end finds pages that were left writable.
    """
    forget_to_protect(monkeypatch)
    assert run_test(load_test("log-arm-aged"), Policy(), 5).kinds.keys() == {"inconsistent"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy"),
    [("log-order", "mutant:log-protects-before-marks"), ("log-races-write", "mutant:mark-before-writable")],
)
def test_races_that_lose_a_mark_are_found_by_search(name: str, policy: str) -> None:
    """No translation is stale in them: an execution shows them by its contents alone."""
    found = explore_verdict(load_test(name), named_policy(policy))
    assert (found.verdict, found.kinds) == (VIOLATIONS, ("lost-dirty",))


def test_two_vcpus_never_store_the_same() -> None:
    """Each has made as many accesses as the other: the page's contents would not tell their writes apart."""
    test = sequential("k: log-arm", "v0: write 0x10", "k: log-get", "v1: write 0x10")
    assert outcome_of(test).kinds == {}
    assert outcome_of(test, "mutant:log-without-protect").kinds == {"lost-dirty": 1}


@pytest.mark.slow
def test_smm_has_a_log_of_its_own() -> None:
    """A vCPU in SMM writes through another memslot, which is armed and read like the first."""
    ops = ["v0: write 0x10", "k: log-arm", "v0: smi", "v0: write 0x10", "k: log-get", "v0: write 0x10"]
    for vm in ("smm_slots=true", "smram=0x600"):
        test = sequential(*ops, vm=vm)
        assert outcome_of(test).kinds == {}, vm
        assert outcome_of(test, "mutant:log-without-protect").kinds == {"lost-dirty": 1}, vm


def test_flags_in_page_tables_are_contents() -> None:
    """A walk sets the accessed flag in a guest's table: KVM logs that, and nothing is lost."""
    ops = ["v0: read 0x10", "k: log-arm", "v0: read 0x11", "v0: write 0x10", "k: log-get", "v0: read 0x12"]
    outcome = outcome_of(sequential(*ops, vm="paging=true"))
    assert outcome.kinds == {}
    assert outcome.evidence["dirty-compared"]


def test_the_host_moves_contents_and_loses_none() -> None:
    ops = ["v0: write 0x200", "k: host-collapse 0x200", "k: log-arm", "v0: write 0x201", "k: log-get"]
    ops += ["k: host-unmap 0x201", "k: host-migrate 0x200", "v0: read 0x201", "v0: write 0x202"]
    assert outcome_of(sequential(*ops, "k: host-collapse 0x200")).kinds == {}


def test_what_user_space_discards_it_knows_of() -> None:
    ops = ["v0: write 0x10", "k: log-arm", "k: host-discard 0x10"]
    assert outcome_of(sequential(*ops)).kinds == {}
    again = sequential(*ops, "v0: write 0x10", "k: log-get", "v0: write 0x10")
    assert outcome_of(again).kinds == {}
    assert outcome_of(again, "mutant:log-without-protect").kinds == {"lost-dirty": 1}


@pytest.mark.slow
@pytest.mark.parametrize("end", ["log-disarm", "slot-delete"])
def test_a_migration_that_is_given_up_has_lost_what_no_bitmap_has(end: str) -> None:
    """A page that is marked when the log goes was going to be reported."""
    ops = ["v0: write 0x10", "k: log-arm", "v0: write 0x10"]
    test = sequential(*ops, f"k: {end}")
    assert outcome_of(test).kinds == {}
    assert outcome_of(test, "mutant:log-without-protect").kinds == {}, "marked, and not read"
    lost = sequential(*ops, "k: log-get", "v0: write 0x10", f"k: {end}")
    assert outcome_of(lost).kinds == {}
    assert outcome_of(lost, "mutant:log-without-protect").kinds == {"lost-dirty": 1}
    after = sequential(*ops, f"k: {end}", *(["k: slot-create"] if end == "slot-delete" else []))
    assert outcome_of(after).kinds == {}


def test_evidence_is_what_was_written_while_it_was_logged() -> None:
    quiet = sequential("v0: write 0x10", "k: log-arm", "v0: read 0x10", "k: log-get")
    assert outcome_of(quiet).evidence["dirty-compared"] == 0
    for mode in ("protect", "manual", "initially-set"):
        vm = f'dirty_log="{mode}"'
        assert outcome_of(sequential("v0: write 0x10", "k: log-arm", vm=vm)).evidence["dirty-compared"] == 0
        written = sequential("k: log-arm", "v0: write 0x10", "v1: write 0x11", vm=vm)
        assert outcome_of(written).evidence["dirty-compared"] == 2, mode


# --- a slow, obvious model ---------------------------------------------------------------------------------

PAGES = (0x10, 0x11, 0x3F, 0x40)
MODES = ("protect", "manual", "initially-set")


@dataclass
class Model:
    """Contents as numbers.  `forgets`: the calls of log-get, by number, and the page that each forgets."""

    mode: str
    forgets: frozenset[tuple[int, int]]
    memory: dict[int, int] = field(default_factory=lambda: dict.fromkeys(PAGES, 0))
    image: dict[int, int] | None = None
    # Written since KVM reported them last.
    written: set[int] = field(default_factory=set)
    owed: set[int] = field(default_factory=set)
    known: bool = False
    gets: int = 0
    lost: list[int] = field(default_factory=list)

    def write(self, page: int) -> None:
        self.memory[page] = 1 + max(self.memory.values())
        self.written.add(page)

    def arm(self) -> None:
        if self.image is None:
            self.image = dict(self.memory)
            self.known = self.mode == "initially-set"
            self.owed = set(PAGES) if self.known else set()
            self.written = set(PAGES) if self.known else set()

    def get(self) -> None:
        assert self.image is not None
        named = {page for page in self.written if (self.gets, page) not in self.forgets}
        self.gets += 1
        if self.mode == "protect":
            self.written = set()
            self.copy(named)
        else:
            self.owed |= named
            self.known = True

    def clear(self, page: int) -> None:
        group = {other for other in PAGES if other // 64 == page // 64}
        cleared = group & self.owed if self.known else group
        self.written -= cleared
        self.owed -= cleared
        self.copy(cleared)

    def copy(self, pages: set[int]) -> None:
        assert self.image is not None
        self.image |= {page: self.memory[page] for page in pages}

    def discard(self, page: int) -> None:
        self.memory[page] = 0
        if self.image is not None:
            self.copy({page})

    def disarm(self) -> None:
        self.lost += sorted(self.differing() - self.written - self.owed)
        self.image = None

    def end(self) -> list[int]:
        if self.image is not None:
            self.get()
            self.copy(self.owed)
            self.lost += sorted(self.differing())
        return self.lost

    def differing(self) -> set[int]:
        assert self.image is not None
        return {page for page in PAGES if self.image[page] != self.memory[page]}


@contextmanager
def forgetful(forgets: frozenset[tuple[int, int]]) -> Iterator[None]:
    """KVM_GET_DIRTY_LOG that takes marks and does not name all of them."""
    real, calls = kvm_vm_ioctl_get_dirty_log, iter(range(1000))

    def get(cpu: Cpu, kvm: Kvm, slot: int, as_id: int = 0) -> list[int]:
        call = next(calls)
        words = real(cpu, kvm, slot, as_id)
        for page in PAGES:
            if (call, page) in forgets:
                words[page // 64] &= ~(1 << page % 64)
        return words

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kvm_ops, "kvm_vm_ioctl_get_dirty_log", get)
        yield


pages = st.sampled_from(PAGES)
actions = st.one_of(
    st.tuples(st.just("write"), pages),
    st.tuples(st.just("get"), st.just(0)),
    st.tuples(st.just("clear"), pages),
    st.tuples(st.just("unmap"), pages),
    st.tuples(st.just("discard"), pages),
    st.tuples(st.sampled_from(["arm", "disarm"]), st.just(0)),
)
SPELLED = {
    "write": "v0: write",
    "clear": "k: log-clear",
    "unmap": "k: host-unmap",
    "discard": "k: host-discard",
}


def lost_pages(test: LitmusTest) -> list[int]:
    """In one execution, as the oracle has them."""
    with running(test) as runner:
        outcome = runner.run(Policy(), 1, 0)
        buffer = ffi.new("struct violation_report[]", 64)
        n = lib.oracle_reports(runner.machine.m, ReportNumber(0), buffer, 64)
    assert not outcome.failure
    return [buffer[i].gfn for i in range(n)]


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    mode=st.sampled_from(MODES),
    program=st.lists(actions, min_size=3, max_size=14),
    forgets=st.frozensets(st.tuples(st.integers(0, 3), pages), max_size=6),
)
def test_the_model_agrees(
    mode: str, program: list[tuple[str, int]], forgets: frozenset[tuple[int, int]]
) -> None:
    """The lost pages are the model's, whichever pages KVM forgets to report."""
    model, ops = Model(mode, forgets), []
    model.arm()
    for action, page in program:
        if action in ("get", "clear", "disarm") and model.image is None:
            continue
        if action == "unmap":
            pass  # contents stay, and the next write faults
        elif action in ("write", "clear", "discard"):
            getattr(model, action)(page)
        else:
            getattr(model, action)()
        ops.append(f"{SPELLED[action]} {page}" if action in SPELLED else f"k: log-{action}")
    test = sequential("v0: read 1", "k: log-arm", *ops, vm=f'dirty_log="{mode}"')
    with forgetful(forgets):
        assert sorted(lost_pages(test)) == sorted(model.end())
