"""Commands that record a trace which answers every question of `missing`."""

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
_SECONDS: Final = 10


def trace_recipe() -> str:
    """Return a shell script for a recording of ten seconds."""
    probes = "\n".join(
        f"echo 'p:flushlab/{function} {function} {arguments}' >>$T/kprobe_events"
        for function, arguments in PROBES
    )
    names = " ".join(TRACEPOINTS).replace(":", "/")
    gone = "\n".join(f"echo '-:flushlab/{function}' >>$T/kprobe_events" for function, _ in PROBES)
    return f"""\
#!/bin/sh
# Record KVM's flushes and their causes for {_SECONDS} s, as root; then: flushlab import kvm.trace
# A busy host writes hundreds of MiB a minute: raise buffer_size_kb if events are lost.
T=/sys/kernel/tracing
I=$T/instances/flushlab
mkdir $I || exit
{probes}
# Processes tell VMs apart.
echo 1 >$I/options/record-tgid
echo mono >$I/trace_clock
echo 16384 >$I/buffer_size_kb
for e in {names}
do
\t# Older kernels lack ipi (before 6.4) and csd (before 6.5).
\t[ ! -e $I/events/$e ] || echo 1 >$I/events/$e/enable
done
echo 1 >$I/events/flushlab/enable
sleep {_SECONDS}
echo 0 >$I/tracing_on
cat $I/trace >kvm.trace
cat $I/per_cpu/cpu*/stats | grep -e overrun -e dropped | sort | uniq -c
echo 0 >$I/events/enable
rmdir $I
{gone}
"""
