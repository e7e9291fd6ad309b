"""The program of a vCPU's guest: an endless loop of accesses that the test may rewrite at any time."""

from __future__ import annotations

from typing import Any

from native import ffi, lib
from native.types import VcpuId

# Pages of the largest slot: a loop of this many accesses visits each page of any slot.
LENGTH = 1024
IDLE_GFN = 0x10
# On page tables each round begins with the guest's code, and ends with a counter of its own, both in slot 0.
CODE_GFN, COUNTER_GFN = 0x10, 0x20
# The pages that the guest OS maps for each of its processes.
LINEAR_PAGE = 0x400
OS_PAGES = 16


class Program:
    """The guest runs without paging, so that it makes the test's accesses and no others.

    With `guest_os`, an OS of two processes with PCIDs works in slot 0 instead of the test's accesses.  With
    `tables`, the guest runs by these page tables, which map each address to itself.
    """

    def __init__(
        self,
        m: Any,
        vcpu: VcpuId,
        *,
        guest_os: bool = False,
        first_gfn: int = 0,
        end_gfn: int = 1,
        tables: int | None = None,
    ) -> None:
        self._m, self._vcpu = m, vcpu
        self._own = tables is not None
        self._length = LENGTH + 2 * self._own
        self._records = ffi.new("uint64_t[]", self._length)
        self._pages = ffi.new("uint64_t[]", [LINEAR_PAGE + i for i in range(OS_PAGES)])
        self._start = 0
        config = {"first_gfn": first_gfn, "end_gfn": end_gfn, "seed": vcpu + 1}
        if guest_os:
            config |= {"paging": 1, "pcid": 1, "switch_every": 500, "unmap_every": 300, "protect_every": 700}
        if tables is not None:
            config["paging"] = 1
        statuses = [lib.guest_configure(m, vcpu, ffi.new("struct guest_config *", config))]
        for _ in range(2 if guest_os else 1):
            pages = 0 if tables is not None else OS_PAGES
            statuses.append(lib.guest_add_process(m, vcpu, self._records, self._length, self._pages, pages))
        if any(statuses):
            raise MemoryError(f"guest of vCPU {vcpu}: {statuses}")
        if tables is not None:
            lib.guest_share_tables(m, vcpu, tables)
        if guest_os:
            self.access(LINEAR_PAGE, OS_PAGES, lib.ACCESS_WRITE)
        else:
            self.idle()

    def idle(self) -> None:
        """In guest mode, without an access to slots 1 and 2: its own code, in slot 0."""
        self.access(IDLE_GFN, 1, lib.ACCESS_READ)

    def spin(self) -> None:
        """Nothing but the guest's own code."""
        for i in range(self._length):
            self._records[i] = lib.ACCESS_EXECUTE << 62 | CODE_GFN << 12
        self.mark()

    def store(self, gfn: int, word: int) -> None:
        """Store to one word, over and over."""
        self._records[1] = lib.ACCESS_WRITE << 62 | gfn << 12 | word * 8

    def access(self, gfn: int, pages: int, kind: int) -> None:
        """Each of the pages in turn, for ever; `kind` is an access_type."""
        for i in range(LENGTH):
            self._records[self._own + i] = kind << 62 | (gfn + i % pages) << 12 | (i * 8) & 0xFF8
        if self._own:
            self._records[0] = lib.ACCESS_EXECUTE << 62 | CODE_GFN << 12
            self._records[LENGTH + 1] = lib.ACCESS_WRITE << 62 | COUNTER_GFN << 12
        self.accesses = (gfn, pages, kind)
        self.mark()

    def mark(self) -> None:
        self._start = lib.guest_clock(self._m, self._vcpu)

    def rounds(self) -> float:
        """Whole loops since the mark."""
        return float(lib.guest_clock(self._m, self._vcpu) - self._start) / self._length
