"""The documents about real hosts: those of `flushlab import --json` and `flushlab replay --json`."""

from __future__ import annotations

from typing import Literal

from emulator.schemas.documents import Part

# --- flushlab import ----------------------------------------------------------------------------------------


class VcpuPart(Part):
    """A task that entered a guest.  `number`, `tgid`: -1 if the trace lacks them; `guest_time`: seconds."""

    comm: str
    tid: int
    tgid: int
    number: int
    entries: int
    exits: dict[str, int]
    vectors: dict[str, int]
    requests: dict[str, int]
    faults: int
    moves: int
    guest_time: float
    cpus: list[int]


class CausePart(Part):
    """Work of KVM that one kind of event led to."""

    events: int
    ranges: int
    pages: int
    zapped: int
    protected: int
    flushes: int
    requests: dict[str, int]
    broadcasts: int
    targets: int
    in_guest: int


class SenderPart(Part):
    """Interrupts that one function sent."""

    calls: int
    targets: int
    in_guest: int
    others: int


class ImportDocument(Part):
    """The document of `flushlab import --json`.  `seconds` is null for several recordings in one file."""

    hosttrace: Literal[1]
    file: str
    lines: int
    events: int
    other_lines: int
    lost_events: int
    lost_unknown: bool
    dialects: dict[str, int]
    seconds: float | None
    cpus: list[int]
    kinds: dict[str, int]
    unread: dict[str, int]
    calls: dict[str, int]
    vcpus: list[VcpuPart]
    causes: dict[str, CausePart]
    senders: dict[str, SenderPart]
    host_flushes: dict[str, int]
    vmcs_clears: int
    tables_zapped: int
    leaves_mapped: int
    unanswered: list[str]


# --- flushlab replay ----------------------------------------------------------------------------------------


class ReplayedPolicy(Part):
    name: str
    counts: dict[str, int]
    flushes: dict[str, int]
    faults: int
    migrations: int
    flushes_elided: int
    flush_cycles: float
    flush_cycles_by_item: dict[str, float]
    lag_seconds: float


class MemslotPart(Part):
    """Guest pages and their host address; `ranges`: those that it was inferred from, 0 if it was given."""

    vm: int
    gfn: int
    pages: int
    hva: int
    ranges: int


class ReplayDocument(Part):
    """The document of `flushlab replay --json`.  `recorded` has the counts that the trace shows.

    `speed` is that of the recorded time, 0: as fast as it went; `lag_seconds` is the most that an event was
    late.
    """

    flushlab_replay: Literal[1]
    source: str
    seconds: float
    speed: float
    events: int
    vms: list[int]
    pcpus: int
    memslots: list[MemslotPart]
    recorded: dict[str, int]
    left_out: dict[str, int]
    policies: list[ReplayedPolicy]
