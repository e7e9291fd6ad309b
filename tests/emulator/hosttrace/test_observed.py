"""The sums of small traces, worked out by hand."""

from __future__ import annotations

from emulator.hosttrace.lines import Event
from emulator.hosttrace.observed import UNKNOWN, Observed
from tests.emulator.hosttrace.made_up import (
    Line,
    entry,
    kick,
    leave,
    observe,
    probe,
    spte,
    unmap,
)

_HOST = 900
_LEAF = "gfn 99 level 1 old_spte 600000455299b77 new_spte 0"


def _observe(*lines: Line) -> Observed:
    return observe(line.ftrace() for line in lines)


def test_a_vcpu_its_exits_and_its_time_in_the_guest() -> None:
    seen = _observe(
        entry(7, 1, 0),
        leave(7, 1, 30, "EPT_VIOLATION"),
        Line("CPU 0/KVM", 7, 1, 31, "kvm_page_fault", "vcpu 0 rip 0x0 address 0x2000 error_code 0x82"),
        entry(7, 1, 40),
        leave(7, 1, 45, "EXTERNAL_INTERRUPT", 0x800000FC),
    )
    (vcpu,) = seen.vcpus.values()
    assert (vcpu.number, vcpu.entries, vcpu.faults, vcpu.guest_time) == (0, 2, 1, 35_000)
    assert vcpu.exits == {"EPT_VIOLATION": 1, "EXTERNAL_INTERRUPT": 1}
    assert vcpu.vectors == {0xFC: 1}


def test_only_external_interrupts_have_a_vector() -> None:
    # Bits 10:8 of a valid field: 2 is an NMI, 3 a hardware exception.
    seen = _observe(leave(7, 1, 1, "EXCEPTION_NMI", 0x80000306), leave(7, 1, 2, "HLT", 0x000000EC))
    assert not seen.vcpus[7].vectors


def test_fields_of_older_kernels() -> None:
    old = Line("CPU", 7, 1, 5, "kvm_exit", "reason EPT_VIOLATION rip 0xffffffffc0771aa2 info 683 800000ec")
    vcpu = _observe(old).vcpus[7]
    assert (vcpu.number, vcpu.exits) == (-1, {"EPT_VIOLATION": 1})


def test_requests_of_an_exit_have_names() -> None:
    rest = " error_code 0x00000000 requests 0x0000008000000001"
    seen = _observe(leave(7, 1, 5, rest=rest), leave(7, 1, 6, rest=" requests 0x0000000000000000"))
    assert seen.vcpus[7].requests == {"TLB_FLUSH": 1, "MMU_FREE_OBSOLETE_ROOTS": 1}


def test_an_entry_on_another_cpu_is_a_move() -> None:
    seen = _observe(*(entry(7, cpu, time) for time, cpu in enumerate((1, 1, 2, 1, 1))))
    assert (seen.vcpus[7].moves, seen.vcpus[7].cpus) == (2, {1, 2})


def test_a_range_and_its_consequences() -> None:
    seen = _observe(
        entry(7, 1, 0),
        entry(8, 2, 0, vcpu=1),
        unmap(_HOST, 0, 10, 0x1000, 0x4000),
        spte(_HOST, 0, 11, _LEAF),
        spte(_HOST, 0, 11, "gfn 9a level 1 old_spte 60000045529ab77 new_spte 60000045529ab75"),
        probe(_HOST, 0, 12, "kvm_flush_remote_tlbs", " kvm=0xffff"),
        probe(_HOST, 0, 13, "kvm_make_all_cpus_request", " kvm=0xffff req=0x300"),
        kick(_HOST, 0, 14, "00000000,0000000e"),
    )
    cause = seen.causes["notifier: unmap"]
    assert (cause.events, cause.ranges, cause.pages) == (1, 1, 3)
    assert (cause.zapped, cause.protected, cause.flushes) == (1, 1, 1)
    assert (cause.broadcasts, cause.targets, cause.in_guest) == (1, 3, 2)
    assert cause.requests == {"TLB_FLUSH": 1}


def test_an_exit_ends_the_guest_on_its_cpu() -> None:
    seen = _observe(
        entry(7, 1, 0), leave(7, 1, 5), kick(_HOST, 0, 6, "2"), entry(7, 1, 7), kick(_HOST, 0, 8, "2")
    )
    sender = seen.senders["kvm_make_all_cpus_request"]
    assert (sender.calls, sender.targets, sender.in_guest) == (2, 2, 1)


