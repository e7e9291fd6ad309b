"""Litmus tests: a small machine, a few threads with a handful of operations each, and the verdict that each
policy deserves.

    model    what a test file may say (the schema, documented there)
    loader   shipped tests, files of one's own, and one-line errors
    ops      the operations: syntax, and what each does with KVM's public functions
    world    one test's machine, VMs and threads
    runner   many executions on real threads, judged
    table    policy x test, as text and JSON
"""

from __future__ import annotations
