"""`flushlab drift`: is a kernel function that the model cites the one that was modelled?"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emulator.cli.drift_run import execute_tree
from emulator.cli.options import refuse
from emulator.errors import BadInput, did_you_mean
from emulator.output import saying

if TYPE_CHECKING:
    from emulator.drift.citations import Citation
    from emulator.drift.compare import Base

DRIFT_HELP = (
    "Compare the kernel functions that the model cites with those of a Linux tree.\n\n"
    "The record has a fingerprint of each function's tokens, by kernel version, and no source; comments and "
    "white space do not count. The report lists each function that differs from the version that the model "
    "follows, by the file here that mirrors it: changed, gone from the tree, added (not in that version), or "
    "not recorded. It says which recorded version the tree's function is the same as.\n\n"
    "Read are arch/x86/kvm, virt/kvm, include/linux/kvm*.h and arch/x86/include/asm/kvm*.h.\n\n"
    "With --run, the tree's code is executed: tdp_mmu.c, tdp_iter.c and spte.c are compiled as they are (by "
    "gcc, in seconds, kept in ~/.cache/flushlab), and random operations run on them and on the model, with "
    "yields and other CPUs' operations in their middle. Return values, flushes, freed tables and SPTEs are "
    "compared after each; a difference is reduced to the operations that matter and shown side by side. The "
    "code runs in a process of its own, with your rights: use it for trees that you trust."
)
DRIFT_EXAMPLES = """\
\b
  flushlab drift ~/linux
  flushlab drift ~/linux --since 6.12
  flushlab drift ~/linux-next --against ~/linux --diff
  flushlab drift ~/linux --run
  flushlab drift ~/linux --run --policy linux-6.12 --operations 200000

Exit status: 0 nothing differs, 1 something differs or is not recorded, 2 bad input.
"""
CHANGED = 1

# Options without effect on --record.
_REPORTS = ("against", "since", "functions", "diff", "everything", "as_json", "fingerprints")
# Options of the comparison of fingerprints, and of the one that executes.
_FINGERPRINTS = ("against", "since", "functions", "diff", "everything", "fingerprints", "record")
_EXECUTION = ("policy", "operations", "seed")


def drift(
    context: typer.Context,
    tree: Annotated[
        Path, typer.Argument(metavar="LINUX-TREE", help="The top directory of a kernel's source.")
    ],
    against: Annotated[
        Path | None,
        typer.Option(metavar="TREE", help="Compare with the functions of this tree, not with the record."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION", help="Compare with this recorded version, not with the modelled one."
        ),
    ] = None,
    functions: Annotated[
        list[str] | None,
        typer.Option("--function", metavar="NAME", help="Only this kernel function; repeatable."),
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="With --against: show how the functions changed.")
    ] = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="Also list functions that are the same, and citations that are found nowhere."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    fingerprints: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A record of your own instead of the shipped one.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Add the tree's fingerprints to this record; compare nothing."),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Compile the tree's TDP MMU and run it beside the model.")
    ] = False,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="P", help="With --run: a preset. Default: the newest that is not newer than the tree."
        ),
    ] = None,
    operations: Annotated[
        int, typer.Option(min=1, max=100_000_000, help="With --run: operations to compare.")
    ] = 20_000,
    seed: Annotated[
        int, typer.Option(min=0, max=1 << 31, help="With --run: the first sequence's number.")
    ] = 0,
) -> None:
    if run:
        refuse(context, _FINGERPRINTS, "--run, which compares no fingerprints", "one of them")
        raise typer.Exit(execute_tree(tree, policy, operations, seed, as_json=as_json))
    refuse(context, _EXECUTION, "no --run", "--run, which executes the tree's code")
    if record is not None:
        refuse(context, _REPORTS, "--record, which compares nothing", "one of them")
        _record(tree, record)
        return
    if against is not None:
        refuse(context, ("since", "fingerprints"), "--against, which needs no record", "one of them")
    elif diff:
        raise BadInput("--diff", "found no --against", "a second tree, because a fingerprint has no text")
    raise typer.Exit(
        _compare(_Request(tree, against, since, functions, fingerprints), diff, everything, as_json)
    )


def _record(tree: Path, file: Path) -> None:
    from emulator.drift.citations import cited
    from emulator.drift.record import record_tree
    from emulator.drift.tree import read_tree

    linux = read_tree(tree)
    record = record_tree(file, linux, cited())
    number = sum(bool(record.fingerprints(name, linux.version)) for name in record.functions)
    print(f"{file}: {number} functions of Linux {linux.version}; versions: {', '.join(record.versions)}")


@dataclass(frozen=True, slots=True)
class _Request:
    """A comparison as it was asked for."""

    tree: Path
    against: Path | None
    since: str | None
    functions: list[str] | None
    fingerprints: Path | None

    def base(self) -> Base:
        from emulator.drift.compare import RecordedBase, TreeBase
        from emulator.drift.record import load_record, shipped_record
        from emulator.drift.tree import read_tree

        if self.against is not None:
            return TreeBase(read_tree(self.against))
        record = shipped_record() if self.fingerprints is None else load_record(self.fingerprints)
        version = record.modelled if self.since is None else record.version_named(self.since)
        return RecordedBase(record, version)

    def cited(self) -> dict[str, list[Citation]]:
        from emulator.drift.citations import cited

        known = cited()
        for name in self.functions or ():
            if name not in known:
                expected = f"a kernel function that the model cites{did_you_mean(name, known)}"
                raise BadInput("--function", f"found {name!r}", expected)
        return {name: known[name] for name in self.functions} if self.functions else known


def _compare(request: _Request, diff: bool, everything: bool, as_json: bool) -> int:
    from emulator.drift.compare import Status, TreeBase, compare, elsewhere, strangers
    from emulator.drift.report import as_dict, as_text, differences, elsewhere_text, strangers_text
    from emulator.drift.tree import read_tree

    chosen = request.cited()
    base = request.base()
    tree = read_tree(request.tree)
    findings = compare(tree, base, chosen)
    missing = sorted(set(request.functions or ()) - {finding.name for finding in findings})
    if missing:
        raise BadInput(
            "--function", f"found {missing[0]!r}", f"a function of {tree.version} or {base.version}"
        )
    status = CHANGED if any(finding.status is not Status.SAME for finding in findings) else 0
    diffs = differences(tree, base.tree, findings) if diff and isinstance(base, TreeBase) else {}
    unknown = strangers(tree, base, chosen)
    with saying(status):
        if as_json:
            print(json.dumps(as_dict(tree, base, findings, unknown, diffs), indent=1))
        else:
            sys.stdout.write("\n".join([as_text(tree, base, findings, everything), *diffs.values()]))
            known = elsewhere(tree, base, chosen) if everything else {}
            if known:
                sys.stdout.write(elsewhere_text(known))
            if everything and unknown:
                sys.stdout.write(strangers_text(unknown))
    return status
