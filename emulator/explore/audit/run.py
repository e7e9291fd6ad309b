"""Audits of litmus tests: accesses of each that the search does not know, and states that it confuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from emulator.explore.audit.continuations import StateCheck, Ways
from emulator.explore.audit.independence import IndependenceCheck
from emulator.explore.audit.residue import ResidueProgram
from emulator.explore.audit.untold import Untold
from emulator.explore.machine.control import Control
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import NONE, ExploreOptions
from emulator.explore.machine.patched_code import shared_classes
from emulator.explore.machine.policy_reads import NOTHING, Grown
from emulator.explore.machine.races import Races
from emulator.explore.machine.states import MachineStates, hear, stateless
from emulator.explore.machine.undeclared import Audit
from emulator.explore.machine.watching import watching
from emulator.explore.strategies.sampling import RandomWalk
from emulator.explore.strategies.search import Limits, search
from emulator.litmus.failure import LitmusFailure
from emulator.litmus.model import INCONCLUSIVE, LitmusTest
from emulator.policy import Policy

KINDS = ("unannounced", "undescribed", "shared", "plain", "ordered", "apart", "failed")
FINDINGS = "findings"
CLEAN = "clean"
# Random executions of a test that are audited.
EXECUTIONS = 20
# Pairs of steps that are swapped in each of EXECUTIONS further executions.
SWAPS = 10
# Values that histories do not tell are looked for in one of so many of EXECUTIONS.
UNTOLD = 4
# Ways to one state are found in a stateful search of so many times EXECUTIONS.
SEARCHED = 3


@dataclass(frozen=True, slots=True)
class AuditResult:
    """The findings of one test under one policy: sentences, and how often each was found.

    executions: random ones for the accesses, and as many again for the swaps.
    unannounced: native calls that no named point announces.  undescribed: native functions without a
    footprint.  shared: accesses of two tasks to a Python object, neither of which happens before the other.
    plain: likewise, plain accesses of a kernel tree's code to memory.
    swaps: pairs of adjacent steps that were swapped, as their footprints do not conflict.  ordered: the pairs
    of which the swap made a difference.  ways: pairs of ways to one state, as a stateful search tells states,
    each continued with the same tasks; apart: their differences, and Python objects that tasks read although
    their states do not tell it.  stateless: the reason why states cannot be
    compared.  failed: why an execution could not go on, which ended the audit.
    """

    test: str
    policy: str
    executions: int
    unannounced: Counter[str] = field(default_factory=Counter)
    undescribed: Counter[str] = field(default_factory=Counter)
    shared: Counter[str] = field(default_factory=Counter)
    plain: Counter[str] = field(default_factory=Counter)
    ordered: Counter[str] = field(default_factory=Counter)
    apart: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    swaps: int = 0
    ways: int = 0
    stateless: str = ""

    @property
    def clean(self) -> bool:
        return not any(getattr(self, kind) for kind in KINDS)

    @property
    def verdict(self) -> str:
        """Return FINDINGS, CLEAN, or INCONCLUSIVE if there was no pair of steps to swap: with a single
        thread, or if each execution has a violation."""
        if not self.clean:
            return FINDINGS
        return CLEAN if self.swaps else INCONCLUSIVE

    def document(self) -> dict[str, Any]:
        """Return the document for --json."""
        return {
            "test": self.test,
            "policy": self.policy,
            "verdict": self.verdict,
            "executions": self.executions,
            "unannounced": dict(sorted(self.unannounced.items())),
            "undescribed": dict(sorted(self.undescribed.items())),
            "shared": dict(sorted(self.shared.items())),
            "plain": dict(sorted(self.plain.items())),
            "swaps": self.swaps,
            "ordered": dict(sorted(self.ordered.items())),
            "ways": self.ways,
            "stateless": self.stateless or None,
            "apart": dict(sorted(self.apart.items())),
            "failed": dict(sorted(self.failed.items())),
        }


@dataclass(frozen=True, slots=True)
class Parts:
    """The classes that an audit is made of.  stateless: why states cannot be compared; "" if they can."""

    program: type[ResidueProgram] = ResidueProgram
    races: Callable[[Control], Races] = Races
    stateless: str = ""


MODEL = Parts()


def run_audit(
    test: LitmusTest,
    policy: Policy,
    executions: int = EXECUTIONS,
    seed: int = 0,
    options: ExploreOptions = NONE,
    parts: Parts = MODEL,
) -> AuditResult:
    """Audit one test under one policy.  The result depends on the arguments only."""
    with policy.confined():
        known, found = NOTHING, None
        while found is None:
            program = parts.program(test, policy, options, known=known)
            try:
                found = _audit(program, executions, seed, parts)
            except Grown:
                assert program.reads is not None
                known = program.reads.next()
            finally:
                program.close()
    return found


def _audit(program: ResidueProgram, executions: int, seed: int, parts: Parts) -> AuditResult:
    walks, again = RandomWalk(executions, seed), RandomWalk(executions // UNTOLD + 1, seed)
    own = program.control.races
    races = own or parts.races(program.control)
    audit = program.control.audit = Audit()
    check = IndependenceCheck(program, program.objects, seed)
    machine_states = MachineStates(program)
    states = StateCheck(program, Ways(program.objects, machine_states), seed)
    untold = Untold(machine_states)
    why = parts.stateless or stateless(program)
    failed: Counter[str] = Counter()
    try:
        with instrument(program.control):
            program.races = races
            # A patched policy's program watches the classes all the time.
            with watching(races) if own is None else nullcontext():
                search(program, program.objects, walks, Limits(), lambda outcome: False)
            program.races = own
            program.control.audit = None
            check.run(executions, SWAPS)
        if not why:
            with instrument(program.control):
                program.races = untold
                with watching(untold, shared_classes()):
                    search(program, program.objects, again, Limits(), lambda outcome: False)
                program.races = own
            hear(program)
            with instrument(program.control):
                states.run(SEARCHED * executions, executions)
    except LitmusFailure as error:
        failed[str(error)] = 1
    if program.reads is not None:
        program.reads.check()
    return AuditResult(
        program.test.name,
        program.policy.name,
        executions,
        audit.unannounced,
        Counter(dict.fromkeys(audit.unknown, 1)),
        races.findings,
        Counter(),
        check.findings,
        states.findings + untold.findings,
        failed,
        check.swaps,
        states.pairs,
        why,
    )


def by_sentence(found: Iterable[AuditResult], kind: str) -> dict[str, tuple[int, list[str]]]:
    """Return, for each sentence of a kind, how often it was found and the tests, in order of appearance."""
    sentences: dict[str, tuple[int, list[str]]] = {}
    for one in found:
        for sentence, n in sorted(getattr(one, kind).items()):
            total, tests = sentences.get(sentence, (0, []))
            sentences[sentence] = (total + n, tests if one.test in tests else [*tests, one.test])
    return sentences
