"""No shipped test is proved where its danger cannot arise.

Each test is tried under linux-7.3 and, by turns, under half of the other presets that it suits;
FLUSHLAB_PRESETS=all takes all of them.  Each pair is executed under explore's scheduler until an execution
meets the test's need: mostly the first one.  `flushlab litmus --explore` says the same of whole searches,
and its document has the counts.
"""

from __future__ import annotations

import pytest

from emulator.explore.machine.lib import instrument
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.sampling import Pct, RandomWalk
from emulator.explore.strategies.search import Limits, search
from emulator.litmus.loader import parse_test, shipped_tests
from emulator.litmus.model import INCONCLUSIVE, SAFE, LitmusTest
from emulator.litmus.policies import expected_of, named_policy
from tests.emulator.litmus.turns import by_turns

TESTS = {test.name: test for test in shipped_tests()}
# Executions until a danger that is rare has come about, and those that say that none can.
RARE, NONE = 400, 16
# Of each of the strategies that meet most dangers at once, before orders are sampled at length.
FEW = 4


def first_met(test: LitmusTest, policy: str, most: int) -> int:
    """Return the number of the first execution that meets the test's need; 0: none of `most`."""
    program = LitmusProgram(test, named_policy(policy))
    strategies = (
        (Exhaustive(program.objects, bound=0), FEW),
        (RandomWalk(FEW, 0), FEW),
        (Exhaustive(program.objects, bound=1), 2 * FEW),
        (Pct(most, 0, 3), most // 2),
        (RandomWalk(most, 1), most),
    )
    done = 0
    try:
        with instrument(program.control):
            for strategy, share in strategies:
                limits = Limits(executions=min(share, most - done))
                if not limits.executions:
                    break
                found = search(
                    program, program.objects, strategy, limits, bool, lambda: program.met().precondition
                )
                done += found.executions
                if found.met:
                    return done
        return 0
    finally:
        program.close()


def wrong(test: LitmusTest, policy: str) -> str:
    """Return how the test's danger under a preset differs from its claim; "" if it does not."""
    (expected,) = expected_of(test, policy)
    needs = " or ".join(test.expect.needs)
    if expected == SAFE and not first_met(test, policy, RARE):
        return f"under {policy}: {needs} never came about, so nothing is proved"
    if expected == INCONCLUSIVE and first_met(test, policy, NONE):
        return f"under {policy}: {needs} came about, so something is proved"
    return ""


def presets_of(name: str) -> list[str]:
    """Return those under which a test is tried here."""
    return by_turns(TESTS[name], list(TESTS).index(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TESTS)
def test_the_danger_is_there_where_a_test_says_so(name: str) -> None:
    found = [wrong(TESTS[name], policy) for policy in presets_of(name)]
    assert not any(found), [one for one in found if one]


@pytest.mark.slow
def test_a_wrong_digit_in_a_shipped_test_would_be_found() -> None:
    """The guard guards: the same test, but the host unmaps a page that is not read."""
    text = TESTS["return-zap"].text
    other = parse_test(text.replace("host-unmap 0x10", "host-unmap 0x20"), "other", None)
    assert wrong(TESTS["return-zap"], "linux-7.3") == ""
    assert wrong(other, "linux-7.3") == "under linux-7.3: averted never came about, so nothing is proved"


def test_what_needs_nothing_is_listed() -> None:
    """A test that needs nothing is safe whatever happens: each must have a reason, and stand here."""
    # Without a race: mutations of the code (bench/mutation) make KVM map wrong rights there.
    rights = {
        "fault-protected",
        "nested-ept-protected",
        "shadow-huge-clean",
        "shadow-read-then-write",
        "shadow-wp-user",
    }
    assert {name for name, test in TESTS.items() if "nothing" in test.expect.needs} == rights
