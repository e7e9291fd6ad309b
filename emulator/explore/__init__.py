"""Explore: small programs under a controlled scheduler, one step at a time, instead of real threads.

    engine/      scheduler     tasks on greenlets; a step ends right before the next access to shared state
                 objects       shared objects as bits, and sets of them as masks
                 fibers        greenlets that are used again
                 slots         attributes that report each access
                 snapshot      the state of Python objects, put back between executions
    strategies/  dpor          every interleaving, up to the order of independent steps (source-DPOR), or up
                               to a bound on preemptions
                 sampling      PCT and random walks, for programs that are too large
                 search        runs a program under a strategy until the strategy or the budget ends
                 subtree       a part of an exhaustive search, from a prefix on
                 tree          one search in parts, with the same result for any number of processes

The engine and the strategies know no KVM.

    machine/     control       one machine under control: interrupts, grace periods, the objects of waits
                 lib           the native library as explored code calls it: calls that share state are steps,
                               and waits are the scheduler's (calls, guest, locks: calls of several steps)
                 footprints    objects that each native call reads and writes
                 options       choices of the scheduler besides the next task: adversary (TLBs that evict and
                               fetch on their own), store_buffers and store_buffer_lib (stores that become
                               visible late)
                 program       a litmus test as a program
                 policy_memory state that a user's policy keeps
                 policy_reads  accesses of a user's policy to KVM's objects, as steps (handed, watchable,
                               policy_code: containers, values and code that can or cannot be watched)
                 races         accesses to Python's objects that no step declares, in patched code and for
                               the audit
                 endless       an end for steps of patched code that have none
                 patched_code  state that a patch keeps where nothing watches it
                 undeclared    native calls without a point or a footprint, for the audit
    results/     verdict       a test under a policy: safe, violations, or the bound that the search reached
                 record        executions, step by step: counterexamples and traces
                 observe       what the steps of a trace did
                 replay        recordings in files, and the same execution again
                 trace         the execution of a search that has a number, or that reaches a goal
                 state         a recorded execution right before one of its steps
                 minimize      shorter counterexamples
                 suite         many tests and policies, on several cores
                 workers       processes that do the parts of a search
    audit/       run           is the search entitled to its verdicts?  independence and residue swap steps
                               that are taken for independent
"""

from __future__ import annotations
