"""The output of `flushlab list litmus`."""

from __future__ import annotations

import inspect

from rich.table import Table
from rich.text import Text

from emulator.litmus import model
from emulator.litmus.loader import shipped_tests
from emulator.litmus.ops import VERBS, GuestOp, KvmOp, VcpuOp


def schema() -> str:
    """Return the documentation of the schema, from the module that defines it."""
    return inspect.cleandoc(model.__doc__ or "")


def tests() -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("test", no_wrap=True)
    table.add_column("threads", justify="right")
    table.add_column("ops", justify="right")
    table.add_column("what it is")
    for test in shipped_tests():
        what = Text(" ".join(test.doc.split()))
        what.append(f"\nfrom: {test.source}", style="dim")
        unsafe = [name for name, verdict in test.expect.policies.items() if isinstance(verdict, tuple)]
        if unsafe:
            what.append(f"\nunsafe: {', '.join(unsafe)}", style="dim")
        for choice, policies in test.expect.apart().items():
            if policies:
                what.append(f"\nunsafe only with {choice}: {', '.join(policies)}", style="dim")
        table.add_row(test.name, str(len(test.threads)), str(test.operations), what)
    return table


def operations() -> Table:
    table = Table(box=None, pad_edge=False, title="\nOperations", title_justify="left")
    for column in ("operation", "done by", "what it is"):
        table.add_column(column, no_wrap=column != "what it is")
    for kind in VERBS.values():
        if issubclass(kind, GuestOp):
            who = "guest"
        elif issubclass(kind, VcpuOp):
            who = "vCPU"
        else:
            who = "kvm, host" if issubclass(kind, KvmOp) else " or ".join(kind.who)
        table.add_row(Text(kind.usage()), who, Text(kind.doc))
    return table
