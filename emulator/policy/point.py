"""Describe a decision point and each of its answers.

KVM states the points and their answers (emulator.kvm.decisions).  An answer that is known to be wrong is a
*mutant*: it exists so that the oracle can be seen to catch it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, get_args, get_type_hints

# The answer of a policy that acts itself; a table has no use for it.
DONE: Final = "done"


@dataclass(frozen=True, slots=True)
class Alternative:
    """One answer.  `mutant`: known to be wrong, by itself or together with answers that `doc` names.

    proposed: KVM does not know it: the class of that proposal decides (emulator.policy.proposals).
    """

    name: str
    doc: str
    mutant: bool = False
    proposed: bool = False


@dataclass(frozen=True, slots=True)
class DecisionPoint:
    """A question that a policy answers; `name` is also the method of `Policy`.

    acts: a policy's class may also answer `done`.
    """

    name: str
    doc: str
    alternatives: tuple[Alternative, ...]
    acts: bool = False

    @property
    def default(self) -> str:
        """Return the answer of Linux 7.3."""
        return self.alternatives[0].name

    def answers(self) -> tuple[str, ...]:
        """Return the answers that a class may give."""
        return (*self.names(), DONE) if self.acts else self.names()

    def proposals(self) -> tuple[str, ...]:
        """Return the alternatives that are proposals: their classes (emulator.policy.proposals) decide."""
        return tuple(alternative.name for alternative in self.alternatives if alternative.proposed)

    def names(self) -> tuple[str, ...]:
        return tuple(alternative.name for alternative in self.alternatives)

    def alternative(self, name: str) -> Alternative:
        return next(a for a in self.alternatives if a.name == name)


def answers_of(method: Callable[..., str]) -> tuple[str, ...]:
    """Return the answers to a decision point, a method of `Decisions`, in the order of its Literal."""
    answers: tuple[str, ...] = get_args(get_type_hints(method)["return"])
    return answers


def point(
    method: Callable[..., str],
    doc: str,
    right: Mapping[str, str],
    *,
    wrong: Mapping[str, str] | None = None,
    proposed: Mapping[str, str] | None = None,
    proposed_wrong: Mapping[str, str] | None = None,
) -> DecisionPoint:
    """Describe a decision point: each of KVM's answers, the wrong ones in `wrong`, and the proposals."""
    answers, mutants = tuple(one for one in answers_of(method) if one != DONE), wrong or {}
    described = [*right, *mutants]
    if sorted(described) != sorted(answers):
        raise AssertionError(f"{method.__name__} has answers {answers}; described are {described}")
    alternatives = (Alternative(one, mutants.get(one) or right[one], one in mutants) for one in answers)
    proposals = (
        *(Alternative(one, text, proposed=True) for one, text in (proposed or {}).items()),
        *(Alternative(one, text, True, True) for one, text in (proposed_wrong or {}).items()),
    )
    return DecisionPoint(method.__name__, doc, (*alternatives, *proposals), DONE in answers_of(method))
