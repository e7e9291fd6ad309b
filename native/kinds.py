"""Name the types of numbers in the core's declarations: of arguments, results, fields, and members of enums.

native/stub.py writes them into the stub.  A test swaps every two numbers of each call, and expects mypy to
object.  So an argument of a new call needs a type, by its name or for its function, if the call takes other
numbers.
"""

from __future__ import annotations

from typing import Final

# Names of arguments that stand for one kind of number (native/types.py) in every function on a machine.
ARGUMENTS: Final = {
    "callback": "RcuCallback",
    "counter": "CounterId",
    "cpu": "CpuId",
    "custody": "Custody",
    "gfn": "Gfn",
    "hfn": "Hfn",
    "histogram": "HistogramId",
    "host_writable": "HostWritable",
    "hva": "Hva",
    "index": "SpteIndex",
    "insn": "GuestInsn",
    "keep": "bool",
    "level": "Level",
    "linear": "Gva",
    "mapped": "bool",
    "on": "bool",
    "populate": "bool",
    "promise": "PromiseKind",
    "report": "ReportNumber",
    "root": "Hfn",
    "root_level": "Level",
    "shared": "bool",
    "slot": "SignalSlot",
    "stat": "VmStat",
    "step": "KernelSpteStep",
    "table": "Hfn",
    "tag": "Custody",
    "target": "CpuId",
    "ticket": "Ticket",
    "type": "AccessKind",
    "vcpu": "VcpuId",
    "vm": "VmId",
    "vmcs": "VmcsId",
    "vpid": "Vpid",
    "wait": "IpiWait",
    "word": "WordIndex",
    "writable": "bool",
    "write": "bool",
}
# Names of arguments in functions on a TLB by itself, which takes VMs and frames as tags without a meaning.
TLB_ARGUMENTS: Final = {
    "ep4ta": "Ep4ta",
    "ept": "bool",
    "gpa_page": "Gfn",
    "kind": "MappingKind",
    "linear_page": "LinearPage",
    "linear_valid": "bool",
    "pcid": "Pcid",
    "right": "Right",
    "type": "AccessKind",
    "vpid": "Vpid",
}
# Arguments that have a meaning of their own in these functions.
EXCEPTIONS: Final = {
    **{
        (function, bound): kind
        for kind, functions in (
            ("Gfn", ("oracle_revoke", "mmu_invalidate_range_add", "mmu_invalidate_overlaps")),
            ("Gfn", ("mmu_invalidate_retry_range",)),
            ("Hva", ("mm_present", "mm_unmap", "mm_protect", "mm_migrate")),
        )
        for function in functions
        for bound in ("start", "end")
    },
    ("cpu_wait_event", "seq"): "EventSeq",
    ("event_record", "kind"): "EventKind",
    ("flush_invvpid_address", "page"): "LinearPage",
    ("mmu_spte_get_lockless", "page"): "LinearPage",
    **{
        (f"mmu_invalidate_{part}", "seq"): "InvalidateSeq"
        for part in ("retry_gfn", "retry_range", "seq_init")
    },
    ("oracle_reports", "from"): "ReportNumber",
    ("oracle_revoke_mask", "base"): "Gfn",
    ("mm_image_create", "start"): "Hva",
    ("mm_image_copy", "base"): "Hva",
    ("mm_image_differs", "from"): "Hva",
    ("srcu_read_unlock", "index"): "int",  # the index of a counter
    ("vcpu_set_cpu", "cpu"): "int",  # or -1: the vCPU is not loaded
    ("tlb_dropped", "vm"): "int",  # or -1: any VM
    **{(function, "kind"): "FrameKind" for function in ("frame_alloc", "frames_in_use", "frames_total")},
    **{(function, "kind"): "FrameKind" for function in ("ept_table_alloc", "shadow_page_alloc")},
    **{
        (function, "function"): "IpiFunction"
        for function in ("smp_call_function_many", "smp_call_function_single", "on_each_cpu")
    },
    **{
        (function, "reason"): "FlushReason"
        for function in (
            "flush_invept_global",
            "flush_invept_single",
            "flush_invvpid_single",
            "flush_invvpid_all",
            "flush_invvpid_address",
            "flush_invvpid_retain_globals",
            "hv_flush_guest_mapping",
            "hv_flush_pcpu",
            "vcpu_add_flush_reason",
        )
    },
}
# Arguments that may be NULL: then the function only counts.
NULLABLE: Final = frozenset({("tlb_dump", "entries"), ("psc_dump", "entries")})
# Numbers that these functions return and other functions take.  A function that may fail returns an int.
RESULTS: Final = {
    "cpu_event": "EventSeq",
    "kvm_mmu_page_get_gfn": "Gfn",
    "mmu_invalidate_seq": "InvalidateSeq",
    "oracle_ticket": "Ticket",
    "spte_next": "SpteIndex",
    "tdp_mmu_get_walk": "Level",
}
# Fields that KVM's code passes to functions of the core.
FIELDS: Final = {
    ("mm_page", "hfn"): "Hfn",
    ("mm_page", "level"): "Level",
    ("mm_page", "tag"): "Custody",
    ("tdp_chunk", "root"): "Hfn",
    ("tdp_chunk", "root_level"): "Level",
    ("tdp_chunk", "level"): "Level",
    ("tdp_chunk", "next_gfn"): "Gfn",
    ("tdp_chunk", "end_gfn"): "Gfn",
    ("tdp_chunk", "found_table"): "Hfn",
    ("tdp_chunk", "found_index"): "SpteIndex",
    ("tdp_chunk", "found_level"): "Level",
    ("tdp_chunk", "found_gfn"): "Gfn",
    ("tdp_removal", "top"): "Level",
    ("tdp_removal", "level"): "Level",
    ("tdp_removal", "gfn"): "Gfn",
    ("tdp_removal", "page"): "Hfn",
    ("tdp_removal", "page_level"): "Level",
}
# Types of the members of these enums: those of the arguments that take them.  A member that counts the others
# is an int.
ENUMS: Final = {
    "access_type": "AccessKind",
    "counter": "CounterId",
    "event_kind": "EventKind",
    "histogram": "HistogramId",
    "flush_reason": "FlushReason",
    "frame_kind": "FrameKind",
    "guest_insn": "GuestInsn",
    "ipi_function": "IpiFunction",
    "ipi_wait": "IpiWait",
    "kernel_spte_step": "KernelSpteStep",
    "mapping_kind": "MappingKind",
    "pg_level": "Level",
    "promise": "PromiseKind",
    "rcu_callback": "RcuCallback",
    "vm_stat": "VmStat",
}
