"""A bpftrace script that prints a trace in the importer's own format, and the table of KVM's exits in it.

The format is a line for each event:

    COMM-TID (TGID) [CPU] SECONDS.NANOSECONDS: EVENT: FIELDS

FIELDS are as the kernel prints the event's, as far as the importer reads them.  A function's call is an event
with the function's name, and (FUNCTION+0x0/0x0) before its arguments, as a kprobe of ftrace.
"""

from __future__ import annotations

from typing import Final

from emulator.hosttrace.recipe import SECONDS

# A line's beginning, and the values that fill it in.
_HEAD: Final = "%s-%d (%d) [%d] %d.%09d: "
_VALUES: Final = "comm, tid, pid, cpu, nsecs / 1000000000, nsecs % 1000000000"
# vmx.h and svm.h of arch/x86/include/uapi/asm: the reasons that hosts see often.  Others are numbers.
VMX_REASONS: Final = {
    0: "EXCEPTION_NMI",
    1: "EXTERNAL_INTERRUPT",
    7: "INTERRUPT_WINDOW",
    10: "CPUID",
    12: "HLT",
    14: "INVLPG",
    18: "VMCALL",
    28: "CR_ACCESS",
    30: "IO_INSTRUCTION",
    31: "MSR_READ",
    32: "MSR_WRITE",
    40: "PAUSE_INSTRUCTION",
    44: "APIC_ACCESS",
    48: "EPT_VIOLATION",
    49: "EPT_MISCONFIG",
    52: "PREEMPTION_TIMER",
    56: "APIC_WRITE",
}
SVM_REASONS: Final = {
    0x10: "write_cr0",
    0x13: "write_cr3",
    0x14: "write_cr4",
    0x60: "interrupt",
    0x61: "nmi",
    0x64: "vintr",
    0x72: "cpuid",
    0x77: "pause",
    0x78: "hlt",
    0x79: "invlpg",
    0x7B: "io",
    0x7C: "msr",
    0x80: "vmrun",
    0x81: "hypercall",
    0x400: "npf",
}
# include/trace/events/tlb.h
_HOST_FLUSHES: Final = (
    "flush on task switch",
    "remote shootdown",
    "local shootdown",
    "local MM shootdown",
    "remote IPI send",
)
# Tracepoints: the text of their fields, and the values that fill it in.
EVENTS: Final = {
    "kvm:kvm_entry": ("vcpu %u, rip 0x%lx", "args->vcpu_id, args->rip"),
    "kvm:kvm_page_fault": (
        "vcpu %u rip 0x%lx address 0x%016llx error_code 0x%llx",
        "args->vcpu_id, args->guest_rip, args->fault_address, args->error_code",
    ),
    "kvm:kvm_unmap_hva_range": ("mmu notifier unmap range: 0x%lx -- 0x%lx", "args->start, args->end"),
    "kvm:kvm_age_hva": ("mmu notifier age hva: 0x%lx -- 0x%lx", "args->start, args->end"),
    "kvm:kvm_cr": (
        "cr_%s %x = 0x%lx",
        'args->rw ? "write" : "read", args->cr, args->val',
    ),
    "kvm:kvm_smm_transition": (
        "vcpu %u: %s SMM, smbase 0x%llx",
        'args->vcpu_id, args->entering ? "entering" : "leaving", args->smbase',
    ),
    "kvmmmu:kvm_tdp_mmu_spte_changed": (
        "as id %d gfn %llx level %d old_spte %llx new_spte %llx",
        "args->as_id, args->gfn, args->level, args->old_spte, args->new_spte",
    ),
    "kvmmmu:kvm_mmu_zap_all_fast": ("kvm-mmu-valid-gen %u", "args->mmu_valid_gen"),
    "kvmmmu:kvm_mmu_split_huge_page": ("gfn %llx level %d", "args->gfn, args->level"),
    "sched:sched_migrate_task": (
        "pid=%d orig_cpu=%d dest_cpu=%d",
        "args->pid, args->orig_cpu, args->dest_cpu",
    ),
    "ipi:ipi_send_cpu": ("cpu=%u callsite=%s", "args->cpu, ksym(args->callsite)"),
    "tlb:tlb_flush": (
        "pages:%ld reason:%s (%d)",
        "args->pages, @host_flush[args->reason], args->reason",
    ),
    "csd:csd_queue_cpu": (
        "cpu=%u callsite=%s func=%s",
        "args->cpu, ksym(args->callsite), ksym(args->func)",
    ),
}
# Functions without a tracepoint: the text of their arguments, and the registers.
FUNCTIONS: Final = {
    "kvm_flush_remote_tlbs": ("kvm=0x%llx", "arg0"),
    "kvm_flush_remote_tlbs_range": ("kvm=0x%llx gfn=0x%llx nr=0x%llx", "arg0, arg1, arg2"),
    "kvm_make_all_cpus_request": ("kvm=0x%llx req=0x%x", "arg0, arg1"),
    "kvm_mmu_load": ("vcpu=0x%llx", "arg0"),
}


