"""A script that measures a host's costs, and prints them as a table for --costs."""

from __future__ import annotations

from typing import Final

# Keys of the table of costs, by function: the cost is that of its shortest call.
FUNCTIONS: Final = {
    "invept_global": "kvm_intel:vmx_flush_tlb_all",
    "invept_single": "kvm_intel:vmx_flush_tlb_current",
    "invvpid_single": "kvm_intel:vmx_flush_tlb_guest",
    "ipi_send": "vmlinux:native_send_call_func_single_ipi",
}
# Does next to nothing before each VM entry (since 5.17), so its time is that of the probes.
_EMPTY: Final = "kvm_intel:vmx_vcpu_pre_run"
_SECONDS: Final = 30


def cost_recipe() -> str:
    """Return a shell script that prints a file for `--costs`."""
    probed = {"probes": _EMPTY, **FUNCTIONS}
    probes = "\n".join(
        f"kfunc:{function} {{ @start[tid] = nsecs; }}\n"
        f"kretfunc:{function} /@start[tid]/ {{ @{key} = min(nsecs - @start[tid]); delete(@start[tid]); }}"
        for key, function in probed.items()
    )
    return f"""\
#!/bin/sh
# Measure the costs of KVM's flushes on this host (Intel), as root, while its VMs run:
#     sh costs.sh >my-host.toml
# Needs bpftrace and a kernel with BTF.  With KVM_UNIT_TESTS=DIR, a built tree of kvm-unit-tests, it measures
# VM exits as well.
# The figures are the shortest calls of {_SECONDS} s, less the probes' own time.  A call may do more than its
# instruction, and one without a root (on entering SMM) does nothing: check them.  ipi_receive and the rest
# keep the values of flushlab's own table.
khz=$(cat /sys/devices/system/cpu/cpu0/cpufreq/base_frequency 2>/dev/null)
[ -n "$khz" ] || khz=$(awk -F: '/cpu MHz/ {{ printf "%d", $2 * 1000; exit }}' /proc/cpuinfo)
bpftrace -e '
{probes}
interval:s:{_SECONDS} {{ exit(); }}
END {{ clear(@start); }}' | awk -v khz="$khz" '
/^@[a-z_]+: [0-9]+$/ {{ sub(/^@/, ""); sub(/:/, ""); ns[$1] = $2 }}
END {{
\tfor (key in ns)
\t\tif (key != "probes") {{
\t\t\tcycles = (ns[key] - ns["probes"]) * khz / 1000000
\t\t\tprintf "[%s]\\ncycles = %d\\n", key, (cycles > 1 ? cycles : 1)
\t\t\tprintf "source = \\"measured by bpftrace, shortest call\\"\\n\\n"
\t\t}}
}}'
[ -z "$KVM_UNIT_TESTS" ] || (cd "$KVM_UNIT_TESTS" && ./x86/run x86/vmexit.flat -append cpuid) |
awk '/^cpuid [0-9]+/ {{
\tprintf "[vm_exit_entry]\\ncycles = %d\\nsource = \\"kvm-unit-tests x86/vmexit, cpuid\\"\\n", $2
}}'
"""
