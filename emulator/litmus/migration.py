"""User space's side of a dirty log: a litmus test with a log ends it as a live migration does.

Arming copies all memory.  The pages that a log names are copied after it was read or, with manual protection,
after they were cleared.  When all threads have ended, each log is read for the last time, and the contents
are compared.

A test that disarms its log or deletes the logged slot gives its migration up.  Guests run at that time, and
the bitmap that is dropped rightly marks the pages that they have written since the log was read.  A page that
differs right before the ioctl is therefore lost unless that bitmap marks it afterwards: KVM has waited for
the faults that had looked the slot up (synchronize_srcu() in kvm_swap_active_memslots()), so their marks are
set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from emulator.actors.image import Difference, Image, report_lost
from emulator.kvm.kvm_host import KVM_DIRTY_LOG_INITIALLY_SET, KVM_MAX_NR_ADDRESS_SPACES
from emulator.kvm.virt.slots import kvm_memslots
from emulator.machine.locks import Mutex
from native import lib
from native.types import Hva

if TYPE_CHECKING:
    from emulator.kvm.structs import Kvm
    from emulator.machine.runtime import Cpu

WORD = 64
_ALL = (1 << WORD) - 1


class RamSlot(NamedTuple):
    """A memslot in user space's terms: guest page 0 is page 0 of its memory."""

    as_id: int
    id: int
    npages: int

    @property
    def words(self) -> int:
        """Return the number of words of its bitmap."""
        return -(-self.npages // WORD)


class Migration:
    """The live migration of one VM.

    Several threads of a test may read and clear logs, and discard memory meanwhile.  A lock protects the
    image and the bitmaps of pages to copy; its holder never waits.

    owed: with manual protection, pages that a log has named and that were not cleared and copied since.
    logs: the test arms this VM's log in some operation.  If it does not, no method takes the lock.
    """

    __slots__ = ("_lock", "_owed", "_suspects", "image", "kvm", "logs", "slots")

    def __init__(self, kvm: Kvm, slots: tuple[RamSlot, ...], logs: bool) -> None:
        self.kvm = kvm
        self.slots = slots
        self.logs = logs
        self.image: Image | None = None
        self._owed: dict[RamSlot, list[int]] = {}
        # Pages that differed when a migration was given up, with the bitmaps that may mark them.
        self._suspects: list[tuple[Difference, list[bytearray]]] = []
        self._lock = Mutex(f"image of VM {kvm.id}")

    def begin(self, cpu: Cpu) -> None:
        """Copy all memory, once all slots are logged.  With INITIALLY_SET all pages are owed once more,
        because none is protected yet."""
        with self._lock.held(cpu):
            if self.image is not None:
                return
            cpu.event(lib.EVENT_LOG_ARM, len(self.slots), 0, self.kvm.id)
            self.image = Image(cpu, self.kvm, Hva(0), max(slot.npages for slot in self.slots))
            if self.kvm.dirty_log_manual & KVM_DIRTY_LOG_INITIALLY_SET:
                self._owed = {slot: [_ALL] * slot.words for slot in self.slots}

    @contextmanager
    def given_up(self, cpu: Cpu) -> Iterator[None]:
        """Bracket the ioctl that ends logging."""
        if not self.logs:
            yield
            return
        spaces = [kvm_memslots(cpu, self.kvm, as_id) for as_id in range(KVM_MAX_NR_ADDRESS_SPACES)]
        slots = [slot for space in spaces for slot in space.slots]
        bitmaps = [slot.dirty_bitmap for slot in slots if slot.dirty_bitmap is not None]
        with self._lock.held(cpu):
            differing = [] if self.image is None else self.image.differing(cpu)
        yield
        cpu.event(lib.EVENT_LOG_END, 0, 0, self.kvm.id)
        with self._lock.held(cpu):
            if self.image is not None:
                self.image.count(cpu, len(differing))
                known = self._owed_pages()
                self._suspects += [(one, bitmaps) for one in differing if one.page not in known]
            self._end(cpu)

    def named(self, cpu: Cpu, slot: RamSlot, words: Sequence[int]) -> None:
        """Copy the pages that a log has named when it was read, or owe them until they are cleared."""
        cpu.event(lib.EVENT_LOG_GET, 0, sum(word.bit_count() for word in words), self.kvm.id)
        manual = self.kvm.dirty_log_manual
        if not any(words) and not manual:
            return
        with self._lock.held(cpu):
            self._suspects = [one for one in self._suspects if not _has(words, one[0].page)]
            if manual:
                owed = self._owed.setdefault(slot, [0] * slot.words)
                owed[:] = [one | other for one, other in zip(owed, words, strict=True)]
            else:
                self._copy(cpu, 0, words)

    def wanted(self, cpu: Cpu, slot: RamSlot, number: int) -> int:
        """Return a mask of the pages to clear, of 64: those owed.  A log that was never read may have marked
        any of them, so all are cleared and copied."""
        with self._lock.held(cpu):
            owed = self._owed.get(slot)
            return _ALL if owed is None else owed[number]

    def cleared(self, cpu: Cpu, slot: RamSlot, number: int, mask: int) -> None:
        """Copy pages after their marks were cleared: an earlier write is in the copy, and a later one is
        logged again."""
        cpu.event(lib.EVENT_LOG_CLEAR, WORD * number, mask, self.kvm.id)
        with self._lock.held(cpu):
            if slot in self._owed:
                self._owed[slot][number] &= ~mask
            self._copy(cpu, number, [mask])

    def discarded(self, cpu: Cpu, start: int, end: int) -> None:
        """Copy pages after user space has discarded their contents, and before a fault can bring them back.

        No log names such pages, because user space changed them itself.
        """
        if not self.logs:
            return
        with self._lock.held(cpu):
            for page in range(start, end):
                if self.image is not None:
                    self.image.copy(cpu, Hva(page), [1])

    def finish(self, cpu: Cpu) -> None:
        """Copy the owed pages and compare, after all threads have ended and each log was read once more."""
        for difference, bitmaps in self._suspects:
            if not any(difference.page < len(bitmap) and bitmap[difference.page] for bitmap in bitmaps):
                report_lost(cpu, self.kvm, difference)
        if self.image is None:
            return
        for words in self._owed.values():
            self._copy(cpu, 0, words)
        self.image.compare(cpu)
        self._end(cpu)

    def _owed_pages(self) -> set[int]:
        return {
            WORD * number + bit
            for words in self._owed.values()
            for number, word in enumerate(words)
            for bit in range(WORD)
            if word >> bit & 1
        }

    def _copy(self, cpu: Cpu, number: int, words: Sequence[int]) -> None:
        if self.image is None:
            return
        for i, mask in enumerate(words, start=number):
            if mask:
                cpu.event(lib.EVENT_COPY, WORD * i, mask, self.kvm.id)
        self.image.copy(cpu, Hva(WORD * number), words)

    def _end(self, cpu: Cpu) -> None:
        if self.image is not None:
            self.image.destroy(cpu)
        self.image = None
        self._owed = {}


def _has(words: Sequence[int], page: int) -> bool:
    return page // WORD < len(words) and bool(words[page // WORD] >> page % WORD & 1)
