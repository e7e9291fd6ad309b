"""The counts of one execution of a litmus test, in which each thread runs until it waits.

Which events KVM needs for a program, and how many, is as much its behaviour as the absence of violations: a
flush that is left out and that nothing misses is a difference between the model and Linux all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import NONE, ExploreOptions
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.search import Limits, search
from emulator.litmus.model import LitmusTest
from emulator.policy import Policy
from native import lib
from native.reader import CounterReader

# The number of ordered steps.  Doing a step twice costs a step, even if the second one has no effect.
STEPS: Final = "steps"
# Counters of a VM that are prices: flushes, kicks, requests, loads of roots, retries, yields.
_PRICES: Final = {
    "remote flushes": "REMOTE_TLB_FLUSH_REQUESTS",
    "kicks": "REMOTE_TLB_FLUSH",
    "requests": "MAKE_ALL_CPUS_REQUEST",
    "flushes": "TLB_FLUSH",
    "INVEPT global": "FLUSH_ALL",
    "INVEPT single": "FLUSH_CURRENT",
    "INVVPID": "FLUSH_GUEST",
    "root loads": "MMU_LOAD",
    "exits": "EXITS",
    "faults": "FAULTS",
    "retries": "FAULT_RETRIES",
}
# Counters of the machine that are prices.
_MACHINES_PRICES: Final = {
    "IPIs": "ipis_sent",
    "interruptions": "interruptions",
    "VM entries": "vm_entries",
    "walk references": "walk_references",
    "SPTEs mapped": "sptes_mapped",
    "grace periods": "grace_periods",
}
_INSTRUCTIONS: Final = "flush instructions"
PRICES: Final = (*_PRICES, *_MACHINES_PRICES, _INSTRUCTIONS, STEPS)
# Prices that are no events of KVM's: the work of guests and walks, which depends on when events come.
WORK: Final = frozenset({"faults", "retries", "walk references", "SPTEs mapped", STEPS})
# Other counters of a VM, and of the machine: events of KVM, of the guest and of the hardware, but neither the
# TLB's accounts nor the oracle's.
_STATS: Final = {
    name.removeprefix("STAT_"): getattr(lib, name) for name in dir(lib) if name.startswith("STAT_")
}
_EVENTS: Final = (
    "calls_run",
    "frames_freed",
    "guest_faults",
    "guest_invalidations",
    "guest_switches",
    "ipis_vmclear",
    "pfns_set",
    "rcu_callbacks",
    "sptes_zapped",
    "tables_freed",
)
_EXITS: Final = "exit_"


def counts_of(test: LitmusTest, policy: Policy, options: ExploreOptions = NONE) -> dict[str, int]:
    """Return the counts, those of PRICES first, then the others that are not 0."""
    program = LitmusProgram(test, policy, options)
    try:
        with instrument(program.control):
            found = search(program, program.objects, Exhaustive(program.objects, bound=0), Limits(1), bool)
            m = program.machine.m
            stats = {
                name: sum(lib.vm_stat(m, kvm.id, stat) for kvm in program.harness.kvms)
                for name, stat in _STATS.items()
            }
            reader = CounterReader(m, vms=program.machine.config["vms"])
            sums = reader.sums()
            prices = {name: stats.pop(stat) for name, stat in _PRICES.items()}
            prices |= {name: sums.pop(counter) for name, counter in _MACHINES_PRICES.items()}
            prices |= {_INSTRUCTIONS: sum(cell.count for cell in reader.flushes()), STEPS: found.steps}
            others = {name.lower(): n for name, n in stats.items()}
            others |= {name: n for name, n in sums.items() if name in _EVENTS or name.startswith(_EXITS)}
            return {**prices, **{name: n for name, n in sorted(others.items()) if n}}
    finally:
        program.close()


def differences(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Return by how much each count has changed, without the number of steps: those are the search's."""
    names = dict.fromkeys([*before, *after])
    found = {name: after.get(name, 0) - before.get(name, 0) for name in names if name != STEPS}
    return {name: n for name, n in found.items() if n}
