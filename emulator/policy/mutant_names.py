"""The names of the mutants, and the short ids by which KVM's code asks for their bugs.

An id is an alias of the name wherever a policy is named (`mutant:B6`): older recordings, litmus tests and
notes have the ids.  Output has the names.
"""

from __future__ import annotations

from typing import Final

PREFIX: Final = "mutant:"

NAMES: Final[dict[str, str]] = {
    "B1": "yield-forgets-flush",
    "B1b": "later-root-forgets-flush",
    "B2": "recovery-forgets-flush",
    "B3": "recovery-uses-old-iterator",
    "B4": "flush-repeated-after-yield",
    "B6": "iterator-skips-spte",
    "B7": "protect-flush-if-changed",
    "B10": "zap-leaves-flush-to-next",
    "B21": "remote-flush-current-only",
    "B25": "notifier-without-reference",
    "B27": "mmio-over-live-spte",
    "B32": "role-change-zaps-tree",
    "I1": "init-without-flush",
    "L1": "log-without-protect",
    "L2": "log-protects-before-marks",
    "L3": "mark-before-writable",
    "P1": "requests-before-mode",
    "P2": "interrupts-before-entry",
    "P3": "mode-before-request",
    "P4": "kick-without-wait",
    "P7": "flush-all-by-invvpid",
    "P8": "guest-flush-by-invept",
    "P9": "root-load-without-flush",
    "P10": "unlock-before-flush",
    "P11": "flush-before-zap",
    "P13": "map-over-frozen",
    "P14": "children-not-frozen",
    "P15": "fault-without-retry",
    "P15b": "sequence-after-lookup",
    "P15c": "retry-ignores-range",
    "P16": "flush-at-range-end",
    "P23": "mask-never-cleared",
    "P23b": "mask-cleared-after-kick",
    "P23d": "mask-without-invvpid",
    "P24": "migration-current-only",
    "P29": "paging-off-without-flush",
    "P31": "smm-keeps-root",
    "P32": "log-flush-before-protect",
    "R1": "generation-not-checked",
    "R2": "generation-without-invvpid",
    "R3": "generation-after-kick",
    "R4": "generation-outlives-root",
    "RFC02": "list-flush-after-rcu",
    "S1": "entry-without-barrier",
    "S2": "request-without-barrier",
    "S3": "generation-without-barrier",
    "S4": "generation-entry-without-barrier",
    "Z1": "zap-range-not-counted",
    "Z2": "notifier-skips-invalid-roots",
}


def canonical(policy: str) -> str:
    """Return the spelling of a policy with a mutant's id, if it has one, replaced by the name."""
    if not policy.startswith(PREFIX):
        return policy
    name, plus, settings = policy.removeprefix(PREFIX).partition("+")
    return PREFIX + NAMES.get(name, name) + plus + settings
