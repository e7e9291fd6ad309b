"""Measurements, each beside a reference taken in the same run.

    python -m bench                          everything: about two minutes, and the machine should be idle
    python -m bench --only guest ipi         some of it; --help names them
    python -m bench --only mutation          a night: every mutant of emulator/kvm against the litmus tests
    python -m bench --only proofs            seven minutes: litmus tests that are proved in five seconds each
    python -m bench --only patched           five minutes: what a patch costs a run, and its start
    python -m bench.mutation --sample 100 --keep FILE       some of that; goes on where FILE ends
    python -m bench --json bench.json        a JSON document as well ("-": on standard output, the table on
                                             standard error)
    python -m bench --quick                  tiny sizes: do the tools work, do the invariants hold?  Times
                                             mean nothing then; only counts are checked against `wanted`
    python -m bench --check                  exit status 1 if a figure is not as wanted
    python -m bench --keep bench.jsonl       append the figures to a file, one line a run
    python -m bench --against bench.jsonl    say which ratios have changed since the last run that was kept
                                             on a processor of this kind

Needs a C compiler ($CC, or else `cc`), and the core built for Python (`pip install -e .`).

How to read it.  A figure has one sample per repeat and, taken right before or after, one sample of its
reference: a bare version of the work, or the time that the real machine or plain pykka takes for it.  `value`
and `reference` are medians.  `ratio` is the median of the repeats' own ratios, which a machine that gets
slower half-way does not disturb; `ratio_of` gives its direction (value/reference for rates and prices,
reference/value for "so many times quicker"), `ratio_low` and `ratio_high` are the extremes.  `wanted` is this
project's condition on the figure, `met` tells whether it holds; figures without a `wanted` are information.

What spoils it?  Any other load on the machine: benchmarks that need two cores suffer first (a membarrier of
half a microsecond interrupted no core, and two pCPUs on one core are no faster than one).  The document has
the load at start and at end (where the benchmarks' own threads count).  Judge by the ratios, and by the
distance of their extremes.

Every run ends with the list of figures that are not as wanted.

Exit status: 0 everything ran, and with --check every figure is as wanted; 1 a benchmark failed, a figure is
not as wanted (with --check), or an invariant of a program did not hold (each asserts that every record took
one poll, one look-up and one check, that every call ran, every callback was invoked, every flush dropped
something, and that the core spins before it sleeps where there are two cores); 2 bad usage or no compiler.

Where things are: native/*.c print samples, one JSON object per figure (native/bench.h); toolchain.py compiles
and runs them; programs.py, job.py, idle.py, zap.py, exploring.py, reduction.py, proofs.py, patched.py and
mutation/ are the benchmarks; figures.py does all arithmetic; history.py keeps and compares; report.py prints;
machine.py describes the machine.
"""
