"""Format of a trace record, and functions that take it apart.

A record is one guest access in 64 bits:

    63..62  type: 0 read, 1 write, 2 execute
    61..48  zero
    47..0   linear address as recorded (user space, so canonical without sign extension)

One record is one memory access of the traced instruction stream: nothing is merged, so each costs the guest
loop one poll, one lookup and one custody check. The only expansion happens at conversion: a modify is a
read followed by a write, and an access that straddles a 4K page is one record per page, because the MMU
translates each page's part on its own (SDM vol. 3A, section 4.1: linear addresses are translated per page).
"""

from __future__ import annotations

import enum
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Records: TypeAlias = npt.NDArray[np.uint64]

TYPE_SHIFT: Final = 62
ADDRESS_BITS: Final = 48
ADDRESS_MASK: Final = (1 << ADDRESS_BITS) - 1
# Canonical user-space addresses with 4-level paging have bit 47 clear.
USER_END: Final = 1 << 47
PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
MAX_RECORDS: Final = 1 << 27


class AccessType(enum.IntEnum):
    """Bits 63..62 of a record; the numbers are part of the file format."""

    READ = 0
    WRITE = 1
    EXECUTE = 2


def pack(types: npt.NDArray[np.uint64], addresses: npt.NDArray[np.uint64]) -> Records:
    """Return records of a column of types and a column of linear addresses."""
    return (types << np.uint64(TYPE_SHIFT)) | addresses


def types_of(records: Records) -> npt.NDArray[np.uint8]:
    """Return the access type of each record."""
    return (records >> np.uint64(TYPE_SHIFT)).astype(np.uint8)


def addresses_of(records: Records) -> npt.NDArray[np.uint64]:
    """Return the linear address of each record."""
    return records & np.uint64(ADDRESS_MASK)


def page_numbers(records: Records) -> npt.NDArray[np.uint64]:
    """Return the 4K page number of each record."""
    return addresses_of(records) >> np.uint64(PAGE_SHIFT)


def distinct_pages(records: Records) -> npt.NDArray[np.uint64]:
    """Return the sorted distinct 4K page numbers that the records touch."""
    return np.unique(page_numbers(records))


def well_formed(records: Records) -> bool:
    """Return whether every record has a known type and an address in user space."""
    if records.size == 0:
        return True
    highest = int(addresses_of(records).max())
    reserved = int(np.bitwise_or.reduce(records) >> np.uint64(ADDRESS_BITS)) & 0x3FFF
    return highest < USER_END and reserved == 0 and int(types_of(records).max()) <= AccessType.EXECUTE
