"""Litmus tests: a small machine, a few threads with a handful of operations each, and the verdict that each
policy deserves.

    model          what a test file may say: the schema, documented there
    loader         shipped tests, files of one's own, and one-line errors
    syntax, ops    how operations are written; guest_ops, kvm_ops, waits: what each does
    guest_program  stretches of guest operations as programs of the core
    world          one test's machine, VMs and threads, execution after execution
    runner         executions on real threads, judged
    verdict        what came of them, and whether that was expected
    policies       which policies a test is run under
    suite, table   many tests under many policies, as text and JSON
"""

from __future__ import annotations
