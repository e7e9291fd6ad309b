"""Explore: small programs under a controlled scheduler, one step at a time, instead of real threads.

    scheduler   tasks on greenlets; a step ends where the next access to shared state is about to happen
    objects     what a step reads and writes, as bit masks
    dpor        every interleaving, up to the order of independent steps (source-DPOR), or up to a bound
    sampling    PCT and random walks, for programs that are too large
    search      runs a program under a strategy until it is done, and says what was proved
    subtree     a part of an exhaustive search, from a prefix on
    tree        one search in parts, whoever does them
    fibers      greenlets that are used again
    slots       attributes that tell of each access, handed containers
    snapshot    the state of Python objects, put back between executions

Nothing up to here knows of KVM.

    control     one machine under control: interrupts, grace periods, what waits are about
    controlled  the native library as explored code sees it: shared calls are steps, waits are the scheduler's
                (controlled_calls, controlled_guest, controlled_locks: what is more than one step)
    footprints  what each native call reads and writes
    choices     what the scheduler may choose besides: adversary (TLBs that evict and fetch of their own),
                store_buffers and buffered (plain stores that become visible late)
    world       a litmus test as a program
    memory      what a user's policy remembers
    policy_reads  ... what it reads of KVM and writes to it: accesses of its steps, or told (watchable,
                policy_code)
    team        who does the parts of a search: this process, or several
    verdict     a test under a policy: safe, violations, or how far the search came
    record      counterexamples: files and replay
    minimize    shorter ones
    suite       many tests and policies, on several cores
    audit       is the search entitled to what it says?  shared_state: what was touched without a step that
                says so; commuting and remains: steps taken for independent that are not; audited: both
"""

from __future__ import annotations
