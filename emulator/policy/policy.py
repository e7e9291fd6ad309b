"""A policy: one answer to every decision point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches

from emulator.errors import BadInput
from emulator.policy.points import BY_NAME, POINTS


class PolicyError(BadInput):
    """A policy, point or alternative that does not exist, in one line."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Answers by point; the defaults are Linux 7.3's.

    KVM's code compares them where it decides: `if kvm.policy.root_load == "flush-current"`.
    """

    name: str = "linux-7.3"
    remote_flush: str = "all-contexts"
    remote_kick: str = "mode-not-outside"
    kick_wait: str = "wait"
    root_load: str = "flush-current"
    migration: str = "all-contexts"
    migration_vpid: str = "with-ept"
    slot_delete: str = "zap-all-roots"
    zap_scope: str = "leafs"
    zap_yield: str = "flush-then-unlock"
    map_replace: str = "flush"
    huge_recovery: str = "in-place"
    write_protect: str = "flush"
    notifier_flush: str = "before-return"
    fault_retry: str = "invalidate-seq"
    entry_order: str = "mode-then-requests"

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "name":
                _check(field.name, getattr(self, field.name))

    def with_settings(self, settings: Mapping[str, str], name: str | None = None) -> Policy:
        """This policy with some points answered differently."""
        for point, alternative in settings.items():
            _check(point, alternative)
        if name is None:
            changed = [f"{point}={settings[point]}" for point in sorted(settings)]
            name = "+".join([self.name, *changed])
        return replace(self, name=name, **settings)

    def answers(self) -> dict[str, str]:
        """Alternative by point, in the order of POINTS."""
        return {point.name: getattr(self, point.name) for point in POINTS}

    def mutants(self) -> tuple[str, ...]:
        """The points whose answer is known to be wrong, as `point=alternative`."""
        answers = self.answers()
        return tuple(
            f"{point.name}={answers[point.name]}"
            for point in POINTS
            if point.alternative(answers[point.name]).mutant
        )


def _check(point: str, alternative: str) -> None:
    known = BY_NAME.get(point)
    if known is None:
        raise PolicyError("policy", f"unknown decision point {point!r}", _expected(point, tuple(BY_NAME)))
    if alternative not in known.names():
        raise PolicyError(
            f"policy: {point}", f"unknown alternative {alternative!r}", _expected(alternative, known.names())
        )


def _expected(found: str, names: tuple[str, ...]) -> str:
    close = get_close_matches(found, names, n=1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    return f"one of {', '.join(names)}{guess}"
