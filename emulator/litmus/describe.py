"""The output of `flushlab list litmus`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from emulator.litmus import model
from emulator.litmus.loader import shipped_tests
from emulator.litmus.ops import VERBS, GuestOp, KvmOp, VcpuOp


def schema() -> str:
    """Return the documentation of the schema, from the module that defines it."""
    return inspect.cleandoc(model.__doc__ or "")


def tests() -> Iterator[tuple[int, str, list[str]]]:
    """Yield a catalogue's entries (emulator.report.console) for the tests that ship."""
    for test in shipped_tests():
        sentences = [test.doc, f"From: {test.source}"]
        unsafe = [name for name, verdict in test.expect.policies.items() if isinstance(verdict, tuple)]
        if unsafe:
            sentences.append(f"Unsafe: {', '.join(unsafe)}")
        for choice, policies in test.expect.apart().items():
            if policies:
                option = "--store-buffers" if choice == "store-buffers" else f"--adversary {choice}"
                sentences.append(f"Unsafe with explore {option} only: {', '.join(policies)}")
        yield 0, f"{test.name} ({len(test.threads)} threads, {test.operations} operations)", sentences


def operations() -> Iterator[tuple[int, str, list[str]]]:
    """Yield a catalogue's entries for the operations, with the kinds of thread that have each."""
    for kind in VERBS.values():
        if issubclass(kind, GuestOp):
            threads = "a guest"
        elif issubclass(kind, VcpuOp):
            threads = "a vCPU"
        else:
            threads = "kvm, host" if issubclass(kind, KvmOp) else " or ".join(kind.who)
        yield 0, f"{kind.usage()}  [{threads}]", [kind.doc]
