"""Sums over a trace: per vCPU, per cause of a flush, per sender of interrupts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Vcpu:
    """A task that entered a guest.

    `guest_time` is in nanoseconds and lacks entries without an exit.  `moves` counts entries on another CPU
    than the entry before; each costs a flush on Intel (vmx_vcpu_load_vmcs).  `vectors` counts external
    interrupts that made it exit, `requests` those that exits tell since 6.13.
    """

    comm: str
    tid: int
    tgid: int = -1
    number: int = -1
    entries: int = 0
    exits: Counter[str] = field(default_factory=Counter)
    vectors: Counter[int] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    faults: int = 0
    moves: int = 0
    guest_time: int = 0
    cpus: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"{self.comm}-{self.tid}"


@dataclass
class Cause:
    """Work of KVM that one kind of event led to, each attributed by the rule of `observed`.

    `ranges` are a notifier's, of `pages` pages in all.  `zapped` and `protected` are leaf SPTEs that became
    non-present or lost their write permission.  `flushes` are calls of kvm_flush_remote_tlbs and its like,
    known from a probe.  `broadcasts` are kicks by kvm_make_all_cpus_request, to `targets` CPUs in all;
    `in_guest` of these ran a guest.
    """

    events: int = 0
    ranges: int = 0
    pages: int = 0
    zapped: int = 0
    protected: int = 0
    flushes: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    broadcasts: int = 0
    targets: int = 0
    in_guest: int = 0


@dataclass
class Sender:
    """Interrupts that one function sent.

    `others` are targets in the guest of another process than the sender's, where the trace tells processes.
    """

    calls: int = 0
    targets: int = 0
    in_guest: int = 0
    others: int = 0
