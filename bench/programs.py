"""Benchmarks that are C programs: their arguments, and the figures that they print."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.benchmark import Context
from bench.figures import Figure
from emulator import traces


@dataclass(frozen=True, slots=True)
class TraceFiles:
    """A decoded trace as the programs read it: files of 64-bit words."""

    name: str
    records: Path
    pages: Path


def trace_files(context: Context, name: str) -> TraceFiles:
    """Decode an embedded trace, or its beginning, into files."""
    files = TraceFiles(name, context.directory / f"{name}.records", context.directory / f"{name}.pages")
    if not files.pages.exists():
        records = traces.load(name).records[: context.sizes.trace_records]
        records.tofile(files.records)
        np.unique(traces.page_numbers(records)).astype(np.uint64).tofile(files.pages)
    return files


def guest(context: Context) -> Iterator[Figure]:
    for info in traces.embedded():
        context.say(f"guest accesses: {info.name}")
        files = trace_files(context, info.name)
        yield from context.toolchain.run(
            "guest_loop", files.name, files.records, files.pages, context.sizes.repeats
        )


def ipi(context: Context) -> Iterator[Figure]:
    files = trace_files(context, traces.embedded()[0].name)
    sizes = context.sizes
    yield from context.toolchain.run("ipi", files.records, files.pages, sizes.ipi_rounds, sizes.repeats)


def walk(context: Context) -> Iterator[Figure]:
    yield from context.toolchain.run("walk", context.sizes.repeats)


def shadow(context: Context) -> Iterator[Figure]:
    files = trace_files(context, traces.embedded()[0].name)
    yield from context.toolchain.run(
        "shadow_guest", files.name, files.records, files.pages, context.sizes.repeats
    )


def spte(context: Context) -> Iterator[Figure]:
    yield from context.toolchain.run("spte", context.sizes.repeats)


def flush(context: Context) -> Iterator[Figure]:
    yield from context.toolchain.run("tlb_flush", context.sizes.tlb_entries, context.sizes.repeats)


def lookup(context: Context) -> Iterator[Figure]:
    yield from context.toolchain.run("tlb_loop", context.sizes.repeats)


def rcu(context: Context) -> Iterator[Figure]:
    yield from context.toolchain.run("rcu", context.sizes.rcu_callbacks, context.sizes.repeats)
