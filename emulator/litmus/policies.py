"""The policies of a table of verdicts, and the verdicts that each test expects of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from emulator.litmus.checks import sequence
from emulator.litmus.model import INCONCLUSIVE, SAFE, Expected, LitmusTest
from emulator.litmus.nested_ops import VmwriteEptp
from emulator.policy import MUTANTS, PRESETS, Mutant, Policy, PolicyError, base_of, canonical, spelled_policy
from emulator.policy.mutants import PREFIX
from emulator.policy.suitable import check_suits, unasked_answer

# As in emulator.litmus.model.KINDS.
_DEADLOCK: Final = "deadlock"


@lru_cache(maxsize=512)
def named_policy(name: str) -> Policy:
    """Return the policy that emulator.policy.spelling spells so, under this name."""
    return spelled_policy(name, canonical(name))


def mutant_names() -> list[str]:
    return [PREFIX + name for name in MUTANTS]


def is_cost_only(name: str) -> bool:
    """Return whether this is a mutant that only costs time and must not cause a violation."""
    mutant = _mutant(name)
    return mutant is not None and mutant.cost_only


def is_consistent(name: str) -> bool:
    """Return whether a mutant is wrong only if stores become visible late: never on real threads here."""
    mutant = _mutant(name)
    return mutant is not None and mutant.store_buffers


def _mutant(name: str) -> Mutant | None:
    return MUTANTS.get(canonical(name).removeprefix(PREFIX)) if name.startswith(PREFIX) else None


def policies_for(test: LitmusTest, chosen: Sequence[str], all_mutants: bool) -> list[str]:
    """Return the policies to run the test under: the chosen ones, or all presets, the policies that the test
    names, and the mutants that must only cost time (with `all_mutants` every mutant).  Those that answer what
    the test's host never asks are left out.

    A policy that is expected to end in a deadlock, and in nothing else, is left to `flushlab explore`:
    threads that wait for ever look like those of a busy machine, and each execution would take the limit.
    """
    if chosen:
        for name in chosen:
            check_suits(named_policy(name), test.name, **kind_of_host(test))
        return list(dict.fromkeys(map(canonical, chosen)))
    mutants = mutant_names() if all_mutants else [name for name in mutant_names() if is_cost_only(name)]
    apart = [name for policies in test.expect.apart().values() for name in policies]
    named = [name for name, verdict in test.expect.policies.items() if verdict != (_DEADLOCK,)]
    names = list(dict.fromkeys([*PRESETS, *named, *apart, *mutants]))
    return [name for name in names if suits(test, name)]


def pairs_of(
    tests: Sequence[LitmusTest], names: Sequence[str], *, named: bool
) -> list[tuple[LitmusTest, str]]:
    """Return each test with each policy that suits it; if the tests were `named` one by one, one that does
    not is an error."""
    pairs = [(test, name) for test in tests for name in names]
    if named:
        for test, name in pairs:
            check_suits(named_policy(name), test.name, **kind_of_host(test))
    return [(test, name) for test, name in pairs if suits(test, name)]


def suits(test: LitmusTest, name: str) -> bool:
    """Return whether the policy can be tried on the test's host (emulator.policy.suitable)."""
    return unasked_answer(named_policy(name), **kind_of_host(test)) is None


def kind_of_host(test: LitmusTest) -> dict[str, bool]:
    """Return the properties on which depends what KVM asks a policy (emulator.policy.suitable)."""
    nested_ept = any(op.verb == VmwriteEptp.verb for name in test.threads for _, op in sequence(test, name))
    return {"ept": test.machine.ept, "nested_ept": nested_ept, "hyperv": test.machine.hyperv}


def expected_of(test: LitmusTest, name: str) -> tuple[Expected, ...]:
    """Return the expected verdicts; none: any verdict is as expected.

    A test names the presets that are not safe.  Mutants and users' policies are judged only if it names them.
    A policy that is unsafe only with more choices of explore's scheduler is safe without them, and a mutant
    of this kind as its base.
    """
    if name in test.expect.policies:
        return (test.expect.policies[name],)
    if name in PRESETS:
        return (test.expect.default,)
    apart = any(name in policies for policies in test.expect.apart().values())
    if apart or is_consistent(name) or is_cost_only(name):
        mutant = _mutant(name)
        kinds = _violations(test, mutant.base) if mutant is not None else ()
        return (kinds or SAFE, INCONCLUSIVE)
    return ()


def _violations(test: LitmusTest, base: str) -> tuple[str, ...]:
    """Return the kinds of violation that the test expects of a preset or a mutant."""
    expected = test.expect.policies.get(base, test.expect.default)
    return expected if isinstance(expected, tuple) else ()


def violations_of_base(test: LitmusTest, name: str) -> frozenset[str]:
    """Return the kinds of violation that the test expects of the policy on which this one is built.

    Met under a user's policy, they say nothing against the user's change.  None for a preset, and for a
    policy with files that can no longer be read.
    """
    if name in PRESETS:
        return frozenset()
    mutant = _mutant(name)
    try:
        base = mutant.base if mutant is not None else base_of(name)
    except PolicyError:
        return frozenset()
    return frozenset(_violations(test, base))
