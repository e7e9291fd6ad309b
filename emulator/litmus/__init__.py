"""Litmus tests: a small machine, a few threads with a handful of operations each, and the verdict that each
policy deserves.

    model          the schema of test files, documented in the module's docstring
    loader         shipped tests, users' files, and one-line errors
    syntax, ops    the notation of operations; guest_ops, kvm_ops, waits: their implementations
    guest_program  stretches of guest operations as programs of the core
    harness        one test's machine, VMs and threads, execution after execution
    runner         executions on real threads, judged
    verdict        the outcome of executions, compared with the expected one
    policies       the policies that a test is run under
    suite, table   many tests under many policies, as text and JSON
"""

from __future__ import annotations
