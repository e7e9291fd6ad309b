"""Commands that record a trace which answers every question of `missing`: with ftrace, trace-cmd or perf."""

from __future__ import annotations

from typing import Final

# The functions without a tracepoint, and the arguments that a probe at each must record.
PROBES: Final = (
    ("kvm_flush_remote_tlbs", "kvm=%di:x64"),
    ("kvm_flush_remote_tlbs_range", "kvm=%di:x64 gfn=%si:x64 nr=%dx:x64"),
    ("kvm_make_all_cpus_request", "kvm=%di:x64 req=%si:x32"),
    ("kvm_mmu_load", "vcpu=%di:x64"),
)
TRACEPOINTS: Final = (
    "kvm:kvm_entry",
    "kvm:kvm_exit",
    "kvm:kvm_page_fault",
    "kvm:kvm_unmap_hva_range",
    "kvm:kvm_age_hva",
    "kvm:kvm_cr",
    "kvm:kvm_smm_transition",
    "kvmmmu:kvm_tdp_mmu_spte_changed",
    "kvmmmu:kvm_mmu_zap_all_fast",
    "kvmmmu:kvm_mmu_split_huge_page",
    "sched:sched_switch",
    "sched:sched_migrate_task",
    "ipi:ipi_send_cpu",
    "ipi:ipi_send_cpumask",
    "csd:csd_queue_cpu",
    "tlb:tlb_flush",
)
SECONDS: Final = 10
_OLDER: Final = "Older kernels lack ipi (before 6.4) and csd (before 6.5)."


def _probes(place: str) -> str:
    return "\n".join(
        f"echo 'p:flushlab/{function} {function} {arguments}' >>{place}/kprobe_events"
        for function, arguments in PROBES
    )


def _without_probes(place: str) -> str:
    return "\n".join(f"echo '-:flushlab/{function}' >>{place}/kprobe_events" for function, _ in PROBES)


def _events(probes: str) -> str:
    """Return the lines that set $events to the options for the probes and for the tracepoints that exist."""
    return f"""\
events="-e {probes}"
for e in {" ".join(TRACEPOINTS)}
do
\t# {_OLDER}
\t[ ! -e $T/events/${{e%:*}}/${{e#*:}} ] || events="$events -e $e"
done"""


def trace_recipe() -> str:
    """Return a shell script for a recording of ten seconds with ftrace alone."""
    names = " ".join(TRACEPOINTS).replace(":", "/")
    return f"""\
#!/bin/sh
# Record KVM's flushes and their causes for {SECONDS} s, as root; then: flushlab import kvm.trace
# A busy host writes hundreds of MiB a minute: raise buffer_size_kb if events are lost.
T=/sys/kernel/tracing
I=$T/instances/flushlab
mkdir $I || exit
{_probes("$T")}
# Processes tell VMs apart.
echo 1 >$I/options/record-tgid
echo mono >$I/trace_clock
echo 16384 >$I/buffer_size_kb
for e in {names}
do
\t# {_OLDER}
\t[ ! -e $I/events/$e ] || echo 1 >$I/events/$e/enable
done
echo 1 >$I/events/flushlab/enable
sleep {SECONDS}
echo 0 >$I/tracing_on
cat $I/trace >kvm.trace
cat $I/per_cpu/cpu*/stats | grep -e overrun -e dropped | sort | uniq -c
echo 0 >$I/events/enable
rmdir $I
{_without_probes("$T")}
"""


def trace_cmd_recipe() -> str:
    """Return a shell script for a recording of ten seconds with trace-cmd."""
    return f"""\
#!/bin/sh
# Record KVM's flushes and their causes for {SECONDS} s, as root; then: flushlab import trace.dat
# Without trace-cmd on the machine that imports: trace-cmd report -i trace.dat >kvm.trace
# `trace-cmd report` prints no processes: record one VM at a time, or take `--recipe perf` or `trace`.
T=/sys/kernel/tracing
{_probes("$T")}
{_events("flushlab")}
trace-cmd record -C mono -b 16384 -o trace.dat $events sleep {SECONDS}
{_without_probes("$T")}
"""


def perf_recipe() -> str:
    """Return a shell script for a recording of ten seconds with perf."""
    return f"""\
#!/bin/sh
# Record KVM's flushes and their causes for {SECONDS} s, as root; then: flushlab import perf.data
# Without perf on the machine that imports: perf script --ns -F +pid -i perf.data >kvm.trace
T=/sys/kernel/tracing
{_probes("$T")}
{_events("flushlab:*")}
perf record -a -k CLOCK_MONOTONIC -m 4M -o perf.data $events -- sleep {SECONDS}
{_without_probes("$T")}
"""
