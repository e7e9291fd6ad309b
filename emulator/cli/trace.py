"""`flushlab trace`: memory traces for the guests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from emulator.report.console import output_console

if TYPE_CHECKING:
    from emulator.traces import Cut, TraceError, TraceInfo

EXIT_USAGE = 2
LONG_INPUT = 32 << 20

RECORDING = """\
\b
Record a program of your own (about two million accesses a second; valgrind
writes the recording to descriptor 9, which the shell turns into a pipe):
  valgrind --tool=lackey --trace-mem=yes --log-fd=9 PROGRAM ARGS \\
      9>&1 >/dev/null \\
    | flushlab trace convert - my.fltrace --skip 20000000 --limit 2000000

\b
--skip leaves out start-up (a dynamic linker is the same in every program).
Try a few values, and compare the traces with `flushlab trace info`.
Conversion stops reading after --limit records, which ends the program.
"""

app = typer.Typer(
    name="trace",
    help="Convert, inspect and list memory traces of real programs, which the guests replay.",
    epilog="`flushlab trace convert --help` shows how to record your own.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _fail(error: TraceError) -> NoReturn:
    typer.echo(f"flushlab trace: {error}", err=True)
    raise typer.Exit(EXIT_USAGE)


@app.command(epilog=RECORDING)
def convert(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="The recording of lackey; - for standard input.")
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="The trace file to write, usually *.fltrace.")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the trace. Default: the name of OUTPUT.")] = None,
    skip: Annotated[
        int, typer.Option(min=0, max=2**62, help="Leave out this number of records at the start.")
    ] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, max=2**62, help="Stop after this number of records.")
    ] = None,
    no_instructions: Annotated[
        bool, typer.Option("--no-instructions", help="Leave out instruction fetches.")
    ] = False,
    description: Annotated[
        str, typer.Option(help="A description of the program, for `flushlab trace list`.")
    ] = "",
) -> None:
    """Convert a recording of valgrind's lackey into a trace.

    A record is one access. A modify (M) becomes a read and a write, and an access that straddles a 4K page
    becomes one record per page; nothing else is added, merged, dropped or reordered.
    """
    from emulator import traces
    from emulator.traces import Cut, TraceError

    cut = Cut(skip, limit, not no_instructions)
    try:
        with _open(source) as (stream, where, size), _progress(size, cut) as report:
            trace, written = traces.convert(
                stream, where, output, cut=cut, name=name, description=description, progress=report
            )
    except TraceError as error:
        _fail(error)
    bits = written * 8 / trace.records.size
    typer.echo(
        f"{output}: {trace.records.size:,} records, {trace.pages.size:,} pages,"
        f" {written:,} bytes ({bits:.2f} bits a record); {trace.metadata.window.describe()}"
    )


@app.command("info")
def show_info(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Trace files, or embedded traces by name.")
    ],
) -> None:
    """Show the content of traces, and how they reuse pages compared with the size of a TLB.

    L1 is the share of accesses that a fully associative LRU TLB of 64 entries would hit. L2 is the share that
    one of 1536 entries would hit in addition. Beyond is the share that this one would miss although the page
    was used before. The working set is the size, in 4K pages, of the LRU TLB that would hit 99% of all
    accesses to pages used before.
    """
    from emulator import traces
    from emulator.traces import TraceError
    from emulator.traces.reuse import L1_ENTRIES, L2_ENTRIES, page_reuse

    table = Table(box=None, pad_edge=False)
    for column in (
        "trace",
        "accesses",
        "reads",
        "writes",
        "executes",
        "pages",
        "working set",
        f"L1 (<{L1_ENTRIES})",
        f"L2 (<{L2_ENTRIES})",
        "beyond",
        "first use",
    ):
        table.add_column(column, justify="left" if column == "trace" else "right")
    details = []
    try:
        for file in files:
            trace = traces.load(file)
            meta, reuse = trace.metadata, page_reuse(trace.records)
            total = meta.accesses
            counts = (total, meta.reads, meta.writes, meta.executes, meta.distinct_pages, reuse.working_set)
            shares = (reuse.within_l1, reuse.within_l2, reuse.beyond_l2, reuse.cold)
            table.add_row(
                trace.name, *(f"{count:,}" for count in counts), *(f"{share:.2%}" for share in shares)
            )
            details.append(
                f"{trace.name}: {meta.command or meta.program} (valgrind {meta.valgrind};"
                f" {meta.window.describe()})"
            )
    except TraceError as error:
        _fail(error)
    output_console(240).print(table)
    for line in details:
        typer.echo(line)


@app.command("list")
def show_list() -> None:
    """List the embedded traces. Scenarios refer to them by name."""
    from emulator import traces
    from emulator.traces import TraceError

    table = Table(box=None, pad_edge=False)
    for column in ("trace", "accesses", "pages", "bytes", "program", "description"):
        table.add_column(column, justify="right" if column in ("accesses", "pages", "bytes") else "left")
    try:
        entries: list[TraceInfo] = traces.embedded()
    except TraceError as error:
        _fail(error)
    for entry in entries:
        meta = entry.metadata
        numbers = (f"{meta.accesses:,}", f"{meta.distinct_pages:,}", f"{entry.size:,}")
        table.add_row(entry.name, *numbers, meta.program, meta.description)
    output_console(240).print(table)


@contextmanager
def _open(source: str) -> Iterator[tuple[BinaryIO, str, int | None]]:
    """Open the recording; yield it, its name in errors, and its size if known."""
    from emulator.traces import TraceError

    if source == "-":
        yield sys.stdin.buffer, "<stdin>", None
        return
    path = Path(source)
    try:
        stream = path.open("rb")
        size = path.stat().st_size if path.is_file() else None
    except FileNotFoundError:
        raise TraceError(source, "no such file", "a recording of lackey, or - for a pipe") from None
    except OSError as error:
        raise TraceError(source, f"cannot be read ({error.strerror})") from None
    with stream:
        yield stream, source, size


@contextmanager
def _progress(size: int | None, cut: Cut) -> Iterator[Callable[[int, int, int], None] | None]:
    """Show a progress bar on a terminal, for inputs that take more than a moment."""
    console = Console(stderr=True)
    if not console.is_terminal or (size is not None and size < LONG_INPUT):
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading", total=cut.stop or size)

        def report(consumed: int, seen: int, kept: int) -> None:
            _show(progress, task, cut, (consumed, seen, kept))

        yield report


def _show(progress: Progress, task: TaskID, cut: Cut, counts: tuple[int, int, int]) -> None:
    consumed, seen, kept = counts
    text = f"{seen:,} records read, {kept:,} kept" if kept else f"{seen:,} of {cut.skip:,} records skipped"
    progress.update(task, description=text, completed=seen if cut.stop else consumed)
