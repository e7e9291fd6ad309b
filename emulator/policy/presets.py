"""Named policies: what was merged, and when.  A preset exists only if each of its answers does."""

from __future__ import annotations

from difflib import get_close_matches

from emulator.policy.mutants import PREFIX, find_mutant
from emulator.policy.policy import Policy, PolicyError

DEFAULT = "linux-7.3"

PRESETS: dict[str, Policy] = {
    preset.name: preset
    for preset in (
        Policy(name=DEFAULT),
        # The same answers but one: huge pages come back by zapping each table, with a flush each.
        Policy(name="linux-6.12", huge_recovery="zap-each"),
    )
}


def preset(name: str) -> Policy:
    """A preset, or a mutant (`mutant:B6`), by name."""
    if name.startswith(PREFIX):
        mutant = find_mutant(name)
        return mutant.policy(preset(mutant.base))
    try:
        return PRESETS[name]
    except KeyError:
        close = get_close_matches(name, PRESETS, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise PolicyError(
            "policy", f"unknown policy {name!r}", f"one of {', '.join(PRESETS)}{guess}"
        ) from None
