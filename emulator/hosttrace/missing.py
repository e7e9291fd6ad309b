"""The questions that a trace leaves open, and the events that would answer them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from emulator.hosttrace.observed import Observed


@dataclass(frozen=True, slots=True)
class Question:
    """Something that a trace tells by certain events.

    `events` are events, or functions under a probe; one of them in the trace is enough.  `record` is the way
    to record them, and `unknown` is left open without them.
    """

    answer: str
    events: tuple[str, ...]
    record: str
    unknown: str


QUESTIONS: Final = (
    Question(
        "entries and exits",
        ("kvm_entry", "kvm_exit"),
        "kvm:kvm_entry kvm:kvm_exit",
        "which CPUs ran a guest, so which interrupts stopped one",
    ),
    Question(
        "notifier ranges", ("kvm_unmap_hva_range",), "kvm:kvm_unmap_hva_range", "what the host took away"
    ),
    Question(
        "changes of SPTEs",
        ("kvm_tdp_mmu_spte_changed",),
        "kvmmmu:kvm_tdp_mmu_spte_changed",
        "how many translations were zapped or write-protected",
    ),
    Question(
        "remote flushes",
        ("kvm_flush_remote_tlbs", "kvm_flush_remote_tlbs_range"),
        "kprobes at kvm_flush_remote_tlbs and kvm_flush_remote_tlbs_range; no tracepoint exists",
        "how often KVM flushed remotely",
    ),
    Question(
        "requests",
        ("kvm_make_all_cpus_request",),
        "a kprobe at kvm_make_all_cpus_request with req=%si:x32",
        "which requests vCPUs were sent",
    ),
    Question(
        "interrupts between CPUs",
        ("ipi_send_cpumask", "ipi_send_cpu"),
        "ipi:ipi_send_cpumask ipi:ipi_send_cpu (since 6.4)",
        "what interrupted which CPU",
    ),
    Question(
        "root loads", ("kvm_mmu_load",), "a kprobe at kvm_mmu_load", "how often a load flushed its context"
    ),
    Question(
        "placement",
        ("sched_switch", "sched_migrate_task"),
        "sched:sched_switch sched:sched_migrate_task",
        "where vCPUs waited while they were out of the guest",
    ),
    Question(
        "VMCS clears",
        ("csd_queue_cpu", "__loaded_vmcs_clear"),
        "csd:csd_queue_cpu (since 6.5)",
        "which migrations interrupted the CPU that a vCPU left",
    ),
)


def unanswered(observed: Observed) -> list[Question]:
    """Return the questions of which the trace has no event.

    Whether none was recorded or none happened, a trace does not tell.
    """
    known = observed.kinds.keys() | {function for function, _ in observed.functions}
    return [question for question in QUESTIONS if not known.intersection(question.events)]