def test_a_cause_grows_old() -> None:
    seen = _observe(
        unmap(_HOST, 0, 0, 0x1000, 0x2000), spte(_HOST, 0, 999, _LEAF), spte(_HOST, 0, 1002, _LEAF)
    )
    assert (seen.causes["notifier: unmap"].zapped, seen.causes[UNKNOWN].zapped) == (1, 1)


def test_a_range_with_a_known_end_does_not_grow_old() -> None:
    seen = _observe(
        probe(_HOST, 0, 0, "kvm_mmu_notifier_invalidate_range_start"),
        spte(_HOST, 0, 5000, _LEAF),
        probe(_HOST, 0, 5001, "kvm_mmu_notifier_invalidate_range_end"),
        spte(_HOST, 0, 5002, _LEAF),
    )
    assert (seen.causes["notifier"].zapped, seen.causes[UNKNOWN].zapped) == (1, 1)


def test_a_cause_is_of_its_task_and_ends_at_entry() -> None:
    seen = _observe(leave(7, 1, 0, "CR_ACCESS"), spte(8, 2, 1, _LEAF), entry(7, 1, 2), spte(7, 1, 3, _LEAF))
    assert seen.causes[UNKNOWN].zapped == 2


def test_tables_and_new_leaves_are_no_zapped_leaves() -> None:
    seen = _observe(
        spte(_HOST, 0, 0, "gfn 0 level 2 old_spte 2c583c907 new_spte 5a0"),
        spte(_HOST, 0, 1, "gfn 0 level 2 old_spte 60000021be00bf3 new_spte 5a0"),
        spte(_HOST, 0, 2, "gfn 803 level 1 old_spte 0 new_spte 5a0"),
        spte(_HOST, 0, 3, "gfn 803 level 1 old_spte 0 new_spte 1003eb27e67"),
    )
    assert (seen.tables_zapped, seen.mapped, seen.causes[UNKNOWN].zapped) == (1, 1, 1)


def test_two_probes_at_a_function_count_one_call() -> None:
    lines = [probe(_HOST, 0, 1, "kvm_flush_remote_tlbs").ftrace()]
    lines.append(lines[0].replace("p_kvm", "mine_kvm"))
    seen = observe(lines * 3)
    assert seen.calls("kvm_flush_remote_tlbs") == 3
    assert seen.causes[UNKNOWN].flushes == 3


def test_a_probe_inside_a_function_and_a_return_are_no_calls() -> None:
    inside = probe(_HOST, 0, 1, "vmx_flush_tlb_all", offset=0x8D)
    back = Line(
        "numad", _HOST, 0, 2, "r_x", "(kvm_arch_vcpu_ioctl_run+0xf43/0x1760 [kvm] <- kvm_mmu_load) a=0"
    )
    seen = _observe(inside, back)
    assert not seen.functions
    assert seen.unread == {"r_x": 1}


def test_a_queued_call_names_its_interrupt() -> None:
    queue = "cpu=1 callsite=generic_exec_single+0x33/0x130 func=__loaded_vmcs_clear [kvm_intel] csd=00"
    send = "cpu=1 callsite=generic_exec_single+0x33/0x130 callback=0x0"
    seen = _observe(
        Line("CPU 0/KVM", 7, 2, 0, "csd_queue_cpu", queue), Line("CPU 0/KVM", 7, 2, 1, "ipi_send_cpu", send)
    )
    assert seen.vmcs_clears == 1
    assert seen.senders["__loaded_vmcs_clear"].targets == 1


def test_another_vm_is_told_by_its_process() -> None:
    lines = [entry(7, 1, 0).ftrace(tgid="70"), entry(8, 2, 0).ftrace(tgid="80")]
    seen = observe([*lines, kick(9, 0, 5, "6").ftrace(tgid="70")])
    assert seen.senders["kvm_make_all_cpus_request"].others == 1


def test_samples_of_the_sequence() -> None:
    fields = "vcpu=ff seq={} inprog={} start={} end={}"
    seen = Observed()
    for times, values in ((2, ("80000001", 1, "1000", "2000")), (1, ("80000003", 0, "5000", "8000"))):
        seen.add(Event("", -1, -1, -1, -1, "ept[0]", fields.format(*values), times=times))
    samples = seen.invalidate
    assert (samples.number, samples.in_progress, samples.ranges, samples.pages) == (3, 2, 2, 4)
    assert (samples.lowest, samples.highest) == (0x80000001, 0x80000003)


def test_the_clock_of_several_recordings_goes_back() -> None:
    assert _observe(entry(7, 1, 5_000_000), entry(7, 1, 1_000_000)).backwards == 4_000_000_000
