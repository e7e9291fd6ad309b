"""A benchmark: its name, the cores that it needs, and the function that yields its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Figure
from bench.toolchain import Toolchain


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the measurements."""

    repeats: int
    # Records of each embedded trace; None: all.
    trace_records: int | None
    # Interrupts of one repeat.
    ipi_rounds: int
    # Idle pCPUs, plain actors beside them, and broadcasts of one repeat.
    idle_pcpus: int
    idle_rounds: int
    idle_repeats: int
    job_seconds: int
    # Translations in the fullest TLB.
    tlb_entries: int
    rcu_callbacks: int
    # Page tables of the range that is zapped.
    zap_tables: int
    # Most executions of a search.
    executions: int
    # Mutants of KVM's code in a sample; None: all.
    mutants: int | None


FULL = Sizes(
    repeats=11,
    trace_records=None,
    ipi_rounds=20_000,
    idle_pcpus=1024,
    idle_rounds=20,
    idle_repeats=5,
    job_seconds=10,
    tlb_entries=1_000_000,
    rcu_callbacks=1_000_000,
    zap_tables=512,
    executions=20_000,
    mutants=None,
)
QUICK = Sizes(
    repeats=2,
    trace_records=20_000,
    ipi_rounds=100,
    idle_pcpus=16,
    idle_rounds=2,
    idle_repeats=1,
    job_seconds=2,
    tlb_entries=10_000,
    rcu_callbacks=1000,
    zap_tables=4,
    executions=40,
    mutants=4,
)


@dataclass(frozen=True, slots=True)
class Context:
    toolchain: Toolchain
    directory: Path
    sizes: Sizes
    # Called with the name of the current measurement.
    say: Callable[[str], None]
    # Called with a text that is printed beside the figures.
    show: Callable[[str], None] = lambda text: None


@dataclass(frozen=True, slots=True)
class Benchmark:
    name: str
    title: str
    figures: Callable[[Context], Iterator[Figure]]
    cores: int = 1
    # Measured only if it is named: it takes hours.
    on_request: bool = False
