"""Explore: small programs under a controlled scheduler, one step at a time, instead of real threads.

    scheduler   tasks on greenlets; a step ends where the next access to shared state is about to happen
    objects     what a step reads and writes, as bit masks
    dpor        every interleaving, up to the order of independent steps (source-DPOR), or up to a bound
    sampling    PCT and random walks, for programs that are too large
    search      runs a program under a strategy until it is done, and says what was proved

Nothing up to here knows of KVM.

    control     one machine under control: interrupts, grace periods, what waits are about
    controlled  the native library as explored code sees it: shared calls are steps, waits are the scheduler's
    footprints  what each native call reads and writes
    world       a litmus test as a program
    verdict     a test under a policy: safe, violations, or how far the search came
    record      counterexamples: files and replay
    minimize    shorter ones
    suite       many tests and policies, on several cores
"""

from __future__ import annotations