def _printing(name: str, text: str, values: str) -> str:
    return f'\tprintf("{_HEAD}{name}: {text}\\n", {_VALUES},\n\t\t{values});'


def _events() -> str:
    found = []
    for event, (text, values) in EVENTS.items():
        found.append(f"tracepoint:{event}\n{{\n{_printing(event.partition(':')[2], text, values)}\n}}\n")
    for function, (text, values) in FUNCTIONS.items():
        line = _printing(function, f"({function}+0x0/0x0) {text}", values)
        found.append(f"kprobe:{function}\n{{\n{line}\n}}\n")
    return "\n".join(found)


def _reasons() -> str:
    tables = ((1, VMX_REASONS), (2, SVM_REASONS))
    lines = [
        f'\t@reason[{isa}, {number}] = "{name}";' for isa, table in tables for number, name in table.items()
    ]
    lines += [f'\t@host_flush[{number}] = "{name}";' for number, name in enumerate(_HOST_FLUSHES)]
    return "\n".join(lines)


def _exit() -> str:
    fields = "rip 0x%lx info1 0x%llx info2 0x%llx intr_info 0x%08x error_code 0x%08x"
    values = "args->guest_rip, args->info1, args->info2, args->intr_info, args->error_code"
    named = _printing(
        "kvm_exit",
        f"vcpu %u reason %s {fields}",
        f"args->vcpu_id, @reason[args->isa, args->exit_reason & 0xffff], {values}",
    )
    number = _printing(
        "kvm_exit", f"vcpu %u reason 0x%x {fields}", f"args->vcpu_id, args->exit_reason, {values}"
    )
    return f"""\
tracepoint:kvm:kvm_exit
/@reason[args->isa, args->exit_reason & 0xffff] != ""/
{{
{named}
}}

tracepoint:kvm:kvm_exit
/@reason[args->isa, args->exit_reason & 0xffff] == ""/
{{
{number}
}}
"""


def bpftrace_recipe() -> str:
    """Return a bpftrace script for a recording of ten seconds."""
    mask = _printing(
        "ipi_send_cpumask",
        "cpumask=%llx callsite=%s",
        "*(uint64 *)args->cpumask, ksym(args->callsite)",
    )
    return f"""\
#!/usr/bin/env bpftrace
/*
 * Record KVM's flushes and their causes for {SECONDS} s, as root:
 *     bpftrace record.bt >kvm.trace; flushlab import kvm.trace
 * A line for each event: COMM-TID (TGID) [CPU] SECONDS.NANOSECONDS: EVENT: FIELDS
 * For Linux 6.5 and newer, and up to 64 CPUs: of a mask of CPUs its first word is printed.
 * If events are lost: BPFTRACE_PERF_RB_PAGES=4096 (bpftrace tells how many).
 */
BEGIN
{{
{_reasons()}
}}

{_exit()}
{_events()}
tracepoint:ipi:ipi_send_cpumask
{{
{mask}
}}

interval:s:{SECONDS}
{{
\texit();
}}

END
{{
\tclear(@reason);
\tclear(@host_flush);
}}
"""
