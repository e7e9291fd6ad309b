"""Which policies a table of verdicts has, and what each test expects of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from emulator.litmus.model import INCONCLUSIVE, SAFE, Expected, LitmusTest
from emulator.policy import MUTANTS, PRESETS, Policy, spelled_policy
from emulator.policy.mutants import PREFIX


@lru_cache(maxsize=512)
def named_policy(name: str) -> Policy:
    """What emulator.policy.spelling can spell, under the name that was written."""
    return spelled_policy(name, name)


def mutant_names() -> list[str]:
    return [PREFIX + name for name in MUTANTS]


def is_cost_only(name: str) -> bool:
    """A mutant that must not trip the oracle."""
    mutant = MUTANTS.get(name.removeprefix(PREFIX))
    return name.startswith(PREFIX) and mutant is not None and mutant.cost_only


def is_consistent(name: str) -> bool:
    """A mutant that is wrong only where stores become visible late: never on real threads here."""
    mutant = MUTANTS.get(name.removeprefix(PREFIX))
    return name.startswith(PREFIX) and mutant is not None and mutant.store_buffers


def policies_for(test: LitmusTest, chosen: Sequence[str], all_mutants: bool) -> list[str]:
    """What the test is run under: what was chosen, or all presets, what the test names, and the mutants that
    must only cost (with `all_mutants` every mutant)."""
    if chosen:
        return list(dict.fromkeys(chosen))
    mutants = mutant_names() if all_mutants else [name for name in mutant_names() if is_cost_only(name)]
    apart = [name for policies in test.expect.apart().values() for name in policies]
    return list(dict.fromkeys([*PRESETS, *test.expect.policies, *apart, *mutants]))


def expected_of(test: LitmusTest, name: str) -> tuple[Expected, ...]:
    """The verdicts that are as expected; none: anything is.

    A test names the presets that are not safe.  Mutants and users' policies are judged where it names them.
    What is unsafe only with more choices of explore's scheduler is safe without.
    """
    if name in test.expect.policies:
        return (test.expect.policies[name],)
    if name in PRESETS:
        return (test.expect.default,)
    apart = any(name in policies for policies in test.expect.apart().values())
    if apart or is_consistent(name) or is_cost_only(name):
        return (SAFE, INCONCLUSIVE)
    return ()
