"""The moments of a race, with the fill and the use, which no ring records; the decision behind a flush."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emulator.explain.events import Event
from emulator.explain.facts import Facts
from emulator.explain.meanings import FILL, USE

# The decision behind a flush, by the flush's reason.
_DECISIONS = {
    "remote_zap": "zap",
    "remote_notifier": "notifier_flush",
    "remote_protect": "write_protect",
    "remote_replace": "map_replace",
    "remote_recover": "huge_recovery",
    "migration": "migration",
    "root_load": "root_load",
}
# Likewise, where the shadow MMU decides instead of the TDP MMU.
_SHADOW_DECISIONS = {"remote_zap": "commit_zap", "remote_replace": "spte_replace"}


@dataclass(frozen=True, slots=True)
class Moment:
    """An action of a CPU, and its meaning for the race ("": context only)."""

    cpu: int
    event: Event
    meaning: str = ""

    @property
    def time(self) -> int:
        return self.event.time


def decision_behind(elided: Event, facts: Facts, after: Event | None) -> str:
    """Return the decision point behind an elided flush; "" if it is not known.

    `after`: the next event of the same CPU, if there is one.
    """
    if after is not None and after.kind == "yield" and not after.b:
        return "zap_yield"
    if elided.reason == "migration" and facts.about_guest:
        return "migration_vpid"
    if facts.kind == "missed-guest-write":
        return "table_protect"
    decisions = _DECISIONS | _SHADOW_DECISIONS if facts.linear else _DECISIONS
    return decisions.get(elided.reason, "")


def moments_of(
    facts: Facts, events: Sequence[Event], meanings: Mapping[int, str], start: int | None
) -> list[Moment]:
    """Return the events that have a meaning, by index, and the use; a fill that no event shows is added.

    start: the index of the VM entry after which the entry was filled, if it is known.
    """
    kept = ((events[i], meaning) for i, meaning in sorted(meanings.items()))
    chosen = [Moment(event.cpu, event, meaning) for event, meaning in kept]
    if not facts.is_use:
        return chosen
    last = max([facts.time, *(event.time for event in events)])
    use = Moment(facts.pcpu, Event(facts.time or last, USE, facts.pcpu, facts.vcpu, facts.gfn, facts.vm), USE)
    if facts.by_kvm or any(moment.meaning == FILL for moment in chosen):
        return [*chosen, use]
    first = events[start].time if start is not None else 0
    fill = Event(first, FILL, facts.pcpu, facts.filled_by, facts.gfn, facts.vm)
    at = 0 if start is None else 1 + next(i for i, m in enumerate(chosen) if m.event.kind == "entry")
    chosen.insert(at, Moment(facts.pcpu, fill, FILL))
    return [*chosen, use]
