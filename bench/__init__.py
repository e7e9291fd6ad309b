"""Measurements, each beside a reference taken in the same run.

    python -m bench                          everything: about two minutes, and the machine should be idle
    python -m bench --only guest ipi         some of it; --help names them
    python -m bench --json bench.json        a JSON document as well ("-": on standard output, the table on
                                             standard error)
    python -m bench --quick                  tiny sizes: do the tools work, do the invariants hold?  The
                                             figures mean nothing, so nothing is held against what is wanted

Needs a C compiler (`cc`, or what $CC says), and the core built for Python (`pip install -e .`).

How to read it.  A figure has one sample per repeat and, taken right before or after, one of its reference:
the same work done barely, or what the real machine or plain pykka takes for it.  `value` and `reference` are
medians.  `ratio` is the median of the repeats' own ratios, which a machine that gets slower half-way does not
disturb; `ratio_of` says which way round it is (value/reference for rates and prices, reference/value for "so
many times quicker"), `ratio_low` and `ratio_high` are the extremes.  `wanted` is what this project asks of
the figure, `met` whether it is so; figures without a `wanted` are there for information.

What spoils it.  Anything else that runs: what needs two cores suffers first (a membarrier of half a
microsecond interrupted nobody, and two pCPUs on one core are no faster than one).  The document says what the
load was at start and at end (where the benchmarks' own threads count).  Judge by the ratios, and by how far
their extremes lie apart.

Exit status: 0 everything ran, whether or not what is wanted was met; 1 a benchmark failed or one of its
invariants did not hold (each program asserts that every record took one poll, one look-up and one check, that
every call ran, every callback was invoked, every flush dropped something); 2 bad usage or no compiler.

Where things are: native/*.c print samples, one JSON object per figure (native/bench.h); toolchain.py compiles
and runs them; programs.py, job.py, idle.py, zap.py, exploring.py and reduction.py are the benchmarks;
figures.py does all arithmetic; report.py prints; machine.py says on what it ran.
"""
